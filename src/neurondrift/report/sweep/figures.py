"""Figures of a sweep: the forest plot over studies, and the ratios against the refusals that were lost."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Polygon
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from matplotlib.transforms import blended_transform_factory

from neurondrift.report import wording
from neurondrift.report.figures.style import BAND, FULL_WIDTH, GREY, INK, Mark, group_marks, letters, new_figure, words
from neurondrift.report.sweep.conclusion import done, judging, verdict_words
from neurondrift.report.sweep.findings import OneEffect, PooledEffect, SweepFindings
from neurondrift.report.wording import finite, ratio

#: Ticks within a power of ten, of axes that are long and short.
COARSE, FINE = (1.0, 2.0, 5.0), (1.0, 1.25, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0)


def sweep_forest(findings: SweepFindings) -> Figure | None:
    """The ratio of each judging group in every study, and over all of them; None where no study has ended."""
    pooled, studies = judging(findings), done(findings)
    if not pooled or not studies:
        return None
    rows = len(pooled) * (len(studies) + 2.5)
    figure = new_figure(1.2 + 0.185 * rows, "How far did the neurons of each group move, over the studies?")
    ax = figure.subplots()
    band = findings["sweep"]["band"]
    ax.set_xscale("log")
    ax.axvspan(1 / band, band, color=BAND, lw=0, zorder=0)
    ax.axvline(1, color=INK, lw=0.8, zorder=1)
    marks = group_marks([each["group"] for each in pooled], {each["group"]: each["role"] for each in pooled})
    at, ticks, labels = 0.0, [], []
    beside = blended_transform_factory(ax.transAxes, ax.transData)
    for effect in pooled:
        mark = marks[effect["group"]]
        ax.text(0.0, at, words(effect["group"]), transform=beside, ha="left", va="center", weight="bold", color=INK)
        for study in studies:
            at += 1
            ticks.append(at)
            labels.append(_short(study["name"]))
            _study(ax, next((e for e in study["effects"] if e["group"] == effect["group"]), None), at, mark)
        at += 1
        ticks.append(at)
        labels.append("over all")
        _diamond(ax, effect, at, mark)
        at += 1.5
    ax.set_yticks(ticks, labels)
    ax.set_ylim(at - 0.5, -0.8)
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    ax.set_xlabel("drift of members / drift of comparable neurons (log scale)")
    _limits(ax, findings, band)
    handles: list[Line2D | Patch] = [
        Line2D([], [], color=GREY, lw=3.2, marker="o", ms=5, label="one study, 90 % interval"),
        Line2D([], [], color=GREY, lw=1.0, label="95 % interval; faint: not comparable"),
        Patch(facecolor=GREY, label="over all, 95 % interval"),
        Line2D([], [], color=GREY, lw=1.0, ls=":", label="a further one, 95 %"),
        Patch(facecolor=BAND, label=f"counts as as far: within × {band:g}"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2)
    return figure


def _short(name: str) -> str:
    text = name.replace("__", "  ").replace("$", r"\$")
    return text if len(text) <= 44 else text[:43] + "…"


def _study(ax: Axes, effect: OneEffect | None, at: float, mark: Mark) -> None:
    beside = blended_transform_factory(ax.transAxes, ax.transData)
    value = finite(effect["ratio"]) if effect else None
    if effect is None or value is None:
        ax.text(1.01, at, "undefined" if effect else "not analysed", transform=beside, va="center", color=GREY)
        return
    faint = 1.0 if effect["comparable"] else 0.4
    for limits, width in ((effect["ratio_ci95"], 1.0), (effect["ratio_ci90"], 3.2)):
        _line(ax, limits, at, mark.colour, width, faint)
    ax.plot([value], [at], color=mark.colour, marker=mark.marker, ms=4.5, mec="white", mew=0.6, zorder=3, alpha=faint)
    said = wording.ratio_with_interval(effect) or f"{ratio(value)} no interval"
    ax.text(1.01, at, f"{said}  {wording.verdict(effect)}", transform=beside, va="center")


def _diamond(ax: Axes, effect: PooledEffect, at: float, mark: Mark) -> None:
    """The mean over the studies: as wide as its 95 % interval; dotted, the prediction interval."""
    beside = blended_transform_factory(ax.transAxes, ax.transData)
    value = finite(effect["ratio"])
    low, high = (finite(limit) for limit in effect["ratio_ci95"])
    if value is not None and low is not None and high is not None:
        corners = [(low, at), (value, at - 0.32), (high, at), (value, at + 0.32)]
        ax.add_patch(Polygon(corners, closed=True, facecolor=mark.colour, edgecolor=INK, lw=0.5, zorder=3))
        _line(ax, effect["ratio_prediction95"], at, mark.colour, 1.0, 1.0, ls=":")
    elif value is not None:
        ax.plot([value], [at], color=mark.colour, marker="D", ms=4.5, zorder=3)
    said = wording.ratio_with_interval(effect) or "no interval"
    ax.text(1.01, at, f"{said}  {verdict_words(effect)}", transform=beside, va="center", weight="bold")


def _line(
    ax: Axes, limits: Sequence[float | None], at: float, colour: str, width: float, alpha: float, ls: str = "-"
) -> None:
    low, high = (finite(limit) for limit in limits)
    if low is not None and high is not None:
        ax.plot([low, high], [at, at], color=colour, lw=width, ls=ls, alpha=alpha, solid_capstyle="butt", zorder=2)


def _limits(ax: Axes, findings: SweepFindings, band: float) -> None:
    """Limits that show every ratio, the intervals as far as they go to a tenth and ten, and the whole band."""
    values = [band**-1.5, band**1.5]
    for study in done(findings):
        for effect in study["effects"]:
            if effect["judging"]:
                values += [v for v in map(finite, (effect["ratio"], *effect["ratio_ci95"])) if v is not None]
    for pooled in judging(findings):
        values += [v for v in map(finite, (*pooled["ratio_ci95"], *pooled["ratio_prediction95"])) if v is not None]
    inside = [min(10.0, max(0.1, value)) for value in values if value > 0]
    ax.set_xlim(min(inside) * 0.96, max(inside) * 1.04)
    _ratio_ticks(ax.xaxis, inside)


def _ratio_ticks(axis: Axis, shown: Sequence[float]) -> None:
    """Ratios as ticks of a logarithmic axis, fewer where it spans much."""
    axis.set_major_locator(LogLocator(subs=COARSE if max(shown) / min(shown) > 4 else FINE))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def sweep_refusals(findings: SweepFindings) -> Figure | None:
    """The ratio of each judging group against the share of refusals lost, one panel a group; None without any."""
    fits = {each["group"]: each for each in findings["regressions"]}
    panels = []
    for effect in judging(findings):
        points = [
            (lost, value)
            for study in done(findings)
            for own in study["effects"]
            if own["group"] == effect["group"]
            and own["comparable"]
            and (value := finite(own["ratio"])) is not None
            and (lost := finite(study["refusals_lost"])) is not None
        ]
        if len(points) > 1:
            panels.append((effect, points))
    if not panels:
        return None
    marks = group_marks([e["group"] for e, _ in panels], {e["group"]: e["role"] for e, _ in panels})
    figure = new_figure(
        2.9, "Drift and lost refusals, over the studies", width=min(FULL_WIDTH, 3.4 * len(panels) + 0.4)
    )
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    band = findings["sweep"]["band"]
    for ax, (effect, points) in zip(axes, panels, strict=True):
        mark = marks[effect["group"]]
        ax.axhspan(1 / band, band, color=BAND, lw=0, zorder=0)
        ax.axhline(1, color=INK, lw=0.8, zorder=1)
        ax.set_yscale("log")
        ax.plot(
            [x for x, _ in points], [y for _, y in points], ls="", color=mark.colour, marker=mark.marker, ms=5, zorder=3
        )
        fit = fits.get(effect["group"])
        slope, intercept = (finite(fit["slope"]), finite(fit["intercept"])) if fit else (None, None)
        if slope is not None and intercept is not None:
            ends = [min(x for x, _ in points), max(x for x, _ in points)]
            ax.plot(ends, [math.exp(intercept + slope * x) for x in ends], color=mark.colour, lw=1.0, zorder=2)
        ax.set_title(words(effect["group"]))
        _ratio_ticks(ax.yaxis, [1 / band, band, *(value for _, points in panels for _, value in points)])
    axes[0].set_ylabel("ratio to comparable neurons")
    figure.supxlabel("refusals lost, share of harmful requests", fontsize=axes[0].yaxis.label.get_size())
    letters(list(axes))
    return figure


FIGURES = (sweep_forest, sweep_refusals)
