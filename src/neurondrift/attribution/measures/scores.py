"""How each score of a material is taken: importance of rows and what is made of them, ratios, measures of a change.

Shapes: O = out, I = in, M = members.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from neurondrift.attribution.measures.material import Material, Set
from neurondrift.base.errors import DataError
from neurondrift.importance.capture import run
from neurondrift.importance.methods import Tokens
from neurondrift.importance.scores import pad_token_id_of
from neurondrift.models.adapters import LowRank
from neurondrift.models.batches import make_batches
from neurondrift.models.parts import Unit
from neurondrift.models.sites import Site

ZERO = "the score of ordinary text is zero"
UNMOVED = "the weights did not move"
Take = Callable[[Material, Unit], "Measured"]


class Measured(dict[str, torch.Tensor]):
    """Scores by site, MLP or attention: float32 `[members]` on the CPU, as `nd.select_top` takes them.

    Attributes
    ----------
    reasons
        Why members are NaN -> how many; empty where none is.
    floor
        Of a functional drift ratio: the same ratio of the two halves of the ordinary text, what it is by chance.
    """

    def __init__(
        self,
        values: Mapping[str, torch.Tensor],
        reasons: Mapping[str, int] | None = None,
        floor: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        super().__init__({name: found.detach().float().cpu() for name, found in values.items()})
        self.reasons = dict(reasons or {})
        self.floor = dict(floor or {})

    @property
    def undefined(self) -> int:
        """How many members are NaN."""
        return sum(int(values.isnan().sum()) for values in self.values())


def importance(name: str) -> Take:
    """A method of `importance.methods` on safety text: sums over rows, and over rows and columns of what is made of
    them."""

    def take(material: Material, unit: Unit) -> Measured:
        return Measured(_summed(material, unit, name, "safety"))

    return take


def _summed(material: Material, unit: Unit, method: str, part: Set) -> dict[str, torch.Tensor]:
    """float64 `[M]`."""
    rows, columns = material.reduced(method, part)
    if unit == "row":
        return rows
    found = {name: one.sums(rows, columns) for name, one in material.compounds(unit).items()}
    return {name: total for name, total in found.items() if total is not None}


def ratio(method: str) -> Take:
    """The score on safety text over that on ordinary text."""

    def take(material: Material, unit: Unit) -> Measured:
        above, below = (_summed(material, unit, method, part) for part in ("safety", "utility"))
        zero = sum(int((values == 0).sum()) for values in below.values())
        values = {name: torch.where(below[name] == 0, torch.nan, found / below[name]) for name, found in above.items()}
        return Measured(values, {ZERO: zero} if zero else None)

    return take


def gradient(material: Material, unit: Unit) -> Measured:
    """Root mean square length of the gradient of all weights of a member."""
    if unit == "row":
        return Measured(material.reduced("gradient", "safety").rows)
    return Measured({name: found.sqrt() for name, found in _summed(material, unit, "fisher", "safety").items()})


def taylor(material: Material, unit: Unit) -> Measured:
    """mean |Σₜ a ∂L/∂a| of a row's output a, a hidden unit's activation, or (summed) the outputs of a head
    (Molchanov et al., arXiv 1906.10771, without the square)."""
    if unit == "row":
        return Measured(material.reduced("taylor", "safety").rows)
    downs = {one.down: one for one in material.compounds(unit).values()}
    sites = {name: site for name, site in material.sites.items() if name in downs}
    totals = {name: torch.zeros(downs[name].count, dtype=torch.float64) for name in sites}

    def record(site: Site, tokens: Tokens) -> None:
        assert tokens.inputs is not None and tokens.gradients is not None
        back_TI = tokens.gradients.float() @ site.weight.to(tokens.gradients.device).float()
        effect_I = (tokens.inputs.float() * back_TI).sum(dim=0)
        totals[site.name] += effect_I.reshape(-1, downs[site.name].size).sum(dim=1).abs().cpu()

    encoded = material.encoded("safety")
    pad = pad_token_id_of(material.sites.model)
    batches = make_batches(encoded, batch_size=material.batch_size, pad_token_id=pad)
    with material.standing() as model:
        run(model, sites, batches, record, backward=True, on_batch=material.on_batch)
    return Measured({name: totals[one.down] / len(encoded) for name, one in material.compounds(unit).items()})


def check_floor(material: Material) -> None:
    """Raise `DataError` for fewer than two ordinary examples: their halves are the noise floor."""
    if len(material.utility) < 2:
        raise DataError(
            "The ordinary set is split in two for the noise floor: it needs two examples or more",
            received=len(material.utility),
        )


def drift_ratio(material: Material, unit: Unit) -> Measured:
    """The log ratio of functional drift: what to rank by."""
    return _of_drift(material, unit, "log_ratio")


def drift_shrunk(material: Material, unit: Unit) -> Measured:
    """The shrunk log ratio of functional drift: what to cut a group by."""
    return _of_drift(material, unit, "shrunk")


def _of_drift(material: Material, unit: Unit, field: str) -> Measured:
    found = getattr(material.outputs, _FIELDS[unit])
    values = {name: getattr(one, field) for name, one in found.items()}
    return _everywhere(material, unit, values, found, {name: one.floor for name, one in found.items()})


def path(material: Material, unit: Unit) -> Measured:
    """What a member's change contributed to the change of the margin on harmful prompts, in nats."""
    values = dict(getattr(material.path("safety"), _FIELDS[unit]))
    moved = change_length(material, unit)
    return _without_unmoved(values, moved)


