"""Answers to prompts: batched, with a KV cache, each stopped as soon as more text would change nothing.

Owns decoding (greedy or sampled) and what is sent to the model: chat template, system prompt, plain text. Knows
nothing of judges beyond the function `decided`, nor of attacks. Shapes: B = rows of the batch, T = cached tokens, V =
vocabulary.

The loop is our own, because transformers' keeps finished rows in the batch until the last one ends, and copies the
whole cache at every token. Here finished rows leave the batch and its cache, and the cache grows in place.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal

import torch
from transformers import DynamicCache, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer

from neurondrift.base.errors import ConfigError, DataError, ModelError
from neurondrift.behaviour.requests import Decoding, Request, context_length, render, row_seed
from neurondrift.models.architecture.saying import say_once
from neurondrift.models.batches import taken_by, takes_mask
from neurondrift.models.sites import unwrap
from neurondrift.models.text.templates import prompt_ids
from neurondrift.models.text.thoughts import decoded, marking_tokens

logger = logging.getLogger(__name__)

Decided = Callable[[str, str], bool]
Backend = Literal["transformers", "vllm"]

CHECK_EVERY = 8  # tokens between two looks at whether an answer is decided
SHORTEST_SHARED = 8  # tokens that prompts must have in common before they are computed once
COMPACT = 0.85  # finished rows leave the batch once no more than this share of it is still being answered


def generate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 64,
    batch_size: int = 32,
    max_length: int = 2048,
    decided: Decided | None = None,
    advance: Callable[[int], None] = lambda n: None,
) -> list[str]:
    """The model's greedy answer to each prompt under the chat template, in the order of `prompts`.

    Parameters and errors are those of `answer`; `prompts` are what a user says, without any template.
    """
    requests = [Request(prompt=prompt, text=render(prompt, tokenizer)) for prompt in prompts]
    return answer(
        model,
        tokenizer,
        requests,
        decoding=Decoding(max_new_tokens=max_new_tokens),
        batch_size=batch_size,
        max_length=max_length,
        decided=decided,
        advance=advance,
    )


def answer(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[Request],
    *,
    decoding: Decoding,
    batch_size: int = 32,
    max_length: int = 2048,
    decided: Decided | None = None,
    advance: Callable[[int], None] = lambda n: None,
    backend: Backend = "transformers",
) -> list[str]:
    """The model's answer to each request, in order, without outer white space and special tokens.

    Thoughts are part of the answer, and so are special tokens that mark them (`[THINK]`, gpt-oss's channels).

    Parameters
    ----------
    model
        A causal language model, with or without an (unmerged) adapter or an intervention; for `vllm` a `VllmModel`.
    tokenizer
        The model's.
    requests
        What is asked.
    decoding
        How answers are drawn. Penalties and other settings of the model's own generation config are not applied.
    batch_size
        Requests that are answered together; they are sorted by length first.
    max_length
        Longest prompt in tokens, template included.
    decided
        `decided(prompt, answer so far)`: True ends that answer early (looked at every 8 tokens). Where the prompt's
        text opened a thought, the answer so far begins with its mark.
    advance
        Called with the number of requests done, for progress.
    backend
        `transformers`, or `vllm` (no early stop).

    Raises
    ------
    DataError
        No requests, an empty prompt, or a prompt longer than `max_length` or than the model's context allows.
    ModelError
        The model has no LM head.
    ConfigError
        An unknown backend, or one that is not installed.
    """
    if not requests:
        raise DataError("There are no prompts")
    ids = [prompt_ids(request.text, tokenizer) for request in requests]
    if backend == "vllm":
        from neurondrift.behaviour.vllm_backend import answer_with_vllm

        _check_lengths(requests, ids, min(max_length, model.context - decoding.max_new_tokens), model.context)
        return answer_with_vllm(model, requests, ids, decoding=decoding, advance=advance)
    if backend != "transformers":
        raise ConfigError("There is no such backend", received=backend, allowed="transformers, vllm")
    context = context_length(model)
    _check_lengths(requests, ids, min(max_length, context - decoding.max_new_tokens), context)
    order = sorted(range(len(requests)), key=lambda index: (-len(ids[index]), index))
    answers = [""] * len(requests)
    with _Loop(model, tokenizer, decoding, decided) as loop:
        for first in range(0, len(order), batch_size):
            part = order[first : first + batch_size]
            for row, text in loop.run([requests[index] for index in part], [ids[index] for index in part]):
                answers[part[row]] = text
                advance(1)
    return answers


def _check_lengths(requests: Sequence[Request], ids: Sequence[Sequence[int]], most: int, context: int) -> None:
    for request, tokens in zip(requests, ids, strict=True):
        if not tokens:
            raise DataError("A prompt is empty", received=request.prompt)
    longest = max(range(len(ids)), key=lambda index: len(ids[index]))
    if len(ids[longest]) > most:
        raise DataError(
            f"Prompt {longest} is longer than max_length, or than the context leaves beside the answer",
            received=f"{len(ids[longest])} tokens: {requests[longest].prompt[:60]!r}",
            allowed=f"{max(most, 0)} (the model's context is {context} tokens)",
            fix="shorten or drop the prompt, raise max_length, or ask for a shorter answer",
        )


class _Layer(DynamicLayer):
    """A cache layer that grows within a buffer, so that a new token costs its own size and not the cache's."""

    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room  # tokens
        self.buffers: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        had = self.keys.shape[-2] if self.keys.numel() else 0
        have = had + key_states.shape[-2]
        if self.buffers is None or self.buffers[0].shape[-2] < have:
            self._rebuild(key_states, value_states, had, max(have, self.room))
        assert self.buffers is not None
        for buffer, new in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, had:have] = new
        self.keys, self.values = (buffer[:, :, :have] for buffer in self.buffers)
        return self.keys, self.values

    def _rebuild(self, keys: torch.Tensor, values: torch.Tensor, had: int, room: int) -> None:
        buffers = [new.new_empty(*new.shape[:2], room, new.shape[3]) for new in (keys, values)]
        if had:
            buffers[0][:, :, :had], buffers[1][:, :, :had] = self.keys, self.values
        self.buffers = (buffers[0], buffers[1])

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        if self.buffers is not None:
            have = self.keys.shape[-2]
            self.buffers = (self.buffers[0][indices], self.buffers[1][indices])
            self.keys, self.values = (buffer[:, :, :have] for buffer in self.buffers)


