"""The sites of a model: its linear weights, whatever the architecture.

Owns all knowledge of architectures: where the linear weights of a decoder lie, which way round they are stored, which
of them share one parameter, and which form the hidden units of an MLP. Everything above sees only `Site`s: named
matrices `[out, in]`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from neurondrift.base.errors import ModelError
from neurondrift.groups.group import Granularity
from neurondrift.models.architecture.blocks import decoder_blocks, peft_kinds, within_wrappers
from neurondrift.models.architecture.experts import is_experts, is_interleaved, is_router, is_transposed
from neurondrift.models.architecture.saying import kinds_of, say_once

# Elements of a weight that are converted to float32 or float64 at a time.
BLOCK = 1 << 21


@dataclass(frozen=True, kw_only=True, eq=False)
class Site:
    """One linear weight of a decoder block, seen as a matrix `[out, in]`.

    Attributes
    ----------
    name
        As in `named_modules()` of the unwrapped model; an expert's site ends in `.gate_up_proj.3` (the
        parameter and the expert's index), since the experts of a layer share one 3-D parameter.
    layer
        Index of the decoder block; several lists of blocks are counted one after the other.
    module_type
        Last part of the name without an expert's index: `q_proj`, `down_proj`, `gate_up_proj`.
    owner
        The module that holds the parameter (a PEFT wrapper's base layer).
    parameter
        Name of the parameter within `owner`.
    transposed
        Whether the parameter is stored `[in, out]` (GPT-2's Conv1D).
    expert
        Index into a 3-D parameter, or None.
    wrapper
        The module that `named_modules()` gives under this name: `owner` itself or PEFT's layer around it.
    inner
        Where `wrapper` is PEFT's `ModulesToSaveWrapper`: the path of `owner` within the module that it keeps.
    also
        The same weight at other places of the model, where layers share it: it counts once, under the first name.
    """

    name: str
    layer: int
    module_type: str
    owner: nn.Module
    parameter: str = "weight"
    transposed: bool = False
    expert: int | None = None
    wrapper: nn.Module
    inner: str = ""
    also: tuple[Site, ...] = ()

    @property
    def tensor(self) -> torch.Tensor:
        """The stored parameter (for an expert: of all experts)."""
        tensor: torch.Tensor = getattr(self.owner, self.parameter)
        return tensor

    @property
    def weight(self) -> torch.Tensor:
        """The weight as a detached view `[out, in]` in the model's dtype; writing to it changes the model.

        A quantised weight is de-quantised, one that FSDP has cut among processes is gathered (`gathered`): a copy.
        """
        tensor = gathered(self.tensor)
        if is_quantised(self.tensor):
            return _dequantise(self.owner, tensor)
        return self.oriented(tensor)

    def oriented(self, tensor: torch.Tensor) -> torch.Tensor:
        """This site's matrix `[out, in]` out of a tensor that is stored as `self.tensor` is: a view."""
        if self.expert is not None:
            tensor = tensor[self.expert]
        return tensor.T if self.transposed else tensor

    @property
    def bias(self) -> torch.Tensor | None:
        """The bias `[out]`, or None."""
        bias = getattr(self.owner, "bias" if self.expert is None else f"{self.parameter}_bias", None)
        if bias is None:
            return None
        return bias.detach() if self.expert is None else bias.detach()[self.expert]

    @property
    def shape(self) -> tuple[int, int]:
        """`(out, in)`."""
        if is_quantised(self.tensor):
            linear: Any = self.owner
            return int(linear.out_features), int(linear.in_features)
        rows, columns = self.tensor.shape[-2:]
        return (columns, rows) if self.transposed else (rows, columns)


def gathered(tensor: torch.Tensor) -> torch.Tensor:
    """A parameter, detached; one that FSDP2 has cut among processes (a DTensor) in full, as a copy.

    Gathering is a collective operation: every process must call this, for the same parameters in the same order.
    """
    whole: Any = tensor.detach()
    return whole.full_tensor() if is_sharded(tensor) else whole


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether a parameter is a DTensor, cut among processes (FSDP2)."""
    return hasattr(tensor, "full_tensor")


def is_quantised(tensor: torch.Tensor) -> bool:
    """Whether a parameter holds packed numbers (bitsandbytes, in any storage dtype) rather than the weight itself."""
    return not tensor.is_floating_point() or type(tensor).__name__ in ("Params4bit", "Int8Params")


def _dequantise(owner: nn.Module, tensor: torch.Tensor) -> torch.Tensor:
    try:
        from peft.utils.integrations import dequantize_module_weight
    except ImportError as error:  # pragma: no cover - PEFT is a dependency
        raise ModelError("A quantised weight needs PEFT to be read") from error
    return dequantize_module_weight(owner).detach()


def unwrap(model: nn.Module) -> Any:
    """The transformers model within PEFT's, data-parallel and compiling wrappers."""
    model = _without_parallel(model)
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()  # type: ignore[operator]
    elif type(model).__name__ == "PeftMixedModel":  # has no get_base_model
        model = model.base_model.model  # type: ignore[union-attr, assignment]
    return _without_parallel(model)


def _without_parallel(model: nn.Module) -> nn.Module:
    while (inner := within_wrappers(model)) is not model or isinstance(getattr(model, "module", None), nn.Module):
        model = inner if inner is not model else model.module  # type: ignore[assignment]
    return model


class Sites(Mapping[str, Site]):
    """The sites of one model, by name: found once by whoever loaded the model, and passed on to all that need them.

    Every linear weight of the decoder blocks is a site, in the order of `named_modules()`; embeddings, norms, biases
    and the LM head are none. The names are those of the unwrapped model, also under PEFT, so that groups, scores and
    drift of the same model always match. A weight that several layers share counts once, under its first name.

    Attributes
    ----------
    model
        The model as it was given, with the wrappers around it.
    left_out
        Parameters of the blocks that are no matrix of a linear map (a state's decay, a convolution, an embedding):
        they are not measured, and a warning names them once.
    shared
        Other places of the weights that are shared: name -> the name of its site. A warning names them once.

    Raises
    ------
    ModelError
        No decoder blocks, or no linear weights in them.

    Notes
    -----
    A handle is of one state of a model. PEFT puts another module around a site when an adapter is attached, and takes
    it away with the adapter: make a new handle then. Switching adapters on and off, and writing to weights, leave it
    valid, but for `fingerprint`, which is read once.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        blocks = [named for stack in decoder_blocks(unwrap(model)) for named in stack.named()]
        self._sites: dict[str, Site] = {}
        self.left_out: list[str] = []
        self.shared: dict[str, str] = {}
        first: dict[tuple[int, int | None], str] = {}  # the model keeps the parameters alive: an id is of one only
        for layer, (name, block) in enumerate(blocks):
            for site in _sites_at(name, layer, block, self.left_out):
                tensor = site.tensor
                known = first.setdefault((id(tensor), site.expert), site.name) if _is_own(tensor) else site.name
                if known == site.name:
                    self._sites[known] = site
                else:
                    self._share(known, site)
        if not self._sites:
            received = type(unwrap(model)).__name__
            raise ModelError("This model has no linear weights in its decoder blocks", received=received)
        self._say()

    def _share(self, known: str, site: Site) -> None:
        self.shared[site.name] = known
        before = self._sites[known]
        if all(site.wrapper is not other.wrapper for other in (before, *before.also)):
            self._sites[known] = replace(before, also=(*before.also, site))

    def _say(self) -> None:
        if self.left_out:
            say_once(f"left out, as they are no matrix of a linear layer: {kinds_of(self.left_out)}")
        if self.shared:
            say_once(f"layers share weights, which count once, under their first name: also {kinds_of(self.shared)}")

    def __getitem__(self, name: str) -> Site:
        return self._sites[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._sites)

    def __len__(self) -> int:
        return len(self._sites)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Site name -> `(out, in)`."""
        return {name: site.shape for name, site in self._sites.items()}

    @cached_property
    def units(self) -> dict[str, Units]:
        """The hidden units of every MLP, with the errors of `mlp_units`."""
        return mlp_units(self._sites)

    @cached_property
    def fingerprint(self) -> str:
        """A short hash that tells models apart: names and shapes of all sites, and 256 values of each.

        The values are rounded to bfloat16 first, so that a checkpoint has one fingerprint in float32 and in bfloat16.
        An adapter on top does not change it; writing to the base weights does: it is of the weights as they are when it
        is first asked for. Under FSDP2 a collective call.
        """
        return fingerprint_of((name, site.weight) for name, site in self._sites.items())


def fingerprint_of(weights: Iterable[tuple[str, torch.Tensor]]) -> str:
    """`Sites.fingerprint` of the weights of all sites, wherever they lie."""
    digest = hashlib.sha256()
    for name, weight in weights:
        digest.update(f"{name}{tuple(weight.shape)}".encode())
        picks = torch.linspace(0, weight.numel() - 1, 256, dtype=torch.float64).long().to(weight.device)
        picked = weight[picks // weight.shape[1], picks % weight.shape[1]]
        digest.update(picked.to(torch.bfloat16).cpu().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def linear_sites(model: nn.Module) -> Sites:
    """Every linear weight of the decoder blocks of a model, by name: its `Sites`, with their errors."""
    return Sites(model)


def sites_of(model: nn.Module | Sites) -> Sites:
    """The handle itself, or a new one of the model, for functions that take either."""
    return model if isinstance(model, Sites) else Sites(model)


def fingerprint(model: nn.Module | Sites) -> str:
    """`Sites.fingerprint` of a model as it is now, or of a handle."""
    return sites_of(model).fingerprint


def _is_own(tensor: torch.Tensor) -> bool:
    """Whether a weight is a parameter, rather than something that is computed anew whenever it is asked for."""
    return isinstance(tensor, nn.Parameter)


def _sites_at(name: str, layer: int, module: nn.Module, left_out: list[str]) -> Iterator[Site]:
    """The sites of a module of a decoder block, and of all below it; what is none is added to `left_out`."""
    copied, adapted = peft_kinds()
    module = within_wrappers(module)
    if isinstance(module, copied):  # passes attributes on: to be asked before all others
        yield from _sites_of_copied(name, layer, module, left_out)
    elif isinstance(module, adapted):
        yield from _sites_of_owner(name.removesuffix(".base_layer"), layer, module, module.get_base_layer(), left_out)
    else:
        yield from _sites_of_owner(name, layer, module, module, left_out)


def _sites_of_copied(name: str, layer: int, wrapper: Any, left_out: list[str]) -> Iterator[Site]:
    """Those of a module that PEFT trains a copy of (`modules_to_save`): of the original, with the way to the copy."""
    from peft.utils.other import AuxiliaryTrainingWrapper

    for site in _sites_at(name, layer, wrapper.original_module, left_out):
        path = site.name if site.expert is None else site.name.rsplit(".", 2)[0]
        is_copied = isinstance(site.wrapper, AuxiliaryTrainingWrapper)  # by one further in
        inner = path.removeprefix(name).removeprefix(".")
        yield site if is_copied else replace(site, wrapper=wrapper, inner=inner)


def _sites_of_owner(name: str, layer: int, wrapper: nn.Module, owner: nn.Module, left_out: list[str]) -> Iterator[Site]:
    """Those of a module, `wrapper` being the module itself or PEFT's layer around it."""
    if isinstance(owner, nn.Linear | Conv1D):
        yield _site(name, layer, wrapper, owner, transposed=isinstance(owner, Conv1D))
    elif is_experts(owner):
        yield from _sites_of_experts(name, layer, wrapper, owner, left_out)
    elif is_router(owner):
        yield _site(name, layer, wrapper, owner)
    else:
        left_out += [f"{name}.{key}" for key, value in owner.named_parameters(recurse=False) if _is_matrix(value)]
        for child_name, child in wrapper.named_children():
            yield from _sites_at(f"{name}.{child_name}", layer, child, left_out)


def _sites_of_experts(
    name: str, layer: int, wrapper: nn.Module, owner: nn.Module, left_out: list[str]
) -> Iterator[Site]:
    """One for each expert in each 3-D parameter, where it is known which way round they lie."""
    transposed = is_transposed(owner)
    for key, value in owner.named_parameters(recurse=False):
        if value.ndim != 3:
            continue
        if transposed is None:
            left_out.append(f"{name}.{key}")
            continue
        for expert in range(value.shape[0]):
            where = {"parameter": key, "transposed": transposed, "expert": expert}
            yield _site(f"{name}.{key}.{expert}", layer, wrapper, owner, **where)


def _is_matrix(parameter: torch.Tensor) -> bool:
    """Whether a parameter has more than one dimension to it; a vector may be stored as `[1, 1, size]`."""
    return sum(size > 1 for size in parameter.shape) > 1


def _site(name: str, layer: int, wrapper: nn.Module, owner: nn.Module, **where: Any) -> Site:
    kind = re.sub(r"(\.weight)?\.\d+$", "", name).rsplit(".", 1)[-1]
    return Site(name=name, layer=layer, module_type=kind, wrapper=wrapper, owner=owner, **where)


DOWN = ("down_proj", "c_proj", "fc2", "dense_4h_to_h", "fc_out", "w2")
UP = ("gate_proj", "up_proj", "gate_up_proj", "c_fc", "fc1", "dense_h_to_4h", "fc_in", "w1", "w3")


@dataclass(frozen=True, kw_only=True)
class Units:
    """The hidden units of one MLP (or of one expert).

    Unit u is row `step * u + offset` of each of `ups` (site name, offset) and column u of the site `down`.
    """

    count: int
    ups: tuple[tuple[str, int], ...]
    down: str
    step: int = 1

    def rows(self, offset: int) -> slice:
        """The rows of all units in a site of `ups`, unit after unit."""
        return slice(offset, offset + self.step * self.count, self.step)

    @property
    def sites(self) -> set[str]:
        """Names of the sites in which a unit has weights."""
        return {self.down, *(site for site, _ in self.ups)}


def mlp_units(sites: Mapping[str, Site]) -> dict[str, Units]:
    """Name of an MLP -> its hidden units: the module that holds its sites, or the expert `...experts.3`.

    A fused gate-and-up projection holds the gate's rows first, or gate and up in turn where transformers says so
    (`is_concatenated`). Raises `ModelError` where an MLP's sites do not fit
    together, or there is none.
    """
    downs = {site.name: site for site in sites.values() if site.module_type in DOWN and "attn" not in site.name}
    units: dict[str, Units] = {}
    for name, down in downs.items():
        holder = _holder(down)
        hidden = down.shape[1]
        ups: list[tuple[str, int]] = []
        step = 1
        for other in sites.values():
            if other.module_type in UP and other.expert == down.expert and _holder(other) == holder:
                if other.shape[0] not in (hidden, 2 * hidden):
                    raise ModelError(
                        f"{other.name} and {name} do not form one MLP", received=f"{other.shape}, {down.shape}"
                    )
                fused = other.shape[0] // hidden
                step = fused if is_interleaved(other.owner) else 1
                ups += [(other.name, number * (1 if step > 1 else hidden)) for number in range(fused)]
        if not ups:
            raise ModelError(f"No projection into the hidden units of {name} was found")
        units[holder] = Units(count=hidden, ups=tuple(ups), down=name, step=step)
    if not units:
        raise ModelError("No MLP was found among the sites", allowed=f"sites named {', '.join(DOWN)}")
    return units


def _holder(site: Site) -> str:
    """The module that an MLP's sites share; for an expert the experts module and the expert's index."""
    if site.expert is not None:
        return f"{site.name.rsplit('.', 2)[0]}.{site.expert}"
    return site.name.rsplit(".", 1)[0]


@torch.no_grad()
def magnitudes_of(sites: Sites, granularity: Granularity) -> Mapping[str, Any]:
    """|w| of the members of every site (MLP) of a model, as `groups.matched` takes it; of w₀ under an adapter.

    Neurons: ‖row‖, float64 `[out]`. Hidden units: ‖rows and column‖ together, float64 `[units]`. Weights: |w|, float32
    `[out, in]`, formed when it is asked for, so that one site at a time is in memory.
    """
    if granularity == "weight":
        return _Weights(sites)
    if granularity == "neuron":
        return {name: row_norms(site.weight).cpu().numpy() for name, site in sites.items()}
    result = {}
    for name, unit in sites.units.items():
        square = row_norms(sites[unit.down].weight.T).square()
        for site, offset in unit.ups:
            square = square + row_norms(sites[site].weight[unit.rows(offset)]).square()
        result[name] = square.sqrt().cpu().numpy()
    return result


class _Weights(Mapping[str, Any]):
    def __init__(self, sites: Mapping[str, Site]) -> None:
        self._sites = sites

    def __getitem__(self, name: str) -> Any:
        return self._sites[name].weight.float().abs().cpu().numpy()

    def __iter__(self) -> Iterator[str]:
        return iter(self._sites)

    def __len__(self) -> int:
        return len(self._sites)


def row_norms(weight_OI: torch.Tensor) -> torch.Tensor:
    """‖w‖ of each row, float64 `[out]`."""
    return torch.cat([block.float().norm(dim=1, dtype=torch.float64) for block in row_blocks(weight_OI)])


def row_blocks(weight_OI: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The weight in blocks of whole rows, each small enough to be converted at no cost in memory."""
    return weight_OI.split(rows_at_once(weight_OI))


def rows_at_once(weight_OI: torch.Tensor) -> int:
    """How many rows such a block has."""
    return max(1, BLOCK // max(1, weight_OI.shape[1]))
