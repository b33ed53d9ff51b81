"""How a model reads what it is given, found by asking it: a few tokens go through it in several ways.

Owns what cannot be told from a configuration: whether what comes later changes what is predicted before, and whether
the model counts positions in a way of its own. Asked once for each class and configuration in a process.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from neurondrift.base.errors import ModelError

TOKENS = 6


class Conventions(NamedTuple):
    """What a model does with a sequence.

    `causal`: a prediction depends on nothing that comes later. `usual_positions`: it takes positions, and 0, 1, 2, ...
    are what it would count by itself.
    """

    causal: bool
    usual_positions: bool


_KNOWN: dict[tuple[type, str], Conventions] = {}


def conventions_of(model: Any) -> Conventions:
    """The conventions of an (unwrapped) model. Where it cannot be asked, because it needs more than tokens, the usual
    ones: what it needs is said where it is used."""
    key = type(model), repr(model.config.to_dict())
    if key not in _KNOWN:
        _KNOWN[key] = _asked(model)
    return _KNOWN[key]


def check_causal(model: Any) -> None:
    """Raise `ModelError` where an (unwrapped) model is no causal language model, whatever its class is called."""
    if not conventions_of(model).causal:
        raise ModelError(
            "This is no causal language model: what comes later in a text changes what it predicts before",
            received=type(model).__name__,
            fix="a decoder says so in its config.json (is_decoder, causal); one that reads both ways cannot be scored "
            "or asked",
        )


def some_tokens(model: Any, count: int, *, first: int = 0) -> torch.Tensor:
    """Different tokens from the middle of the vocabulary `[1, count]`, where no special ones are."""
    weight = model.get_input_embeddings().weight
    middle = weight.shape[0] // 3
    return (torch.arange(first, first + count, device=weight.device) % max(1, middle) + middle)[None]


def logits_of(model: Any, input_ids: torch.Tensor, **given: Any) -> torch.Tensor:
    """The logits of all tokens, float32, of what the model's `forward` takes of the arguments."""
    output: torch.Tensor = model(input_ids=input_ids, **taken(model, {"use_cache": False} | given)).logits
    return output.float()


def taken(model: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the arguments that the `forward` of an (unwrapped) model takes."""
    known = inspect.signature(model.forward).parameters
    takes_all = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in known.values())
    return {key: value for key, value in given.items() if takes_all or key in known}


def close(
    found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype, *, wide: float = 1e-3, narrow: float = 0.1
) -> bool:
    """Whether logits are the same but for rounding: `wide` is allowed in 32 bits and more, `narrow` in 16."""
    if found.shape != expected.shape:
        return False
    allowed = narrow if dtype.itemsize < 4 else wide
    return bool((found - expected).norm() <= allowed * expected.norm())


@torch.no_grad()
def _asked(model: Any) -> Conventions:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        tokens = some_tokens(model, TOKENS)
        plain = logits_of(model, tokens)
        if plain.ndim != 3 or plain.shape[1] != TOKENS:
            return Conventions(causal=False, usual_positions=False)
        other = torch.cat([tokens[:, :-1], some_tokens(model, 1, first=TOKENS)], dim=1)
        causal = close(logits_of(model, other)[:, :-1], plain[:, :-1], model.dtype, wide=1e-4, narrow=0.03)
        usual = "position_ids" in inspect.signature(model.forward).parameters
        if usual:
            positions = torch.arange(TOKENS, device=tokens.device)[None]
            mask = torch.ones_like(tokens)
            usual = close(logits_of(model, tokens, attention_mask=mask, position_ids=positions), plain, model.dtype)
        return Conventions(causal, usual)
    except (RuntimeError, TypeError, ValueError, KeyError, AttributeError, IndexError):
        return Conventions(causal=True, usual_positions="position_ids" in inspect.signature(model.forward).parameters)
    finally:
        for module in training:
            module.training = True
