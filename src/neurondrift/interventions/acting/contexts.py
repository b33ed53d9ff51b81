"""Interventions on a group as reversible contexts on a loaded model: prune, rewind, transplant.

Owns what is written into the model and how every bit of it comes back. An adapter is never merged: its factors are
masked where the change is made of whole rows or columns, and otherwise its change of the weights is formed in float32
and added to the site's output. Knows nothing of prompts, null distributions and files of a study.
Shapes: T = tokens, O = out, I = in, R = rank.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from neurondrift.base.errors import GroupError, ModelError
from neurondrift.base.files import atomic_path
from neurondrift.groups.group import Group
from neurondrift.models.adapters import change_of, dense_delta, is_trained
from neurondrift.models.disk.initial import Weights
from neurondrift.models.loading import quiet_transformers
from neurondrift.models.parts import Kind, Region, members_within, parts
from neurondrift.models.sites import Site, Sites, is_quantised, sites_of, unwrap

PruneMode = Literal["zero", "mean"]


class Applied(NamedTuple):
    """What an intervention reached: members of the group, those it acted on, those outside the trained sites."""

    members: int
    acted_on: int
    outside: int


@contextmanager
def prune(model: nn.Module | Sites, group: Group, *, mode: PruneMode = "zero") -> Iterator[Applied]:
    """Within the context the group's weights are zero, or the mean of their site.

    Parameters
    ----------
    model
        Any model, or its `linear_sites`, which spares looking for them again with every group; with an (unmerged) LoRA
        adapter, w₀ and Δ are both pruned. Pruning the model before fine-tuning is
        `with peft_model.disable_adapter(), prune(peft_model, group):`.
    group
        Of neurons (the row), weights (the entry) or hidden units (rows of gate and up, column of down).
    mode
        `zero`; or `mean`: a row becomes the mean row of its site, a column the mean column, an entry the mean entry.
        Means are taken in float64 and rounded to the dtype of the weight.

    Yields
    ------
    Applied

    Raises
    ------
    GroupError
        A group of another model.
    ModelError
        A quantised weight, which cannot be written; an adapter whose change cannot be masked (DoRA, merged).

    Notes
    -----
    A bias is no weight of a neuron and stays. Leaving the context restores every bit, also after an exception.
    """
    if mode not in ("zero", "mean"):
        raise GroupError("There is no such way to prune", received=mode, allowed="zero, mean")
    sites = sites_of(model)
    regions = _regions(group, sites)
    check_base(group, sites)
    for name in regions:
        if is_quantised(sites[name].tensor):
            raise ModelError("A quantised weight cannot be pruned", received=name, fix="load the model unquantised")
    with ExitStack() as undo, torch.no_grad():
        _keep_fingerprint(sites, undo)
        for name, region in regions.items():
            site = sites[name]
            _write(site, region, 0.0 if mode == "zero" else _mean_of(site.weight, region.kind), undo)
            if _has_delta(site):
                _mask(site, region, undo, mean=mode == "mean")
        yield Applied(len(group), len(group), 0)


@contextmanager
def rewind(model: nn.Module | Sites, group: Group, *, initial: Weights | None = None) -> Iterator[Applied]:
    """Within the context the group has its values from before fine-tuning; all else stays fine-tuned.

    Parameters
    ----------
    model
        A model with a LoRA adapter (Δ of the group is left out), or a fully fine-tuned one with `initial`; or its
        `linear_sites`.
    group
        Of neurons, weights or hidden units.
    initial
        For full fine-tuning: site name -> w₀ `[out, in]`, for example `CheckpointWeights`.

    Yields
    ------
    Applied
        `outside` counts members in sites that the adapter does not train: nothing is there to undo.

    Raises
    ------
    GroupError
        A group of another model, or none of whose members lies in a trained site: rewinding it can do nothing.
    ModelError
        No adapter and no `initial`; an adapter whose change cannot be masked (DoRA, merged).

    Notes
    -----
    What is no site (embeddings, norms, biases, the LM head) stays the model's own. Leaving restores every bit.
    """
    with _change(model, group, "rewind", initial) as applied:
        yield applied


@contextmanager
def transplant(model: nn.Module | Sites, group: Group, *, tuned: Weights | None = None) -> Iterator[Applied]:
    """Within the context only the group has been fine-tuned: w₀ everywhere, and Δ of the group.

    Parameters and errors are those of `rewind`, but for a fully fine-tuned model: then `model` is the one from
    *before* fine-tuning, and `tuned` gives the weights from after it.
    """
    with _change(model, group, "transplant", tuned) as applied:
        yield applied


@contextmanager
def _change(model: nn.Module | Sites, group: Group, what: str, weights: Weights | None) -> Iterator[Applied]:
    sites = sites_of(model)
    regions = _regions(group, sites)
    trained = set(sites) if weights is not None else {name for name, site in sites.items() if _has_delta(site)}
    if not trained:
        raise ModelError(
            f"There is no change to {what}: the model has no active adapter",
            received=type(sites.model).__name__,
            fix="load the adapter unmerged, or pass the other model's weights",
        )
    applied = reach(group, sites, trained, what)
    if weights is None:
        check_base(group, sites)
    with ExitStack() as undo, torch.no_grad():
        if weights is not None:
            _keep_fingerprint(sites, undo)
        for name in sites:
            site, region = sites[name], regions.get(name)
            if name not in trained:
                continue
            if weights is not None:
                if region is not None:
                    _write(site, region, region.of(weights(name).to(site.weight.device)).to(site.weight.dtype), undo)
            elif what == "rewind":
                if region is not None:
                    _mask(site, region, undo)
            else:
                nothing = Region("rows", torch.empty(0, dtype=torch.int64))
                _mask(site, (region or nothing).complement(site.shape), undo)
        yield applied


def _regions(group: Group, sites: Sites) -> dict[str, Region]:
    return {name: part.region() for name, part in parts(group, sites).items()}


def reach(group: Group, sites: Sites, trained: set[str], what: str) -> Applied:
    """How many members lie in trained sites. Raises `GroupError` where none does.

    A hidden unit counts as reached where one of its sites is trained.
    """
    inside = members_within(group, sites, trained)
    if not inside:
        raise GroupError(
            f"No member of the group lies in a trained site: {what} can do nothing",
            received=f"members in {', '.join(list(group.members)[:3])}",
            allowed=f"sites such as {', '.join(sorted(trained)[:3])}",
            fix="adapt these sites when fine-tuning, or make the group from trained sites",
        )
    return Applied(len(group), inside, len(group) - inside)


def _has_delta(site: Site) -> bool:
    """Whether an adapter adds to the site's weight now. Raises `ModelError` for one that is merged or no LoRA."""
    from peft.tuners.lora import LoraLayer

    layer: Any = site.wrapper
    if not is_trained(site) or layer.disable_adapters:
        return False
    if not isinstance(layer, LoraLayer):
        raise ModelError(
            f"The change that this kind of adapter makes to {site.name} cannot be masked",
            received=type(layer).__name__,
            allowed="LoRA",
        )
    if layer.merged:
        raise ModelError(
            f"The adapter is merged into {site.name}: its change cannot be told from the weights any more",
            fix="call model.unmerge_adapter() or load the adapter unmerged",
        )
    return True


