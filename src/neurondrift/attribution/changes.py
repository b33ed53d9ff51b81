"""Where the states of a change come from: an adapter on the model, folders of adapters, checkpoints read from files.

Owns the way from references to `Change`s: which model is the vessel, which states it is put to, and what of a change
lies outside of the sites. Nothing but the vessel is in memory: whole weights are read site by site from safetensors.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from neurondrift.attribution.states import Aside, Source, State, Vessel, exact, own_parameters
from neurondrift.base.errors import ArtifactError, ConfigError, ModelError
from neurondrift.base.names import plain
from neurondrift.models.adapters import LowRank, change_of, check_methods, dense_delta, is_trained
from neurondrift.models.architecture.saying import kinds_of, say_once
from neurondrift.models.disk.adapter_files import CONFIG, read_config
from neurondrift.models.disk.checkpoints import Checkpoint
from neurondrift.models.disk.initial import CheckpointWeights, Weights
from neurondrift.models.loading import attach_adapter, folder_of, load_model
from neurondrift.models.sites import Sites, unwrap

STEP = re.compile(r"(?:checkpoint-|step=)(\d+)")


@dataclass(eq=False)
class Change:
    """A change of a model: its states in order, the first of them W₀ and the last W, and the loaded model that takes
    them on (`Vessel`).

    Attributes
    ----------
    vessel
        Its context is entered by the measures.
    states
        Two or more.
    steps
        The training step of each state, -1 where none is known.
    references
        What each state was read from.
    unknown
        Parameters that are no sites and of which it is not known whether they moved; they stay as they are.
    """

    vessel: Vessel
    states: Sequence[State]
    steps: Sequence[int] = ()
    references: Sequence[str] = ()
    unknown: Sequence[str] = ()
    kept: list[Any] = field(default_factory=list)  # what the sources read from, alive as long as this

    @property
    def sites(self) -> Sites:
        return self.vessel.sites

    def moved(self) -> list[str]:
        """Names of the sites that a state names, in the model's order."""
        named = {name for state in self.states for name in (*state.factors, *state.dense)}
        return [name for name in self.sites if name in named]


def change_from(model: nn.Module | Sites | Change, initial: Weights | str | Path | None = None) -> Change:
    """The change that a model has been through.

    Parameters
    ----------
    model
        A PEFT model with unmerged adapters, its base weights W₀; or any model with `initial`; its `linear_sites`; or a
        `Change`, which is given back.
    initial
        W₀: the folder of a full model, whose norms, embeddings and biases are read too, or a callable site -> `[out,
        in]` (then those are taken as unmoved, and that is said).

    Raises
    ------
    ModelError
        No adapter and no `initial`; a merged adapter, or one whose change no weight shows.
    ArtifactError
        Files of `initial` that are missing or of another model.
    """
    if isinstance(model, Change):
        if initial is not None:
            raise ConfigError("A Change has its initial weights already", received="initial")
        return model
    vessel = Vessel(model)
    aside = Aside()
    kept: list[Any] = [aside]
    check_methods(vessel.sites.model, initial_given=initial is not None)
    last = _of_adapters(vessel, aside)
    if initial is None:
        if not (last.factors or last.dense or last.elsewhere):
            raise ModelError(
                "A model without an adapter does not tell what has changed",
                received=type(unwrap(vessel.sites.model)).__name__,
                fix="pass initial=, the folder of the model from before",
            )
        return Change(vessel, (State(), last), kept=kept)
    with contextlib.ExitStack() as stack:
        if isinstance(initial, str | Path):
            folder = stack.enter_context(folder_of(initial))
            first, unknown = _stored(vessel, folder, str(initial))
            kept.append(stack.pop_all())  # a temporary folder is there as long as the change is
        else:
            first, unknown = State(dense=_differences(vessel, initial)), list(vessel.elsewhere)
            say_once("only sites have initial weights: norms, embeddings and biases are taken as unmoved")
    return Change(vessel, (first, last), unknown=unknown, kept=kept)


def _differences(vessel: Vessel, weights: Weights) -> dict[str, Source]:
    """What is to be added to the vessel's own weights to get others."""

    def difference(name: str) -> torch.Tensor:
        own = vessel.own(name)
        dtype = exact(own.dtype)
        return weights(name).to(own.device, dtype) - own.to(dtype)

    return {name: partial(difference, name) for name in vessel.sites}


