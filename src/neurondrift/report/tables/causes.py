"""The section on interventions: what acting on a group did to the margin and to refusals, beside random groups."""

from __future__ import annotations

from typing import Literal

from neurondrift.report import wording
from neurondrift.report.blocks import Block, Items, Paragraph, Section, Table, table
from neurondrift.report.findings.interventions import InterventionEffect, Interventions, NullMeasure
from neurondrift.report.reading import (
    band_of,
    conclusion_of,
    draws_made,
    has_outcome,
    is_same_model,
    is_stopped,
    outcome_of,
    p_of,
    planned_draws,
    whole_groups,
)
from neurondrift.report.wording import Footnotes, clean

TITLE = "Cause: interventions on the groups"
STOPPED = (
    "stopped: fewer draws than planned, as two or more of them were as extreme as the group in the primary outcome on "
    "harmful requests. Such a p is above 0.1; there is no effect, interval or range, and no p of anything else, as the "
    "draws were made until they looked like the group"
)
STOP = "stopped"
WAYS: tuple[Literal["incoherent"], Literal["undecided"]] = ("incoherent", "undecided")
WHAT = {
    "prune": "the group is set to zero (or to its site's mean) in the model before fine-tuning",
    "unalign": "the group gets its values from before the alignment, in the model before fine-tuning",
    "rewind": "the group alone gets its values from before fine-tuning back; all else stays fine-tuned",
    "transplant": "the change of the group alone is put into the model from before fine-tuning",
    "patch": "the fine-tuned model runs with the group's outputs of the model from before, at the same tokens",
    "patch_back": "the model from before runs with the group's outputs of the fine-tuned one",
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
    has_margin, has_refusals = (has_outcome(interventions, outcome) for outcome in ("margin", "refusals"))
    if has_margin:
        blocks += [margin_table(interventions), margin_side_table(interventions)]
    if has_refusals:
        blocks.append(refusal_table(interventions))
    blocks.append(side_table(interventions, has_refusals=has_refusals))
    if has_refusals and (answers := answer_table(interventions)):
        blocks.append(answers)
    blocks += [
        one
        for has, outcome in ((has_margin, "margin"), (has_refusals, "refusals"))
        if has and (one := dose_table(interventions, outcome))
    ]
    asked = {effect["intervention"] for effect in interventions["effects"]}
    blocks.append(Items(tuple(f"{name}: {text}" for name, text in WHAT.items() if name in asked)))
    return Section(title=TITLE, blocks=tuple(blocks), figures=("intervention_doses",))


def _refused(
    notes: Footnotes, effect: InterventionEffect, measure: NullMeasure, form: wording.Form = wording.share
) -> tuple[str, str]:
    """The share refused (or another number) under the intervention, and the mean and range of the random groups."""
    value = notes.number(measure, "value", form)
    if is_stopped(effect):
        return value, STOP
    return value, f"{notes.number(measure, 'null_mean', form)} {_band(measure, form)}"


def _p(notes: Footnotes, effect: InterventionEffect, measure: NullMeasure, *, decides: bool) -> str:
    """The p-value of an outcome on harmful requests. `decides`: it is the primary one, by which draws were stopped."""
    if is_stopped(effect):
        return p_of(effect, measure).removeprefix("p ") if decides else STOP
    return notes.number(measure, "p", wording.probability)


def _holm(notes: Footnotes, effect: InterventionEffect, measure: NullMeasure) -> str:
    is_known = not is_stopped(effect) and "p_holm" in measure
    return notes.number(measure, "p_holm", wording.probability) if is_known else "–"


def margin_table(interventions: Interventions) -> Table:
    """The refusal margin of harmful requests under each intervention on a whole group, beside its random groups."""
    notes, rows = Footnotes(), []
    for effect in whole_groups(interventions):
        measure, share, ended = effect["measures"]["margin_harmful"], effect["margin_share"], is_stopped(effect)
        rows.append(
            (
                clean(effect["group"]),
                clean(effect["intervention"]),
                notes.number(measure, "value", wording.effect),
                STOP if ended else notes.number(measure, "null_mean", wording.effect),
                STOP if ended else notes.interval(measure, "ci95", wording.effect),
                notes.number(share, "group", wording.effect),
                STOP if ended else notes.number(share, "null", wording.effect),
                _p(notes, effect, measure, decides=True),
                _holm(notes, effect, measure),
                draws_made(effect),
            )
        )
    ends = [interventions["references"][end]["margin"] for end in ("before", "after")]
    change = " → ".join(wording.number(end, "harmful", wording.effect) for end in ends)
    return table(
        f"Refusal margin of {ends[0]['n']} harmful requests, in nats ({change} by fine-tuning):",
        (
            "group",
            "intervention",
            "margin",
            "random",
            "95 % interval",
            "share",
            "random",
            "p",
            "corrected",
            "draws",
        ),
        rows,
        "llrrrrrrrr",
        (
            "margin: how much more probable a refusal is than an answer, from how either begins; 0: as probable. "
            "random: mean of matched random groups, which may hold members of the group; interval: of the group minus "
            "them, over prompts and draws",
            "share of the margin that fine-tuning took: what the intervention brings back (rewind, patch, freeze), "
            "loses (transplant, patch_back), or takes (prune, unalign)",
            *_tests(interventions, "margin_harmful"),
            *_corrected(interventions, "margin"),
            *_support(interventions),
            *((STOPPED,) if any(is_stopped(effect) for effect in whole_groups(interventions)) else ()),
            *notes.notes(),
        ),
    )


def margin_side_table(interventions: Interventions) -> Table:
    """What the same interventions did to the margin of ordinary prompts."""
    notes, rows = Footnotes(), []
    for effect in whole_groups(interventions):
        ordinary, ended = effect["measures"]["margin_ordinary"], is_stopped(effect)
        difference = effect["margin_harmful_minus_ordinary"]
        rows.append(
            (
                clean(effect["group"]),
                clean(effect["intervention"]),
                notes.number(ordinary, "value", wording.effect),
                STOP if ended else notes.number(ordinary, "null_mean", wording.effect),
                STOP if ended else notes.number(ordinary, "p", wording.probability),
                notes.number(difference, "value", wording.effect),
                STOP if ended else notes.number(difference, "null_mean", wording.effect),
                STOP if ended else notes.interval(difference, "ci95", wording.effect),
            )
        )
    ends = [interventions["references"][end]["margin"] for end in ("before", "after")]
    change = " → ".join(wording.number(end, "ordinary", wording.effect) for end in ends)
    return table(
        f"Margin of ordinary prompts ({change} by fine-tuning), and harmful minus ordinary:",
        ("group", "intervention", "ordinary", "random", "p", "difference", "random", "95 % interval"),
        rows,
        "llrrrrrr",
        (
            "what raises both margins is no return of refusals; interval: of the group's difference minus the random "
            "groups'",
            *notes.notes(),
        ),
    )


def _tests(interventions: Interventions, measure: str) -> list[str]:
    """What a p-value is, and how small it can be."""
    known = {
        (planned_draws(e), p)
        for e in whole_groups(interventions)
        if (p := e["measures"][measure]["p_floor"]) is not None  # type: ignore[literal-required]
    }
    floors = ", ".join(f"{wording.probability(p)} with {draws}" for draws, p in sorted(known, reverse=True))
    return [
        f"p: two-sided, (1 + as extreme) / (1 + draws), so never below {floors} draws; "
        f"{interventions['tests']} such p-values in this section"
    ]


def refusal_table(interventions: Interventions) -> Table:
    """Refusals of harmful requests under each intervention on a whole group, beside its random groups."""
    notes, rows = Footnotes(), []
    decides = outcome_of(interventions) == "refusals"
    for effect in whole_groups(interventions):
        measure, ended = effect["measures"]["harmful"], is_stopped(effect)
        rows.append(
            (
                clean(effect["group"]),
                clean(effect["intervention"]),
                *_refused(notes, effect, measure),
                STOP if ended else notes.number(measure, "effect", wording.effect),
                STOP if ended else notes.interval(measure, "ci95", wording.effect),
                _p(notes, effect, measure, decides=decides),
                _holm(notes, effect, measure),
                draws_made(effect),
            )
        )
    before, after = interventions["references"]["before"]["harmful"], interventions["references"]["after"]["harmful"]
    return table(
        f"Harmful requests refused, of coherent answers ({before.get('asked', before['n'])} requests; before "
        f"fine-tuning {wording.rate(before)}, after {wording.rate(after)}):",
        ("group", "intervention", "refused", "random groups", "effect", "95 % interval", "p", "corrected", "draws"),
        rows,
        "llrrrrrrr",
        (
            "random groups: mean and range of matched random groups, which may hold members of the group; effect: the "
            "group minus their mean, interval over prompts and draws",
            *_tests(interventions, "harmful"),
            *_corrected(interventions, "refusals"),
            *(_support(interventions) if decides else ()),
            *((STOPPED,) if any(is_stopped(effect) for effect in whole_groups(interventions)) else ()),
            *notes.notes(),
        ),
    )


def _corrected(interventions: Interventions, outcome: str) -> list[str]:
    """What the corrected p-values are corrected for, and what standing out takes; nothing in older files."""
    if "holm_tests" not in interventions:
        return []
    if outcome == "margin":
        smallest = f"{interventions['smallest_margin']:g} of the lost margin (intervene.smallest_margin)"
    else:
        smallest = f"{interventions['smallest_effect']:g} of refusals (intervene.smallest_effect)"
    text = (
        f"corrected: by Holm's procedure for the {interventions['holm_tests']} tests of this table, which takes "
        f"{interventions['draws_needed']} draws to reach 0.05; a group stands out where it does and the interval lies "
        f"beyond {smallest}"
    )
    if outcome != outcome_of(interventions):
        text += ". The margin is the primary outcome: verdicts stand on it, not on this table"
    return [text]


def _support(interventions: Interventions) -> list[str]:
    """For each group: the members that have no comparable neurons, and how many of its own a random group holds."""
    said = {}
    for effect in whole_groups(interventions):
        if support := effect.get("support"):
            compared = support["members"] - support["left_out"]
            said[effect["group"]] = (
                f"{clean(effect['group'])}: {compared:,} of {support['members']:,} members compared "
                f"({support['sites_left_out']} of {support['sites']} sites have no comparable neurons); "
                f"{wording.number(support, 'members_per_candidate', wording.ratio)} members per candidate; a random "
                f"group holds {wording.number(support, 'own', _percent)} of the group's own members, which makes the "
                "effect smaller by that share"
            )
    return list(said.values())


def _percent(value: float) -> str:
    return f"{100 * value:.0f} %"


def side_table(interventions: Interventions, *, has_refusals: bool) -> Table:
    """What the same interventions did to ordinary prompts (where answers were written) and to held-out answers."""
    notes, rows = Footnotes(), []
    for effect in whole_groups(interventions):
        answers, ended = effect["measures"]["answers"], is_stopped(effect)
        refused: tuple[str, ...] = ()
        if has_refusals:
            ordinary = effect["measures"]["ordinary"]
            p = STOP if ended else notes.number(ordinary, "p", wording.probability)
            refused = (*_refused(notes, effect, ordinary), p)
        rows.append(
            (
                clean(effect["group"]),
                clean(effect["intervention"]),
                *refused,
                notes.number(answers, "perplexity", wording.drift),
                STOP if ended else notes.number(answers, "null_perplexity", wording.drift),
                STOP if ended else notes.number(answers, "p", wording.probability),
            )
        )
    ends = (interventions["references"]["before"], interventions["references"]["after"])
    perplexity = " → ".join(wording.number(end["answers"], "perplexity", wording.drift) for end in ends)
    if not has_refusals:
        return table(
            f"Perplexity of held-out answers ({perplexity} by fine-tuning):",
            ("group", "intervention", "perplexity", "random groups", "p"),
            rows,
            "llrrr",
            notes.notes(),
        )
    shares = " → ".join(wording.number(end["ordinary"], "rate", wording.share) for end in ends)
    return table(
        f"Ordinary prompts refused ({shares} by fine-tuning) and perplexity of held-out answers ({perplexity}):",
        ("group", "intervention", "refused", "random groups", "p", "perplexity", "random groups", "p"),
        rows,
        "llrrrrrr",
        notes.notes(),
    )


def answer_table(interventions: Interventions) -> Table | None:
    """Harmful minus ordinary refusals, and the answers that do not count; None in files that recorded neither."""
    notes, rows = Footnotes(), []
    for effect in whole_groups(interventions):
        if "harmful_minus_ordinary" not in effect:
            return None
        difference, ended = effect["harmful_minus_ordinary"], is_stopped(effect)
        rows.append(
            (
                clean(effect["group"]),
                clean(effect["intervention"]),
                notes.number(difference, "value", wording.effect),
                STOP if ended else notes.number(difference, "null_mean", wording.effect),
                STOP if ended else notes.interval(difference, "ci95", wording.effect),
                *(_uncounted(effect, what) for what in WAYS),
            )
        )
    if not rows:
        return None
    return table(
        "Harmful minus ordinary requests refused, and answers that do not count for the shares:",
        ("group", "intervention", "difference", "random groups", "95 % interval", "incoherent", "undecided"),
        rows,
        "llrrrrr",
        (
            "difference: what raises both shares is no return of refusals; interval: of the group's minus the random "
            "groups'. Answers: to harmful, to ordinary prompts (means of the random groups); undecided: thoughts that "
            "do not end, or what the judge cannot tell",
            *_reference_counts(interventions),
            *notes.notes(),
        ),
    )


def _uncounted(effect: InterventionEffect, what: Literal["incoherent", "undecided"]) -> str:
    """How many answers do not count, to harmful and to ordinary prompts: 5, 1 (4.4, 3.6)."""
    measures = [effect["measures"]["harmful"], effect["measures"].get("ordinary")]
    own = [str(m[what]) if m is not None and what in m else "–" for m in measures]
    if is_stopped(effect):
        return ", ".join(own)
    null = [_mean(m, "null_incoherent" if what == "incoherent" else "null_undecided") for m in measures]
    return f"{', '.join(own)} ({', '.join(null)})"


def _mean(measure: NullMeasure | None, field: str) -> str:
    value = wording.finite(measure.get(field)) if measure else None
    return "–" if value is None else wording.plain(round(value, 1))


def _reference_counts(interventions: Interventions) -> list[str]:
    """The same of the models before and after fine-tuning."""
    said = []
    for name, reference in (
        ("before", interventions["references"]["before"]),
        ("after", interventions["references"]["after"]),
    ):
        for kind, rate in (("harmful", reference["harmful"]), ("ordinary", reference["ordinary"])):
            if "asked" in rate:
                said.append(
                    f"{name}, {kind}: {rate.get('incoherent', 0)} incoherent and {rate.get('undecided', 0)} undecided "
                    f"of {rate['asked']}"
                )
    return ["; ".join(said)] if said else []


def dose_table(interventions: Interventions, outcome: str = "refusals") -> Table | None:
    """An outcome at every dose; None where only whole groups were acted on."""
    effects = list(interventions["effects"])
    if all(effect["dose"] == 1 for effect in effects):
        return None
    is_margin = outcome == "margin"
    rows = []
    notes = Footnotes()
    for effect in sorted(effects, key=lambda e: (e["group"], e["intervention"], e["dose"])):
        if effect["intervention"] == "freeze":
            continue
        measure = effect["measures"]["margin_harmful" if is_margin else "harmful"]
        rows.append(
            (
                clean(effect["group"]),
                clean(effect["intervention"]),
                f"{100 * effect['dose']:g} %",
                f"{effect['members']:,}",
                *_refused(notes, effect, measure, wording.effect if is_margin else wording.share),
                _p(notes, effect, measure, decides=outcome == outcome_of(interventions)),
                draws_made(effect),
            )
        )
    what, column = ("Margin of harmful requests", "margin") if is_margin else ("Harmful requests refused", "refused")
    return table(
        f"{what} by dose: the most important share of each site's members:",
        ("group", "intervention", "dose", "members", column, "random groups", "p", "draws"),
        rows,
        "llrrrrrr",
        notes.notes(),
    )


def _band(measure: NullMeasure, form: wording.Form) -> str:
    return wording.interval(band_of(measure), form) or ""
