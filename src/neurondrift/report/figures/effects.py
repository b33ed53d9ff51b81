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
from matplotlib.transforms import blended_transform_factory

from neurondrift.report import wording
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
    words,
)
from neurondrift.report.findings.statistical import Effect, Findings, SiteEffect
from neurondrift.report.reading import analysis_of, effects_of, in_group_order, metrics_of, primary_of, roles_of
from neurondrift.report.wording import finite

#: Limits of the colour map, the smallest that holds most cells being taken.
COLOUR_LIMITS = (0.25, 0.5, 1.0, 1.5, 2.0, 3.0)
MOST_CELLS = 0.95
DIVERGING = "PuOr_r"
#: Points between the line of no effect and the names of its sides.
BESIDE_ZERO = 6.0


def effect_sizes(results: Findings) -> Figure | None:
    """Forest plot of g of every group in every metric, with the band that counts as no difference."""
    metrics = metrics_of(results)
    effects = effects_of(results)
    groups = in_group_order(results, (effect["group"] for effect in effects))
    analysis = analysis_of(results)
    if analysis is None or not effects:
        return None
    by_key = {(e["group"], e["metric"]): e for e in effects}
    rows = len(groups) * (len(metrics) + 1)
    figure = new_figure(1.15 + 0.185 * rows, "Did the neurons of each group drift more than comparable neurons?")
    ax = figure.subplots()
    sesoi = finite(analysis["sesoi"]) or 0.0
    ax.axvspan(-sesoi, sesoi, color=BAND, lw=0, zorder=0)
    ax.axvline(0, color=INK, lw=0.8, zorder=1)
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
    ax.set_ylim(at - 0.6, -0.7)
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    ax.set_xlabel("effect size g of members against matched controls, in SD within strata")
    _symmetric(ax, effects, sesoi)
    _name_the_sides(ax)
    band = [Patch(facecolor=BAND, label=f"counts as the same (H2): |g| < {sesoi:g}")] if sesoi else []
    figure.legend(
        handles=[
            Line2D([], [], color=GREY, lw=3.2, marker="o", ms=5, label="g with 90 % interval"),
            Line2D([], [], color=GREY, lw=1.0, label="95 % interval"),
            *band,
        ],
        loc="outside lower center",
        ncols=3,
    )
    return figure


def _forest_row(ax: Axes, effect: Effect | None, at: float, mark: Mark) -> None:
    beside = blended_transform_factory(ax.transAxes, ax.transData)
    value = finite(effect["g"]["value"]) if effect else None
    if effect is None or value is None:
        ax.text(1.01, at, "undefined" if effect else "not analysed", transform=beside, va="center", color=GREY)
        return
    g = effect["g"]
    for limits_of_g, width in ((g["ci95"], 1.0), (g["ci90"], 3.2)):
        low, high = (finite(limit) for limit in limits_of_g)
        if low is not None and high is not None:
            ax.plot([low, high], [at, at], color=mark.colour, lw=width, solid_capstyle="butt", zorder=2)
    ax.plot([value], [at], color=mark.colour, marker=mark.marker, ms=5, mec="white", mew=0.6, zorder=3)
    limits = wording.interval(g["ci95"], wording.effect) or "no interval"
    ax.text(
        1.01,
        at,
        f"{wording.effect(value)} {limits}  {words(effect['verdict'])}".replace("-", "−"),
        transform=beside,
        va="center",
    )


def _name_the_sides(ax: Axes) -> None:
    """What lies to the left and to the right of 0, above the panel, each label `BESIDE_ZERO` points from the line.

    The distance is no spaces in the text: an SVG drops those at its ends, so that the labels would touch.
    """
    above = blended_transform_factory(ax.transData, ax.transAxes)
    for text, side, alignment in (("← drifted less", -1, "right"), ("drifted more (H1) →", 1, "left")):
        ax.annotate(
            text,
            (0, 1),
            xycoords=above,
            xytext=(side * BESIDE_ZERO, 3),
            textcoords="offset points",
            ha=alignment,
            va="bottom",
            color=GREY,
            annotation_clip=False,
        )


