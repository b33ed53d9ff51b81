"""The figure of interventions in doses."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from neurondrift.report.figures.style import FULL_WIDTH, GREY, INK, LEAST_WIDTH, group_marks, letters, new_figure, words
from neurondrift.report.reading import roles_of
from neurondrift.report.tables.causes import _draws, _is_stopped
from neurondrift.report.wording import Record, finite

NULL_BAND = "#D9D9D9"
#: The panels, in order.
PANELS = ("prune", "rewind", "transplant", "freeze")


def intervention_doses(results: Record) -> Figure | None:
    """Refusals against dose, a row a group and a column an intervention, the random groups as a band."""
    found = results.get("interventions")
    known = (results.get("study") or {}).get("model_fingerprint")
    if not found or not found.get("effects") or known not in (None, found.get("model_fingerprint")):
        return None
    effects = found["effects"]
    groups = list(dict.fromkeys(str(effect["group"]) for effect in effects))
    kinds = [kind for kind in PANELS if any(effect["intervention"] == kind for effect in effects)]
    marks = group_marks(groups, roles_of(results))
    figure = new_figure(
        1.0 + 1.55 * len(groups),
        "Harmful requests refused when only one group is acted on",
        width=max(LEAST_WIDTH, FULL_WIDTH * min(1, len(kinds) / 3)),
    )
    axes = figure.subplots(len(groups), len(kinds), squeeze=False, sharex=True, sharey=True)
    before, after = (finite(found["references"][name]["harmful"]["rate"]) for name in ("before", "after"))
    for row, group in enumerate(groups):
        for column, kind in enumerate(kinds):
            ax = axes[row][column]
            own = sorted(
                (e for e in effects if e["group"] == group and e["intervention"] == kind), key=lambda e: e["dose"]
            )
            _references(ax, before, after)
            _panel(ax, own, marks[group].colour, marks[group].marker)
            if stopped := [effect for effect in own if _is_stopped(effect)]:
                ax.text(0.04, 0.04, f"{_draws(stopped[-1])} draws", transform=ax.transAxes, fontsize=7, color=INK)
            if row == 0:
                ax.set_title(kind)
            if row == len(groups) - 1:
                ax.set_xlabel("share of the group, %")
        axes[row][0].set_ylabel(f"{words(group)}\nshare refused")
    axes[0][0].set(xlim=(0, 106), ylim=(-0.04, 1.04), xticks=[0, 25, 50, 75, 100])
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


def _panel(ax: Axes, effects: Sequence[Record], colour: str, marker: str) -> None:
    doses = [100 * effect["dose"] for effect in effects]
    measures = [effect["measures"]["harmful"] for effect in effects]
    values, means, lows, highs = (
        [finite(m.get(field)) for m in measures] for field in ("value", "null_mean", "null_low", "null_high")
    )
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
