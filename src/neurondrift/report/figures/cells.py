"""The cells of a map of layers and module types, as data: where they lie, what they hold, where colours end."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from neurondrift.report.findings.statistical import Effect, Findings, SiteEffect
from neurondrift.report.reading import effects_of
from neurondrift.report.wording import finite

#: Ratios at the ends of the colour map, the smallest that holds most cells being taken.
COLOUR_LIMITS = (1.05, 1.1, 1.25, 1.5, 2.0, 3.0, 5.0)
MOST_CELLS = 0.95

#: A layer and a module type.
Place = tuple[int | None, str]
Site = TypeVar("Site", bound=Mapping[str, Any])


class Axes(NamedTuple):
    """Layers from the first on, those without one last, and module types in the order of the model."""

    layers: list[int | None]
    modules: list[str]


class RatioCell(NamedTuple):
    """The logarithm of the ratio (None: undefined), of how many members, in how many sites."""

    log_ratio: float | None
    n: int
    sites: int


class RatioMaps(NamedTuple):
    """The maps of several groups: where their cells lie, each group's own, the log ratio at the end of the colours, and
    whether some cells lie beyond it."""

    axes: Axes
    cells: dict[str, dict[Place, RatioCell]]
    limit: float
    beyond: bool


def ratio_maps(effects: Sequence[Effect]) -> RatioMaps:
    """The maps of some effects, at least one, on common axes and colours."""
    cells = {effect["group"]: ratio_cells(effect) for effect in effects}
    sizes = [abs(cell.log_ratio) for own in cells.values() for cell in own.values() if cell.log_ratio is not None]
    return RatioMaps(axes_of(effects), cells, *colour_limit(sizes))


def mapped_effects(results: Findings, metric: str) -> list[Effect]:
    """The effects in one metric that have ratios of sites, in the order of the groups."""
    return [e for e in effects_of(results, metric) if any("ratio" in cell for cell in e["by_site"])]


def axes_of(effects: Sequence[Effect]) -> Axes:
    """Where the cells of several groups lie; modules as in the group that lists most of them, then any others."""
    cells = [cell for effect in effects for cell in effect["by_site"]]
    listed = max(([part["name"] for part in effect["by_module"]] for effect in effects), key=len)
    known = {cell["module_type"] for cell in cells}
    modules = [name for name in dict.fromkeys([*listed, *sorted(known)]) if name in known]
    return Axes(layers_of(cells), modules)


def layers_of(cells: Iterable[Mapping[str, Any]]) -> list[int | None]:
    """The layers in their order; None, for what is in no layer, last."""
    known = {cell["layer"] for cell in cells}
    return sorted(known, key=lambda layer: math.inf if layer is None else layer)


def by_place(sites: Iterable[Site], layer_and_module: Callable[[Site], Place]) -> dict[Place, list[Site]]:
    """The sites at each place: more than one where experts share a layer and a module type."""
    places: dict[Place, list[Site]] = {}
    for site in sites:
        places.setdefault(layer_and_module(site), []).append(site)
    return places


def ratio_cells(effect: Effect) -> dict[Place, RatioCell]:
    """The cells of one group. Where experts share a place, the mean of their log ratios weighted by their members."""
    return {
        place: _together(sites)
        for place, sites in by_place(effect["by_site"], lambda cell: (cell["layer"], cell["module_type"])).items()
    }


def _together(sites: Sequence[SiteEffect]) -> RatioCell:
    known = [(found, site["n"]) for site in sites if (found := log_ratio(site)) is not None and site["n"]]
    members = sum(n for _, n in known)
    mean = sum(found * n for found, n in known) / members if members else None
    return RatioCell(mean, sum(site["n"] for site in sites), len(sites))


def log_ratio(cell: SiteEffect) -> float | None:
    """The logarithm of a site's ratio, None where it is undefined."""
    value = finite(cell.get("ratio"))
    return None if value is None or value <= 0 else math.log(value)


def colour_limit(sizes: Sequence[float]) -> tuple[float, bool]:
    """The limit of the colours, a log ratio, and whether some cells lie beyond it."""
    limits = [math.log(limit) for limit in COLOUR_LIMITS]
    if not sizes:
        return limits[0], False
    most = sorted(sizes)[math.ceil(MOST_CELLS * len(sizes)) - 1]
    limit = next((limit for limit in limits if most <= limit), limits[-1])
    return limit, max(sizes) > limit
