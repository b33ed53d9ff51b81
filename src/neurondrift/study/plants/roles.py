"""Which units of a model are planted, which are the decoy and which only move as far: drawn at random, site by site."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from neurondrift.base.errors import ModelError
from neurondrift.groups.group import Granularity, Group, without_empty
from neurondrift.models.parts import Unit, compounds
from neurondrift.models.sites import Sites

GRANULARITY: dict[Unit, Granularity] = {"row": "neuron", "hidden_unit": "unit", "head": "head"}


def population(sites: Sites, unit: Unit) -> dict[str, tuple[int, int]]:
    """Where there are such units, in the model's order: site or MLP -> how many, and how many inputs each has.

    Raises `ModelError` where the model has none that are known.
    """
    if unit == "row":
        return dict(sites.shapes)
    return {name: (one.count, sites.shapes[one.ups[0][0]][1]) for name, one in compounds(sites, unit).items()}


def draw(sites: Sites, unit: Unit, share: float, seed: int, names: Sequence[str]) -> dict[str, Group]:
    """Disjoint groups of the same size, each `share` of the units of every place, drawn at random.

    Where a place has too few units for that, so many places as make up the share have one each.

    Raises `ModelError` where they do not leave half of the units alone.
    """
    places = population(sites, unit)
    generator = np.random.default_rng([seed, len(names)])
    members: dict[str, dict[str, np.ndarray]] = {name: {} for name in names}
    for place, count in _counts(places, share, generator).items():
        total = places[place][0]
        if 2 * count * len(names) > total:
            raise ModelError(
                f"{place} is too small for {len(names)} groups that leave half of it alone",
                received=f"{total} units, {count} in each group",
                fix="take a smaller share",
            )
        drawn = generator.permutation(total)[: count * len(names)].reshape(len(names), count)
        for name, rows in zip(names, drawn, strict=True):
            members[name][place] = np.sort(rows).astype(np.int64)
    return {
        name: Group(
            granularity=GRANULARITY[unit],
            members=without_empty(own),
            shapes=places,
            provenance={"rule": f"plant: {name}", "share": share, "seed": seed, "unit": unit, "role": None},
        )
        for name, own in members.items()
    }


def _counts(places: Mapping[str, tuple[int, int]], share: float, generator: np.random.Generator) -> dict[str, int]:
    if all(share * total >= 0.5 for total, _ in places.values()):
        return {place: max(1, round(share * total)) for place, (total, _) in places.items()}
    wanted = max(1, round(share * sum(total for total, _ in places.values())))
    chosen = generator.permutation(len(places))[:wanted]
    names = list(places)
    return {names[at]: 1 for at in sorted(chosen)}
