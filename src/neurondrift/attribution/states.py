"""A loaded model as the vessel of other states of itself: its weights moved along the way from one state to another.

Owns how a state is told (what is added to the vessel's own weights), how the vessel takes on any point between two
states, and how every bit of it comes back. Knows nothing of where states come from, of prompts and of measures.
Shapes: O = out, I = in, R = rank.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from neurondrift.base.errors import ModelError
from neurondrift.base.names import plain
from neurondrift.importance.observer import is_plain
from neurondrift.models.adapters import LowRank
from neurondrift.models.disk.tensors import TensorFile
from neurondrift.models.sites import Site, Sites, is_quantised, sites_of, unwrap

# What is read when it is asked for: a dense change, `[out, in]` of a site or in the shape of a parameter.
Source = Callable[[], torch.Tensor]
ALIGNED = 64  # bytes: where a tensor may begin in the file of what is kept aside


class State(NamedTuple):
    """A state of a model, told as what is added to the vessel's own weights; what is not named is as it is there.

    `factors`: site -> B A. `dense`: site -> a source of the change `[out, in]`. `elsewhere`: parameter that is no
    site -> a source of its change. The empty state is the vessel's own.
    """

    factors: Mapping[str, LowRank] = {}
    dense: Mapping[str, Source] = {}
    elsewhere: Mapping[str, Source] = {}


class Aside:
    """Tensors kept in a temporary file (in `TMPDIR`) and mapped when they are asked for, in their own dtype."""

    def __init__(self) -> None:
        self._file = tempfile.NamedTemporaryFile(prefix="neurondrift-")  # noqa: SIM115 - lives as long as this does
        self._places: dict[str, TensorFile] = {}
        self._end = 0

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def keep(self, key: str, tensor: torch.Tensor) -> Source:
        """Keep a copy under a key; what is there already stays."""
        if key not in self._places:
            self._end += -self._end % ALIGNED
            raw = tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy()
            self._file.seek(self._end)
            self._file.write(raw.data)
            self._file.flush()
            self._places[key] = TensorFile(self._file.name, tensor.dtype, tuple(tensor.shape), self._end)
            self._end += raw.nbytes
        return lambda: self.get(key)

    def get(self, key: str) -> torch.Tensor:
        """What was kept, mapped: do not write."""
        return self._places[key].mapped()

    def close(self) -> None:
        self._file.close()
        self._places.clear()


Delta = LowRank | torch.Tensor


@dataclass(eq=False)
class Vessel:
    """A loaded model whose weights can be put to other states, and come back bit for bit when it is closed.

    A context manager. Within it adapters are switched off: the model computes with its own weights until `go`.
    Changes in factors are added to the outputs of plain linear layers, so that a weight in 16 bits rounds nothing
    away; all others are written into the weights, which are kept aside in a temporary file for that time.

    Attributes
    ----------
    sites
        The model's.
    elsewhere
        Every parameter that is no site (norms, embeddings, biases, the LM head), by its plain name; not an adapter's.
    """

    model: nn.Module | Sites
    sites: Sites = field(init=False)
    elsewhere: dict[str, nn.Parameter] = field(init=False)
    names: dict[str, list[str]] = field(init=False)  # all names of such a parameter: tied weights have several

    def __post_init__(self) -> None:
        self.sites = sites_of(self.model)
        own = {id(site.tensor) for site in self.sites.values()}
        self.elsewhere, self.names = {}, {}
        known: dict[int, str] = {}
        for name, parameter in own_parameters(unwrap(self.sites.model)):
            if id(parameter) in own:
                continue
            first = known.setdefault(id(parameter), plain(name))
            self.elsewhere[first] = parameter
            self.names.setdefault(first, []).append(plain(name))
        self._aside = Aside()
        self._added: dict[str, LowRank] = {}
        self._undo: contextlib.ExitStack | None = None
        self._last: tuple[Any, torch.Tensor] | None = None

    @property
    def device(self) -> torch.device:
        """Where inputs go."""
        weight: torch.Tensor = unwrap(self.sites.model).get_input_embeddings().weight
        return weight.device

    def __enter__(self) -> Vessel:
        self._undo = contextlib.ExitStack()
        self._undo.callback(self._restore)
        self._undo.enter_context(_adapters_off(self.sites.model))
        for site in self.sites.values():
            if self._takes_factors(site):
                self._undo.callback(site.owner.register_forward_hook(self._adding(site)).remove)
        return self

    def __exit__(self, *exception: object) -> None:
        assert self._undo is not None
        self._undo.close()
        self._undo = None

    def own(self, site: str) -> torch.Tensor:
        """The vessel's own weight `[out, in]`, also while another one stands in its place: do not write."""
        return self._aside.get(site) if site in self._aside else self.sites[site].weight

    def own_elsewhere(self, name: str) -> torch.Tensor:
        """The vessel's own parameter that is no site."""
        key = f"elsewhere {name}"
        return self._aside.get(key) if key in self._aside else self.elsewhere[name].detach()

    def kind_elsewhere(self, name: str) -> str:
        """What a parameter that is no site is: `embeddings`, `head` (where it is not the embeddings too), `bias`,
        `norm` (other vectors), or `other`."""
        model, parameter = unwrap(self.sites.model), self.elsewhere[name]
        head = model.get_output_embeddings()
        if parameter is getattr(model.get_input_embeddings(), "weight", None):
            return "embeddings"
        if head is not None and parameter is getattr(head, "weight", None):
            return "head"
        if name.rpartition(".")[2].endswith("bias"):
            return "bias"
        return "norm" if parameter.dim() == 1 else "other"

    def delta(self, first: State, second: State, site: str) -> Delta | None:
        """The change of a site from one state to another, float32 (float64 of a float64 model) on its device; in
        factors where both states have it so; None where neither names the site."""
        known = self.sites[site]
        device, dtype = known.tensor.device, exact(known.tensor.dtype)
        if site not in first.dense and site not in second.dense:
            factors = _joined(first.factors.get(site), second.factors.get(site), -1.0, 1.0)
            return None if factors is None else LowRank(factors.a.to(device, dtype), factors.b.to(device, dtype))
        key = first, second, site
        if self._last is None or any(one is not other for one, other in zip(self._last[0], key, strict=True)):
            start, end = (_dense(state, site, device, dtype) for state in (first, second))
            both = end if start is None else -start if end is None else end - start
            assert both is not None
            self._last = key, both
        return self._last[1]

    def delta_elsewhere(self, first: State, second: State) -> Iterator[tuple[str, torch.Tensor]]:
        """Name and change of every parameter that is no site and moves from one state to another."""
        for name in sorted({*first.elsewhere, *second.elsewhere}):
            parameter = self.elsewhere[name]
            dtype = exact(parameter.dtype)
            parts = [
                state.elsewhere[name]().to(parameter.device, dtype) * sign
                for state, sign in ((first, -1.0), (second, 1.0))
                if name in state.elsewhere
            ]
            change = parts[0] if len(parts) == 1 else parts[0] + parts[1]
            if bool((change != 0).any()):
                yield name, change

    @torch.no_grad()
    def go(self, first: State, second: State, share: float) -> None:
        """Put the model at (1 - share) · first + share · second."""
        assert self._undo is not None, "a vessel moves within its context only"
        self._added.clear()
        for name, site in self.sites.items():
            dense = name in first.dense or name in second.dense
            factors = _joined(first.factors.get(name), second.factors.get(name), 1 - share, share)
            in_factors = factors is not None and not dense and self._takes_factors(site)
            if in_factors and factors is not None:
                device, dtype = site.tensor.device, exact(site.tensor.dtype)
                self._added[name] = LowRank(factors.a.to(device, dtype), factors.b.to(device, dtype))
            if not in_factors and (dense or factors is not None):
                self._put(site, first, second, share)
            elif name in self._aside:
                site.weight.copy_(self._aside.get(name))
        for name, parameter in self.elsewhere.items():
            key = f"elsewhere {name}"
            if name in first.elsewhere or name in second.elsewhere:
                self._aside.keep(key, parameter)
                value = self._aside.get(key).to(parameter.device, exact(parameter.dtype))
                for state, part in ((first, 1 - share), (second, share)):
                    if name in state.elsewhere and part:
                        value = value + part * state.elsewhere[name]().to(value)
                parameter.detach().copy_(value)
            elif key in self._aside:
                parameter.detach().copy_(self._aside.get(key))

    def _put(self, site: Site, first: State, second: State, share: float) -> None:
        if is_quantised(site.tensor):
            raise ModelError(
                f"The weight of {site.name} is quantised and cannot be moved along a path",
                fix="load the model in a plain dtype",
            )
        self._aside.keep(site.name, site.weight)
        device, dtype = site.tensor.device, exact(site.tensor.dtype)
        value = self._aside.get(site.name).to(device, dtype)
        for state, part in ((first, 1 - share), (second, share)):
            change = _dense(state, site.name, device, dtype) if part else None
            if change is not None:
                value = value + part * change
        site.weight.copy_(value)

    @torch.no_grad()
    def _restore(self) -> None:
        self._added.clear()
        self._last = None
        for key in self._aside:
            name = key.removeprefix("elsewhere ")
            target = self.elsewhere[name].detach() if name != key else self.sites[name].weight
            target.copy_(self._aside.get(key))
        self._aside.close()
        self._aside = Aside()

    def _takes_factors(self, site: Site) -> bool:
        return site.expert is None and not site.also and is_plain(site)

    def _adding(self, site: Site) -> Callable[..., torch.Tensor]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
            factors = self._added.get(site.name)
            if factors is None:
                return output
            inputs = args[0].to(factors.a.dtype)
            return output + F.linear(F.linear(inputs, factors.a), factors.b).to(output.dtype)

        return hook