def _symmetric(ax: Axes, effects: Sequence[Effect], sesoi: float) -> None:
    """Limits that show every interval and the whole band, with 0 inside."""
    shown = [v for e in effects for v in (e["g"]["value"], *e["g"]["ci95"])]
    values = [v for v in map(finite, shown) if v is not None] + [-1.6 * sesoi, 1.6 * sesoi, -0.05, 0.05]
    room = 0.04 * (max(values) - min(values))
    ax.set_xlim(min(values) - room, max(values) + room)


def layer_module_effects(results: Findings) -> Figure | None:
    """g of every site in the primary metric: layers against module types, one panel per group."""
    metric = primary_of(results)
    effects = [e for e in effects_of(results, metric) if e["by_site"]]
    cells = [c for e in effects for c in e["by_site"]]
    if not cells:
        return None
    modules = _modules(effects, cells)
    layers: list[int | None] = [*sorted({c["layer"] for c in cells if c["layer"] is not None})]
    if any(c["layer"] is None for c in cells):
        layers.append(None)
    limit, beyond = _colour_limit([abs(g) for c in cells if (g := finite(c["g"])) is not None])
    width = max(LEAST_WIDTH, min(FULL_WIDTH, 1.2 + 1.5 * len(effects)))
    figure = new_figure(
        1.7 + max(1.2, min(5.5, 0.105 * len(layers))),
        f"Where each group drifted more or less than its controls: {wording.metric_name(metric)}",
        width=width,
    )
    axes = figure.subplots(1, len(effects), squeeze=False, sharey=True)[0]
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
        for cell in effect["by_site"]:
            g = finite(cell["g"])
            values[layers.index(cell["layer"])][modules.index(cell["module_type"])] = math.nan if g is None else g
        mesh = ax.pcolormesh(values, cmap=colours, norm=norm, edgecolors="white", linewidth=0.3, zorder=1)
        ax.set_title(words(effect["group"]))
        ax.set_xticks([i + 0.5 for i in range(len(modules))], [words(m) for m in modules], rotation=90)
        ax.tick_params(length=0)
        for side in ("left", "bottom"):
            ax.spines[side].set_visible(False)
    every = max(1, math.ceil(len(layers) / 12))
    chosen = list(range(0, len(layers), every))
    axes[0].set_yticks([i + 0.5 for i in chosen], ["none" if layers[i] is None else str(layers[i]) for i in chosen])
    axes[0].set_ylabel("layer")
    bar = figure.colorbar(
        mesh, ax=list(axes), extend="both" if beyond else "neither", fraction=0.05, pad=0.02, aspect=25
    )
    bar.set_label("g (orange: more than controls)")
    bar.ax.spines["outline"].set_visible(False)
    letters(list(axes))
    figure.legend(
        handles=[
            Patch(facecolor="#F2F2F2", edgecolor="#BDBDBD", hatch="/////", label="no members there, or undefined"),
            Line2D([], [], ls="", label="a cell is one site with few neurons: read patterns"),
        ],
        loc="outside lower center",
        ncols=2 if width > LEAST_WIDTH else 1,
    )
    return figure


def _modules(effects: Sequence[Effect], cells: Sequence[SiteEffect]) -> list[str]:
    """Module types in the order of the model: as in the group that lists most of them, then any others."""
    listed = max(([part["name"] for part in effect["by_module"]] for effect in effects), key=len)
    known = {cell["module_type"] for cell in cells}
    return [name for name in dict.fromkeys([*listed, *sorted(known)]) if name in known]


def _colour_limit(sizes: Sequence[float]) -> tuple[float, bool]:
    """The limit of the colours, and whether some cells lie beyond it."""
    if not sizes:
        return COLOUR_LIMITS[0], False
    most = sorted(sizes)[math.ceil(MOST_CELLS * len(sizes)) - 1]
    limit = next((limit for limit in COLOUR_LIMITS if most <= limit), COLOUR_LIMITS[-1])
    return limit, max(sizes) > limit
