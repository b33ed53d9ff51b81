"""Importance scores: one function a method, in a small registry.

A method says what it needs of a pass over the data, how one example changes a site's accumulator, and how the
accumulator becomes a score. It sees matrices only; `capture.py` brings them. Shapes: O = out, I = in,
T = tokens of one example.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from neurondrift.base.errors import ConfigError

# Elements of one example's gradient that are formed at a time on the CPU: the product, its absolute value and the
# sum then stay within the cache. On an accelerator the whole matrix is formed at once.
CPU_BLOCK = 1 << 19


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """What one site saw of one example.

    `inputs` [T, I] and `outputs` [T, O] (without bias) in the model's dtype, `gradients` [T, O] of the
    example's loss with respect to the outputs, `is_response` [T]: the tokens that are targets. What a method
    does not need is None.
    """

    inputs: torch.Tensor | None = None
    outputs: torch.Tensor | None = None
    gradients: torch.Tensor | None = None
    is_response: torch.Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Method:
    """An importance score.

    Attributes
    ----------
    name
        As it is called in configurations and file headers.
    needs
        `nothing` (the weight is enough), `forward` (inputs) or `backward` (gradients too).
    accumulator
        Shape of the float32 accumulator of a site: `weight` [O, I], `input` [I], `output` [O] or `none`.
    update
        `update(accumulator, tokens)`: add one example, in place.
    finish
        `finish(accumulator, weight, examples, tokens, generator)`: the score, float32 `[O, I]` (or `[O]` for
        `neurons_only`); `examples` and `tokens` count what was added. May reuse the accumulator's memory.
    neurons_only
        The score exists for whole neurons, not for single weights.
    """

    name: str
    needs: Literal["nothing", "forward", "backward"]
    accumulator: Literal["weight", "input", "output", "none"]
    update: Callable[[torch.Tensor, Tokens], None]
    finish: Callable[[torch.Tensor, torch.Tensor, int, int, torch.Generator], torch.Tensor]
    neurons_only: bool = False


def for_each_block_of_gradient(
    accumulator: torch.Tensor, tokens: Tokens, add: Callable[[torch.Tensor, torch.Tensor], object]
) -> None:
    """Form an example's weight gradient δᵀx block of rows by block and hand each to `add(rows, block)`: the rows of the
    accumulator (`[O, I]` or `[O]`), and the gradient's."""
    assert tokens.gradients is not None and tokens.inputs is not None
    gradients_TO, inputs_TI = tokens.gradients, tokens.inputs
    rows = out_features = gradients_TO.shape[1]
    if accumulator.device.type == "cpu":
        rows = min(out_features, max(16, CPU_BLOCK // inputs_TI.shape[1]))
    for start in range(0, out_features, rows):
        gradient = gradients_TO[:, start : start + rows].T @ inputs_TI
        add(accumulator[start : start + rows], gradient.to(accumulator.device))


def _snip_update(accumulator: torch.Tensor, tokens: Tokens) -> None:
    # The conversion comes first: adding bfloat16 to float32 in one operation is slower on the CPU.
    for_each_block_of_gradient(accumulator, tokens, lambda block, gradient: block.add_(gradient.float().abs_()))


def _snip_finish(
    accumulator: torch.Tensor, weight: torch.Tensor, examples: int, tokens: int, generator: torch.Generator
) -> torch.Tensor:
    return accumulator.mul_(_magnitude(weight, accumulator)).div_(examples)


def _fisher_update(accumulator: torch.Tensor, tokens: Tokens) -> None:
    def add(block: torch.Tensor, gradient: torch.Tensor) -> None:
        gradient = gradient.float()
        block.addcmul_(gradient, gradient)

    for_each_block_of_gradient(accumulator, tokens, add)


def _fisher_finish(
    accumulator: torch.Tensor, weight: torch.Tensor, examples: int, tokens: int, generator: torch.Generator
) -> torch.Tensor:
    return accumulator.div_(examples)


def _gradient_update(accumulator: torch.Tensor, tokens: Tokens) -> None:
    for_each_block_of_gradient(
        accumulator, tokens, lambda rows, gradient: rows.add_(gradient.float().square_().sum(dim=1))
    )


def _gradient_finish(
    accumulator: torch.Tensor, weight: torch.Tensor, examples: int, tokens: int, generator: torch.Generator
) -> torch.Tensor:
    return accumulator.div_(examples).sqrt_()


def _wanda_update(accumulator: torch.Tensor, tokens: Tokens) -> None:
    assert tokens.inputs is not None and tokens.is_response is not None
    chosen = tokens.inputs[tokens.is_response].float()
    accumulator.add_(chosen.square().sum(dim=0).to(accumulator.device))


def _wanda_finish(
    accumulator: torch.Tensor, weight: torch.Tensor, examples: int, tokens: int, generator: torch.Generator
) -> torch.Tensor:
    return _magnitude(weight, accumulator) * (accumulator / max(tokens, 1)).sqrt()


def _taylor_update(accumulator: torch.Tensor, tokens: Tokens) -> None:
    assert tokens.outputs is not None and tokens.gradients is not None
    effect = (tokens.outputs.float() * tokens.gradients.float()).sum(dim=0)
    accumulator.add_(effect.abs_().to(accumulator.device))


def _no_update(accumulator: torch.Tensor, tokens: Tokens) -> None:
    raise AssertionError("a method that needs nothing is never updated")


def _magnitude_finish(
    accumulator: torch.Tensor, weight: torch.Tensor, examples: int, tokens: int, generator: torch.Generator
) -> torch.Tensor:
    return _magnitude(weight, accumulator).clone()


def _random_finish(
    accumulator: torch.Tensor, weight: torch.Tensor, examples: int, tokens: int, generator: torch.Generator
) -> torch.Tensor:
    return torch.rand(weight.shape, generator=generator)


def _magnitude(weight: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """|W| in float32 on the accumulator's device."""
    return weight.to(device=like.device, dtype=torch.float32).abs()


METHODS: dict[str, Method] = {
    method.name: method
    for method in [
        Method(name="snip", needs="backward", accumulator="weight", update=_snip_update, finish=_snip_finish),
        Method(name="fisher", needs="backward", accumulator="weight", update=_fisher_update, finish=_fisher_finish),
        Method(name="wanda", needs="forward", accumulator="input", update=_wanda_update, finish=_wanda_finish),
        Method(
            name="taylor",
            needs="backward",
            accumulator="output",
            update=_taylor_update,
            finish=_fisher_finish,
            neurons_only=True,
        ),
        Method(
            name="gradient",
            needs="backward",
            accumulator="output",
            update=_gradient_update,
            finish=_gradient_finish,
            neurons_only=True,
        ),
        Method(name="magnitude", needs="nothing", accumulator="none", update=_no_update, finish=_magnitude_finish),
        Method(name="random", needs="nothing", accumulator="none", update=_no_update, finish=_random_finish),
    ]
}


def get_method(name: str) -> Method:
    """A method by name. Raises `ConfigError` where there is none."""
    if name not in METHODS:
        raise ConfigError("There is no such importance method", received=name, allowed=", ".join(METHODS))
    return METHODS[name]