def exact(dtype: torch.dtype) -> torch.dtype:
    """What sums about weights of a dtype are formed in: float32, or float64 for a model of float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _joined(first: LowRank | None, second: LowRank | None, start: float, end: float) -> LowRank | None:
    """start · first + end · second, in factors; what counts nothing is left out."""
    parts = [(one, share) for one, share in ((first, start), (second, end)) if one is not None and share != 0]
    if not parts:
        return None
    a = torch.cat([one.a.double() for one, _ in parts])
    return LowRank(a, torch.cat([one.b.double() * share for one, share in parts], dim=1))


def _dense(state: State, site: str, device: torch.device, dtype: torch.dtype) -> torch.Tensor | None:
    """What a state adds to a site, formed; None where it adds nothing."""
    change: torch.Tensor | None = None
    if site in state.factors:
        factors = state.factors[site]
        change = factors.b.to(device, dtype) @ factors.a.to(device, dtype)
    if site in state.dense:
        read = state.dense[site]().to(device, dtype)
        change = read if change is None else change + read
    return change


def own_parameters(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of a model without those of adapters around its modules, by the names it has without them."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    if isinstance(module, AuxiliaryTrainingWrapper):
        yield from own_parameters(module.original_module, prefix)
        return
    if isinstance(module, BaseTunerLayer):
        yield from own_parameters(module.get_base_layer(), prefix)
        return
    for key, parameter in module.named_parameters(recurse=False):
        yield f"{prefix}{key}", parameter
    for key, child in module.named_children():
        yield from own_parameters(child, f"{prefix}{key}.")


@contextlib.contextmanager
def _adapters_off(model: nn.Module) -> Iterator[None]:
    """Every adapter is switched off within the block; as before afterwards, what requires gradients too."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    layers: list[Any] = [m for m in model.modules() if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper)]
    on = [layer for layer in layers if not layer.disable_adapters]
    required = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        for layer in on:
            layer.enable_adapters(False)
        yield
    finally:
        for layer in on:
            layer.enable_adapters(True)
        for parameter, flag in required.items():
            parameter.requires_grad_(flag)
