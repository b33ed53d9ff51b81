"""The figure of the final drift: how it is distributed among the members of each group and among their controls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from neurondrift.report.figures.style import (
    FULL_WIDTH,
    GREY,
    LEAST_WIDTH,
    METRIC_LABELS,
    METRIC_TITLES,
    Mark,
    group_marks,
    legend_below,
    new_figure,
    titled,
    words,
)
from neurondrift.report.findings.statistical import DriftDistribution, Findings
from neurondrift.report.reading import drawn_groups, metrics_among, roles_of
from neurondrift.report.wording import finite

#: Spans of drift up to here get ticks at 1 and 3 of each power of ten.
FEW_DECADES = 30
#: From so many columns on, panels have room for so many ticks only.
ROOM = {1: 5, 5: 3, 7: 2}


def final_drift_distributions(results: Findings) -> Figure | None:
    """Final drift of the members and of their matched controls: a row per metric, a column per group."""
    shown = [
        d for d in results.get("distributions") or [] if d["edges"] and all((finite(e) or 0) > 0 for e in d["edges"])
    ]
    metrics = metrics_among(results, (d["metric"] for d in shown))
    groups = drawn_groups(results, (d["group"] for d in shown))
    if not shown:
        return None
    marks = group_marks(groups, roles_of(results))
    figure = new_figure(
        0.9 + 1.35 * len(metrics),
        "Final drift of each group and of controls of the same site and norm",
        width=max(LEAST_WIDTH, FULL_WIDTH * min(1, len(groups) / 3)),
    )
    axes = figure.subplots(len(metrics), len(groups), squeeze=False, sharex="row", sharey="row")
    for row, metric in zip(axes, metrics, strict=True):
        for ax, group in zip(row, groups, strict=True):
            _panel(
                ax,
                [d for d in shown if (d["metric"], d["group"]) == (metric, group)],
                marks[group],
                next(ticks for columns, ticks in reversed(ROOM.items()) if len(groups) >= columns),
            )
        row[0].set_ylabel("density")
        row[0].set_ylim(0, 1.22 * max(row[0].get_ylim()[1], 1e-9))
        label = ", ".join(filter(None, (METRIC_TITLES.get(metric, words(metric)), METRIC_LABELS.get(metric))))
        row[len(groups) // 2].set_xlabel(label, x=0.5 if len(groups) % 2 else 0.0)
    for ax, group in zip(axes[0], groups, strict=True):
        ax.set_title(titled(group))
    handles: list[Any] = [
        Patch(facecolor=GREY, alpha=0.5, label="members of the group"),
        Line2D([], [], color="black", lw=1.1, label="controls of the same site and norm"),
    ]
    if len({d["seed"] for d in shown}) > 1:
        handles.append(Line2D([], [], color=GREY, lw=0.5, label="thin: each seed"))
    legend_below(figure, handles, columns=3)
    return figure


def _panel(ax: Axes, seeds: Sequence[DriftDistribution], mark: Mark, ticks: int) -> None:
    """One group in one metric: the mean over seeds above each seed's histograms."""
    shared = _mean_histogram(seeds)
    for one in seeds:
        _histogram(ax, one, mark, width=0.4 if shared else 0.8, fill=0.0 if shared else 0.15)
    if shared:
        _histogram(ax, shared, mark, width=1.1, fill=0.4)
    _log_axis(ax, [edge for one in seeds for edge in one["edges"]], ticks)
    counts = "\n".join(f"n = {one['n_members']:,}" for one in seeds[:1])
    ax.text(0.99, 0.98, counts, transform=ax.transAxes, ha="right", va="top", color=GREY)
    if not seeds:
        ax.text(0.5, 0.5, "not measured", transform=ax.transAxes, ha="center", va="center", color=GREY)


def _mean_histogram(seeds: Sequence[DriftDistribution]) -> DriftDistribution | None:
    """The mean over seeds of densities over the same edges; None where there are none, or the edges differ."""
    if not seeds or any(one["edges"] != seeds[0]["edges"] for one in seeds):
        return None
    means = seeds[0].copy()
    means["members"] = [sum(values) / len(values) for values in zip(*map(_members, seeds), strict=True)]
    means["controls"] = [sum(values) / len(values) for values in zip(*map(_controls, seeds), strict=True)]
    return means


def _members(one: DriftDistribution) -> list[float]:
    return [finite(density) or 0.0 for density in one["members"]]


def _controls(one: DriftDistribution) -> list[float]:
    return [finite(density) or 0.0 for density in one["controls"]]


def _histogram(ax: Axes, one: DriftDistribution, mark: Mark, *, width: float, fill: float) -> None:
    edges, members = one["edges"], _members(one)
    if fill:
        ax.stairs(members, edges, fill=True, color=mark.colour, alpha=fill, lw=0)
    ax.stairs(members, edges, color=mark.colour, lw=width)
    ax.stairs(_controls(one), edges, color="black", lw=width)


def _log_axis(ax: Axes, edges: Sequence[float], ticks: int) -> None:
    ax.set_xscale("log")
    ax.set_yticks([])
    ax.xaxis.set_minor_formatter(NullFormatter())
    if edges and max(edges) / min(edges) < FEW_DECADES and min(edges) > 1e-3:
        ax.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    else:
        ax.xaxis.set_major_locator(LogLocator(numticks=ticks))
