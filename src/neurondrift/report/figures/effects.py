"""Figures of the matched effects: the forest plot, and the map of layers and module types."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from matplotlib.transforms import blended_transform_factory

from neurondrift.report import wording
from neurondrift.report.figures.cells import mapped_effects, ratio_maps
from neurondrift.report.figures.style import (
    BAND,
    FULL_WIDTH,
    GREY,
    INK,
    LEAST_WIDTH,
    METRIC_TITLES,
    Mark,
    group_marks,
    letters,
    new_figure,
    titled,
    words,
)
from neurondrift.report.findings.statistical import Effect, Findings
from neurondrift.report.reading import (
    analysis_of,
    comparisons_of,
    drawn_groups,
    effects_of,
    in_group_order,
    judged,
    metrics_of,
    primary_of,
    roles_of,
)
from neurondrift.report.wording import finite

DIVERGING = "PuOr_r"
#: Panels beside each other, at most.
MOST_PANELS = 5
#: Points between the line of no effect and the names of its sides.
BESIDE_ONE = 6.0
#: Rows between a ratio that judges and the published one under it.
BELOW = 0.34
#: Ratios that may be ticks, and the fewest that a panel must show.
TICKS = (0.1, 0.2, 0.33, 0.5, 0.67, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 3.0, 5.0, 10.0)
FEW_TICKS = 7


def effect_sizes(results: Findings) -> Figure | None:
    """Forest plot of the ratio of every group in every metric by both comparisons, with the band of equivalence."""
    metrics = metrics_of(results)
    effects = [effect for effect in effects_of(results) if judged(effect) is not None]
    groups = in_group_order(results, (effect["group"] for effect in effects))
    analysis = analysis_of(results)
    if analysis is None or not effects:
        return None
    by_key = {(e["group"], e["metric"]): e for e in effects}
    rows = len(groups) * (len(metrics) + 1)
    figure = new_figure(1.3 + 0.185 * rows, "How far did the neurons of each group move, beside comparable neurons?")
    ax = figure.subplots()
    band = finite(analysis.get("band")) or 1.0
    ax.set_xscale("log")
    ax.axvspan(1 / band, band, color=BAND, lw=0, zorder=0)
    ax.axvline(1, color=INK, lw=0.8, zorder=1)
    marks = group_marks(groups, roles_of(results))
    at, ticks, labels = 0.0, [], []
    for group in groups:
        ax.text(
            -0.012,
            at,
            words(group),
            transform=blended_transform_factory(ax.transAxes, ax.transData),
            ha="right",
            va="center",
            weight="bold",
            color=INK,
        )
        for metric in metrics:
            at += 1
            ticks.append(at)
            labels.append(METRIC_TITLES.get(metric, words(metric)).lower().replace("l2", "L2"))
            _forest_row(ax, by_key.get((group, metric)), at, marks[group])
        at += 1.25
    ax.set_yticks(ticks, labels)
    ax.set_ylim(at - 0.5, -0.7)
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    ax.set_xlabel("drift of members / drift of comparable neurons (log scale)")
    _ratio_axis(ax, effects, band)
    _name_the_sides(ax)
    handles: list[Line2D | Patch] = [
        Line2D([], [], color=GREY, lw=3.2, marker="o", ms=5, label="ratio that judges, 90 % interval"),
        Line2D([], [], color=GREY, lw=1.0, label="95 % interval"),
    ]
    if any(effect.get("effect_matched") for effect in effects):
        handles.append(Line2D([], [], color=GREY, lw=0.7, marker="o", ms=3, mfc="white", label="by norm only, 95 %"))
    if band > 1:
        handles.append(Patch(facecolor=BAND, label=f"counts as as far: within × {band:g}"))
    figure.legend(handles=handles, loc="outside lower center", ncols=2)
    return figure


def _forest_row(ax: Axes, effect: Effect | None, at: float, mark: Mark) -> None:
    beside = blended_transform_factory(ax.transAxes, ax.transData)
    found = judged(effect) if effect else None
    value = finite(found["ratio"]) if found else None
    if found is None or value is None:
        ax.text(1.01, at, "undefined" if effect else "not analysed", transform=beside, va="center", color=GREY)
        return
    faint = 1.0 if found["comparable"] else 0.4
    for limits, width in ((found["ratio_ci95"], 1.0), (found["ratio_ci90"], 3.2)):
        _whisker(ax, limits, at, mark, width, faint)
    ax.plot([value], [at], color=mark.colour, marker=mark.marker, ms=5, mec="white", mew=0.6, zorder=3, alpha=faint)
    norm = effect.get("effect_norm") if effect else None
    beneath = finite(norm["ratio"]) if norm and norm is not found else None
    if norm and beneath is not None:
        _whisker(ax, norm["ratio_ci95"], at + BELOW, mark, 0.7, 0.8)
        ax.plot([beneath], [at + BELOW], color=mark.colour, marker=mark.marker, ms=3, mfc="white", mew=0.7, zorder=3)
    said = wording.ratio_with_interval(found) or f"{wording.ratio(value)} no interval"
    ax.text(1.01, at, f"{said}  {wording.verdict(found)}", transform=beside, va="center")


def _whisker(ax: Axes, limits: Sequence[float | None], at: float, mark: Mark, width: float, alpha: float) -> None:
    low, high = (finite(limit) for limit in limits)
    if low is not None and high is not None:
        ax.plot([low, high], [at, at], color=mark.colour, lw=width, alpha=alpha, solid_capstyle="butt", zorder=2)


def _name_the_sides(ax: Axes) -> None:
    """What lies to the left and to the right of 1, above the panel, each label `BESIDE_ONE` points from the line.

    The distance is no spaces in the text: an SVG drops those at its ends, so that the labels would touch.
    """
    above = blended_transform_factory(ax.transData, ax.transAxes)
    for text, side, alignment in (("← moved less far", -1, "right"), ("moved further →", 1, "left")):
        ax.annotate(
            text,
            (1, 1),
            xycoords=above,
            xytext=(side * BESIDE_ONE, 3),
            textcoords="offset points",
            ha=alignment,
            va="bottom",
            color=GREY,
            annotation_clip=False,
        )


def _ratio_axis(ax: Axes, effects: Sequence[Effect], band: float) -> None:
    """Limits that show every interval and the whole band, with 1 inside, and ratios as ticks."""
    shown = [v for e in effects for found in comparisons_of(e) for v in (found["ratio"], *found["ratio_ci95"])]
    values = [v for v in map(finite, shown) if v is not None and v > 0] + [band**-1.3, band**1.3, 0.95, 1.05]
    low, high = math.log(min(values)), math.log(max(values))
    room = 0.04 * (high - low)
    ax.set_xlim(math.exp(low - room), math.exp(high + room))
    inside = [tick for tick in TICKS if low - room <= math.log(tick) <= high + room]
    if len(inside) > FEW_TICKS:
        inside = [tick for tick in inside if tick not in (0.9, 1.1, 0.67, 1.5)]
    ax.xaxis.set_major_locator(FixedLocator(inside))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.xaxis.set_minor_locator(NullLocator())


def layer_module_effects(results: Findings) -> Figure | None:
    """The ratio of every site in the primary metric: layers against module types, one panel per group."""
    metric = primary_of(results)
    drawn = drawn_groups(results, (e["group"] for e in effects_of(results, metric)))
    effects = [effect for effect in mapped_effects(results, metric) if effect["group"] in drawn]
    if not effects:
        return None
    (layers, modules), cells, limit, beyond = ratio_maps(effects)
    rows = math.ceil(len(effects) / MOST_PANELS)
    columns = math.ceil(len(effects) / rows)
    width = max(LEAST_WIDTH, min(FULL_WIDTH, 1.2 + 1.5 * columns))
    figure = new_figure(
        0.5 + rows * (1.2 + max(1.2, min(5.5, 0.105 * len(layers)))),
        f"Ratio to comparable neurons by layer and module: {wording.metric_name(metric)}",
        width=width,
    )
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    axes = list(grid.flat)[: len(effects)]
    for ax in list(grid.flat)[len(effects) :]:
        ax.set_axis_off()
    norm = Normalize(-limit, limit)
    colours = colormaps[DIVERGING]
    for ax, effect in zip(axes, effects, strict=True):
        ax.add_patch(
            Rectangle(
                (0, 0),
                1,
                1,
                transform=ax.transAxes,
                facecolor="#F2F2F2",
                edgecolor="#BDBDBD",
                hatch="/////",
                lw=0,
                zorder=0,
            )
        )
        values = [[math.nan] * len(modules) for _ in layers]
        for (layer, module), cell in cells[effect["group"]].items():
            found = cell.log_ratio
            values[layers.index(layer)][modules.index(module)] = math.nan if found is None else found
        mesh = ax.pcolormesh(values, cmap=colours, norm=norm, edgecolors="white", linewidth=0.3, zorder=1)
        ax.set_title(titled(effect["group"]))
        ax.set_xticks([i + 0.5 for i in range(len(modules))], [words(m) for m in modules], rotation=90)
        ax.tick_params(length=0, labelbottom=True)
        for side in ("left", "bottom"):
            ax.spines[side].set_visible(False)
    every = max(1, math.ceil(len(layers) / 12))
    chosen = list(range(0, len(layers), every))
    axes[0].set_yticks([i + 0.5 for i in chosen], ["none" if layers[i] is None else str(layers[i]) for i in chosen])
    for row in grid:
        row[0].set_ylabel("layer")
    bar = figure.colorbar(
        mesh, ax=list(grid.flat), extend="both" if beyond else "neither", fraction=0.05, pad=0.02, aspect=25
    )
    steps = (-limit, -limit / 2, 0.0, limit / 2, limit)
    bar.set_ticks(steps, labels=[f"{math.exp(step):.2f}" for step in steps])
    bar.set_label("ratio (orange: further)")
    bar.ax.spines["outline"].set_visible(False)
    letters(axes)
    figure.legend(
        handles=[
            Patch(facecolor="#F2F2F2", edgecolor="#BDBDBD", hatch="/////", label="no members there, or undefined"),
            Line2D([], [], ls="", label="a cell is one site with few neurons: read patterns"),
        ],
        loc="outside lower center",
        ncols=2 if width > LEAST_WIDTH else 1,
    )
    return figure
