"""The section on interventions: what acting on a group did to refusals, beside matched random groups."""

from __future__ import annotations

from neurondrift.report import wording
from neurondrift.report.blocks import Block, Items, Paragraph, Section, Table, table
from neurondrift.report.findings.interventions import Interventions, NullMeasure
from neurondrift.report.reading import (
    band_of,
    conclusion_of,
    draws_made,
    is_same_model,
    is_stopped,
    planned_draws,
    whole_groups,
)
from neurondrift.report.wording import Footnotes, clean

TITLE = "Cause: interventions on the groups"
STOPPED = (
    "fewer draws than planned: stopped, as two or more of them were as extreme as the group in refusals of harmful "
    "requests; such a p is above 0.1. Those of ordinary prompts and answers are of the same draws, not adjusted for "
    "stopping"
)
WHAT = {
    "prune": "the group is set to zero (or to its site's mean) in the model before fine-tuning",
    "rewind": "the group alone gets its values from before fine-tuning back; all else stays fine-tuned",
    "transplant": "the change of the group alone is put into the model from before fine-tuning",
    "freeze": "fine-tuning is done again with the group held still",
}


def section(interventions: Interventions, fingerprint: str | None = None) -> Section:
    """The whole section, from the content of `interventions.json`; `fingerprint` is that of the report's model."""
    if not is_same_model(interventions["model_fingerprint"], fingerprint):
        text = "The interventions that lie here are of another model or adapter: run neurondrift intervene again."
        return Section(title=TITLE, blocks=(Paragraph(text),))
    blocks: list[Block] = []
    if sentences := conclusion_of(interventions):
        blocks.append(Paragraph(clean(" ".join(sentences))))
    blocks.append(refusal_table(interventions))
    blocks.append(side_table(interventions))
    doses = dose_table(interventions)
    if doses:
        blocks.append(doses)
    asked = {effect["intervention"] for effect in interventions["effects"]}
    blocks.append(Items(tuple(f"{name}: {text}" for name, text in WHAT.items() if name in asked)))
    return Section(title=TITLE, blocks=tuple(blocks), figures=("intervention_doses",))


def _refused(notes: Footnotes, measure: NullMeasure) -> tuple[str, str]:
    """The share refused under the intervention, and the mean and range of the random groups."""
    null = notes.number(measure, "null_mean", wording.share)
    return notes.number(measure, "value", wording.share), f"{null} {_band(measure, wording.share)}"


def refusal_table(interventions: Interventions) -> Table:
    """Refusals of harmful requests under each intervention on a whole group, beside its random groups."""
    notes, rows = Footnotes(), []
    for effect in whole_groups(interventions):
        measure = effect["measures"]["harmful"]
        rows.append(
            (
                clean(effect["group"]),
                clean(effect["intervention"]),
                *_refused(notes, measure),
                notes.number(measure, "effect", wording.effect),
                notes.interval(measure, "ci95", wording.effect),
                notes.number(measure, "p", wording.probability),
                draws_made(effect),
            )
        )
    before, after = interventions["references"]["before"]["harmful"], interventions["references"]["after"]["harmful"]
    known = {
        (planned_draws(e), p)
        for e in whole_groups(interventions)
        if (p := e["measures"]["harmful"]["p_floor"]) is not None
    }
    floors = ", ".join(f"{wording.probability(p)} with {draws}" for draws, p in sorted(known, reverse=True))
    return table(
        f"Harmful requests refused ({before['n']} prompts; before fine-tuning {wording.rate(before)}, after "
        f"{wording.rate(after)}):",
        ("group", "intervention", "refused", "random groups", "effect", "95 % interval", "p", "draws"),
        rows,
        "llrrrrrr",
        (
            "random groups: mean and range of matched random groups; effect: the group minus their mean, interval over "
            "prompts and draws",
            f"p: two-sided, (1 + as extreme) / (1 + draws), so never below {floors} draws; "
            f"{interventions['tests']} tests in these two tables, not corrected for their number",
            *((STOPPED,) if any(is_stopped(effect) for effect in whole_groups(interventions)) else ()),
            *notes.notes(),
        ),
    )


def side_table(interventions: Interventions) -> Table:
    """What the same interventions did to ordinary prompts and to held-out answers."""
    notes, rows = Footnotes(), []
    for effect in whole_groups(interventions):
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
    ends = (interventions["references"]["before"], interventions["references"]["after"])
    refused = " → ".join(wording.number(end["ordinary"], "rate", wording.share) for end in ends)
    perplexity = " → ".join(wording.number(end["answers"], "perplexity", wording.drift) for end in ends)
    return table(
        f"Ordinary prompts refused ({refused} by fine-tuning) and perplexity of held-out answers ({perplexity}):",
        ("group", "intervention", "refused", "random groups", "p", "perplexity", "random groups", "p"),
        rows,
        "llrrrrrr",
        notes.notes(),
    )


def dose_table(interventions: Interventions) -> Table | None:
    """Refusals at every dose; None where only whole groups were acted on."""
    effects = list(interventions["effects"])
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
                draws_made(effect),
            )
        )
    return table(
        "Harmful requests refused by dose: the most important share of each site's members:",
        ("group", "intervention", "dose", "members", "refused", "random groups", "p", "draws"),
        rows,
        "llrrrrrr",
        notes.notes(),
    )


def _band(measure: NullMeasure, form: wording.Form) -> str:
    return wording.interval(band_of(measure), form) or ""
