"""The section on interventions: what acting on a group did to refusals, beside matched random groups; its figure."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from neurondrift.report import wording
from neurondrift.report.blocks import Block, Items, Paragraph, Section, Table, table
from neurondrift.report.style import FULL_WIDTH, GREY, INK, LEAST_WIDTH, group_marks, letters, new_figure, words
from neurondrift.report.wording import Footnotes, Record, clean, finite

TITLE = "Cause: interventions on the groups"
NULL_BAND = "#D9D9D9"
STOPPED = (
    "fewer draws than planned: stopped, as two or more of them were as extreme as the group in refusals of harmful "
    "requests; such a p is above 0.1. Those of ordinary prompts and answers are of the same draws, not adjusted for "
    "stopping"
)
#: The panels, in order.
PANELS = ("prune", "rewind", "transplant", "freeze")
WHAT = (
    "prune: the group is set to zero (or to its site's mean) in the model before fine-tuning",
    "rewind: the group alone gets its values from before fine-tuning back; all else stays fine-tuned",
    "transplant: the change of the group alone is put into the model from before fine-tuning",
    "freeze: fine-tuning is done again with the group held still",
)


def section(found: Record, fingerprint: object = None) -> Section:
    """The whole section, from the content of `interventions.json`; `fingerprint` is that of the report's model."""
    if fingerprint is not None and found.get("model_fingerprint") != fingerprint:
        text = "The interventions that lie here are of another model or adapter: run neurondrift intervene again."
        return Section(title=TITLE, blocks=(Paragraph(text),))
    blocks: list[Block] = []
    if found.get("conclusion"):
        blocks.append(Paragraph(clean(found["conclusion"])))
    blocks.append(refusal_table(found))
    blocks.append(side_table(found))
    doses = dose_table(found)
    if doses:
        blocks.append(doses)
    asked = {str(effect["intervention"]) for effect in found["effects"]}
    blocks.append(Items(tuple(text for text in WHAT if text.partition(":")[0] in asked)))
    return Section(title=TITLE, blocks=tuple(blocks), figures=("intervention_doses",))


def table_lines(found: Record) -> list[str]:
    """The tables of the section as lines for a screen."""
    from neurondrift.report.text import render_section

    shown = section(found)
    return render_section(Section(title=shown.title, blocks=tuple(b for b in shown.blocks if not isinstance(b, Items))))


def _whole(found: Record) -> list[Record]:
    return [effect for effect in found["effects"] if effect["dose"] == 1]


def _refused(notes: Footnotes, measure: Record) -> tuple[str, str]:
    """The share refused under the intervention, and the mean and range of the random groups."""
    null = notes.number(measure, "null_mean", wording.share)
    return notes.number(measure, "value", wording.share), f"{null} {_band(measure, wording.share)}"


def refusal_table(found: Record) -> Table:
    """Refusals of harmful requests under each intervention on a whole group, beside its random groups."""
    notes, rows = Footnotes(), []
    for effect in _whole(found):
        measure = effect["measures"]["harmful"]
        rows.append(
            (
                clean(effect["group"]),
                clean(effect["intervention"]),
                *_refused(notes, measure),
                notes.number(measure, "effect", wording.effect),
                notes.interval(measure, "ci95", wording.effect),
                notes.number(measure, "p", wording.probability),
                _draws(effect),
            )
        )
    before, after = (found["references"][name]["harmful"] for name in ("before", "after"))
    floors = sorted({(_planned(e), e["measures"]["harmful"]["p_floor"]) for e in _whole(found)}, reverse=True)
    smallest = ", ".join(f"{wording.probability(p)} with {k}" for k, p in floors)
    return table(
        f"Harmful requests refused ({before['n']} prompts; before fine-tuning {wording.rate(before)}, after "
        f"{wording.rate(after)}):",
        ("group", "intervention", "refused", "random groups", "effect", "95 % interval", "p", "draws"),
        rows,
        "llrrrrrr",
        (
            "random groups: mean and range of matched random groups; effect: the group minus their mean, interval over "
            "prompts and draws",
            f"p: two-sided, (1 + as extreme) / (1 + draws), so never below {smallest} draws; "
            f"{found['tests']} tests in these two tables, not corrected for their number",
            *((STOPPED,) if any(_is_stopped(effect) for effect in _whole(found)) else ()),
            *notes.notes(),
        ),
    )


def side_table(found: Record) -> Table:
    """What the same interventions did to ordinary prompts and to held-out answers."""
    notes, rows = Footnotes(), []
    for effect in _whole(found):
        ordinary, answers = (effect["measures"][kind] for kind in ("ordinary", "answers"))
        rows.append(
            (
                clean(effect["group"]),
                clean(effect["intervention"]),
                *_refused(notes, ordinary),
                notes.number(ordinary, "p", wording.probability),
                notes.number(answers, "perplexity", wording.drift),
                notes.number(answers, "null_perplexity", wording.drift),
                notes.number(answers, "p", wording.probability),
            )
        )
    ends = [found["references"][name] for name in ("before", "after")]
    refused = " → ".join(wording.share(end["ordinary"]["rate"]) for end in ends)
    perplexity = " → ".join(wording.drift(end["answers"]["perplexity"]) for end in ends)
    return table(
        f"Ordinary prompts refused ({refused} by fine-tuning) and perplexity of held-out answers ({perplexity}):",
        ("group", "intervention", "refused", "random groups", "p", "perplexity", "random groups", "p"),
        rows,
        "llrrrrrr",
        notes.notes(),
    )


def dose_table(found: Record) -> Table | None:
    """Refusals at every dose; None where only whole groups were acted on."""
    effects = list(found["effects"])
    if all(effect["dose"] == 1 for effect in effects):
        return None
    rows = []
    notes = Footnotes()
    for effect in sorted(effects, key=lambda e: (e["group"], e["intervention"], e["dose"])):
        if effect["intervention"] == "freeze":
            continue
        measure = effect["measures"]["harmful"]
        rows.append(
            (
                clean(effect["group"]),
                clean(effect["intervention"]),
                f"{100 * effect['dose']:g} %",
                f"{effect['members']:,}",
                *_refused(notes, measure),
                notes.number(measure, "p", wording.probability),
                _draws(effect),
            )
        )
    return table(
        "Harmful requests refused by dose: the most important share of each site's members:",
        ("group", "intervention", "dose", "members", "refused", "random groups", "p", "draws"),
        rows,
        "llrrrrrr",
        notes.notes(),
    )


def _band(measure: Record, form: wording.Form) -> str:
    return wording.interval([measure.get("null_low"), measure.get("null_high")], form) or ""


def _planned(effect: Record) -> int:
    return int(effect.get("draws_planned", effect["draws"]))


def _is_stopped(effect: Record) -> bool:
    return bool(effect["draws"] < _planned(effect))


def _draws(effect: Record) -> str:
    return f"{effect['draws']} of {_planned(effect)}" if _is_stopped(effect) else str(effect["draws"])


# --- the figure -----------------------------------------------------------------------------------------


def intervention_doses(results: Record) -> Figure | None:
    """Refusals against dose, a row a group and a column an intervention, the random groups as a band."""
    found = results.get("interventions")
    known = (results.get("study") or {}).get("model_fingerprint")
    if not found or not found.get("effects") or known not in (None, found.get("model_fingerprint")):
        return None
    effects = found["effects"]
    groups = list(dict.fromkeys(str(effect["group"]) for effect in effects))
    kinds = [kind for kind in PANELS if any(effect["intervention"] == kind for effect in effects)]
    marks = group_marks(groups)
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
