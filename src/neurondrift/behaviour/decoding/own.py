"""Answers by transformers' own loop, for models whose state or whose way of preparing what they are given is their own.

The tokens are drawn as in our loop, and answers end as there: only what is kept between two tokens is the model's
business.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria

from neurondrift.behaviour.decoding.draws import Draws
from neurondrift.models.architecture.conventions import close, logits_of

# Rows and what they have said so far -> the rows whose answers more text would not change.
Settled = Callable[[set[int], dict[int, list[int]]], set[int]]


class _Draw(LogitsProcessor):
    """Leaves only the token that is drawn for each row."""

    def __init__(self, draws: Draws, rows: Sequence[int], length: int) -> None:
        self.draws, self.rows, self.length = draws, rows, length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        picked = self.draws.pick(scores, self.rows, input_ids.shape[1] - self.length).to(scores.device)
        return torch.full_like(scores, float("-inf")).scatter(1, picked[:, None], 0.0)


class _Stop(StoppingCriteria):
    """Stops each row at a token that ends answers, or where more would change nothing; keeps how long each is."""

    def __init__(
        self, rows: Sequence[int], length: int, ends: torch.Tensor, settled: Settled | None, every: int
    ) -> None:
        self.rows, self.length, self.ends, self.settled, self.every = rows, length, ends, settled, every
        self.lengths: dict[int, int] = {}

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        count = input_ids.shape[1] - self.length
        ended = torch.isin(input_ids[:, -1].cpu(), self.ends).tolist()
        live = {row for row in self.rows if row not in self.lengths}
        done = {row for row, end in zip(self.rows, ended, strict=True) if end} & live
        if self.settled is not None and count % self.every == 0:
            said = {row: input_ids[at, self.length :].tolist() for at, row in enumerate(self.rows)}
            done |= self.settled(live - done, said)
        self.lengths |= dict.fromkeys(done, count)
        return torch.tensor([row in self.lengths for row in self.rows], device=input_ids.device)


def answers_by_its_own_loop(
    model: Any,
    inner: Any,
    input_BT: torch.Tensor,
    rows: Sequence[int],
    draws: Draws,
    *,
    ends: torch.Tensor,
    pad: int,
    limit: int,
    settled: Settled | None,
    every: int,
) -> Iterator[tuple[int, list[int]]]:
    """Each row, and the tokens of its answer, of prompts of one length.

    Parameters
    ----------
    model, inner
        The model as it is given, and within its wrappers.
    input_BT
        The prompts, without padding.
    rows
        What each prompt is called.
    draws
        How tokens are drawn.
    ends, pad, limit
        Tokens that end an answer, the token that fills, the most tokens of an answer.
    settled, every
        Which answers are settled, asked each time that so many tokens are there.
    """
    length = input_BT.shape[1]
    stop = _Stop(rows, length, ends, settled, every)
    settings = GenerationConfig(do_sample=False, max_new_tokens=limit, pad_token_id=pad)
    with _plain_settings(inner, settings):
        whole = model.generate(
            input_BT,
            attention_mask=torch.ones_like(input_BT),
            generation_config=settings,
            logits_processor=[_Draw(draws, rows, length)],
            stopping_criteria=[stop],
        )
    for at, row in enumerate(rows):
        yield row, whole[at, length : length + stop.lengths.get(row, limit)].tolist()


@torch.no_grad()
def holds_in_batches(model: Any, inner: Any, input_BT: torch.Tensor, pad: int) -> bool:
    """Whether transformers' loop gives several prompts of one length the logits that a plain forward pass gives them:
    RWKV's states of a batch are mixed up."""
    settings = GenerationConfig(do_sample=False, max_new_tokens=3, pad_token_id=pad)
    try:
        with _plain_settings(inner, settings):
            given = {"attention_mask": torch.ones_like(input_BT), "generation_config": settings}
            made = model.generate(input_BT, **given, output_logits=True, return_dict_in_generate=True)
        plain = logits_of(inner, made.sequences[:, :-1])[:, input_BT.shape[1] - 1 :]
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError):
        return False
    return close(torch.stack(made.logits, dim=1).float(), plain, inner.dtype)


@contextlib.contextmanager
def _plain_settings(inner: Any, settings: GenerationConfig) -> Iterator[None]:
    """The model's own generation settings, such as penalties and forced tokens, are put aside within the block."""
    before = inner.generation_config
    inner.generation_config = settings
    try:
        yield
    finally:
        inner.generation_config = before