def _stored(vessel: Vessel, folder: Path, reference: str) -> tuple[State, list[str]]:
    """A full model in a folder as a state, and the parameters that could not be found in it."""
    checkpoint = Checkpoint(folder, reference)
    weights = CheckpointWeights(folder, vessel.sites, checkpoint=checkpoint)
    for name in vessel.sites:
        weights.stored(name)
    found: dict[str, Source] = {}
    unknown = []
    for name, parameter in vessel.elsewhere.items():
        aliases = vessel.names[name]
        read = next((r for alias in aliases if (r := checkpoint.parameter(alias)) is not None), None)
        if read is None:
            unknown.append(name)
            continue
        if tuple(read.shape) != tuple(parameter.shape):
            raise ArtifactError(
                f"The checkpoint {reference} holds {name} in another shape",
                received=tuple(read.shape),
                allowed=str(tuple(parameter.shape)),
            )
        found[name] = partial(_difference_elsewhere, vessel, name, read.read)
    if unknown:
        say_once(f"not found in {reference}, and taken as unmoved: {kinds_of(unknown)}")
    return State(dense=_differences(vessel, weights), elsewhere=found), unknown


def _difference_elsewhere(vessel: Vessel, name: str, read: Source) -> torch.Tensor:
    own = vessel.own_elsewhere(name)
    dtype = exact(own.dtype)
    return read().to(own.device, dtype) - own.to(dtype)


@torch.no_grad()
def _of_adapters(vessel: Vessel, aside: Aside, prefix: str = "") -> State:
    """What the active adapters of the vessel's model add; a dense change is kept aside under `prefix` and its name."""
    factors: dict[str, LowRank] = {}
    dense: dict[str, Source] = {}
    for name, site in vessel.sites.items():
        if not is_trained(site):
            continue
        change = change_of(site)
        if isinstance(change, LowRank):
            factors[name] = LowRank(change.a.detach().clone(), change.b.detach().clone())
        elif change is not None:
            dense[name] = aside.keep(f"{prefix}{name}", dense_delta(change, site.weight))
    return State(factors, dense, _outside(vessel, aside, prefix))


def _outside(vessel: Vessel, aside: Aside, prefix: str) -> dict[str, Source]:
    """What active adapters change outside of the sites: copies of modules that are trained whole, LoRA on others."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper

    wrappers = {id(module) for site in vessel.sites.values() for module in site.wrapper.modules()}
    known = {id(parameter): name for name, parameter in vessel.elsewhere.items()}
    found: dict[str, Source] = {}

    def add(parameter: nn.Parameter, change: torch.Tensor) -> None:
        name = known.get(id(parameter))
        if name is not None:
            found[name] = aside.keep(f"{prefix}elsewhere {name}", change)

    for path, module in unwrap(vessel.sites.model).named_modules():
        layer: Any = module
        if isinstance(layer, ModulesToSaveWrapper):
            active = [name for name in layer.active_adapters if name in layer.modules_to_save]
            if active:
                copies = dict(layer.modules_to_save[active[0]].named_parameters())
                for key, parameter in own_parameters(layer.original_module):
                    if id(parameter) in known:
                        dtype = exact(parameter.dtype)
                        add(parameter, copies[key].detach().to(dtype) - parameter.detach().to(dtype))
        elif isinstance(layer, AuxiliaryTrainingWrapper):
            raise ModelError(
                f"What the adapter changes at {plain(path)} cannot be attributed",
                received=type(layer).__name__,
                fix="train without it, or merge the adapter and compare two full models",
            )
        elif isinstance(layer, BaseTunerLayer) and id(layer) not in wrappers:
            weight = getattr(layer.get_base_layer(), "weight", None)
            keys = {name for key in layer.adapter_layer_names for name in getattr(layer, key)}
            for name in [name for name in layer.active_adapters if name in keys]:
                if weight is None or not hasattr(layer, "get_delta_weight"):
                    raise ModelError(
                        f"What the adapter changes at {plain(path)} cannot be attributed", received=type(layer).__name__
                    )
                add(weight, layer.get_delta_weight(name).detach())
    return found


def _of_folder(vessel: Vessel, folder: Path, aside: Aside) -> State:
    """The state that an adapter's folder makes of a vessel without adapters; it is put on, read and taken off again."""
    from peft.utils.other import ModulesToSaveWrapper

    model = vessel.sites.model
    adapted: Any = attach_adapter(model, folder)
    try:
        check_methods(adapted, initial_given=False)
        return _of_adapters(Vessel(adapted), aside, f"{folder} ")
    finally:
        inner = unwrap(adapted)
        originals = [(n, m.original_module) for n, m in inner.named_modules() if isinstance(m, ModulesToSaveWrapper)]
        adapted.unload()
        for name, module in originals:  # PEFT leaves the trained copies in their places
            parent, _, leaf = name.rpartition(".")
            setattr(inner.get_submodule(parent) if parent else inner, leaf, module)


