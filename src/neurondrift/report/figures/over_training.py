"""Figures along the training: drift of the groups, and refusals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from neurondrift.report.figures.style import (
    FULL_WIDTH,
    GREY,
    KIND_MARKS,
    LEAST_WIDTH,
    METRIC_LABELS,
    METRIC_TITLES,
    Mark,
    as_series,
    group_marks,
    legend_below,
    letters,
    new_figure,
    step_axis,
    words,
)
from neurondrift.report.findings.attribution import MarginAt
from neurondrift.report.findings.statistical import Findings, Mean, RefusalRate, ShortRate, TrajectoryPoint
from neurondrift.report.reading import (
    behaviour_seeds,
    drawn_groups,
    in_group_order,
    kinds_of,
    margins_of,
    metrics_among,
    primary_of,
    rates_before_alignment,
    rates_of,
    roles_of,
    trajectories_of,
)
from neurondrift.report.wording import ALL, KINDS, finite

#: Room in points for the power of ten of an axis, between the panel and its title.
ABOVE_POWER = 16.0
#: How matched controls are drawn.
DASHED = (0, (3.5, 2.0))
#: A legend to the right of its panel.
BESIDE: Any = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5), "handlelength": 2.4}


class Line(NamedTuple):
    """A curve with its limits, where they are known."""

    steps: list[float]
    values: list[float]
    low: list[float]
    high: list[float]


def drift_over_training(results: Findings) -> Figure | None:
    """Mean drift of every group and of its controls, one panel per metric."""
    points = trajectories_of(results)
    metrics = metrics_among(results, (point["metric"] for point in points))
    if not metrics:
        return None
    groups = drawn_groups(results, (point["group"] for point in points if point["group"] != ALL))
    marks = group_marks(groups, roles_of(results))
    figure = new_figure(
        3.0,
        "How far the neurons of each group moved during fine-tuning",
        width=max(LEAST_WIDTH, FULL_WIDTH * len(metrics) / 3),
    )
    axes = figure.subplots(1, len(metrics), squeeze=False)[0]
    for ax, metric in zip(axes, metrics, strict=True):
        _drift_panel(ax, trajectories_of(results, metric), marks, metric)
    letters(list(axes), pad=ABOVE_POWER)
    handles = [Line2D([], [], color=m.colour, marker=m.marker, label=words(g)) for g, m in marks.items()]
    if any(point["controls"] for point in points):
        handles.append(Line2D([], [], color=GREY, ls=DASHED, lw=1.0, label="controls of the same site and norm"))
    if any(point["group"] == ALL for point in points):
        handles.append(Line2D([], [], color=GREY, lw=2.4, alpha=0.55, label="all neurons"))
    seeds = len({point["seed"] for point in points})
    legend_below(figure, [*handles, _spread_handle(seeds)], columns=4 if len(metrics) > 2 else 2)
    return figure


def _drift_panel(ax: Axes, points: Sequence[TrajectoryPoint], marks: Mapping[str, Mark], metric: str) -> None:
    """One metric: all neurons, and each group above its controls."""
    drawn = _curves(ax, _lines(points, ALL, "members"), Mark(GREY, ""), "-", width=2.4, alpha=0.55)
    as_series(drawn, "all neurons")
    for group, mark in marks.items():
        drawn = _curves(ax, _lines(points, group, "controls"), Mark(mark.colour, ""), DASHED, width=1.0)
        drawn += _curves(ax, _lines(points, group, "members"), mark, "-")
        as_series(drawn, group)
    ax.set(
        xlabel="training step",
        ylabel=METRIC_LABELS.get(metric, words(metric)),
        title=METRIC_TITLES.get(metric, words(metric)),
    )
    ax.yaxis.set_major_locator(MaxNLocator(5))
    ax.set_ylim(bottom=0)
    step_axis(ax, max((point["step"] for point in points), default=1))


def refusals_over_training(results: Findings) -> Figure | None:
    """Refusals of each kind of prompt over the steps, and under them the drift of the safety groups."""
    kinds = kinds_of(results)
    if not kinds:
        return None
    metric = "relative" if trajectories_of(results, "relative") else primary_of(results)
    points = trajectories_of(results, metric)
    roles = roles_of(results)
    safety = [point["group"] for point in points if roles[point["group"]] == "safety"]
    marks = group_marks(in_group_order(results, safety), roles)
    margins = [margin for seed in behaviour_seeds(results) if seed is not None for margin in margins_of(results, seed)]
    figure = new_figure(
        (4.0 if marks else 2.6) + (1.4 if margins else 0.0),
        "Refusals during fine-tuning" + (", and how far the safety groups moved" if marks else ""),
    )
    heights = [3, *([2] if margins else []), *([2] if marks else [])]
    axes: list[Axes] = list(figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0])
    last = _last_step(rates_of(results), points if marks else [])
    early_at = -0.13 * last
    _refusal_panel(axes[0], results, kinds, last, early_at)
    if margins:
        _margin_panel(axes[1], margins, margins_of(results, None), kinds, early_at)
    if marks:
        _safety_panel(axes[-1], points, marks, metric)
    is_early = any(finite(rate["rate"]) is not None for rate in rates_before_alignment(results).values())
    _early_ticks(axes, last, early_at if is_early else None)
    axes[-1].set_xlabel("training step")
    letters(axes)
    if marks:
        axes[-1].set_title(axes[-1].get_title(loc="left"), y=1.0, pad=ABOVE_POWER)
    return figure


def _last_step(rates: Sequence[RefusalRate], points: Sequence[TrajectoryPoint]) -> float:
    """Where the axis of steps ends; 1 where nothing was trained."""
    return float(max([rate["step"] or 0 for rate in rates] + [point["step"] for point in points]) or 1)


def _refusal_panel(ax: Axes, results: Findings, kinds: Sequence[str], last: float, early_at: float) -> None:
    """A curve per kind of prompt, moved apart a little, with the rates before alignment at `early_at`."""
    early = rates_before_alignment(results)
    for index, kind in enumerate(kinds):
        shift = (index - (len(kinds) - 1) / 2) * 0.008 * last
        _refusal_curves(ax, rates_of(results, kind=kind), early.get(kind), kind, shift, early_at)
    ax.set(ylim=(-0.03, 1.03), ylabel="share of prompts refused", title="Refusals")
    ax.grid(axis="y")
    handles: list[Any] = [
        Line2D([], [], color=c, marker=m, ls=ls, label=KINDS.get(k, words(k)).replace("-but-", ", "))
        for k, (c, m, ls) in ((k, _kind_mark(k)) for k in kinds)
    ]
    handles.append(Line2D([], [], color=GREY, marker="|", ls="", ms=9, label="95 % Wilson interval"))
    if is_mixed(rates_of(results)):
        label = "whole answers, at the ends\n(curves: their beginnings)"
        handles.append(Line2D([], [], color=GREY, marker="*", ms=8, mfc="white", ls="", label=label))
    seeds = len(behaviour_seeds(results))
    ax.legend(handles=[*handles, *([_spread_handle(seeds)] if seeds > 1 else [])], **BESIDE)


def _margin_panel(
    ax: Axes, margins: Sequence[MarginAt], early: Sequence[MarginAt], kinds: Sequence[str], early_at: float
) -> None:
    """The refusal margin of each kind of prompt: a curve, or one a seed with their mean."""
    for kind in kinds:
        colour, marker, dash = _kind_mark(kind)
        by_seed: dict[int | None, Line] = {}
        for margin in (each for each in margins if each["kind"] == kind):
            if (value := finite(margin["mean"])) is not None:
                line = by_seed.setdefault(margin["seed"], Line([], [], [], []))
                _append(line, float(margin["step"] or 0), value, margin)
        _curves(ax, list(by_seed.values()), Mark(colour, marker), dash)
        for margin in (each for each in early if each["kind"] == kind):
            if (value := finite(margin["mean"])) is not None:
                ax.plot([early_at], [value], color=colour, marker=marker, ls="", mfc="white")
    ax.axhline(0, color=GREY, lw=0.8)
    ax.set(ylabel="nats", title="Refusal margin: above 0 a refusal is the more probable")
    ax.legend(handles=[Patch(facecolor=GREY, alpha=0.25, label="95 % over prompts (one seed)")], **BESIDE)


def _safety_panel(ax: Axes, points: Sequence[TrajectoryPoint], marks: Mapping[str, Mark], metric: str) -> None:
    """How far the safety groups had moved at the same steps."""
    for group, mark in marks.items():
        _curves(ax, _lines(points, group, "members"), mark, "-")
    ax.set(
        ylabel=METRIC_LABELS.get(metric, words(metric)),
        title=f"{METRIC_TITLES.get(metric, words(metric))} of the safety groups, mean over neurons",
    )
    ax.set_ylim(bottom=0)
    lines = [Line2D([], [], color=m.colour, marker=m.marker, label=words(g)) for g, m in marks.items()]
    is_one_run = len({point["seed"] for point in points}) == 1
    ax.legend(handles=[*lines, *([_spread_handle(1)] if is_one_run else [])], **BESIDE)


def _refusal_curves(
    ax: Axes, rates: Sequence[RefusalRate], early: RefusalRate | None, kind: str, shift: float, early_at: float
) -> None:
    """The curve of answers judged alike at every step; where those at the ends are longer, these stand apart."""
    colour, marker, dash = _kind_mark(kind)
    by_seed: dict[int | None, Line] = {}
    mixed = is_mixed(rates)
    for rate in rates:
        step = float(rate["step"] or 0)
        alike = rate.get("short") if mixed else rate
        value = finite(alike["rate"]) if alike else None
        if alike is not None and value is not None:
            _append(by_seed.setdefault(rate["seed"], Line([], [], [], [])), step, value, alike)
        if mixed and rate.get("whole"):
            _long_end(ax, rate, step + shift, colour)
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
    if early is not None and mixed:
        _long_end(ax, early, early_at + 2.5 * shift, colour)
    first = early.get("short") if early is not None and mixed else early
    value = finite(first["rate"]) if first else None
    if first is not None and value is not None:
        at = Line([], [], [], [])
        _append(at, early_at, value, first)
        _bars(ax, [early_at + 2.5 * shift], at, colour, alpha=1.0)
        ax.plot([early_at + 2.5 * shift], [value], color=colour, marker=marker, ls="", mfc="white")


def _long_end(ax: Axes, rate: RefusalRate, at: float, colour: str) -> None:
    """A rate of whole answers beside a curve of beginnings: a star that no line joins."""
    value = finite(rate["rate"])
    if value is not None:
        ax.plot([at], [value], color=colour, marker="*", ms=8, mfc="white", ls="", zorder=4)


def is_mixed(rates: Sequence[RefusalRate]) -> bool:
    """Whether some rates are of whole answers and others of answers that were ended early."""
    return len({bool(rate.get("whole")) for rate in rates}) > 1


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


def _lines(points: Sequence[TrajectoryPoint], group: str, arm: Literal["members", "controls"]) -> list[Line]:
    """One curve per seed."""
    by_seed: dict[int, Line] = {}
    for point in sorted((p for p in points if p["group"] == group), key=lambda p: p["step"]):
        mean = point[arm]
        value = finite(mean["mean"]) if mean else None
        if mean is not None and value is not None:
            _append(by_seed.setdefault(point["seed"], Line([], [], [], [])), float(point["step"]), value, mean)
    return list(by_seed.values())


def _append(line: Line, step: float, value: float, limits: Mean | RefusalRate | ShortRate | MarginAt) -> None:
    low, high = finite(limits["low"]), finite(limits["high"])
    line.steps.append(step)
    line.values.append(value)
    line.low.append(value if low is None else low)
    line.high.append(value if high is None else high)


def _mean(lines: Sequence[Line]) -> Line:
    """The mean curve over the steps that all seeds have; its limits are not defined, so they are the mean."""
    shared = [s for s in lines[0].steps if all(s in line.steps for line in lines)]
    values = [sum(line.values[line.steps.index(s)] for line in lines) / len(lines) for s in shared]
    return Line(shared, values, values, values)


def _curves(
    ax: Axes, lines: Sequence[Line], mark: Mark, dash: Any, *, width: float = 1.4, alpha: float = 1.0
) -> list[Artist]:
    """One seed: the curve with its band. Several: thin curves and their mean. Returns what was drawn."""
    if not lines:
        return []
    drawn: list[Artist] = []
    main = lines[0] if len(lines) == 1 else _mean(lines)
    if len(lines) > 1:
        for line in lines:
            drawn += ax.plot(line.steps, line.values, color=mark.colour, ls=dash, lw=0.5, alpha=0.6 * alpha)
    elif mark.marker:
        drawn.append(ax.fill_between(main.steps, main.low, main.high, color=mark.colour, alpha=0.15, lw=0, zorder=1))
    every = max(1, round(len(main.steps) / 6))
    drawn += ax.plot(
        main.steps,
        main.values,
        color=mark.colour,
        ls=dash,
        lw=width,
        alpha=alpha,
        marker=mark.marker or None,
        markevery=every,
    )
    return drawn


def _bars(ax: Axes, at: Sequence[float], line: Line, colour: str, *, alpha: float) -> None:
    ax.vlines(at, line.low, line.high, color=colour, lw=1.0, alpha=alpha)


def _kind_mark(kind: str) -> tuple[str, str, str]:
    return KIND_MARKS.get(kind, (GREY, "D", "--"))


def _spread_handle(seeds: int) -> Any:
    if seeds > 1:
        return Line2D([], [], color=GREY, lw=0.5, label="thin: each seed, thick: mean")
    return Patch(facecolor=GREY, alpha=0.25, label="band: 95 % interval")