class _Loop:
    """Decodes batches with one model. A context manager: within it, the LM head gets contiguous rows.

    A frozen LM head on the strided last position is otherwise multiplied as a batch of copies of its weight: seconds,
    and gigabytes, for one product.
    """

    def __init__(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, decoding: Decoding, decided: Decided | None
    ) -> None:
        self.model, self.tokenizer, self.decoding, self.decided = model, tokenizer, decoding, decided
        inner = unwrap(model)
        self.config, self.head = inner.config, inner.get_output_embeddings()
        if self.head is None:
            raise ModelError("This model has no LM head", received=type(inner).__name__)
        self.device = model.get_input_embeddings().weight.device
        taken = inspect.signature(inner.forward).parameters
        supports = getattr(inner, "_supports_default_dynamic_cache", lambda: True)
        self.takes_mask = takes_mask(model)
        # Others keep a state of their own kind.
        self.takes_cache = "past_key_values" in taken and supports() and self.takes_mask
        self.takes_positions, self.takes_last = "position_ids" in taken, "logits_to_keep" in taken
        self.pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
        self.ends = torch.tensor(sorted(_end_tokens(inner, tokenizer)), dtype=torch.long)
        self.marks = marking_tokens(tokenizer)

    def __enter__(self) -> _Loop:
        self.hook = self.head.register_forward_pre_hook(lambda module, args: (args[0].contiguous(), *args[1:]))
        return self

    def __exit__(self, *exception: object) -> None:
        self.hook.remove()

    @torch.no_grad()
    def run(self, requests: Sequence[Request], ids: Sequence[Sequence[int]]) -> Iterator[tuple[int, str]]:
        """Each row's answer, as (row, text), when it is done; `requests` and `ids` are one batch.

        A model that is told no positions counts padding among them: only prompts of one length go through it together.
        """
        if self.takes_positions and self.takes_mask:
            yield from self._run(requests, ids)
            return
        for length in sorted(set(map(len, ids))):
            rows = [row for row, tokens in enumerate(ids) if len(tokens) == length]
            for at, text in self._run([requests[row] for row in rows], [ids[row] for row in rows]):
                yield rows[at], text

    def _run(self, requests: Sequence[Request], ids: Sequence[Sequence[int]]) -> Iterator[tuple[int, str]]:
        filled = self._prefill(requests, ids) if self.takes_cache else None
        self.takes_cache = filled is not None
        if filled is None:
            yield from self._run_without_cache(requests, ids)
            return
        limit = self.decoding.max_new_tokens
        draws = _Draws(requests, self.decoding)
        said: list[list[int]] = [[] for _ in requests]
        rows = list(range(len(requests)))  # of the batch, in the cache's order
        live = set(rows)
        logits_BV, mask_BT, cache = filled
        longest = mask_BT.shape[1] - limit
        positions_B1 = mask_BT[:, :longest].sum(1, keepdim=True) - 1
        for count in range(1, limit + 1):
            next_B = draws.pick(logits_BV, rows, count - 1)
            ended_B = torch.isin(next_B, self.ends).tolist()
            tokens_B = next_B.tolist()
            for at, row in enumerate(rows):
                if row in live:
                    said[row].append(tokens_B[at])
            done = {row for at, row in enumerate(rows) if row in live and (ended_B[at] or count == limit)}
            if self.decided is not None and count % CHECK_EVERY == 0:
                done |= self._settled(requests, said, live - done)
            for row in sorted(done):
                yield row, decoded(self.tokenizer, said[row], self.marks).strip()
            live -= done
            if not live:
                return
            next_B = next_B.to(self.device)
            if len(live) <= COMPACT * len(rows):
                keep = [at for at, row in enumerate(rows) if row in live]
                if _selects(cache):
                    cache.batch_select_indices(torch.tensor(keep, device=self.device))
                    rows = [rows[at] for at in keep]
                    next_B, mask_BT, positions_B1 = next_B[keep], mask_BT[keep], positions_B1[keep]
            positions_B1 = positions_B1 + 1
            logits_BV = self._step(next_B[:, None], mask_BT[:, : longest + count], positions_B1, cache)

    def _run_without_cache(
        self, requests: Sequence[Request], ids: Sequence[Sequence[int]]
    ) -> Iterator[tuple[int, str]]:
        """As `run`, where a model keeps no keys and values: all tokens are computed again for each new one.

        Only prompts of one length are computed together, as such models may not know of padding.
        """
        say_once(f"{type(unwrap(self.model)).__name__} has no cache of keys and values: answers take longer")
        draws = _Draws(requests, self.decoding)
        for length in sorted(set(map(len, ids))):
            rows = [row for row, tokens in enumerate(ids) if len(tokens) == length]
            said: list[list[int]] = [[] for _ in requests]
            for count in range(1, self.decoding.max_new_tokens + 1):
                input_BT = torch.tensor([[*ids[row], *said[row]] for row in rows], device=self.device)
                extra = {"logits_to_keep": 1} if self.takes_last else {}
                given = {"attention_mask": torch.ones_like(input_BT), "use_cache": False, **extra}
                logits_BV = self.model(input_ids=input_BT, **taken_by(self.model, given)).logits[:, -1]
                next_B = draws.pick(logits_BV, rows, count - 1)
                for row, token in zip(rows, next_B.tolist(), strict=True):
                    said[row].append(token)
                ended = {row for row, end in zip(rows, torch.isin(next_B, self.ends).tolist(), strict=True) if end}
                live = {row for row in rows if row not in ended and count < self.decoding.max_new_tokens}
                if self.decided is not None and count % CHECK_EVERY == 0:
                    live -= self._settled(requests, said, live)
                for row in rows:
                    if row not in live:
                        yield row, self.tokenizer.decode(said[row], skip_special_tokens=True).strip()
                rows = [row for row in rows if row in live]
                if not rows:
                    break

    def _prefill(
        self, requests: Sequence[Request], ids: Sequence[Sequence[int]]
    ) -> tuple[torch.Tensor, torch.Tensor, DynamicCache] | None:
        """Logits after each prompt [B, V], the mask with room for the answer [B, T], and the filled cache; None where
        the model has left the cache empty.

        What prompts have in common is computed once: equal texts, and the tokens that all of them begin with (the
        head of a chat template). Padding stands between that beginning and the rest.
        """
        limit = self.decoding.max_new_tokens
        distinct = list(dict.fromkeys(map(tuple, ids)))
        owners = [distinct.index(tuple(tokens)) for tokens in ids]
        longest = max(map(len, distinct))
        cache = self._cache(longest + limit)
        shared = self._shared(distinct, cache)
        if not _selects(cache):
            distinct, owners = list(map(tuple, ids)), list(range(len(ids)))
        input_BT = torch.full((len(distinct), longest), self.pad)
        mask_BT = torch.zeros((len(distinct), longest + limit), dtype=torch.long)
        for row, tokens in enumerate(distinct):
            input_BT[row, :shared] = torch.tensor(tokens[:shared])
            input_BT[row, longest - len(tokens) + shared :] = torch.tensor(tokens[shared:])
            mask_BT[row, :shared] = 1
            mask_BT[row, longest - len(tokens) + shared :] = 1  # also the room of the answer
        input_BT, mask_BT = input_BT.to(self.device), mask_BT.to(self.device)
        positions_BT = (mask_BT[:, :longest].cumsum(1) - 1).clamp(min=0)
        if shared:
            self._step(input_BT[:1, :shared], mask_BT[:1, :shared], positions_BT[:1, :shared], cache)
            cache.batch_select_indices(torch.zeros(len(distinct), dtype=torch.long, device=self.device))
        logits_BV = self._step(input_BT[:, shared:], mask_BT[:, :longest], positions_BT[:, shared:], cache)
        if not _is_filled(cache):
            return None
        if len(distinct) < len(ids):
            places = torch.tensor(owners, device=self.device)
            cache.batch_select_indices(places)
            logits_BV, mask_BT = logits_BV[places], mask_BT[places]
        return logits_BV, mask_BT, cache

    def _shared(self, distinct: Sequence[tuple[int, ...]], cache: DynamicCache) -> int:
        """How many tokens all prompts begin with, at least one token of each left over; 0 where it saves nothing.

        Only for caches of plain layers: a sliding window counts the padding in between.
        """
        if len(distinct) < 2 or not self.takes_positions or not cache.layers:
            return 0
        if not all(isinstance(layer, _Layer) for layer in cache.layers):
            return 0
        first, last = min(distinct), max(distinct)
        most = min(map(len, distinct)) - 1
        shared = next((at for at in range(most) if first[at] != last[at]), most)
        return shared if shared >= SHORTEST_SHARED else 0

    def _settled(self, requests: Sequence[Request], said: list[list[int]], live: set[int]) -> set[int]:
        assert self.decided is not None
        rows = sorted(row for row in live if not requests[row].whole)
        texts = [requests[row].opening + decoded(self.tokenizer, said[row], self.marks) for row in rows]
        return {row for row, text in zip(rows, texts, strict=True) if self.decided(requests[row].prompt, text)}

    def _cache(self, room: int) -> DynamicCache:
        cache = DynamicCache(config=self.config)
        # Only plain layers: those with a sliding window or a state have rules of their own.
        cache.layers = [_Layer(room) if type(layer) is DynamicLayer else layer for layer in cache.layers]
        return cache

    def _step(
        self, input_BT: torch.Tensor, mask_BT: torch.Tensor, positions_BT: torch.Tensor, cache: DynamicCache
    ) -> torch.Tensor:
        """Logits after the last token, float32 [B, V], on the CPU or the model's device."""
        extra: dict[str, Any] = {"position_ids": positions_BT} if self.takes_positions else {}
        if self.takes_last:
            extra["logits_to_keep"] = 1
        extra |= {"attention_mask": mask_BT} if self.takes_mask else {}
        output = self.model(input_ids=input_BT, past_key_values=cache, use_cache=True, **extra)
        logits: torch.Tensor = output.logits[:, -1]
        return logits


