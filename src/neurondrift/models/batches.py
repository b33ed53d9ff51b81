"""Batches of encoded examples, padded or without padding, and the loss on their responses.

Owns how examples go through a model together, how long a text a model takes, and the rule that logits are computed
only where a response token is predicted. Scoring, training and the perplexity of held-out answers all go through
`token_losses`. Shapes: B = examples, T = tokens, N = predicted response tokens of a batch, V = vocabulary. Where
examples are laid out one after the other (`layout`), a batch has one row of T tokens, whatever its number of examples.
"""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from neurondrift.base.errors import DataError, ModelError
from neurondrift.models.architecture.conventions import goes_through, taken
from neurondrift.models.architecture.packing import Layout, draws, laid_out, layout_of, packs
from neurondrift.models.data import IGNORED, name_of
from neurondrift.models.sites import unwrap

# Elements of the logits that are in float32 at a time: as many as stay in a core's cache, or keep another device busy.
LOGITS_AT_ONCE_CPU, LOGITS_AT_ONCE = 1 << 19, 1 << 22
# Types whose attention mask is for show.
IGNORES_MASK = ("cpmant",)
# What configurations call the number of positions.
LENGTHS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_target_positions")
POSITIONS = re.compile("pos|wpe")  # what a table of them is called
UNUSED = 8  # rows of a table of positions that stand for none, at most
SHORTER = (
    "drop the example, or set max_length to at most {most} (align.max_length, score.max_length, finetune.max_length or "
    "evaluate.max_length, whichever stage it is; --max-length with a model alone)"
)
TOKENS_OF_A_PASS = 512  # that an accelerator computes while a further pass is begun
SHORT = 192  # tokens up to which, in 16 bits on a CPU, torch's plain attention is faster than its fused one


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Examples padded to one length, or laid out one after the other (`layout`), with explicit positions."""

    input_ids: torch.Tensor  # [B, T]
    labels: torch.Tensor  # [B, T], -100 where the token is no target
    attention_mask: torch.Tensor  # [B, T]
    starts: list[int]  # first real token of each example
    lengths: list[int]
    names: list[str]  # what an error calls each example
    layout: Layout | None = None

    def to(self, device: torch.device) -> Batch:
        """The batch with its tensors on `device`."""
        moved = {key: getattr(self, key).to(device) for key in ("input_ids", "labels", "attention_mask")}
        layout = None if self.layout is None else self.layout.to(device)
        return replace(self, **moved, layout=layout)

    def span(self, example: int) -> tuple[int, int]:
        """Where the tokens of an example begin and end among all of the batch `[B·T]`; not where some are shared."""
        first = self.starts[example] + (0 if self.layout is not None else example * self.input_ids.shape[1])
        return first, first + self.lengths[example]

    def only(self, example: int) -> Batch:
        """A batch of one of its examples, padded as it was."""
        rows, columns = slice(example, example + 1), slice(None)
        if self.layout is not None:
            rows, columns = slice(None), slice(*self.span(example))
        parts = {key: getattr(self, key)[rows, columns] for key in ("input_ids", "labels", "attention_mask")}
        at = slice(example, example + 1)
        starts = self.starts[at] if self.layout is None else [0]
        return Batch(**parts, starts=starts, lengths=self.lengths[at], names=self.names[at])

    @property
    def position_ids(self) -> torch.Tensor:
        """[B, T]: 0, 1, 2, ... over the real tokens of each example."""
        if self.layout is not None:
            return self.layout.positions_N[None]
        return (self.attention_mask.cumsum(dim=1) - 1).clamp(min=0)


def make_batches(
    encoded: Sequence[Mapping[str, Any]],
    *,
    model: Any,
    batch_size: int,
    pad_token_id: int,
    padding_side: str = "right",
    multiple: int = 1,
) -> list[Batch]:
    """Examples sorted by length and padded batch by batch; padding that a row brings along is dropped.

    `model` is what the batches are for. `multiple` rounds the padded length up, as far as the model takes it: fewer
    different shapes, for which the CPU's kernels are prepared once each.

    Raises `DataError` for an example without a single target after its first token, and as `check_length`.
    """
    rows = _sorted_rows(encoded, model)
    longest = max(context_length(model), len(rows[0].ids))
    return [
        _pad(rows[first : first + batch_size], pad_token_id, padding_side, multiple, longest)
        for first in range(0, len(rows), batch_size)
    ]


def context_length(model: Any) -> int:
    """The longest sequence that a model's configuration speaks of; very large where it names none.

    Models of RoBERTa's kind count positions from `padding_idx` + 1: so many of their positions hold no token.
    """
    inner = unwrap(model)
    config = inner.config
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    named = (getattr(config, name, None) for name in LENGTHS)
    longest = next((int(length) for length in named if length), 10**9)
    for name, module in inner.named_modules() if hasattr(inner, "named_modules") else ():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            longest = min(longest, module.num_embeddings - module.padding_idx - 1)
    return longest


def positions_of(model: Any) -> int | None:
    """How many tokens a model has an embedding of a position for, beside that of the tokens; None where none is seen.
    Nothing is computed, so that the model may be without its numbers; what else can be a table is found by
    `check_length` alone."""
    inner, most = unwrap(model), context_length(model)
    tokens = inner.get_input_embeddings()
    beside = next((module for module in inner.modules() if any(one is tokens for one in module.children())), inner)
    tables = [one for name, one in beside.named_children() if isinstance(one, nn.Embedding) and POSITIONS.search(name)]
    return most if any(most <= table.num_embeddings <= most + UNUSED for table in tables) else None


def check_lengths(model: Any, encoded: Sequence[Mapping[str, Any]]) -> None:
    """`check_length` of encoded examples, for what makes its batches one at a time."""
    _sorted_rows(encoded, model)


def check_length(model: Any, length: int, what: str, fix: str = SHORTER) -> None:
    """Raise `DataError` where a text of so many tokens, called `what`, is longer than the model has positions.

    Models whose positions are computed (rotary ones) take longer texts than they were trained on; where they are looked
    up in a table (GPT-2, OPT, BERT, RoBERTa), a longer text ends within torch.
    """
    inner, most = unwrap(model), context_length(model)
    if length > most and not goes_through(inner, length) and goes_through(inner, most):
        raise too_long(what, length, most, fix)


def too_long(what: str, length: int, most: int, fix: str = SHORTER) -> DataError:
    """What is said of a text that is longer than a model's positions."""
    return DataError(
        f"{what} is longer than the model has positions",
        received=f"{length} tokens",
        allowed=f"{most}",
        fix=fix.format(most=most),
    )


