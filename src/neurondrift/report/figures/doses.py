"""The figures of interventions in doses: of the groups, and of rankings out of sample."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from neurondrift.base.roles import INTERVENTIONS
from neurondrift.report.figures.style import FULL_WIDTH, GREY, INK, LEAST_WIDTH, group_marks, letters, new_figure, words
from neurondrift.report.findings.interventions import InterventionEffect, NullMeasure
from neurondrift.report.findings.statistical import Findings
from neurondrift.report.reading import (
    draws_made,
    interventions_of,
    is_same_model,
    is_stopped,
    outcome_of,
    roles_of,
    study_of,
)
from neurondrift.report.wording import finite, role_of

NULL_BAND = "#D9D9D9"
ENDS: tuple[Literal["before"], Literal["after"]] = ("before", "after")


def intervention_doses(results: Findings) -> Figure | None:
    """The primary outcome against dose, a row per group and a column per intervention, random groups as a band."""
    acted = interventions_of(results)
    if acted is None or not acted["effects"]:
        return None
    effects, references = acted["effects"], acted["references"]
    is_margin = outcome_of(acted) == "margin"
    groups = list(dict.fromkeys(effect["group"] for effect in effects))
    kinds = [kind for kind in INTERVENTIONS if any(effect["intervention"] == kind for effect in effects)]
    roles = roles_of(results)
    roles.update({effect["group"]: role_of(effect) for effect in effects if "role" in effect})
    marks = group_marks(groups, roles)
    figure = new_figure(
        1.0 + 1.55 * len(groups),
        "Refusal margin of harmful requests when only one group is acted on"
        if is_margin
        else "Harmful requests refused when only one group is acted on",
        width=max(LEAST_WIDTH, FULL_WIDTH * min(1, len(kinds) / 3)),
    )
    axes = figure.subplots(len(groups), len(kinds), squeeze=False, sharex=True, sharey=True)
    before, after = (
        finite(references[end]["margin"]["harmful"] if is_margin else references[end]["harmful"]["rate"])
        for end in ENDS
    )
    for row, group in enumerate(groups):
        for column, kind in enumerate(kinds):
            ax = axes[row][column]
            own = sorted(
                (e for e in effects if e["group"] == group and e["intervention"] == kind), key=lambda e: e["dose"]
            )
            _references(ax, before, after)
            measures = [e["measures"]["margin_harmful" if is_margin else "harmful"] for e in own]
            _panel(ax, own, measures, marks[group].colour, marks[group].marker)
            if stopped := [effect for effect in own if is_stopped(effect)]:
                ax.text(0.04, 0.04, f"{draws_made(stopped[-1])} draws", transform=ax.transAxes, fontsize=7, color=INK)
            if row == 0:
                ax.set_title(kind)
        axes[row][0].set_ylabel(f"{words(group)}\n{'margin, nats' if is_margin else 'share refused'}")
    labelled = axes[-1] if len(kinds) <= 3 else [axes[-1][len(kinds) // 2]]  # of many narrow panels one is enough
    for ax in labelled:
        ax.set_xlabel("share of the group, %")
    axes[0][0].set(xlim=(0, 106), xticks=[0, 50, 100] if len(kinds) > 3 else [0, 25, 50, 75, 100])
    if not is_margin:
        axes[0][0].set(ylim=(-0.04, 1.04))
    if len(kinds) * len(groups) > 1:
        letters([axes[0][column] for column in range(len(kinds))])
    handles = [
        *(Line2D([], [], color=m.colour, marker=m.marker, label=words(g)) for g, m in marks.items()),
        Line2D([], [], color=GREY, ls=(0, (3.5, 2.0)), label="matched random groups, mean"),
        Patch(facecolor=NULL_BAND, label="their range"),
        Line2D([], [], color=INK, lw=0.8, label="before fine-tuning"),
        Line2D([], [], color=INK, lw=0.8, ls=":", label="after"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3 if len(kinds) > 2 else 2)
    return figure


def _references(ax: Axes, before: float | None, after: float | None) -> None:
    for value, style in ((before, "-"), (after, ":")):
        if value is not None:
            ax.axhline(value, color=INK, lw=0.8, ls=style, zorder=1)


def _panel(
    ax: Axes, effects: Sequence[InterventionEffect], measures: Sequence[NullMeasure], colour: str, marker: str
) -> None:
    doses = [100 * effect["dose"] for effect in effects]
    values, means = [m["value"] for m in measures], [m["null_mean"] for m in measures]
    lows, highs = [m["null_low"] for m in measures], [m["null_high"] for m in measures]
    known = [i for i in range(len(doses)) if None not in (means[i], lows[i], highs[i])]
    x = [doses[i] for i in known]
    low, mean, high = ([float(v[i] or 0.0) for i in known] for v in (lows, means, highs))
    if len(known) > 1:
        ax.fill_between(x, low, high, color=NULL_BAND, lw=0, zorder=0)
    elif known:
        ax.bar(x, [high[0] - low[0]], bottom=low, width=8, color=NULL_BAND, zorder=0)
        ax.plot([x[0] - 4, x[0] + 4], [mean[0], mean[0]], color=GREY, ls=(0, (3.5, 2.0)), lw=1.0, zorder=2)
    ax.plot(x, mean, color=GREY, ls=(0, (3.5, 2.0)), lw=1.0, zorder=2)
    ax.plot(doses, [float("nan") if v is None else v for v in values], color=colour, marker=marker, zorder=3)


#: Colour and marker of what neurons are ranked by.
RANKINGS = {"budget": ("#D55E00", "o"), "norm": ("#0072B2", "s"), "safety_score": ("#009E73", "^")}
RANKED_BY = {"budget": "by the budget", "norm": "by the norm of the change", "safety_score": "by the safety score"}


def out_of_sample_doses(results: Findings) -> Figure | None:
    """Share of the lost margin that comes back against dose, a panel per intervention; permuted rankings as bands."""
    found = results.get("dose_response")
    if not found or not is_same_model(found["model_fingerprint"], study_of(results).get("model_fingerprint")):
        return None
    if all(finite(effect["share"]) is None for effect in found["effects"]):
        return None
    kinds = list(dict.fromkeys(effect["intervention"] for effect in found["effects"]))
    figure = new_figure(
        3.2, "Lost margin that comes back on other prompts than those ranked by", width=max(LEAST_WIDTH, FULL_WIDTH)
    )
    axes = figure.subplots(1, len(kinds), squeeze=False, sharey=True)[0]
    for ax, kind in zip(axes, kinds, strict=True):
        effects = [effect for effect in found["effects"] if effect["intervention"] == kind]
        doses = sorted({effect["dose"] for effect in effects})
        for style in (0.0, 1.0):
            ax.axhline(style, color=INK, lw=0.8, ls=":" if style == 0 else "-", zorder=1)
        budget = {effect["dose"]: effect["random"] for effect in effects if effect["arm"] == "budget"}
        for null, colour, alpha in (("uniform", "#B8C9D6", 0.5), ("matched", NULL_BAND, 0.9)):
            known = [dose for dose in doses if null in budget.get(dose, {})]
            low, high = (
                [float(budget[dose][null][field] or 0.0) for dose in known] for field in ("share_low", "share_high")
            )
            ax.fill_between([100 * dose for dose in known], low, high, color=colour, alpha=alpha, lw=0, zorder=0)
        for arm, (colour, marker) in RANKINGS.items():
            own = {effect["dose"]: effect["share"] for effect in effects if effect["arm"] == arm}
            values = [finite(own.get(dose)) for dose in doses]
            ax.plot(
                [100 * dose for dose in doses],
                [float("nan") if value is None else value for value in values],
                color=colour,
                marker=marker,
                zorder=3,
            )
        ax.set(title=kind, xscale="log", xticks=[100 * dose for dose in doses])
        ax.set_xticklabels([f"{100 * dose:g}" for dose in doses])
        ax.minorticks_off()
        ax.set_xlabel("neurons of each site, %")
    axes[0].set_ylabel("share of the lost margin")
    if len(kinds) > 1:
        letters(list(axes))
    handles = [
        *(Line2D([], [], color=c, marker=m, label=RANKED_BY[arm]) for arm, (c, m) in RANKINGS.items()),
        Patch(facecolor=NULL_BAND, label="random, same site and |w|: range"),
        Patch(facecolor="#B8C9D6", alpha=0.5, label="random, same site: range"),
        Line2D([], [], color=INK, lw=0.8, label="before fine-tuning"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    return figure