def _is_filled(cache: DynamicCache) -> bool:
    """Whether a model has written anything into the cache."""
    flags = ("is_conv_states_initialized", "is_recurrent_states_initialized")
    return any(
        (getattr(layer, "is_initialized", False) and getattr(layer, "keys", None) is not None)
        or any(any(_values(getattr(layer, flag, ()))) for flag in flags)
        for layer in cache.layers
    )


def _values(flags: Any) -> Iterable[Any]:
    return flags.values() if isinstance(flags, dict) else flags if isinstance(flags, list | tuple) else (flags,)


def _selects(cache: DynamicCache) -> bool:
    """Whether rows can be dropped from, or repeated in, every layer of the cache."""
    return all(hasattr(layer, "batch_select_indices") for layer in cache.layers)


class _Draws:
    """Picks the next token of each row: the most probable one, or by a random number of the row's own."""

    def __init__(self, requests: Sequence[Request], decoding: Decoding) -> None:
        self.decoding = decoding
        if decoding.temperature > 0:
            self.uniform_BN = torch.stack([_uniform(request, decoding) for request in requests])

    def pick(self, logits_BV: torch.Tensor, rows: Sequence[int], number: int) -> torch.Tensor:
        """Token of each row [B], on the CPU. `number` counts the tokens drawn before."""
        if self.decoding.temperature <= 0:
            return logits_BV.argmax(dim=-1).cpu()
        shares_BV = torch.softmax(logits_BV.float() / self.decoding.temperature, dim=-1).cpu()
        return draw(shares_BV, self.uniform_BN[list(rows), number], top_p=self.decoding.top_p)