def batches_without_padding(
    model: nn.Module,
    encoded: Sequence[Mapping[str, Any]],
    *,
    batch_size: int,
    pad_token_id: int,
    share: bool = True,
) -> list[Batch]:
    """As `make_batches`, with (next to) nothing computed for padding.

    The examples of a batch are laid out one after the other where the model computes the same for them then, and tokens
    that all of them begin with are laid out once (`share`: where no gradient of a single example is asked for).
    Elsewhere they are batches of one length each, so that there are more of them; on an accelerator, where a pass has a
    price of its own, of about one length.
    """
    rows = _sorted_rows(encoded, model)
    inner: Any = unwrap(model)
    # What a training computes anew in its backward pass, it computes outside of our hands.
    packed = packs(model, inner) and not (share and is_checkpointing(model))
    alone = share and not (model.training and draws(model, inner))
    price = 0 if next(model.parameters()).device.type == "cpu" or not takes_mask(model) else TOKENS_OF_A_PASS
    batches = []
    for first in range(0, len(rows), batch_size):
        part = rows[first : first + batch_size]
        if packed:
            batches.append(_laid_out(part, _beginning(part) if alone else 0))
        else:
            batches += [_pad(group, pad_token_id, "right", 1, len(group[0].ids)) for group in _alike(part, price)]
    return batches