# The models under adapters whose w₀ the contexts that are open around this place have written to.
_WRITTEN: ContextVar[tuple[Sites, ...]] = ContextVar("written", default=())


def _keep_fingerprint(sites: Sites, undo: ExitStack) -> None:
    """Read the fingerprint of w₀ before it is written to, for the contexts within this one."""
    if unwrap(sites.model) is not sites.model and _written(sites) is None:
        _ = sites.fingerprint
        undo.callback(_WRITTEN.set, _WRITTEN.get())
        _WRITTEN.set((*_WRITTEN.get(), sites))


def _written(sites: Sites) -> Sites | None:
    """The handle by which a context around this place writes to the same base model."""
    base = unwrap(sites.model)
    return next((each for each in _WRITTEN.get() if unwrap(each.model) is base), None)


def check_base(group: Group, sites: Sites) -> None:
    """Under an adapter the base never changes, so the group must be one of this base."""
    own = group.provenance.get("model")
    if own is None or unwrap(sites.model) is sites.model:
        return
    base = (_written(sites) or sites).fingerprint
    if own != base:
        raise GroupError(
            "The group was made from another model",
            received=f"group of {own}, model {base}",
            fix="make the group from this model, or load the model that the adapter and the group belong to",
        )


def _write(site: Site, region: Region, values: torch.Tensor | float, undo: ExitStack) -> None:
    weight = site.weight
    if is_quantised(site.tensor):
        raise ModelError("A quantised weight cannot be written", received=site.name, fix="load the model unquantised")
    region = _on(region, weight.device)
    before = region.of(weight).clone()
    undo.callback(_restore, region, weight, before)
    region.put(weight, values)


def _restore(region: Region, tensor: torch.Tensor, before: torch.Tensor) -> None:
    with torch.no_grad():
        region.put(tensor, before)


def _on(region: Region, device: torch.device) -> Region:
    return Region(region.kind, region.index.to(device))


def _mean_of(weight_OI: torch.Tensor, kind: Kind) -> torch.Tensor:
    """The mean row `[in]`, column `[out, 1]` or entry `[]`."""
    wide = weight_OI.double()
    mean = wide.mean(0) if kind == "rows" else wide.mean(1, keepdim=True) if kind == "columns" else wide.mean()
    return mean.to(weight_OI.dtype)