def draw(shares_BV: torch.Tensor, uniform_B: torch.Tensor, *, top_p: float = 1.0) -> torch.Tensor:
    """Tokens [B] drawn from probabilities [B, V] by uniform numbers [B] in [0, 1): the inverse of the cumulated sum.

    With `top_p` < 1, from the fewest most probable tokens that together reach it (Holtzman et al., arXiv 1904.09751).
    """
    if top_p < 1:
        ordered_BV, tokens_BV = shares_BV.double().sort(dim=-1, descending=True, stable=True)
        summed_BV = ordered_BV.cumsum(dim=-1)
        ordered_BV = ordered_BV.masked_fill(summed_BV - ordered_BV >= top_p * summed_BV[:, -1:], 0)
    else:
        ordered_BV, tokens_BV = shares_BV.double(), None
    summed_BV = ordered_BV.cumsum(dim=-1)
    wanted_B1 = uniform_B.double()[:, None] * summed_BV[:, -1:]
    place_B1 = torch.searchsorted(summed_BV, wanted_B1, right=True).clamp(max=shares_BV.shape[-1] - 1)
    return (place_B1 if tokens_BV is None else tokens_BV.gather(1, place_B1))[:, 0]


def _uniform(request: Request, decoding: Decoding) -> torch.Tensor:
    generator = torch.Generator().manual_seed(row_seed(request, decoding.seed))
    return torch.rand(decoding.max_new_tokens, generator=generator, dtype=torch.float64)


def _end_tokens(model: Any, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Tokens that end an answer: those of the generation config, and the tokenizer's."""
    named = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = set(named) if isinstance(named, list | tuple) else {named}
    return {int(token) for token in ends | {tokenizer.eos_token_id} if token is not None}