def change_along(
    model: nn.Module | Sites, snapshots: Sequence[str | Path], *, start: str | Path | None = None
) -> Change:
    """The change of a loaded model along saved states of its training.

    Parameters
    ----------
    model
        W₀, without adapters: the vessel.
    snapshots
        Full models or adapters of the model, in order; a folder with `checkpoint-N` (or `step=N`) folders stands for
        each of them, by N.
    start
        An adapter that was on the model at the start; None: the model itself is the start.

    Raises
    ------
    ConfigError
        No snapshots.
    ModelError
        A model that has an adapter on it; snapshots that cannot be read or do not fit it.
    ArtifactError
        Missing or truncated files.
    """
    if not snapshots:
        raise ConfigError("There is nothing to compare with the base", allowed="one or more models or adapters")
    vessel, aside, stack = Vessel(model), Aside(), contextlib.ExitStack()
    if hasattr(vessel.sites.model, "peft_config") or any(map(is_trained, vessel.sites.values())):
        raise ModelError(
            "The model that snapshots are compared with has an adapter on it",
            received=type(vessel.sites.model).__name__,
            fix="load the base model by itself",
        )
    states = [State() if start is None else _of_folder(vessel, Path(start), aside)]
    steps, references, unknown = [-1], ["" if start is None else str(start)], set[str]()
    for step, folder, named in (found for one in snapshots for found in _snapshots(one, stack)):
        if (folder / CONFIG).exists():
            states.append(_of_folder(vessel, folder, aside))
        else:
            state, lost = _stored(vessel, folder, named)
            states.append(state)
            unknown |= set(lost)
        steps.append(step)
        references.append(named)
    return Change(vessel, states, steps, references, sorted(unknown), kept=[aside, stack])


class Opened(NamedTuple):
    """A change that was read from references, and the tokenizer of its base."""

    change: Change
    tokenizer: Any


def open_change(base: str | Path, tuned: Sequence[str | Path], *, dtype: str = "auto", device: str = "auto") -> Opened:
    """The change from a base to other models, all of them references.

    `base` is a full model, which is loaded; or an adapter, whose own base is loaded and which is the start; `tuned` are
    the `snapshots` of `change_along`, whose errors apply, and `dtype` and `device` as in `load_model`.
    """
    if not tuned:
        raise ConfigError("There is nothing to compare with BASE", allowed="one or more models or adapters")
    first = _adapter_folder(base)
    reference = str(base) if first is None else str(read_config(first / CONFIG).get("base_model_name_or_path") or "")
    if not reference:
        raise ModelError("The adapter does not say which model it was trained on", received=str(base))
    with contextlib.ExitStack() as early:
        for one in tuned:  # mistakes are told before a model is loaded
            _snapshots(one, early)
        model, tokenizer = load_model(reference, dtype=dtype, device=device)
        change = change_along(model, tuned, start=first)
    change.references = [str(base), *change.references[1:]]
    return Opened(change, tokenizer)


def _adapter_folder(reference: str | Path) -> Path | None:
    path = Path(str(reference))
    if path.is_dir() and (path / CONFIG).exists() and not (path / "config.json").exists():
        return path
    return None


def _snapshots(reference: str | Path, stack: contextlib.ExitStack) -> list[tuple[int, Path, str]]:
    """Step, folder and name of what a reference stands for."""
    folder = stack.enter_context(folder_of(reference))
    held = [(int(match[1]), entry) for entry in folder.iterdir() if (match := STEP.fullmatch(entry.name))]
    inner = sorted(
        (step, entry) for step, entry in held if any((entry / name).exists() for name in ("config.json", CONFIG))
    )
    if inner:
        return [(step, entry, str(Path(str(reference)) / entry.name)) for step, entry in inner]
    if not any((folder / name).exists() for name in ("config.json", CONFIG)):
        raise ModelError(
            "This folder holds no model: it has no config.json",
            received=str(reference),
            allowed="a folder that save_pretrained wrote, an adapter's folder, or one with checkpoint-* folders",
        )
    own = STEP.fullmatch(folder.name)
    return [(int(own[1]) if own else -1, folder, str(reference))]
