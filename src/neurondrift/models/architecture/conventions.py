"""How a model reads what it is given, found by asking it: a few tokens go through it in several ways.

Owns what cannot be told from a configuration: whether what comes later changes what is predicted before, whether the
model counts positions in a way of its own, and whether a text of some length goes through it. Asked once for each class
and configuration in a process.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from neurondrift.base.errors import ModelError

TOKENS = 6
NOTED_WHEN_SAVED = ("architectures", "dtype", "torch_dtype", "transformers_version", "_name_or_path")


class Conventions(NamedTuple):
    """What a model does with a sequence.

    `causal`: a prediction depends on nothing that comes later. `usual_positions`: it takes positions, and 0, 1, 2, ...
    are what it would count by itself.
    """

    causal: bool
    usual_positions: bool


_KNOWN: dict[tuple[type, str], Conventions] = {}
_GONE_THROUGH: dict[tuple[type, str], int] = {}  # the longest text that has


def _kind(model: Any) -> tuple[type, str]:
    return kind_of(model), settings_of(model)


def kind_of(model: Any) -> type:
    """The class of a model, of one that FSDP2 has cut too, which has made it a class of its own."""
    return next(each for each in type(model).__mro__ if not any(b.__name__ == "FSDPModule" for b in each.__mro__))


def settings_of(model: Any) -> str:
    """What the configuration of an (unwrapped) model says, but what is written into it when the model is saved: of
    several processes one saves, and all must ask the same questions. And the dtype of its weights."""
    said = {name: value for name, value in model.config.to_dict().items() if name not in NOTED_WHEN_SAVED}
    return repr((said, next((parameter.dtype for parameter in model.parameters()), None)))


def conventions_of(model: Any) -> Conventions:
    """The conventions of an (unwrapped) model. Where it cannot be asked, because it needs more than tokens, the usual
    ones: what it needs is said where it is used."""
    key = _kind(model)
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


class _WithinTables(TorchDispatchMode):
    """Within it a look-up beyond the end of a table is an `IndexError`: a GPU would end the process."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = func.overloadpacket
        if packet is torch.ops.aten.embedding:
            _check_within(args[1], args[0].shape[0])
        elif packet in (torch.ops.aten.gather, torch.ops.aten.index_select):
            _check_within(args[2], args[0].shape[args[1]])
        elif packet is torch.ops.aten.index and not any(one is None for one in args[1]):
            for indices, size in zip(args[1], args[0].shape, strict=False):
                _check_within(indices, size)
        return func(*args, **(kwargs or {}))


def _check_within(indices: torch.Tensor, size: int) -> None:
    if not indices.is_floating_point() and indices.dtype != torch.bool and indices.numel() and indices.max() >= size:
        raise IndexError(f"a look-up at {int(indices.max())} in a table of {size}")


@torch.no_grad()
def goes_through(model: Any, length: int) -> bool:
    """Whether a text of so many tokens goes through an (unwrapped) model, found by sending one: where positions are
    looked up in a table, only as many tokens do as the table has rows."""
    key = _kind(model)
    if length > _GONE_THROUGH.get(key, 0):
        training = [module for module in model.modules() if module.training]
        model.eval()
        try:
            tokens = some_tokens(model, length)
            given = {"attention_mask": torch.ones_like(tokens), "logits_to_keep": 1, "use_cache": False}
            with _WithinTables():
                model(input_ids=tokens, **taken(model, given))
        except torch.OutOfMemoryError:
            raise
        except (IndexError, RuntimeError, ValueError, AssertionError):
            return False
        finally:
            for module in training:
                module.training = True
        _GONE_THROUGH[key] = length
    return True