def _laid_out(rows: Sequence[_Row], shared: int) -> Batch:
    """One row of the tokens of all rows, the first `shared` ones once."""
    layout = layout_of([len(row.ids) for row in rows], shared)
    ids, labels = list(rows[0].ids[:shared]), [IGNORED] * shared
    starts = []
    for row in rows:
        starts.append(len(ids) - shared)
        ids += row.ids[shared:]
        labels += [IGNORED, *row.labels[shared + 1 :]]  # what comes before is the end of another row
    return Batch(
        input_ids=torch.tensor([ids]),
        labels=torch.tensor([labels]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        starts=starts,
        lengths=[len(row.ids) for row in rows],
        names=[str(row.number) for row in rows],
        layout=layout,
    )


def _beginning(rows: Sequence[_Row]) -> int:
    """How many tokens all rows begin with, none of which is a target or predicts one."""
    shortest = min(next(place for place, label in enumerate(row.labels) if place and label != IGNORED) for row in rows)
    first, rest = rows[0].ids, [row.ids for row in rows[1:]]
    if not rest:
        return 0
    same = 0
    while same < shortest - 1 and all(ids[same] == first[same] for ids in rest):
        same += 1
    return same


def _alike(rows: Sequence[_Row], price: int) -> list[Sequence[_Row]]:
    """Rows, sorted by length, cut into batches for which the fewest tokens are computed, padding among them, where
    each batch costs as much as `price` tokens."""
    best: list[tuple[int, int]] = [
        (0, 0)
    ]  # the least cost of the first so many rows, and where their last batch begins
    for end in range(1, len(rows) + 1):
        costs = [best[at][0] + price + (end - at) * len(rows[at].ids) for at in range(end)]
        at = min(range(end), key=costs.__getitem__)
        best.append((costs[at], at))
    groups, end = [], len(rows)
    while end:
        groups.append(rows[best[end][1] : end])
        end = best[end][1]
    return groups[::-1]


class _Row(NamedTuple):
    number: int
    name: str
    ids: list[int]
    labels: list[int]


def _sorted_rows(encoded: Sequence[Mapping[str, Any]], model: Any) -> list[_Row]:
    """The longest first, which the model takes: found before any hook sees the model. Raises as `make_batches`."""
    rows = [_unpadded(index, row) for index, row in enumerate(encoded)]
    if not rows:
        raise DataError("There are no examples")
    rows.sort(key=lambda row: (-len(row.ids), row.number))
    check_length(model, len(rows[0].ids), f"Example {rows[0].name}")
    return rows


def _unpadded(index: int, row: Mapping[str, Any]) -> _Row:
    ids, labels = list(map(int, row["input_ids"])), list(map(int, row["labels"]))
    mask = row.get("attention_mask")
    if mask is not None:
        ids = [token for token, keep in zip(ids, mask, strict=True) if keep]
        labels = [label for label, keep in zip(labels, mask, strict=True) if keep]
    if len(ids) != len(labels):
        raise DataError(f"Example {name_of(row, index)} has {len(ids)} input_ids but {len(labels)} labels")
    name = name_of(row, index)
    if all(label == IGNORED for label in labels[1:]):
        raise DataError(f"Example {name} has no response token", fix="raise max_length or drop the example")
    return _Row(index, name, ids, labels)


def _pad(rows: Sequence[_Row], pad_token_id: int, padding_side: str, multiple: int, most: int) -> Batch:
    longest = min(-(-max(len(row.ids) for row in rows) // multiple) * multiple, most)
    shape = (len(rows), longest)
    input_ids, labels = torch.full(shape, pad_token_id), torch.full(shape, IGNORED)
    attention_mask = torch.zeros(shape, dtype=torch.long)
    starts = [0 if padding_side == "right" else longest - len(row.ids) for row in rows]
    for position, (start, row) in enumerate(zip(starts, rows, strict=True)):
        span = slice(start, start + len(row.ids))
        input_ids[position, span] = torch.tensor(row.ids)
        labels[position, span] = torch.tensor(row.labels)
        labels[position, start] = IGNORED  # nothing comes before the first token that could predict it
        attention_mask[position, span] = 1
    return Batch(
        input_ids=input_ids,
        labels=labels,
        attention_mask=attention_mask,
        starts=starts,
        lengths=[len(row.ids) for row in rows],
        names=[str(row.number) for row in rows],
    )


class TokenLosses(NamedTuple):
    """Cross-entropy of each predicted response token, float32 `[N]`, and the example it belongs to, `[N]`."""

    losses: torch.Tensor
    owners: torch.Tensor


def token_losses(model: nn.Module, batch: Batch) -> TokenLosses:
    """The loss of every response token of a batch, differentiable.

    The LM head sees only the positions that predict a response token: the other logits are never computed.
    """
    targets_BT = F.pad(batch.labels[:, 1:], (0, 1), value=IGNORED)  # what position t predicts
    predicts_BT = targets_BT != IGNORED
    head = unwrap(model).get_output_embeddings()
    if head is None:
        raise ModelError("This model has no LM head", received=type(unwrap(model)).__name__)

    def keep_predicting_positions(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0][predicts_BT.to(args[0].device)].unsqueeze(0), *args[1:])

    handle = head.register_forward_pre_hook(keep_predicting_positions)
    # A recomputation in the backward pass must find the attention that the forward pass had.
    try:
        with (
            as_laid_out(model, batch),
            contextlib.nullcontext() if is_checkpointing(model) else attention_for(model, batch),
        ):
            output = model(input_ids=batch.input_ids, **arguments_for(model, batch))
    finally:
        handle.remove()
    logits_NV = output.logits.squeeze(0)  # not [0], whose backward would fill a second matrix
    if logits_NV.ndim != 2 or len(logits_NV) != int(predicts_BT.sum()):
        raise ModelError(
            "This model does not give one prediction for each token: it is no causal language model",
            received=type(unwrap(model)).__name__,
        )
    losses_N = _CrossEntropy.apply(logits_NV, targets_BT[predicts_BT].to(logits_NV.device))
    owners = predicts_BT.nonzero()[:, 0] if batch.layout is None else batch.layout.owners_N[predicts_BT[0]]
    return TokenLosses(losses_N, owners.to(logits_NV.device))


def as_laid_out(model: nn.Module, batch: Batch) -> contextlib.AbstractContextManager[None]:
    """Within the block the model reads the examples of a batch as they are laid out."""
    return laid_out(unwrap(model), batch.layout)


def arguments_for(model: nn.Module, batch: Batch) -> dict[str, Any]:
    """What a model is given beside the tokens of a batch."""
    given: dict[str, Any] = {"attention_mask": batch.attention_mask, "use_cache": False}
    if not any(hasattr(module, "create_position_ids_from_input_ids") for module in unwrap(model).modules()):
        given["position_ids"] = batch.position_ids  # RoBERTa's count from elsewhere: it makes its own from the tokens
    if not takes_mask(model) and not bool(batch.attention_mask.all()):
        raise ModelError(
            "This model takes no attention mask: examples of different lengths cannot go through it together",
            received=type(unwrap(model)).__name__,
            fix="use a batch size of 1",
        )
    return taken(unwrap(model), given)


def takes_mask(model: nn.Module) -> bool:
    """Whether a model can be told of padding."""
    inner: Any = unwrap(model)
    if getattr(inner.config, "model_type", "") in IGNORES_MASK:
        return False
    return "attention_mask" in inspect.signature(inner.forward).parameters


class _CrossEntropy(torch.autograd.Function):
    """Cross-entropy of each row in float32, `[N, V]` and `[N]` -> `[N]`, some rows at a time.

    `F.cross_entropy` of converted logits holds four matrices `[N, V]`, most of them in float32, and one of them can be
    larger than all activations; this holds the logits and their gradient, in the logits' dtype. Its backward runs once.
    """

    @staticmethod
    def forward(ctx: Any, logits_NV: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
        losses_N = torch.empty(len(targets_N), dtype=torch.float32, device=logits_NV.device)
        wanted = ctx.needs_input_grad[0]
        gradients_NV = torch.empty_like(logits_NV) if wanted else None
        for part in _parts(logits_NV):
            targets = targets_N[part, None]
            logits = logits_NV[part].to(torch.float32, copy=True)  # worked on in place
            totals = logits.logsumexp(dim=1, keepdim=True)
            losses_N[part] = (totals - logits.gather(1, targets))[:, 0]
            if gradients_NV is not None:
                probabilities = logits.sub_(totals).exp_()
                probabilities.scatter_add_(1, targets, torch.full_like(totals, -1.0))
                gradients_NV[part] = probabilities
        ctx.gradients = gradients_NV
        return losses_N

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, weights_N: torch.Tensor) -> tuple[torch.Tensor, None]:
        gradients_NV, ctx.gradients = ctx.gradients, None
        assert gradients_NV is not None, "the loss has been gone back through already"
        for part in _parts(gradients_NV):
            gradients_NV[part] = gradients_NV[part] * weights_N[part, None]  # in float32, rounded once
        return gradients_NV, None


def _parts(logits_NV: torch.Tensor) -> Iterator[slice]:
    """Rows that are taken together."""
    at_once = LOGITS_AT_ONCE_CPU if logits_NV.device.type == "cpu" else LOGITS_AT_ONCE
    rows = max(1, at_once // logits_NV.shape[1])
    return (slice(first, first + rows) for first in range(0, len(logits_NV), rows))


def is_checkpointing(model: nn.Module) -> bool:
    """Whether transformers' activation checkpointing is switched on."""
    return bool(getattr(unwrap(model), "is_activation_checkpointing", False))


@contextlib.contextmanager
def attention_for(model: nn.Module, batch: Batch) -> Iterator[None]:
    """Plain attention within the block for short batches in 16 bits on a CPU, where the model leaves the choice to
    torch (`benchmarks/scoring.py --attention`)."""
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else unwrap(model).dtype
    is_cpu = batch.input_ids.device.type == "cpu"
    length = batch.input_ids.shape[1] if batch.layout is None else batch.layout.longest
    if not is_cpu or length > SHORT or dtype.itemsize > 2:
        yield
        return
    with sdpa_kernel(SDPBackend.MATH):
        yield


def response_losses(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Mean cross-entropy over the response tokens of each example, float32 `[B]`, differentiable."""
    losses_N, owners_N = token_losses(model, batch)
    sums_B = torch.zeros(len(batch.names), device=losses_N.device).index_add(0, owners_N, losses_N)
    return sums_B / torch.bincount(owners_N, minlength=len(batch.names))
