"""Activations on harmful prompts beside those on harmless ones, where an answer begins.

Owns their difference, Cohen's d, and the cosine of weights with the direction that tells the two kinds of prompts
apart.

Sources: difference of means and its direction, Arditi et al. (arXiv 2406.11717); neurons by the contrast of their
activations, Chen et al. (arXiv 2406.14144).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from neurondrift.attribution.measures.material import Material, Set
from neurondrift.attribution.measures.scores import Measured, members_of
from neurondrift.attribution.outputs import passed_through
from neurondrift.base.errors import DataError
from neurondrift.behaviour.requests import render
from neurondrift.importance.capture import run
from neurondrift.importance.methods import Tokens
from neurondrift.importance.scores import pad_token_id_of
from neurondrift.models.architecture.blocks import decoder_blocks
from neurondrift.models.batches import Batch, make_batches
from neurondrift.models.data import IGNORED, Example
from neurondrift.models.parts import Unit
from neurondrift.models.sites import Site, unwrap
from neurondrift.models.text.templates import prompt_ids

UNSEEN = "no prompt of one of the sets came by"
CONSTANT = "the activation does not vary within the sets"
NO_DIRECTION = "there is no direction that tells the sets apart, or no weight"
SETS: tuple[Set, Set] = ("safety", "utility")


@dataclass(eq=False)
class Sums:
    """Sums of a vector and of its squares over the prompts of a set, float64 on the CPU."""

    count: int = 0
    first: Any = 0.0
    second: Any = 0.0

    def add(self, values: torch.Tensor) -> None:
        """Add one vector `[n]`."""
        values = values.detach().cpu().double()
        self.count += 1
        self.first, self.second = self.first + values, self.second + values.square()

    @property
    def mean(self) -> torch.Tensor:
        return torch.as_tensor(self.first) / self.count

    @property
    def scatter(self) -> torch.Tensor:
        """Sum of the squared distances from the mean."""
        return (torch.as_tensor(self.second) - self.count * self.mean.square()).clamp(min=0)


Pair = dict[Set, Sums]


@dataclass(eq=False)
class Activations:
    """What the last token of each prompt shows, by set: outputs and inputs of sites, and what leaves each block."""

    outputs: dict[str, Pair] = field(default_factory=dict)
    inputs: dict[str, Pair] = field(default_factory=dict)
    blocks: dict[int, Pair] = field(default_factory=dict)


def activations(material: Material) -> Activations:
    """The sums over harmful and harmless prompts; one forward pass a prompt, shared by all contrasts."""
    found: Activations = material.once("activations", lambda: _activations(material))
    return found


def check_prompts(material: Material) -> None:
    """Raise `DataError` for fewer than two prompts of a kind."""
    for part in SETS:
        count = len(material.prompts(part))
        if count < 2:
            raise DataError("A contrast of activations needs two prompts or more of each kind", received=count)


def _activations(material: Material) -> Activations:
    check_prompts(material)
    found = Activations()
    pad = pad_token_id_of(material.sites.model)
    with material.standing() as model:
        for part in SETS:
            rows = [_to_last(ids) for ids in prompt_tokens(material, part)]

            def record(site: Site, tokens: Tokens, part: Set = part) -> None:
                assert tokens.inputs is not None and tokens.outputs is not None and tokens.is_response is not None
                last = tokens.is_response.nonzero().flatten()
                if len(last):  # an expert sees some prompts only
                    _sums(found.outputs, site.name, part).add(tokens.outputs[last[-1]])
                    _sums(found.inputs, site.name, part).add(tokens.inputs[last[-1]])

            batches = make_batches(rows, model=model, batch_size=material.batch_size, pad_token_id=pad)
            for batch in batches:
                with _blocks_seen(model, batch, functools.partial(_add_block, found, part)):
                    run(model, material.sites, [batch], record, backward=False, objective=passed_through)
                material.on_batch(batch)
    return found


def prompt_tokens(material: Material, part: Set) -> list[list[int]]:
    """The prompts of a set as token ids, up to where the answer begins."""
    found = []
    for prompt in material.prompts(part):
        text, earlier = (prompt.prompt, prompt.messages) if isinstance(prompt, Example) else (prompt, ())
        if not text.strip():
            raise DataError("A prompt is empty", received=repr(text))
        how: dict[str, Any] = {"system": material.system, "chat_template": material.chat_template}
        ids = prompt_ids(render(text, material.tokenizer, earlier=earlier, **how), material.tokenizer)
        found.append(ids[: material.max_length])
    return found


def _to_last(ids: Sequence[int]) -> dict[str, list[int]]:
    """A row of which the last token counts."""
    return {"input_ids": list(ids), "labels": [IGNORED] * (len(ids) - 1) + [ids[-1]]}


def _sums(table: dict[Any, Pair], key: Any, part: Set) -> Sums:
    return table.setdefault(key, {}).setdefault(part, Sums())


def _add_block(found: Activations, part: Set, layer: int, values: torch.Tensor) -> None:
    _sums(found.blocks, layer, part).add(values)


@contextlib.contextmanager
def _blocks_seen(model: nn.Module, batch: Batch, add: Callable[[int, torch.Tensor], None]) -> Iterator[None]:
    """`add(layer, vector)` is given what leaves each block at the last token of each prompt."""
    rows = list(range(len(batch.lengths)))
    last = [start + length - 1 for start, length in zip(batch.starts, batch.lengths, strict=True)]

    def hook(layer: int, module: nn.Module, args: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple | list) else output
        if isinstance(hidden, torch.Tensor) and hidden.shape[:2] == batch.input_ids.shape and hidden.ndim == 3:
            for values in hidden[rows, last]:
                add(layer, values)

    blocks = [block for stack in decoder_blocks(unwrap(model)) for _, block in stack.named()]
    handles = [block.register_forward_hook(functools.partial(hook, layer)) for layer, block in enumerate(blocks)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def contrast(material: Material, unit: Unit) -> Measured:
    """|mean over harmful prompts - mean over harmless ones| of a row's output or a hidden unit's activation, where the
    prompt ends; of a head the length of that difference."""

    def of(pair: Pair, size: int) -> torch.Tensor:
        return _members(_difference(pair).square(), size).sqrt()

    return _of_activations(material, unit, of)


def cohens_d(material: Material, unit: Unit) -> Measured:
    """The same difference in pooled standard deviations; of a head in those of all its dimensions together."""

    def of(pair: Pair, size: int) -> torch.Tensor:
        safety, utility = pair["safety"], pair["utility"]
        variance = (safety.scatter + utility.scatter) / (safety.count + utility.count - 2)
        spread = _members(variance, size)
        return torch.where(spread > 0, (_members(_difference(pair).square(), size) / spread).sqrt(), torch.nan)

    return _of_activations(material, unit, of, undefined=CONSTANT)


def _difference(pair: Pair) -> torch.Tensor:
    return pair["safety"].mean - pair["utility"].mean


def _members(values: torch.Tensor, size: int) -> torch.Tensor:
    return values.reshape(-1, size).sum(dim=1)


def _of_activations(
    material: Material, unit: Unit, of: Callable[[Pair, int], torch.Tensor], *, undefined: str = ""
) -> Measured:
    found = activations(material)
    if unit == "row":
        places = {name: (found.outputs.get(name), 1) for name in material.sites}
    else:
        places = {name: (found.inputs.get(one.down), one.size) for name, one in material.compounds(unit).items()}
    values: dict[str, torch.Tensor] = {}
    reasons: dict[str, int] = {}
    for name, count in members_of(material, unit).items():
        pair, size = places[name]
        if pair is None or not _seen(pair):
            values[name] = torch.full((count,), torch.nan)
            reasons[UNSEEN] = reasons.get(UNSEEN, 0) + count
            continue
        values[name] = of(pair, size)
        missing = int(values[name].isnan().sum())
        if missing:
            reasons[undefined] = reasons.get(undefined, 0) + missing
    return Measured(values, reasons)


def _seen(pair: Mapping[Set, Sums]) -> bool:
    """Whether both sets came by, and often enough for a spread."""
    return all(part in pair for part in SETS) and sum(sums.count for sums in pair.values()) > 2


@torch.no_grad()
def refusal_direction(material: Material, unit: Unit) -> Measured:
    """How far weights lie along the direction that tells harmful prompts from harmless ones, 0 to 1.

    A row: |cos| with the difference of the means of its site's inputs, which is what it reads. A hidden unit or head:
    |cos| of what it writes (its columns; of several the root of the share of their squares) with the difference of the
    means of what leaves its block (Arditi et al.), at the last token of the prompt.
    """
    found = activations(material)
    values: dict[str, torch.Tensor] = {}
    if unit == "row":
        for name, site in material.sites.items():
            pair = found.inputs.get(name)
            values[name] = _cosines(site.weight, pair, site.shape[0], 1)
    else:
        for name, one in material.compounds(unit).items():
            site = material.sites[one.down]
            values[name] = _cosines(site.weight.T, found.blocks.get(site.layer), one.count, one.size)
    missing = sum(int(own.isnan().sum()) for own in values.values())
    return Measured(values, {NO_DIRECTION: missing} if missing else None)


def _cosines(vectors: torch.Tensor, pair: Pair | None, count: int, size: int) -> torch.Tensor:
    """Root of the share of the squares of `size` vectors at a time that lies along a difference of means, float64."""
    direction = _difference(pair) if pair is not None and _seen(pair) else None
    if direction is None or len(direction) != vectors.shape[1] or not bool(direction.norm() > 0):
        return torch.full((count,), torch.nan)
    own = vectors.cpu().double()
    along = _members((own @ (direction / direction.norm())).square(), size)
    whole = _members(own.square().sum(dim=1), size)
    return torch.where(whole > 0, (along / whole).sqrt(), torch.nan)