def provenance_difference(material: Material, unit: Unit) -> Measured:
    """Cosine of a member's change with the update that refusals ask for, minus that of ordinary answers."""
    found = getattr(material.origins, _FIELDS[unit])
    return _everywhere(material, unit, {name: one.difference for name, one in found.items()}, found)


def change_length(material: Material, unit: Unit) -> Measured:
    """‖D‖ of a member; 0 where it did not move."""
    change = material.change
    first, last = change.states[0], change.states[-1]
    rows, columns = {}, {}
    for name, site in change.sites.items():
        delta = change.vessel.delta(first, last, name)
        rows[name], across = squares(delta, site)
        if name in material.downs:
            columns[name] = across
    if unit == "row":
        return Measured({name: found.sqrt() for name, found in rows.items()})
    found = {name: one.sums(rows, columns) for name, one in material.compounds(unit).items()}
    return Measured({name: total.sqrt() for name, total in found.items() if total is not None})


def squares(delta: torch.Tensor | LowRank | None, site: Site) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of the squares of a change over its rows `[O]` and over its columns `[I]`, float64 on the CPU."""
    if delta is None:
        return torch.zeros(site.shape[0], dtype=torch.float64), torch.zeros(site.shape[1], dtype=torch.float64)
    if isinstance(delta, LowRank):
        a, b = delta.a.cpu().double(), delta.b.cpu().double()
        return ((b @ (a @ a.T)) * b).sum(dim=1).clamp(min=0), ((b.T @ b @ a) * a).sum(dim=0).clamp(min=0)
    square = delta.cpu().double().square()
    return square.sum(dim=1), square.sum(dim=0)


#: What holds the members of a unit in the results of measures of a change.
_FIELDS: dict[Unit, str] = {"row": "rows", "hidden_unit": "units", "head": "heads"}


def _everywhere(
    material: Material,
    unit: Unit,
    values: Mapping[str, torch.Tensor],
    found: Mapping[str, Any],
    floor: Mapping[str, torch.Tensor] | None = None,
) -> Measured:
    """Every site in the model's order; NaN where none of its weights moved."""
    reasons: dict[str, int] = {}
    for one in found.values():
        for reason, count in one.reasons.items():
            reasons[reason] = reasons.get(reason, 0) + count
    result = {}
    for name, count in members_of(material, unit).items():
        result[name] = values[name] if name in values else torch.full((count,), torch.nan)
        if name not in values:
            reasons[UNMOVED] = reasons.get(UNMOVED, 0) + count
    return Measured(result, reasons, floor)


def _without_unmoved(values: Mapping[str, torch.Tensor], lengths: Measured) -> Measured:
    """NaN where a change has no length, and where nothing of a site was seen."""
    result, reasons = {}, {UNMOVED: 0}
    for name, length in lengths.items():
        own = values.get(name, torch.zeros_like(length))
        result[name] = torch.where(length == 0, torch.nan, own)
        reasons[UNMOVED] += int((length == 0).sum())
    return Measured(result, {reason: count for reason, count in reasons.items() if count})


def members_of(material: Material, unit: Unit) -> dict[str, int]:
    """Site, MLP or attention -> how many members it has."""
    if unit == "row":
        return {name: shape[0] for name, shape in material.sites.shapes.items()}
    return {name: one.count for name, one in material.compounds(unit).items()}
