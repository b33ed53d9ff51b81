"""The refusal margin: how much more probable a refusal is than an answer, from how either begins. One forward a prompt.

Owns the way from prompts and a tree of openings to margins, differentiable, by one of two layouts: the tree behind the
prompt under a mask of its own, or (where a model cannot take such a mask) one row for each branch of the tree. Shapes:
B = rows, T = tokens, P = prompts, K = nodes of the tree behind the prompt, V = vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedTokenizerBase

from neurondrift.attribution.openings import Openings, openings_for, tree_of
from neurondrift.base.errors import DataError, ModelError
from neurondrift.base.processes import in_shares
from neurondrift.behaviour.requests import render
from neurondrift.importance.capture import run
from neurondrift.importance.scores import pad_token_id_of
from neurondrift.models.architecture.conventions import taken
from neurondrift.models.architecture.saying import say_once
from neurondrift.models.batches import Batch, check_length, make_batches, response_losses
from neurondrift.models.data import IGNORED, Example
from neurondrift.models.sites import unwrap
from neurondrift.models.text.templates import prompt_ids

# How far the logits of the two layouts may lie apart, as a share of their length: rounding, and no more.
SAME, SAME_16_BITS = 1e-3, 0.03
LOOKED_AT = 4  # prompts of which it is seen whether what they begin with can be computed once
SHORTEST_COMMON = 8  # tokens that prompts must begin with together before they are computed once


class Function(Protocol):
    """A number that a model gives each of `count` items; what is attributed is the mean over them.

    `batches` gives the items in batches, and a call the values `[B]` of one, differentiable: their sum is that of its
    items.
    """

    @property
    def count(self) -> int: ...

    def batches(self, batch_size: int) -> list[Batch]: ...

    def __call__(self, model: nn.Module, batch: Batch) -> torch.Tensor: ...


class _Reads(NamedTuple):
    """Where the logits of each prompt's nodes are read: rows and columns of the batch, `[P, K + 1]`."""

    rows: torch.Tensor
    columns: torch.Tensor


