"""Attribution patching: which activations carry what tells harmful prompts from harmless ones to the refusal margin.

With integrated gradients along the embeddings. Shapes: T = tokens, O = out, I = in, M = members.

Sources: attribution patching, Syed et al. (arXiv 2310.10348); with integrated gradients along the embeddings of the two
prompts, Hanna et al. (arXiv 2403.17806).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import nn

from neurondrift.attribution.margin import Margin
from neurondrift.attribution.measures.contrasts import prompt_tokens
from neurondrift.attribution.measures.material import Material, Set
from neurondrift.attribution.measures.scores import Measured, members_of
from neurondrift.attribution.paths import midpoints
from neurondrift.base.errors import DataError
from neurondrift.importance.capture import run
from neurondrift.importance.methods import Tokens
from neurondrift.models.batches import Batch
from neurondrift.models.parts import Unit
from neurondrift.models.sites import Site, unwrap

APART = "the two prompts of a pair do not come by here alike: experts, or a layer that is used in several places"
POINTS = 5  # of the way from a harmless prompt to its harmful one


def attribution_patching(material: Material, unit: Unit) -> Measured:
    """What a row's output or a hidden unit's or head's activation carries of the margin, in nats.

    The mean over pairs of a harmful and a harmless prompt of as many tokens of Σₜ (aₜ - a'ₜ) gₜ, with a and a' the
    activation on either and g the mean gradient of the margin with respect to it at five midpoints between the
    embeddings of the two prompts. Above 0 where the activation makes a refusal of the harmful prompt more probable.

    Raises as `pairs_of`.
    """
    found: _Patched = material.once("patching", lambda: _patched(material))
    values: dict[str, torch.Tensor] = {}
    reasons: dict[str, int] = {}
    compounds = {} if unit == "row" else material.compounds(unit)
    for name, count in members_of(material, unit).items():
        if unit == "row":
            own = found.rows.get(name)
        else:
            own = found.columns.get(compounds[name].down)
            own = None if own is None else own.reshape(count, -1).sum(dim=1)
        if own is None:
            reasons[APART] = reasons.get(APART, 0) + count
        values[name] = torch.full((count,), torch.nan) if own is None else own
    return Measured(values, reasons)


def pairs_of(material: Material) -> list[tuple[int, int]]:
    """Places of harmful and of harmless prompts of as many tokens: each is in one pair at most, first come first.

    Raises `DataError` where there are none.
    """
    free: dict[int, list[int]] = {}
    for place, ids in enumerate(prompt_tokens(material, "utility")):
        free.setdefault(len(ids), []).append(place)
    pairs = []
    for place, ids in enumerate(prompt_tokens(material, "safety")):
        if free.get(len(ids)):
            pairs.append((place, free[len(ids)].pop(0)))
    if not pairs:
        raise DataError(
            "No harmful prompt has as many tokens as a harmless one: their activations cannot be put side by side",
            fix="give more prompts: harmful, harmless",
        )
    return pairs


@dataclass(eq=False)
class _Patched:
    """Sums over pairs, divided by their count: of rows `[O]`, of columns `[I]`; float64."""

    rows: dict[str, torch.Tensor] = field(default_factory=dict)
    columns: dict[str, torch.Tensor] = field(default_factory=dict)


def _patched(material: Material) -> _Patched:
    pairs = pairs_of(material)
    chosen: dict[Set, list[int]] = {"safety": [one for one, _ in pairs], "utility": [other for _, other in pairs]}
    with material.standing() as model:
        both = [
            material.margin_of([material.prompts(part)[place] for place in places]) for part, places in chosen.items()
        ]
        both[1].in_tree = both[0].in_tree = both[0].in_tree and both[1].in_tree
        state = _Patching(material, {name: site for name, site in material.sites.items() if site.expert is None})
        for batch, other in zip(*(margin.batches(material.batch_size) for margin in both), strict=True):
            state.one_batch(model, both[0], batch, other)
            material.on_batch(batch)
    return _Patched(
        {name: total / len(pairs) for name, total in state.rows.items() if name not in state.apart},
        {name: total / len(pairs) for name, total in state.columns.items() if name not in state.apart},
    )


@dataclass(eq=False)
class _Patching:
    """The sums, and what is kept of the batch that is looked at: differences of outputs, and of the inputs of sites
    whose columns are hidden units or heads, example after example."""

    material: Material
    sites: dict[str, Site]
    rows: dict[str, torch.Tensor] = field(default_factory=dict)
    columns: dict[str, torch.Tensor] = field(default_factory=dict)
    apart: set[str] = field(default_factory=set)

    def one_batch(self, model: nn.Module, margin: Margin, batch: Batch, other: Batch) -> None:
        """Add the pairs of one batch."""
        seen, beside = (self._seen(model, margin, one) for one in (batch, other))
        for name in self.sites:
            shapes = [[y.shape for y, _ in side.get(name, [])] for side in (seen, beside)]
            if shapes[0] != shapes[1] or len(shapes[0]) != len(batch.names):
                self.apart.add(name)
        looked_at = {name: site for name, site in self.sites.items() if name not in self.apart}
        differences = {
            name: [
                (y - y2, None if x is None or x2 is None else x - x2)
                for (y, x), (y2, x2) in zip(seen[name], beside[name], strict=True)
            ]
            for name in looked_at
        }
        del seen, beside
        shares = midpoints(POINTS)
        for share in shares:
            turn = dict.fromkeys(looked_at, 0)

            def record(site: Site, tokens: Tokens, turn: dict[str, int] = turn) -> None:
                assert tokens.gradients is not None
                outputs, inputs = differences[site.name][turn[site.name]]
                turn[site.name] += 1
                gradients = tokens.gradients.float()
                self._add(self.rows, site.name, (outputs * gradients).sum(dim=0))
                if inputs is not None:
                    back = gradients @ site.weight.to(gradients)
                    self._add(self.columns, site.name, (inputs * back).sum(dim=0))

            with _between(model, other, share):
                run(model, looked_at, [batch], record, backward=True, objective=margin)

    def _add(self, table: dict[str, torch.Tensor], name: str, values: torch.Tensor) -> None:
        values = values.cpu().double() / POINTS
        table[name] = table[name] + values if name in table else values

    def _seen(
        self, model: nn.Module, margin: Margin, batch: Batch
    ) -> dict[str, list[tuple[torch.Tensor, torch.Tensor | None]]]:
        """Outputs of each site, and inputs where they are wanted, of each row of a batch."""
        found: dict[str, list[tuple[torch.Tensor, torch.Tensor | None]]] = {}

        def record(site: Site, tokens: Tokens) -> None:
            assert tokens.outputs is not None and tokens.inputs is not None
            inputs = tokens.inputs.float().clone() if site.name in self.material.downs else None
            found.setdefault(site.name, []).append((tokens.outputs.float().clone(), inputs))

        run(model, self.sites, [batch], record, backward=False, objective=margin)
        return found


@contextlib.contextmanager
def _between(model: nn.Module, other: Batch, share: float) -> Iterator[None]:
    """The embeddings of a batch become (1 - share) · those of the other batch + share · its own."""
    embeddings = unwrap(model).get_input_embeddings()
    forward: Callable[[torch.Tensor], torch.Tensor] = embeddings.forward

    def mix(module: nn.Module, args: tuple[torch.Tensor, ...], embedded: torch.Tensor) -> torch.Tensor:
        beside = forward(other.input_ids.to(embedded.device)).detach()
        return (share * embedded.detach() + (1 - share) * beside).to(embedded.dtype)

    handle = embeddings.register_forward_hook(mix)
    try:
        yield
    finally:
        handle.remove()