def _mask(site: Site, region: Region, undo: ExitStack, *, mean: bool = False) -> None:
    """Take a region out of a site's Δ (or set it to Δ's mean row, column or entry)."""
    if not len(region.index) or (region.kind == "entries" and not region.index.any()):
        return
    layer: Any = site.wrapper
    names = _maskable_adapters(site)
    if region.kind == "entries":
        _replace_delta(site, region, names, undo, mean=mean)
        return
    for name in names:
        module = layer.lora_B[name] if region.kind == "rows" else layer.lora_A[name]
        factor = module.weight.detach()
        _put(_on(region, factor.device), factor, _mean_of(factor, region.kind) if mean else 0.0, undo)
        bias = layer.lora_B[name].bias
        if bias is not None and region.kind == "rows":
            own = _on(Region("rows", region.index), bias.device)
            _put(own, bias.detach(), bias.detach().double().mean().to(bias.dtype) if mean else 0.0, undo)


def _put(region: Region, tensor: torch.Tensor, values: torch.Tensor | float, undo: ExitStack) -> None:
    undo.callback(_restore, region, tensor, region.of(tensor).clone())
    region.put(tensor, values)


def _maskable_adapters(site: Site) -> list[str]:
    """Names of the active adapters of a site, all of them plain LoRA."""
    layer: Any = site.wrapper
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if site.expert is not None:
        raise ModelError("The adapter of an expert cannot be masked yet", received=site.name)
    for name in names:
        if name in layer.lora_variant:
            raise ModelError(
                f"The change that this kind of adapter makes to {site.name} cannot be masked",
                received=type(layer.lora_variant[name]).__name__,
                allowed="plain LoRA or rsLoRA",
            )
    return names


class _DenseChange:
    """The forward hook that adds x Dᵀ to the output of a layer whose adapter is silenced.

    `stack` holds Δ float32 `[out, in]` as each of the contexts open around the layer has left it; D is the last.
    """

    def __init__(self) -> None:
        self.stack: list[torch.Tensor] = []

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        if module.disable_adapters:
            return output
        change = F.linear(args[0].float(), self.stack[-1])
        return (output.float() + change).to(output.dtype)


def _dense_change(site: Site) -> _DenseChange | None:
    """What a context that is open has put onto the site's layer: looked up there, as any module's hooks are."""
    return next((hook for hook in site.wrapper._forward_hooks.values() if isinstance(hook, _DenseChange)), None)


def _replace_delta(site: Site, region: Region, names: list[str], undo: ExitStack, *, mean: bool) -> None:
    """Silence the adapter and add x Dᵀ to the site's output, D being Δ in float32 with the region masked."""
    layer: Any = site.wrapper
    if any(layer.lora_B[name].bias is not None for name in names):
        raise ModelError("An adapter with biases cannot be masked weight by weight", received=site.name)
    hook = _dense_change(site)
    dense = adapter_delta(site) if hook is None else hook.stack[-1].clone()
    mask = region.index.to(dense.device)
    dense[mask] = dense.double().mean().float() if mean else 0.0
    for name in names:
        factor = layer.lora_B[name].weight.detach()
        everything = Region("rows", torch.arange(factor.shape[0], device=factor.device))
        _put(everything, factor, 0.0, undo)
    if hook is None:
        hook = _DenseChange()
        undo.callback(layer.register_forward_hook(hook).remove)
    hook.stack.append(dense)
    undo.callback(hook.stack.pop)


def adapter_delta(site: Site) -> torch.Tensor:
    """Δ of a site as its adapter and the contexts around it make it now, float32 `[out, in]`; zeros without one."""
    change = change_of(site) if _has_delta(site) else None
    if change is None:
        return torch.zeros(site.shape, device=site.weight.device)
    hook = _dense_change(site)
    return dense_delta(change, site.weight) if hook is None else hook.stack[-1]


@torch.no_grad()
def save_model(model: nn.Module | Sites, folder: str | Path, *, tokenizer: Any = None) -> Path:
    """Write the model as it is now, within an intervention's context, as a plain model in float32.

    w₀ + Δ is formed in float32, so that nothing is rounded to a lower precision; `load_model(folder)` reads it. Within
    an intervention on rows or columns `model.save_pretrained` of PEFT works too, and writes the masked adapter alone.
    """
    sites = sites_of(model)
    base: Any = unwrap(sites.model)
    changed = {name: site for name, site in sites.items() if is_trained(site)}
    state = {}
    for name, tensor in base.state_dict().items():
        if ".lora_" in name:
            continue
        name = name.replace(".base_layer.", ".")
        state[name] = tensor.detach().float() if tensor.is_floating_point() else tensor.detach()
    for name, site in changed.items():
        if site.expert is not None:
            raise ModelError("A model with adapted experts cannot be saved whole yet", received=name)
        weight = site.weight.float() + adapter_delta(site)
        state[f"{name}.{site.parameter}"] = weight.T if site.transposed else weight
    config = copy.deepcopy(base.config)
    config.dtype = torch.float32
    with quiet_transformers():
        plain = type(base)(config).float()
        plain.load_state_dict({name: tensor.cpu().contiguous() for name, tensor in state.items()})
        plain.generation_config = copy.deepcopy(base.generation_config)
        with atomic_path(Path(folder)) as partial:
            plain.save_pretrained(str(partial))
            if tokenizer is not None:
                tokenizer.save_pretrained(str(partial))
    return Path(folder)