@dataclass(eq=False)
class Margin:
    """The refusal margin of each of some prompts, as a `Function`.

    Parameters
    ----------
    model
        A causal language model; looked at once, to see whether the tree can be laid behind a prompt.
    tokenizer
        The model's; its chat template renders the prompts.
    prompts
        Texts, or examples (their earlier turns count, their responses do not).
    openings
        `Openings`, the name of a language, or None for English.
    chat_template
        Whether prompts go through the chat template.
    system
        A system prompt before each of them.

    Attributes
    ----------
    in_tree
        Whether one row holds all of the tree; otherwise each branch is a row of its own (said once).

    Raises
    ------
    DataError
        No prompts, an empty one, or one that with the openings is longer than the model has positions.
    ConfigError
        Openings that are empty, or of which one begins with one of the other kind.
    """

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    prompts: Sequence[str | Example]
    openings: Openings | str | None = None
    chat_template: bool = True
    system: str | None = None
    in_tree: bool = field(init=False)
    _is_quick: bool | None = field(init=False, default=None)
    _common: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        if not self.prompts:
            raise DataError("There are no prompts")
        chosen = self.openings if isinstance(self.openings, Openings) else openings_for(self.openings or "en")
        self.openings, self.tree = chosen, tree_of(chosen, self.tokenizer)
        self._ids = [self._tokens(prompt) for prompt in self.prompts]
        pad = self.tokenizer.pad_token_id
        self._pad = int(pad if pad is not None else (self.tokenizer.eos_token_id or 0))
        chains = [self.tree.chain(node) for node in range(self.tree.inner + 1)]
        self._depths = torch.tensor([len(chain) for chain in chains])
        self._leaves = self.tree.leaves
        self._row_of = torch.tensor(
            [
                next(at for at, leaf in enumerate(self._leaves) if node in (0, *chains[leaf]))
                for node in range(len(chains))
            ]
        )
        inner = self.tree.inner
        self._sees = torch.zeros(inner, inner, dtype=torch.bool)  # which nodes a node looks back at
        for node in range(1, inner + 1):
            self._sees[node - 1, [other - 1 for other in chains[node]]] = True
        longest = max(range(self.count), key=lambda index: len(self._ids[index]))
        asked = self.prompts[longest]
        check_length(
            self.model,
            len(self._ids[longest]) + int(self._depths.max()),
            f"Prompt {longest if isinstance(asked, str) else asked.id} with the openings",
            fix="drop the prompt, or choose shorter openings",
        )
        head = unwrap(self.model).get_output_embeddings()
        if head is None:
            raise ModelError("This model has no LM head", received=type(unwrap(self.model)).__name__)
        self.in_tree = inner > 0 and self._tree_holds()

    def _tokens(self, prompt: str | Example) -> list[int]:
        text, earlier = (prompt, ()) if isinstance(prompt, str) else (prompt.prompt, prompt.messages)
        if not text.strip():
            raise DataError("A prompt is empty", received=repr(text))
        how: dict[str, Any] = {"system": self.system, "chat_template": self.chat_template, "earlier": earlier}
        return prompt_ids(render(text, self.tokenizer, **how), self.tokenizer)

    @property
    def count(self) -> int:
        """How many prompts there are."""
        return len(self.prompts)

    def batches(self, batch_size: int) -> list[Batch]:
        """The prompts, sorted by length, `batch_size` rows at a time or all branches of one prompt."""
        order = sorted(range(self.count), key=lambda index: (-len(self._ids[index]), index))
        together = batch_size if self.in_tree else max(1, batch_size // len(self._leaves))
        parts = (order[first : first + together] for first in range(0, self.count, together))
        return [self._batch(part, in_tree=self.in_tree) for part in parts]

    def _batch(self, chosen: Sequence[int], *, in_tree: bool) -> Batch:
        """Rows of prompt and tree, padded on the left; or of prompt and branch, padded on the right."""
        tokens = self.tree.tokens
        branches = (
            [list(tokens)] if in_tree else [[tokens[n - 1] for n in self.tree.chain(leaf)] for leaf in self._leaves]
        )
        rows = [[*self._ids[index], *branch] for index in chosen for branch in branches]
        longest = max(map(len, rows))
        input_ids = torch.full((len(rows), longest), self._pad)
        mask = torch.zeros((len(rows), longest), dtype=torch.long)
        starts = [longest - len(row) if in_tree else 0 for row in rows]
        for at, (start, row) in enumerate(zip(starts, rows, strict=True)):
            input_ids[at, start : start + len(row)] = torch.tensor(row)
            mask[at, start : start + len(row)] = 1
        return Batch(
            input_ids=input_ids,
            labels=torch.full_like(input_ids, IGNORED),
            attention_mask=mask,
            starts=starts,
            lengths=[len(row) for row in rows],
            names=[str(index) for index in chosen for _ in branches],
        )

    def __call__(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """The margin of each prompt at its first row, 0 at its others: float32 `[B]`, differentiable."""
        margins_P = self._margins(self._logits(model, batch, in_tree=self.in_tree))
        if self.in_tree:
            return margins_P
        rows = torch.arange(0, len(batch.names), len(self._leaves), device=margins_P.device)
        return margins_P.new_zeros(len(batch.names)).index_add(0, rows, margins_P)

    @torch.no_grad()
    def quick_values(self, model: nn.Module, *, batch_size: int = 32) -> torch.Tensor:
        """As `values_of`, with what all prompts begin with (the head of a chat template) computed once.

        Where that cannot be done it is `values_of`: fewer than 8 tokens in common, a model in 16 bits, one that does
        not take the tree behind a prompt, or whose cache is not of keys and values. The first call asks the model
        whether both say the same. float64 `[count]` on the CPU.
        """
        if self._is_quick is None:
            self._is_quick = self._quick_holds(model)
        return self._quick(model, batch_size) if self._is_quick else values_of(model, self, batch_size=batch_size)

    def _quick_holds(self, model: nn.Module) -> bool:
        first, last = min(self._ids), max(self._ids)
        most = min(map(len, self._ids)) - 1
        self._common = next((at for at in range(most) if first[at] != last[at]), most)
        if self._common < SHORTEST_COMMON or not self.in_tree or unwrap(model).dtype.itemsize < 4 or self.count < 2:
            return False
        longest = max(range(self.count), key=lambda index: len(self._ids[index]))
        looked_at = [longest, *(index for index in range(self.count) if index != longest)][:LOOKED_AT]
        training, device = model.training, unwrap(model).get_input_embeddings().weight.device
        model.eval()
        try:
            batch = self._batch(looked_at, in_tree=True).to(device)
            plain = self._margins(self._logits(model, batch, in_tree=True)).double().cpu()
            quick = self._quick(model, LOOKED_AT, looked_at)[looked_at]
        except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError, AssertionError, ModelError):
            return False
        finally:
            model.train(training)
        return bool(((quick - plain).abs() <= SAME * (1 + plain.abs())).all())

    def _quick(self, model: nn.Module, batch_size: int, chosen: Sequence[int] | None = None) -> torch.Tensor:
        """The values of the chosen prompts (default: all), NaN of the others."""
        order = sorted(range(self.count) if chosen is None else chosen, key=lambda index: -len(self._ids[index]))
        parts = [order[first : first + batch_size] for first in range(0, len(order), batch_size)]
        found = torch.full((self.count,), float("nan"), dtype=torch.float64)
        for part, values in zip(parts, in_shares(parts, partial(self._quick_parts, model)), strict=True):
            found[part] = torch.tensor(values, dtype=torch.float64)
        return found

    def _quick_parts(self, model: nn.Module, parts: Sequence[Sequence[int]]) -> list[list[float]]:
        """The values of some prompts at a time, behind what all begin with."""
        inner, count, found = unwrap(model), self._common, []
        device, training = inner.get_input_embeddings().weight.device, model.training
        model.eval()
        try:
            begun = DynamicCache(config=inner.config)
            head = torch.tensor([self._ids[0][:count]], device=device)
            given = taken(inner, {"position_ids": torch.arange(count, device=device)[None], "logits_to_keep": 1})
            model(input_ids=head, past_key_values=begun, use_cache=True, **given)
            for part in parts:
                whole = self._batch(part, in_tree=True).to(device)
                mask_BT, rest = self._behind(whole, part)
                cache = copy.deepcopy(begun)
                cache.batch_repeat_interleave(len(part))
                seen, places = self._tree_mask(model, mask_BT)[:, :, count:], self._tree_positions(mask_BT)[:, count:]
                given = {"attention_mask": seen, "position_ids": places, "past_key_values": cache}
                logits = self._read(model, rest, self._reads(rest, in_tree=True), given)
                found.append(self._margins(logits).double().tolist())
        finally:
            model.train(training)
        return found

    def _behind(self, batch: Batch, chosen: Sequence[int]) -> tuple[torch.Tensor, Batch]:
        """The mask of common tokens, padding, and what is behind them; and the batch of the latter two."""
        count, longest = self._common, batch.input_ids.shape[1]
        mask = batch.attention_mask.clone()
        for row, index in enumerate(chosen):
            start = longest - len(self._ids[index]) - self.tree.inner
            mask[row, :count], mask[row, count : start + count] = 1, 0
        rest = replace(batch, input_ids=batch.input_ids[:, count:])
        return mask, rest

    def _margins(self, logits_PKV: torch.Tensor) -> torch.Tensor:
        device = logits_PKV.device
        nodes, tokens = torch.tensor(self.tree.edges, device=device).T
        wanted_PE = logits_PKV[:, nodes, tokens] - logits_PKV.logsumexp(dim=-1)[:, nodes]
        openings_PN = wanted_PE @ self.tree.paths.to(device, wanted_PE.dtype).T
        is_refusal = self.tree.is_refusal.to(device)
        return openings_PN[:, is_refusal].logsumexp(dim=1) - openings_PN[:, ~is_refusal].logsumexp(dim=1)

    def _logits(self, model: nn.Module, batch: Batch, *, in_tree: bool) -> torch.Tensor:
        """The logits at each node, `[P, K + 1, V]`, float32 at least; the LM head sees nothing else."""
        reads = self._reads(batch, in_tree=in_tree)
        mask = batch.attention_mask
        given: dict[str, Any] = {"use_cache": False}
        if in_tree:
            given |= {"attention_mask": self._tree_mask(model, mask), "position_ids": self._tree_positions(mask)}
        else:
            given["attention_mask"] = mask
            if not any(hasattr(module, "create_position_ids_from_input_ids") for module in unwrap(model).modules()):
                given["position_ids"] = torch.arange(mask.shape[1], device=mask.device).expand(mask.shape)
        return self._read(model, batch, reads, given)

    def _read(self, model: nn.Module, batch: Batch, reads: _Reads, given: dict[str, Any]) -> torch.Tensor:
        head = unwrap(model).get_output_embeddings()

        def keep(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            device = args[0].device
            return (args[0][reads.rows.to(device), reads.columns.to(device)].flatten(0, 1)[None], *args[1:])

        handle = head.register_forward_pre_hook(keep)
        try:
            output = model(input_ids=batch.input_ids, **taken(unwrap(model), given))
        finally:
            handle.remove()
        logits: torch.Tensor = output.logits
        if logits.shape[:-1] != (1, reads.rows.numel()):
            raise ModelError("This model does not give one prediction for each token", received=tuple(logits.shape))
        logits = logits.view(*reads.rows.shape, -1)
        return logits if logits.dtype == torch.float64 else logits.float()

    def _reads(self, batch: Batch, *, in_tree: bool) -> _Reads:
        nodes = self.tree.inner + 1
        if in_tree:
            rows = torch.arange(len(batch.names))[:, None].expand(-1, nodes)
            columns = torch.arange(batch.input_ids.shape[1] - nodes, batch.input_ids.shape[1]).expand_as(rows)
            return _Reads(rows, columns)
        each = len(self._leaves)
        if len(batch.names) % each:
            raise ModelError(
                "The branches of a prompt cannot be taken apart: what this model computes cannot be seen by hooks",
                received=type(unwrap(self.model)).__name__,
            )
        first = torch.arange(0, len(batch.names), each)[:, None]
        own = torch.tensor(batch.lengths[::each])[:, None] - self._depths[self._leaves[0]]  # the prompts' lengths
        return _Reads(first + self._row_of, own - 1 + self._depths)

    def _tree_positions(self, mask_BT: torch.Tensor) -> torch.Tensor:
        inner = self.tree.inner
        prompt_BT = (mask_BT[:, : mask_BT.shape[1] - inner].cumsum(dim=1) - 1).clamp(min=0)
        return torch.cat([prompt_BT, prompt_BT[:, -1:] + self._depths[1:].to(mask_BT.device)], dim=1)

    def _tree_mask(self, model: nn.Module, mask_BT: torch.Tensor) -> torch.Tensor:
        """Which tokens each token looks back at, `[B, 1, T, T]`: true, or 0 and the least number (eager)."""
        length, inner = mask_BT.shape[1], self.tree.inner
        sees_TT = torch.ones(length, length, dtype=torch.bool, device=mask_BT.device).tril()
        sees_TT[length - inner :, length - inner :] = self._sees.to(mask_BT.device)
        diagonal_TT = torch.eye(length, dtype=torch.bool, device=mask_BT.device)  # padding looks at itself, not nowhere
        sees_BTT = (sees_TT & mask_BT[:, None, :].bool()) | diagonal_TT
        config = unwrap(model).config
        if getattr(config, "_attn_implementation", "eager") == "sdpa":
            return sees_BTT[:, None]
        dtype = unwrap(model).dtype
        blocked = torch.zeros(sees_BTT.shape, dtype=dtype, device=mask_BT.device)
        return blocked.masked_fill(~sees_BTT, torch.finfo(dtype).min)[:, None]

    @torch.no_grad()
    def _tree_holds(self) -> bool:
        """Whether the model's logits at all nodes are the same in either layout, for the longest prompt."""
        longest = max(range(self.count), key=lambda index: len(self._ids[index]))
        device = unwrap(self.model).get_input_embeddings().weight.device
        training = self.model.training
        self.model.eval()
        try:
            plain, tree = (
                self._logits(self.model, self._batch([longest], in_tree=kind).to(device), in_tree=kind)
                for kind in (False, True)
            )
        except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError, NotImplementedError):
            tree = None
        finally:
            self.model.train(training)
        most = SAME if unwrap(self.model).dtype.itemsize > 2 else SAME_16_BITS
        holds = tree is not None and bool((tree - plain).norm() <= most * plain.norm())
        if not holds:
            say_once(
                f"{type(unwrap(self.model)).__name__} cannot take a mask of its own for each token: the margin is "
                "computed with one row for each branch of the openings"
            )
        return holds


class ResponseLoss:
    """The mean cross-entropy over the response tokens of each example, as a `Function`.

    `encoded` as for `score`. Raises `DataError` as `make_batches` does.
    """

    def __init__(self, model: nn.Module, encoded: Sequence[Any]) -> None:
        self._encoded, self._model, self._pad = encoded, model, pad_token_id_of(model)

    @property
    def count(self) -> int:
        """How many examples there are."""
        return len(self._encoded)

    def batches(self, batch_size: int) -> list[Batch]:
        """The examples, sorted by length."""
        return make_batches(self._encoded, model=self._model, batch_size=batch_size, pad_token_id=self._pad)

    def __call__(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """The loss of each example, float32 `[B]`, differentiable."""
        return response_losses(model, batch)


def values_of(model: nn.Module, function: Function, *, batch_size: int = 8) -> torch.Tensor:
    """What a function gives each of its items with the model as it is, float64 `[count]` on the CPU, in their order.

    The model computes as it does where its gradients are taken (16 bits: sums over blocks in float32).
    """
    batches = function.batches(batch_size)

    def values(own: Sequence[Batch]) -> list[list[float]]:
        known: list[list[float]] = []

        def objective(model: nn.Module, batch: Batch) -> torch.Tensor:
            values_B = function(model, batch)
            known.append(values_B.detach().double().tolist())
            return values_B

        run(model, {}, own, lambda site, tokens: None, backward=False, objective=objective)
        return known

    found = torch.zeros(function.count, dtype=torch.float64)
    for batch, own in zip(batches, in_shares(batches, values), strict=True):
        rows = torch.tensor([int(name) for name in batch.names])
        found.index_add_(0, rows, torch.tensor(own, dtype=torch.float64))
    return found


def refusal_margin(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | Example],
    openings: Openings | str | None = None,
    *,
    batch_size: int = 16,
    chat_template: bool = True,
) -> torch.Tensor:
    """How much more probable a refusal is than an answer, after each prompt.

    Parameters
    ----------
    model
        A causal language model, with or without adapters; left as it was.
    tokenizer
        The model's.
    prompts
        What a user says, or examples.
    openings
        `Openings(refusal=..., compliance=...)`, the name of a language, or None for the documented English list
        (`attribution/openings/en.json`); `own_openings` makes them of a model's own answers.
    batch_size
        Rows that pass through the model together; the result does not depend on it.
    chat_template
        Whether prompts go through the chat template.

    Returns
    -------
    float32 `[prompts]` on the CPU, in nats: logsumexp over the refusal openings of log P(opening | prompt) minus the
    same over the compliance openings. Above 0 a refusal is the more probable. For a value that can be differentiated,
    call a `Margin` on its batches.

    Raises
    ------
    DataError
        No prompts, an empty one, or one too long for the model's context.
    ConfigError
        Openings that are empty or contradict each other.
    """
    function = Margin(model, tokenizer, prompts, openings, chat_template)
    return values_of(model, function, batch_size=batch_size).float()
