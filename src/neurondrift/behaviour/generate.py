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
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from transformers import DynamicCache, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer

from neurondrift.base.errors import ConfigError, DataError, ModelError
from neurondrift.base.processes import in_shares, sharers
from neurondrift.behaviour.decoding.beginning import Beginning, common_beginning, parts_of_like_length
from neurondrift.behaviour.decoding.cache import GrowingLayer, is_filled, selects
from neurondrift.behaviour.decoding.draws import Draws, end_tokens
from neurondrift.behaviour.decoding.own import answers_by_its_own_loop, holds_in_batches
from neurondrift.behaviour.requests import Decoding, Request, render
from neurondrift.models.architecture.conventions import check_causal, close, conventions_of, some_tokens
from neurondrift.models.architecture.saying import say_once
from neurondrift.models.batches import context_length, takes_mask
from neurondrift.models.sites import unwrap
from neurondrift.models.text.templates import prompt_ids
from neurondrift.models.text.thoughts import decoded, marking_tokens

logger = logging.getLogger(__name__)

Decided = Callable[[str, str], bool]
Backend = Literal["transformers", "vllm"]

CHECK_EVERY = 8  # tokens between two looks at whether an answer is decided
# Class and configuration -> `_Loop._find_loop`.
_LOOPS: dict[tuple[type, type, str], str] = {}
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
    beginning: Beginning | None = None,
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
        Requests that are answered together; they are sorted by length first. Processes that share work answer
        whole batches each, and smaller ones where there are fewer batches than processes.
    max_length
        Longest prompt in tokens, template included.
    decided
        `decided(prompt, answer so far)`: True ends that answer early (looked at every 8 tokens). Where the prompt's
        text opened a thought, the answer so far begins with its mark.
    advance
        Called with the number of requests done, for progress.
    backend
        `transformers`, or `vllm` (no early stop).
    beginning
        Tokens that all requests begin with, by default those that they have in common; handed to several calls with
        one model in one state, they are computed once for all of them.

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
    each = min(batch_size, -(-len(order) // sharers().total))
    parts = [order[first : first + each] for first in range(0, len(order), each)]
    done = 0

    def answered(own: Sequence[Sequence[int]]) -> list[list[str]]:
        nonlocal done
        found = []
        with _Loop(model, tokenizer, decoding, decided) as loop:
            loop.beginning = common_beginning(ids) if beginning is None else beginning
            for part in own:
                texts = [""] * len(part)
                for row, text in loop.run([requests[index] for index in part], [ids[index] for index in part]):
                    texts[row] = text
                    done += 1
                    advance(1)
                found.append(texts)
        return found

    answers = [""] * len(requests)
    for part, texts in zip(parts, in_shares(parts, answered), strict=True):
        for index, text in zip(part, texts, strict=True):
            answers[index] = text
    if done < len(order):  # what other processes have answered
        advance(len(order) - done)
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
        check_causal(inner)
        self.takes_mask, self.takes_positions = takes_mask(model), conventions_of(inner).usual_positions
        self.takes_last = "logits_to_keep" in inspect.signature(inner.forward).parameters
        self.pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
        self.ends = torch.tensor(sorted(end_tokens(inner, tokenizer)), dtype=torch.long)
        self.marks = marking_tokens(tokenizer)
        self.beginning: Beginning | None = None  # of all prompts; None: of each batch its own
        self.loop = self._find_loop()

    def _find_loop(self) -> str:
        """How this model can be decoded: `padded`, `even` (only prompts of one length go through it together), `own`
        (transformers' loop, with prompts of one length) or `alone` (the same, one prompt at a time). It is asked, once
        for each class and configuration: what its cache gives must be what it gives without one."""
        inner = unwrap(self.model)
        key = type(self.model), type(inner), repr(inner.config.to_dict())
        if key not in _LOOPS:
            _LOOPS[key] = next((name for name in ("padded", "even") if self._agrees(padded=name == "padded")), "")
        if not _LOOPS[key]:
            prompts = torch.cat([some_tokens(inner, 6), some_tokens(inner, 6, first=6)])
            _LOOPS[key] = "own" if holds_in_batches(self.model, inner, prompts, self.pad) else "alone"
        return _LOOPS[key]

    @torch.no_grad()
    def _agrees(self, *, padded: bool) -> bool:
        """Whether two short prompts, of different lengths if `padded`, and a token after each, give the logits in a
        batch with a cache that they give alone and without."""
        inner = unwrap(self.model)
        taken = inspect.signature(inner.forward).parameters
        supports = getattr(inner, "_supports_default_dynamic_cache", lambda: True)
        if "past_key_values" not in taken or not supports() or not self.takes_mask:  # a state of another kind
            return False
        if padded and not self.takes_positions:  # padding would be counted
            return False
        longer, other = some_tokens(inner, 7), some_tokens(inner, 7, first=7)
        ids = [longer[0, :6].tolist(), other[0, : 4 if padded else 6].tolist()]
        last_B1 = torch.stack([longer[0, 6:], other[0, 6:]])
        try:
            alone = [
                torch.cat([torch.tensor([row], device=self.device), last[None]], dim=1)
                for row, last in zip(ids, last_B1, strict=True)
            ]
            expected = torch.cat([self.model(input_ids=one).logits[:, -2:].float() for one in alone])
            filled = self._prefill(ids)
            if filled is None:
                return False
            logits_BV, mask_BT, cache = filled
            positions_B1 = mask_BT[:, :6].sum(1, keepdim=True)
            after_BV = self._step(last_B1, mask_BT[:, :7], positions_B1, cache)
        except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError):
            return False
        return close(torch.stack([logits_BV, after_BV], dim=1).float(), expected, inner.dtype)

    def __enter__(self) -> _Loop:
        self.hook = self.head.register_forward_pre_hook(lambda module, args: (args[0].contiguous(), *args[1:]))
        return self

    def __exit__(self, *exception: object) -> None:
        self.hook.remove()

    @torch.no_grad()
    def run(self, requests: Sequence[Request], ids: Sequence[Sequence[int]]) -> Iterator[tuple[int, str]]:
        """Each row's answer, as (row, text), when it is done; `requests` and `ids` are one batch.

        A model that cannot be told of padding has only prompts of one length go through it together.
        """
        if self.loop == "padded":
            yield from self._run(requests, ids)
            return
        lengths = {row: (row if self.loop == "alone" else 0, len(tokens)) for row, tokens in enumerate(ids)}
        for length in sorted(set(lengths.values())):
            rows = [row for row in lengths if lengths[row] == length]
            run = self._run if self.loop == "even" else self._run_its_own
            for at, text in run([requests[row] for row in rows], [ids[row] for row in rows]):
                yield rows[at], text

    def _run_its_own(self, requests: Sequence[Request], ids: Sequence[Sequence[int]]) -> Iterator[tuple[int, str]]:
        """As `_run`, of prompts of one length, by transformers' own loop: the model keeps something else than keys and
        values, or is given something else than we would give it."""
        inner = unwrap(self.model)
        if not hasattr(self.model, "generate"):
            raise ModelError("This model does not write one token after the other", received=type(inner).__name__)
        say_once(f"{type(inner).__name__} keeps a state of its own: answers are made by transformers' own loop")

        def settled(live: set[int], said: dict[int, list[int]]) -> set[int]:
            return self._settled(requests, said, live)

        answers = answers_by_its_own_loop(
            self.model,
            inner,
            torch.tensor(ids, device=self.device),
            range(len(ids)),
            Draws(requests, self.decoding),
            ends=self.ends,
            pad=self.pad,
            limit=self.decoding.max_new_tokens,
            settled=None if self.decided is None else settled,
            every=CHECK_EVERY,
        )
        for row, tokens in answers:
            yield row, decoded(self.tokenizer, tokens, self.marks).strip()

    def _run(self, requests: Sequence[Request], ids: Sequence[Sequence[int]]) -> Iterator[tuple[int, str]]:
        filled = self._prefill(ids)
        assert filled is not None, "the model has been asked whether it fills a cache"
        limit = self.decoding.max_new_tokens
        draws = Draws(requests, self.decoding)
        said: dict[int, list[int]] = {row: [] for row in range(len(requests))}
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
                if selects(cache):
                    cache.batch_select_indices(torch.tensor(keep, device=self.device))
                    rows = [rows[at] for at in keep]
                    next_B, mask_BT, positions_B1 = next_B[keep], mask_BT[keep], positions_B1[keep]
            positions_B1 = positions_B1 + 1
            logits_BV = self._step(next_B[:, None], mask_BT[:, : longest + count], positions_B1, cache)

    def _prefill(self, ids: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor, DynamicCache] | None:
        """Logits after each prompt [B, V], the mask with room for the answer [B, T], and the filled cache; None where
        the model has left the cache empty.

        What prompts have in common is computed once: equal texts, and the tokens that all of them begin with (the
        head of a chat template). Padding stands between that beginning and the rest.
        """
        limit = self.decoding.max_new_tokens
        distinct = sorted(dict.fromkeys(map(tuple, ids)), key=lambda tokens: -len(tokens))
        owners = [distinct.index(tuple(tokens)) for tokens in ids]
        longest = max(map(len, distinct))
        cache = self._cache(longest + limit)
        beginning = self._begin(distinct, cache)
        shared = 0 if beginning is None else len(beginning.tokens)
        if not selects(cache):
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
        if beginning is None:
            logits_BV = self._step(input_BT, mask_BT[:, :longest], positions_BT, cache)
        else:
            cache = beginning.caches(cache, len(distinct), longest, longest + limit)
            found = []
            for part in parts_of_like_length([len(tokens) - shared for tokens in distinct], self.device):
                start = longest - len(distinct[part.start]) + shared  # the tokens of the longest of them begin there
                of_part = self._cache(0)
                of_part.layers = [layer.rows(part, start) for layer in cache.layers]
                found.append(
                    self._step(input_BT[part, start:], mask_BT[part, :longest], positions_BT[part, start:], of_part)
                )
            logits_BV = torch.cat(found)
        if not is_filled(cache):
            return None
        if owners != list(range(len(distinct))):
            places = torch.tensor(owners, device=self.device)
            cache.batch_select_indices(places)
            logits_BV, mask_BT = logits_BV[places], mask_BT[places]
        return logits_BV, mask_BT, cache

    def _begin(self, distinct: Sequence[tuple[int, ...]], cache: DynamicCache) -> Beginning | None:
        """What all prompts begin with, read by the model; None where they have too little in common.

        Only for caches of plain layers: a sliding window counts the padding in between.
        """
        if not self.takes_positions or not cache.layers:
            return None
        if not all(isinstance(layer, GrowingLayer) for layer in cache.layers):
            return None
        beginning = common_beginning(distinct) if self.beginning is None else self.beginning
        count = len(beginning.tokens)
        if not count:
            return None
        assert all(tokens[:count] == beginning.tokens and len(tokens) > count for tokens in distinct)
        if beginning.layers is None:
            read, places_BT = self._cache(count), torch.arange(count, device=self.device)[None]
            tokens_BT = torch.tensor([beginning.tokens], device=self.device)
            self._step(tokens_BT, torch.ones_like(tokens_BT), places_BT, read)
            if not is_filled(read):
                return None
            beginning.keep(read)
        return beginning

    def _settled(self, requests: Sequence[Request], said: Mapping[int, list[int]], live: set[int]) -> set[int]:
        assert self.decided is not None
        rows = sorted(row for row in live if not requests[row].whole)
        texts = [requests[row].opening + decoded(self.tokenizer, said[row], self.marks) for row in rows]
        return {row for row, text in zip(rows, texts, strict=True) if self.decided(requests[row].prompt, text)}

    def _cache(self, room: int) -> DynamicCache:
        cache = DynamicCache(config=self.config)
        # Only plain layers: those with a sliding window or a state have rules of their own.
        cache.layers = [GrowingLayer(room) if type(layer) is DynamicLayer else layer for layer in cache.layers]
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
