"""Figures along the training: drift of the groups, refusals, and the distributions at the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from neurondrift.report.figures.style import (
    FULL_WIDTH,
    GREY,
    KIND_MARKS,
    LEAST_WIDTH,
    METRIC_LABELS,
    METRIC_TITLES,
    Mark,
    group_marks,
    letters,
    new_figure,
    step_axis,
    words,
)
from neurondrift.report.reading import behaviour_of, group_order, kinds_of, metrics_of, primary_of, rates_of, roles_of
from neurondrift.report.wording import ALL, KINDS, Record, finite

ARMS = ("members", "controls")
#: Room in points for the power of ten of an axis, between the panel and its title.
ABOVE_POWER = 16.0
#: Spans of drift up to here get ticks at 1 and 3 of each power of ten.
FEW_DECADES = 30


class Line(NamedTuple):
    """A curve with its limits, where they are known."""

    steps: list[float]
    values: list[float]
    low: list[float]
    high: list[float]


def drift_over_training(results: Record) -> Figure | None:
    """Mean drift of every group and of its controls, one panel a metric."""
    points = results.get("trajectories") or []
    known = {str(p["metric"]) for p in points}
    metrics = [m for m in metrics_of(results) if m in known] + sorted(known - set(metrics_of(results)))
    if not metrics:
        return None
    groups = sorted(dict.fromkeys(str(p["group"]) for p in points if p["group"] != ALL), key=group_order(results))
    marks = group_marks(groups, roles_of(results))
    seeds = len({p["seed"] for p in points})
    figure = new_figure(
        3.0,
        "How far the neurons of each group moved during fine-tuning",
        width=max(LEAST_WIDTH, FULL_WIDTH * len(metrics) / 3),
    )
    axes = figure.subplots(1, len(metrics), squeeze=False)[0]
    for ax, metric in zip(axes, metrics, strict=True):
        chosen = [p for p in points if p["metric"] == metric]
        _curves(ax, _lines(chosen, ALL, "members"), Mark(GREY, ""), "-", width=2.4, alpha=0.55)
        for group in groups:
            _curves(ax, _lines(chosen, group, "controls"), Mark(marks[group].colour, ""), (0, (3.5, 2.0)), width=1.0)
            _curves(ax, _lines(chosen, group, "members"), marks[group], "-")
        ax.set(
            xlabel="training step",
            ylabel=METRIC_LABELS.get(metric, words(metric)),
            title=METRIC_TITLES.get(metric, words(metric)),
        )
        ax.yaxis.set_major_locator(MaxNLocator(5))
        ax.set_ylim(bottom=0)
        step_axis(ax, max((p["step"] for p in chosen), default=1))
    letters(list(axes), pad=ABOVE_POWER)
    handles = [Line2D([], [], color=m.colour, marker=m.marker, label=words(g)) for g, m in marks.items()]
    if any(p.get("controls") for p in points):
        handles.append(Line2D([], [], color=GREY, ls=(0, (3.5, 2.0)), lw=1.0, label="matched controls, same colour"))
    if any(p["group"] == ALL for p in points):
        handles.append(Line2D([], [], color=GREY, lw=2.4, alpha=0.55, label="all neurons"))
    _legend(figure, [*handles, _spread_handle(seeds)], columns=4 if len(metrics) > 2 else 2)
    return figure


def final_drift_distributions(results: Record) -> Figure | None:
    """Final drift of the members and of their matched controls: a row a metric, a column a group."""
    records = [
        r
        for r in results.get("distributions") or []
        if r.get("edges") and all((finite(edge) or 0) > 0 for edge in r["edges"])
    ]
    known = {str(r["metric"]) for r in records}
    metrics = [m for m in metrics_of(results) if m in known] + sorted(known - set(metrics_of(results)))
    groups = sorted(dict.fromkeys(str(r["group"]) for r in records), key=group_order(results))
    if not records:
        return None
    marks = group_marks(groups, roles_of(results))
    figure = new_figure(
        0.9 + 1.35 * len(metrics),
        "Final drift of each group's neurons and of their matched controls",
        width=max(LEAST_WIDTH, FULL_WIDTH * min(1, len(groups) / 3)),
    )
    axes = figure.subplots(len(metrics), len(groups), squeeze=False, sharex="row", sharey="row")
    for row, metric in enumerate(metrics):
        for column, group in enumerate(groups):
            ax = axes[row][column]
            chosen = [r for r in records if (r["metric"], r["group"]) == (metric, group)]
            shared = _mean_histogram(chosen)
            for record in chosen:
                _histogram(ax, record, marks[group], width=0.4 if shared else 0.8, fill=0.0 if shared else 0.15)
            if shared:
                _histogram(ax, shared, marks[group], width=1.1, fill=0.4)
            _log_axis(ax, chosen)
            counts = "\n".join(f"n = {r['n_members']:,}" for r in chosen[:1] if finite(r.get("n_members")) is not None)
            ax.text(0.99, 0.98, counts, transform=ax.transAxes, ha="right", va="top", color=GREY)
            if not chosen:
                ax.text(0.5, 0.5, "not measured", transform=ax.transAxes, ha="center", va="center", color=GREY)
            if row == 0:
                ax.set_title(words(group))
            if column == 0:
                ax.set_ylabel("density")
        axes[row][0].set_ylim(0, 1.22 * max(axes[row][0].get_ylim()[1], 1e-9))
        label = ", ".join(filter(None, (METRIC_TITLES.get(metric, words(metric)), METRIC_LABELS.get(metric))))
        axes[row][len(groups) // 2].set_xlabel(label, x=0.5 if len(groups) % 2 else 0.0)
    handles: list[Any] = [
        Patch(facecolor=GREY, alpha=0.5, label="members of the group"),
        Line2D([], [], color="black", lw=1.1, label="matched controls"),
    ]
    if len({r["seed"] for r in records}) > 1:
        handles.append(Line2D([], [], color=GREY, lw=0.5, label="thin: each seed"))
    _legend(figure, handles, columns=3)
    return figure


def refusals_over_training(results: Record) -> Figure | None:
    """Refusals of each kind of prompt over the steps, and under them the drift of the safety groups."""
    kinds = kinds_of(results)
    if not kinds:
        return None
    points, metric = results.get("trajectories") or [], "relative"
    if not any(p["metric"] == metric for p in points):
        metric = primary_of(results)
    roles = roles_of(results)
    groups = [
        str(g) for g in dict.fromkeys(p["group"] for p in points if p["metric"] == metric) if roles[str(g)] == "safety"
    ]
    figure = new_figure(
        4.0 if groups else 2.6,
        "Refusals during fine-tuning" + (", and how far the safety groups moved" if groups else ""),
    )
    axes: list[Axes] = list(
        figure.subplots(2 if groups else 1, 1, sharex=True, squeeze=False, height_ratios=[3, 2] if groups else [1])[
            :, 0
        ]
    )
    rates = rates_of(results)
    last = float(max([r["step"] for r in rates] + [p["step"] for p in points if groups]) or 1)
    early_at = -0.13 * last
    early = {r["kind"]: r for r in behaviour_of(results).get("before_alignment") or []}
    for index, kind in enumerate(kinds):
        shift = (index - (len(kinds) - 1) / 2) * 0.008 * last
        _refusal_curves(axes[0], rates_of(results, kind=kind), early.get(kind), kind, shift, early_at)
    axes[0].set(ylim=(-0.03, 1.03), ylabel="share of prompts refused", title="Refusals")
    axes[0].grid(axis="y")
    if groups:
        chosen = [p for p in points if p["metric"] == metric]
        for group, mark in group_marks(groups, roles).items():
            _curves(axes[1], _lines(chosen, group, "members"), mark, "-")
        axes[1].set(
            ylabel=METRIC_LABELS.get(metric, words(metric)),
            title=f"{METRIC_TITLES.get(metric, words(metric))} of the safety groups, mean over neurons",
        )
        axes[1].set_ylim(bottom=0)
    _early_ticks(axes, last, early_at if any(finite(r.get("rate")) is not None for r in early.values()) else None)
    axes[-1].set_xlabel("training step")
    letters(axes)
    if groups:
        axes[1].set_title(axes[1].get_title(loc="left"), y=1.0, pad=ABOVE_POWER)
    seeds = len({r["seed"] for r in rates})
    handles: list[Any] = [
        Line2D([], [], color=c, marker=m, ls=ls, label=KINDS.get(k, words(k)).replace("-but-", ", "))
        for k, (c, m, ls) in ((k, _kind_mark(k)) for k in kinds)
    ]
    handles.append(Line2D([], [], color=GREY, marker="|", ls="", ms=9, label="95 % Wilson interval"))
    beside: Any = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5), "handlelength": 2.4}
    axes[0].legend(handles=[*handles, *([_spread_handle(seeds)] if seeds > 1 else [])], **beside)
    if groups:
        lines = [
            Line2D([], [], color=m.colour, marker=m.marker, label=words(g))
            for g, m in group_marks(groups, roles).items()
        ]
        one_run = len({p["seed"] for p in points}) == 1
        axes[1].legend(handles=[*lines, *([_spread_handle(1)] if one_run else [])], **beside)
    return figure


def _refusal_curves(
    ax: Axes, rates: Sequence[Record], early: Record | None, kind: str, shift: float, early_at: float
) -> None:
    colour, marker, dash = _kind_mark(kind)
    by_seed: dict[Any, Line] = {}
    for record in rates:
        value = finite(record.get("rate"))
        if value is not None:
            line = by_seed.setdefault(record["seed"], Line([], [], [], []))
            _append(line, float(record["step"]), value, record)
    for line in by_seed.values():
        shifted = [step + shift for step in line.steps]
        single = len(by_seed) == 1
        _bars(ax, shifted, line, colour, alpha=1.0 if single else 0.3)
        ax.plot(
            shifted,
            line.values,
            color=colour,
            ls=dash,
            marker=marker if single else "",
            lw=1.4 if single else 0.6,
            alpha=1.0 if single else 0.6,
        )
    if len(by_seed) > 1:
        mean = _mean(list(by_seed.values()))
        ax.plot([s + shift for s in mean.steps], mean.values, color=colour, ls=dash, marker=marker, lw=1.8)
    value = finite(early.get("rate")) if early else None
    if early is not None and value is not None:
        at = Line([], [], [], [])
        _append(at, early_at, value, early)
        _bars(ax, [early_at + 2.5 * shift], at, colour, alpha=1.0)
        ax.plot([early_at + 2.5 * shift], [value], color=colour, marker=marker, ls="", mfc="white")


def _early_ticks(axes: Sequence[Axes], last: float, early_at: float | None) -> None:
    """Steps from 0, and the point before alignment set apart behind a dotted line."""
    ticks = step_axis(axes[-1], last)
    labels = [f"{tick:.0f}" for tick in ticks]
    if early_at is not None:
        for ax in axes:
            ax.axvline(early_at * 0.45, color=GREY, lw=0.8, ls=":")
        ticks, labels = [early_at, *ticks], ["before\nalignment", *labels]
    axes[-1].set_xticks(ticks, labels)
    axes[-1].set_xlim((early_at * 1.6 if early_at is not None else -0.04 * last), 1.04 * last)


def _lines(points: Sequence[Record], group: str, arm: str) -> list[Line]:
    """One curve a seed."""
    by_seed: dict[Any, Line] = {}
    for point in sorted((p for p in points if p["group"] == group), key=lambda p: p["step"]):
        record = point.get(arm)
        value = finite(record.get("mean")) if isinstance(record, Mapping) else None
        if value is not None:
            _append(by_seed.setdefault(point["seed"], Line([], [], [], [])), float(point["step"]), value, record)
    return list(by_seed.values())


def _append(line: Line, step: float, value: float, record: Any) -> None:
    low, high = finite(record.get("low")), finite(record.get("high"))
    line.steps.append(step)
    line.values.append(value)
    line.low.append(value if low is None else low)
    line.high.append(value if high is None else high)


def _mean(lines: Sequence[Line]) -> Line:
    """The mean curve over the steps that all seeds have; its limits are not defined, so they are the mean."""
    shared = [s for s in lines[0].steps if all(s in line.steps for line in lines)]
    values = [sum(line.values[line.steps.index(s)] for line in lines) / len(lines) for s in shared]
    return Line(shared, values, values, values)


def _curves(ax: Axes, lines: Sequence[Line], mark: Mark, dash: Any, *, width: float = 1.4, alpha: float = 1.0) -> None:
    """One seed: the curve with its band. Several: thin curves and their mean."""
    if not lines:
        return
    main = lines[0] if len(lines) == 1 else _mean(lines)
    if len(lines) > 1:
        for line in lines:
            ax.plot(line.steps, line.values, color=mark.colour, ls=dash, lw=0.5, alpha=0.6 * alpha)
    elif mark.marker:
        ax.fill_between(main.steps, main.low, main.high, color=mark.colour, alpha=0.15, lw=0, zorder=1)
    every = max(1, round(len(main.steps) / 6))
    ax.plot(
        main.steps,
        main.values,
        color=mark.colour,
        ls=dash,
        lw=width,
        alpha=alpha,
        marker=mark.marker or None,
        markevery=every,
    )


def _bars(ax: Axes, at: Sequence[float], line: Line, colour: str, *, alpha: float) -> None:
    ax.vlines(at, line.low, line.high, color=colour, lw=1.0, alpha=alpha)


def _mean_histogram(records: Sequence[Record]) -> Record | None:
    """The mean over seeds of densities over the same edges; None where the edges differ or a density is missing."""
    if not records or any(r["edges"] != records[0]["edges"] for r in records):
        return None
    bins = len(records[0]["edges"]) - 1
    out: dict[str, Any] = {"edges": records[0]["edges"]}
    for arm in ARMS:
        densities = [[finite(v) or 0.0 for v in r.get(arm) or []] for r in records]
        if all(len(density) == bins for density in densities):
            out[arm] = [sum(values) / len(values) for values in zip(*densities, strict=True)]
    return out


def _histogram(ax: Axes, record: Record, mark: Mark, *, width: float, fill: float) -> None:
    edges = record["edges"]
    members, controls = ([finite(v) or 0.0 for v in record.get(arm) or []] for arm in ARMS)
    if len(members) == len(edges) - 1:
        if fill:
            ax.stairs(members, edges, fill=True, color=mark.colour, alpha=fill, lw=0)
        ax.stairs(members, edges, color=mark.colour, lw=width)
    if len(controls) == len(edges) - 1:
        ax.stairs(controls, edges, color="black", lw=width)


def _log_axis(ax: Axes, records: Sequence[Record]) -> None:
    ax.set_xscale("log")
    ax.set_yticks([])
    ax.xaxis.set_minor_formatter(NullFormatter())
    used = [edge for r in records for edge in r["edges"]]
    if used and max(used) / min(used) < FEW_DECADES and min(used) > 1e-3:
        ax.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    else:
        ax.xaxis.set_major_locator(LogLocator(numticks=5))


def _kind_mark(kind: str) -> tuple[str, str, str]:
    return KIND_MARKS.get(kind, (GREY, "D", "--"))


def _spread_handle(seeds: int) -> Any:
    if seeds > 1:
        return Line2D([], [], color=GREY, lw=0.5, label="thin: each seed, thick: mean")
    return Patch(facecolor=GREY, alpha=0.25, label="band: 95 % interval")


def _legend(figure: Figure, handles: Sequence[Any], *, columns: int) -> None:
    figure.legend(
        handles=list(handles), loc="outside lower center", ncols=max(1, columns), handlelength=2.4, columnspacing=1.4
    )
