"""Rows of different lengths laid one after the other, so that nothing is computed for padding.

Owns how a model is made to read such a row, and the question whether it can. What a model computes for each token by
itself (norms, products, experts) is computed once for each token; attention alone sees the rows apart, padded, with the
mask that the model would have made for them. Tokens that all rows begin with can be laid once. Shapes: B = rows, T =
tokens of the longest, N = tokens laid out, H = heads, D = their width.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from neurondrift.models.architecture.conventions import close, conventions_of, kind_of, settings_of, some_tokens, taken

NAME = "neurondrift_packed"
#: Attention that is given each row's queries, keys and values, whatever their order in memory.
KINDS = ("sdpa", "eager")


class Layout(NamedTuple):
    """Where the tokens of rows lie in one long row.

    `spread_M` `[B·T]`: of each place of the padded rows, which token lies there (padding: any). `kept_N` `[N]`: of each
    token, its place among them. `back_M` `[B·T]`: as `spread_M`, N where nothing is read from. `shared`: how many
    tokens, the first, begin every row.
    """

    rows: int
    longest: int
    shared: int
    spread_M: torch.Tensor
    kept_N: torch.Tensor
    back_M: torch.Tensor
    positions_N: torch.Tensor
    owners_N: torch.Tensor

    def to(self, device: torch.device) -> Layout:
        moved: dict[str, Any] = {
            name: value.to(device) for name, value in self._asdict().items() if isinstance(value, torch.Tensor)
        }
        return self._replace(**moved)


def layout_of(lengths: Sequence[int], shared: int = 0) -> Layout:
    """Rows of so many tokens each, whose first `shared` ones are laid out once."""
    rows, longest = len(lengths), max(lengths)
    own = [length - shared for length in lengths]
    tokens = shared + sum(own)
    spread_BT = torch.zeros(rows, longest, dtype=torch.long)
    back_BT = torch.full((rows, longest), tokens)
    kept_N, positions_N, owners_N = (torch.zeros(tokens, dtype=torch.long) for _ in range(3))
    spread_BT[:, :shared] = torch.arange(shared)
    back_BT[0, :shared] = kept_N[:shared] = positions_N[:shared] = torch.arange(shared)
    start = shared
    for row, count in enumerate(own):
        span, places = slice(start, start + count), torch.arange(shared, shared + count)
        spread_BT[row, places] = back_BT[row, places] = torch.arange(start, start + count)
        kept_N[span], positions_N[span], owners_N[span] = row * longest + places, places, row
        start += count
    return Layout(rows, longest, shared, spread_BT.reshape(-1), kept_N, back_BT.reshape(-1), positions_N, owners_N)


class _Spread(torch.autograd.Function):
    """`[N, H, D]` -> `[B, T, H, D]`: tokens to their places, shared ones into every row."""

    @staticmethod
    def forward(ctx: Any, packed: torch.Tensor, layout: Layout) -> torch.Tensor:
        ctx.layout = layout
        return packed.index_select(0, layout.spread_M).unflatten(0, (layout.rows, layout.longest))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        layout = ctx.layout
        packed = gradients.flatten(0, 1).index_select(0, layout.kept_N)
        if layout.shared:
            packed[: layout.shared] = gradients[:, : layout.shared].sum(dim=0)
        return packed, None


class _Gather(torch.autograd.Function):
    """`[B, T, H, D]` -> `[N, H, D]`: the tokens of all rows, shared ones of the first."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, layout: Layout) -> torch.Tensor:
        ctx.layout = layout
        return rows.flatten(0, 1).index_select(0, layout.kept_N)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        layout = ctx.layout
        extended = torch.cat([gradients, gradients.new_zeros(1, *gradients.shape[1:])])
        return extended.index_select(0, layout.back_M).unflatten(0, (layout.rows, layout.longest)), None


class _Unfit(ValueError):
    """Attention was given something else than the tokens that were laid out."""


class _Reading(NamedTuple):
    layout: Layout
    kind: str  # of attention


_READING: list[_Reading] = []


def _attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **given: Any,
) -> tuple[torch.Tensor, None]:
    """The model's own attention, of each row by itself: `[1, H, N, D]` -> `[1, N, H, D]`."""
    if not _READING:
        raise _Unfit("nothing is laid out")
    layout, kind = _READING[-1]
    if any(x.ndim != 4 or x.shape[0] != 1 or x.shape[2] != len(layout.kept_N) for x in (query, key, value)):
        raise _Unfit("attention is given something else than the tokens that were laid out")
    layout = layout.to(query.device)  # a model may lie on several
    rows = [_Spread.apply(x[0].transpose(0, 1), layout).transpose(1, 2) for x in (query, key, value)]
    given.pop("position_ids", None)
    output, _ = _own_attention(module, kind)(module, *rows, attention_mask, **given)
    return _Gather.apply(output, layout)[None], None


