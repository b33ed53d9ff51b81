"""The maps of the page as data: ratios of the groups by layer and module type, and where the lost margin lies."""

from __future__ import annotations

import math
from collections.abc import Sequence

from neurondrift.report import wording
from neurondrift.report.blocks import Cell, Map, Panel
from neurondrift.report.figures.cells import RatioCell, by_place, layers_of, mapped_effects, ratio_maps
from neurondrift.report.findings.attribution import AttributionFindings, SiteShare
from neurondrift.report.findings.statistical import Findings
from neurondrift.report.reading import primary_of
from neurondrift.report.wording import clean, hundredths, ratio

#: Values that the key names.
STEPS = (-1.0, -0.5, 0.0, 0.5, 1.0)


def of_effects(results: Findings) -> tuple[Map, ...]:
    """The ratio of every site in the primary metric, a panel per group; nothing where there are none."""
    metric = primary_of(results)
    effects = mapped_effects(results, metric)
    if not effects:
        return ()
    (layers, modules), cells, limit, beyond = ratio_maps(effects)
    panels = [
        Panel(
            title=clean(effect["group"]),
            cells=tuple(
                Cell(
                    row=layers.index(layer),
                    column=modules.index(module),
                    value=None if found.log_ratio is None else max(-1.0, min(1.0, found.log_ratio / limit)),
                    text=_ratio_text(found),
                )
                for (layer, module), found in cells[effect["group"]].items()
            ),
        )
        for effect in effects
    ]
    made = Map(
        title=f"Ratio to comparable neurons by layer and module: {wording.metric_name(metric)}",
        rows=_layers(layers),
        columns=tuple(map(clean, modules)),
        panels=tuple(panels),
        key=_key([ratio(math.exp(step * limit)) for step in STEPS], beyond=beyond),
        notes=("orange: further; a cell is one site with few neurons: read patterns",),
        figure="layer_module_effects",
    )
    return (made,)


def _ratio_text(cell: RatioCell) -> str:
    value = "undefined" if cell.log_ratio is None else ratio(math.exp(cell.log_ratio))
    where = f", mean of {cell.sites} sites" if cell.sites > 1 else ""
    return f"{value}{where}, {cell.n:,} member{'' if cell.n == 1 else 's'}"


def of_shares(found: AttributionFindings) -> tuple[Map, ...]:
    """The share of the lost margin of every layer and module type; nothing in findings of older versions."""
    sites = found.get("by_site", [])
    if not sites:
        return ()
    layers = layers_of(sites)
    modules = list(dict.fromkeys(site["module_type"] for site in sites))
    places = by_place(sites, lambda site: (site["layer"], site["module_type"]))
    shares = {place: sum(site["share"] for site in own) for place, own in places.items()}
    limit = max(map(abs, shares.values())) or 1.0
    cells = [
        Cell(
            row=layers.index(layer),
            column=modules.index(module),
            value=shares[layer, module] / limit,
            text=_share_text(shares[layer, module], own),
        )
        for (layer, module), own in places.items()
    ]
    made = Map(
        title="Share of the lost refusal margin by layer and module, all neurons",
        rows=_layers(layers),
        columns=tuple(map(clean, modules)),
        panels=(Panel(title="all neurons", cells=tuple(cells)),),
        key=_key([hundredths(step * limit) for step in STEPS], beyond=False),
        notes=("orange: carries loss; purple: gained margin",),
    )
    return (made,)


def _share_text(share: float, sites: Sequence[SiteShare]) -> str:
    where = f", {len(sites)} sites" if len(sites) > 1 else ""
    return f"{hundredths(share)}{where}, {sum(site['n'] for site in sites):,} neurons"


def _layers(layers: Sequence[int | None]) -> tuple[str, ...]:
    return tuple("none" if layer is None else str(layer) for layer in layers)


def _key(labels: Sequence[str], *, beyond: bool) -> tuple[tuple[float, str], ...]:
    """What values mean; with `beyond` some lie outside the ends."""
    named = list(labels)
    if beyond:
        named[0], named[-1] = f"≤ {named[0]}", f"≥ {named[-1]}"
    return tuple(zip(STEPS, named, strict=True))
