"""Which token comes next: the most probable one, or one drawn by a random number of the request's own; and which end.

Shapes: B = rows of the batch, V = vocabulary, N = tokens of an answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from neurondrift.behaviour.requests import Decoding, Request, row_seed


class Draws:
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


def end_tokens(model: Any, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Tokens that end an answer: those of the generation config, and the tokenizer's."""
    named = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = set(named) if isinstance(named, list | tuple) else {named}
    return {int(token) for token in ends | {tokenizer.eos_token_id} if token is not None}