def _own_attention(module: nn.Module, kind: str) -> Callable[..., Any]:
    if kind == "eager":
        try:
            own: Callable[..., Any] = sys.modules[type(module).__module__].eager_attention_forward
        except AttributeError:
            raise _Unfit("this attention is the module's own") from None
        return own
    function: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS[kind]
    return function


def _mask(**given: Any) -> torch.Tensor | None:
    """The mask of the padded rows. Padding comes last and what comes later is not seen: it need not be told of."""
    if not _READING:
        raise _Unfit("nothing is laid out")
    layout, kind = _READING[-1]
    length = layout.longest
    padded = {"batch_size": layout.rows, "q_length": length, "kv_length": length, "q_offset": 0, "kv_offset": 0}
    mask: torch.Tensor | None = ALL_MASK_ATTENTION_FUNCTIONS[kind](**given | padded | {"attention_mask": None})
    return mask


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, _mask)


@contextlib.contextmanager
def laid_out(inner: nn.Module, layout: Layout | None) -> Iterator[None]:
    """Within the block an (unwrapped) model reads one long row as the rows of a layout; without one, as always."""
    if layout is None:
        yield
        return
    configs = _configs(inner)
    kinds = {config._attn_implementation for config in configs}
    before = [config._attn_implementation_internal for config in configs]
    _READING.append(_Reading(layout, kinds.pop()))
    try:
        for config in configs:
            config._attn_implementation_internal = NAME
        yield
    finally:
        _READING.pop()
        for config, kind in zip(configs, before, strict=True):
            config._attn_implementation_internal = kind


def _configs(inner: nn.Module) -> list[Any]:
    """The configurations that the modules of a model ask for their attention."""
    found = {
        id(module.config): module.config
        for module in inner.modules()
        if hasattr(getattr(module, "config", None), "_attn_implementation_internal")
    }
    return list(found.values())


_KNOWN: dict[tuple[Any, ...], bool] = {}


def packs(model: nn.Module, inner: Any) -> bool:
    """Whether a model, with what is wrapped around it, computes for rows that are laid out what it computes for each
    alone; it is asked, once for each class and configuration in a process."""
    kinds = {config._attn_implementation for config in _configs(inner)}
    if len(kinds) != 1 or not kinds <= set(KINDS):
        return False
    adapters = tuple(repr(type(each)) for each in getattr(model, "peft_config", {}).values())
    key = kind_of(model), kind_of(inner), settings_of(inner), adapters, *kinds
    if key not in _KNOWN:
        _KNOWN[key] = _holds(model, inner)
    return _KNOWN[key]


def draws(model: nn.Module, inner: Any) -> bool:
    """Whether a model draws random numbers in training (dropout): tokens that rows share would share them too."""
    modules = any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules())
    named = any(
        isinstance(value, float) and value > 0 and ("drop" in name or "jitter" in name)
        for config in _configs(inner) or [inner.config]
        for name, value in config.to_dict().items()
    )
    return modules or named


@torch.no_grad()
def _holds(model: nn.Module, inner: Any) -> bool:
    """Whether three short rows that begin alike give the logits that each gives alone, and are blind to each other."""
    if not conventions_of(inner).usual_positions:
        return False
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        begin, later = some_tokens(inner, 2)[0], some_tokens(inner, 12, first=2)[0]
        own = [later[:5], later[5:7], later[7:10]]
        alone = [_logits(model, inner, torch.cat([begin, part])) for part in own]
        layout = layout_of([len(begin) + len(part) for part in own], len(begin)).to(begin.device)
        expected = torch.cat([alone[0], *(logits[len(begin) :] for logits in alone[1:])])
        with laid_out(inner, layout):
            found = _logits(model, inner, torch.cat([begin, *own]), layout.positions_N)
            other = _logits(model, inner, torch.cat([begin, later[3:8], *own[1:]]), layout.positions_N)
        apart = slice(len(begin) + len(own[0]), None)
        return close(found, expected, inner.dtype, wide=1e-4, narrow=0.03) and close(
            other[apart], found[apart], inner.dtype, wide=1e-6, narrow=1e-3
        )
    except (RuntimeError, TypeError, ValueError, KeyError, AttributeError, IndexError, NotImplementedError):
        return False
    finally:
        for module in training:
            module.training = True


def _logits(model: nn.Module, inner: Any, ids_N: torch.Tensor, positions_N: torch.Tensor | None = None) -> torch.Tensor:
    given: dict[str, Any] = {"use_cache": False, "attention_mask": torch.ones_like(ids_N)[None]}
    given["position_ids"] = (torch.arange(len(ids_N), device=ids_N.device) if positions_N is None else positions_N)[
        None
    ]
    output: torch.Tensor = model(input_ids=ids_N[None], **taken(inner, given)).logits
    if output.shape[:2] != (1, len(ids_N)):
        raise _Unfit("no prediction for each token")
    return output[0].float()
