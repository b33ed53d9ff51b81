"""The order of the report: the answer on one screen, the tables, the methods; answers of the model where asked for."""

from __future__ import annotations

from collections.abc import Sequence

from neurondrift.report import wording
from neurondrift.report.blocks import Block, Document, Items, Paragraph, Section
from neurondrift.report.change import doses, neurons
from neurondrift.report.change import tables as change
from neurondrift.report.change.deciding import decision, decision_of_published
from neurondrift.report.figures import maps
from neurondrift.report.findings.statistical import Findings
from neurondrift.report.reading import (
    analysis_of,
    effects_of,
    is_older,
    judged,
    metrics_of,
    primary_of,
    sentences_of,
    study_of,
    weaknesses_of,
)
from neurondrift.report.tables import answer, causes, drift, hypotheses, ranks, ratios, repetitions, study
from neurondrift.report.wording import Record, clean, metric_words, seeds_words

QUESTION = (
    "Question: when this model is fine-tuned{under}, do the neurons that keep it safe move further, as far, or less "
    "far than comparable neurons?"
)
MAIN_CAVEATS = 3
#: What every study of this kind leaves open, for the first screen when the data themselves show nothing worse.
STANDING_CAVEATS = (
    "a length of drift is no damage: a group may move little and still lose its function, and read beside refusals it "
    "shows no cause",
    "only neurons of the fine-tuned sites are compared; importance scores choose the groups, and another "
    "method may choose others",
    "one model, one optimiser and one fine-tuning recipe: under another optimiser the same groups may move 2 to 3 "
    "times as far as their controls",
    "refusals are judged by rule, and for English; no person has read the answers",
)
#: What stands above answers to harmful requests.
WARNING = (
    "What follows was written by the model, on harmful requests. It was asked for with --show-responses, and no person "
    "has read it."
)


def build_document(results: Findings, answers: Sequence[Record] = ()) -> Document:
    """The whole report as data.

    Parameters
    ----------
    results
        The content of `statistical_results.json`. Parts that are missing or empty leave a sentence that says so.
    answers
        Answers to harmful requests that are to be shown; by default none is.

    Returns
    -------
    Document
    """
    return Document(
        title=f"neurondrift: {clean(study_of(results).get('name'), 'study without a name')}",
        subtitle=_subtitle(results),
        answer=_answer(results),
        sections=(
            _drift(results),
            hypotheses.section(results),
            change.section(results),
            neurons.section(results),
            _contrasts(results),
            _subgroups(results),
            _seeds(results),
            _balance(results),
            repetitions.section(results),
            _trajectories(results),
            _behaviour(results),
            _associations(results),
            *_causes(results),
            *_doses(results),
            *_rank_level(results),
            _weights(results),
            _overlaps(results),
            _groups(results),
            _settings(results),
            _methods(results),
            _weaknesses(results),
            *answer_sections(answers),
        ),
    )


def _subtitle(results: Findings) -> str:
    about, analysis = study_of(results), analysis_of(results)
    seeds = about.get("seeds") or (analysis["seed_labels"] if analysis else [])
    parts = [clean(about.get("model"), "model not recorded")]
    settings = about.get("finetune", {})
    if method := settings.get("method"):
        optimiser = about.get("optimiser")
        under = f" under {wording.optimiser_words(optimiser, settings.get('momentum'))}" if optimiser else ""
        parts.append(f"fine-tuned by {clean(method)}{under}")
    if (steps := about.get("steps")) is not None:
        parts.append(f"{clean(steps)} steps")
    return ", ".join([*parts, seeds_words(len(seeds))])


def _answer(results: Findings) -> Section:
    optimiser = study_of(results).get("optimiser")
    under = f" under {wording.optimiser_words(optimiser)}" if optimiser else ""
    said = (sentences_of(results) or ["none, drift was not analysed."])[0]
    said = wording.OLDER + "." if is_older(results) else clean(said)
    blocks: list[Block] = [Paragraph(QUESTION.format(under=under)), Paragraph(f"Answer: {said}")]
    if analysis_of(results):
        blocks.append(Paragraph(wording.LENGTHS_ALONE))
        blocks.append(Paragraph(f"H1 or H2: {clean(decision(results).sentences[0])}"))
        if published := decision_of_published(results):
            blocks.append(Paragraph(f"By {wording.published_words()}: {clean(published.sentences[0])}"))
    tables = (answer.answer_table(results), *change.answer_tables(results), answer.controls_table(results))
    blocks += [made for made in tables if made]
    blocks += [Paragraph(text) for text in [answer.what_groups_stand_on(results)] if text]
    blocks += [Paragraph(text) for text in (answer.thirds(results), *_other_metrics(results)) if text]
    refusals = study.refusal_answer_table(results)
    blocks.append(refusals or Paragraph("Refusals: not measured in this study."))
    caveats = weaknesses_of(results)
    chosen = (*caveats, repetitions.caveat(results), *STANDING_CAVEATS)[:MAIN_CAVEATS]
    blocks.append(
        Paragraph(
            "Main caveats"
            + (f" ({len(caveats) - MAIN_CAVEATS} more at the end)" if len(caveats) > MAIN_CAVEATS else "")
            + ":"
        )
    )
    blocks.append(Items(tuple(chosen), ordered=True))
    return Section(title="The answer", blocks=tuple(blocks), figures=("effect_sizes",))


def _other_metrics(results: Findings) -> list[str]:
    """How the judging groups come out in the metrics that are not primary."""
    clauses = []
    for metric in metrics_of(results)[1:]:
        verdicts = [
            f"{clean(effect['group'])} {wording.verdict(found)}"
            for effect in effects_of(results, metric)
            if effect.get("judging") and (found := judged(effect))
        ]
        if verdicts:
            clauses.append(f"{wording.metric_name(metric)}: {', '.join(verdicts)}")
    return [f"In the other metrics: {'; '.join(clauses)}."] if clauses else []


def _drift(results: Findings) -> Section:
    blocks: list[Block] = [drift.matched_table(results, metric) for metric in metrics_of(results)]
    if blocks:
        blocks.append(drift.unmatched_table(results))
        if not is_older(results):
            blocks[:0] = [ratios.ratio_table(results, metric) for metric in metrics_of(results)]
    return Section(
        title="Final drift by group",
        blocks=_or_say(blocks, "Drift was not analysed."),
        figures=("final_drift_distributions",),
    )


def _contrasts(results: Findings) -> Section:
    blocks: list[Block] = []
    analysis = analysis_of(results)
    if analysis and analysis["contrasts"]:
        blocks += [ratios.contrast_table(results, metric) for metric in metrics_of(results)]
    return Section(title="Groups against each other", blocks=_or_say(blocks, "No groups were contrasted."))


def _subgroups(results: Findings) -> Section:
    where, effects = metric_words(primary_of(results)), effects_of(results, primary_of(results))
    blocks: list[Block] = []
    if any(effect["by_module"] for effect in effects):
        blocks.append(ratios.subgroup_table(results, "by_module", f"By module type, {where}", "module type"))
    if any(effect["by_layer_third"] for effect in effects):
        blocks.append(ratios.subgroup_table(results, "by_layer_third", f"By layer third, {where}", "layer third"))
    return Section(
        title="By module type and by layer third",
        blocks=_or_say(blocks, "There are no subgroups."),
        figures=("layer_module_effects",),
        maps=maps.of_effects(results),
    )


def _seeds(results: Findings) -> Section:
    analysis = analysis_of(results)
    seeds = len(analysis["seed_labels"]) if analysis else 0
    text = (
        "One training seed: there is no run-to-run variation to show, and no interval here covers it."
        if seeds == 1
        else "Drift was not analysed."
    )
    blocks: list[Block] = [ratios.seed_table(results)] if seeds > 1 and not is_older(results) else []
    return Section(title="By training seed", blocks=_or_say(blocks, text))


def _balance(results: Findings) -> Section:
    known = effects_of(results, primary_of(results)) and not is_older(results)
    blocks: list[Block] = [ratios.counts_table(results), ratios.balance_table(results)] if known else []
    return Section(title="Matching and its balance", blocks=_or_say(blocks, "Nothing was matched."))


def _trajectories(results: Findings) -> Section:
    return Section(
        title="Drift over training",
        figures=("drift_over_training",),
        blocks=_or_say(list(drift.trajectory_tables(results)), "No snapshots in these results."),
    )


def _behaviour(results: Findings) -> Section:
    blocks: list[Block] = [*study.behaviour_tables(results), *change.margin_tables(results)]
    changes = study.change_table(results)
    if changes:
        blocks.append(changes)
    return Section(
        title="Behaviour over training",
        blocks=_or_say(blocks, "Behaviour was not measured."),
        figures=("refusals_over_training",),
    )


def _associations(results: Findings) -> Section:
    table, analysis = study.association_table(results), analysis_of(results)
    blocks: list[Block] = [table] if table else []
    statements = dict.fromkeys(clean(a["statement"]) for a in (analysis["associations"] if analysis else []))
    blocks += [Paragraph(f"What this can say: {statement}") for statement in statements]
    return Section(
        title="Refusals beside drift", blocks=_or_say(blocks, "Drift and refusals were not measured at the same steps.")
    )


def _causes(results: Findings) -> tuple[Section, ...]:
    """The section on interventions, only where `neurondrift intervene` was run."""
    acted = results.get("interventions")
    return (causes.section(acted, study_of(results).get("model_fingerprint")),) if acted else ()


def _doses(results: Findings) -> tuple[Section, ...]:
    """The section on the dose-response, only where `neurondrift dose-response` was run."""
    found = results.get("dose_response")
    return (doses.section(found, study_of(results).get("model_fingerprint")),) if found else ()


def _rank_level(results: Findings) -> tuple[Section, ...]:
    """The section on subspaces, only where `neurondrift subspaces` was run."""
    subspaces = results.get("subspaces")
    return (ranks.section(subspaces, study_of(results).get("model_fingerprint")),) if subspaces else ()


def _weights(results: Findings) -> Section:
    table = drift.weight_table(results)
    return Section(title="Single weights", blocks=(table or Paragraph("Single weights were not followed."),))


def _overlaps(results: Findings) -> Section:
    analysis = analysis_of(results)
    blocks: list[Block] = [drift.overlap_table(results)] if analysis and analysis["overlaps"] else []
    return Section(title="Overlap of the groups", blocks=_or_say(blocks, "There is one group only."))


def _groups(results: Findings) -> Section:
    blocks: list[Block] = [study.group_table(results)] if results.get("groups") else []
    return Section(title="The groups", blocks=_or_say(blocks, "The groups were not recorded."))


def _settings(results: Findings) -> Section:
    return Section(title="How it was made", blocks=(study.settings_table(results),))


def _methods(results: Findings) -> Section:
    analysis = analysis_of(results)
    band, resamples, bins = (wording.number(analysis, field, wording.plain) for field in ("band", "resamples", "bins"))
    lines = (
        "Drift of a neuron (a row w of a linear weight): ‖Δw‖, ‖Δw‖/‖w₀‖ and 1 − cos(w₀, wₜ), in float32 or better.",
        "Ratio: exp of the mean over members of log drift minus that of controls of the same site, mean over seeds.",
        "Matched comparison (judges where there are covariates): controls weighted until row norm, utility score and "
        "gradient scale on the fine-tuning data balance within the site. Norm only (published): same site and quantile "
        f"bin of ‖w₀‖ ({bins} a site, halved while unbalanced), adjusted by regression for what is left of log ‖w₀‖.",
        "Gate: no verdict where a balanced covariate differs by more than 0.1 SD after it, or more than 5 % of the "
        "members have no control. Sites without a counterfactual are left out and counted.",
        f"Intervals: studentised cluster bootstrap over sites or layers, whichever is wider ({resamples} resamples); "
        "from 3 seeds on, seeds too.",
        "p: from the same distribution, Holm-adjusted; controls of known answer are outside the family.",
        f"Moved, by intervals of the ratio: as far if the 90 % one lies within a factor of {band} (two one-sided "
        "tests); else further (less far) if the 95 % one lies above (below) 1; else inconclusive.",
        "Outputs: the root of the mean of |D̃x|² over the inputs x of a neuron on answers to harmful (ordinary) "
        "requests, D̃ its change without the 8 leading input directions of both; compared as drift is.",
        "Share of the lost margin: integrated gradients of the refusal margin along the saved steps (or the straight "
        "way), summed over a group, beside its controls as they are weighted; clusters as for ratios.",
        "H1: more than comparable neurons, by more than the band, in every group that judges. H2: in none of them, and "
        "patching their original activations brings no refusals back. Else undecided.",
        "Controls of known answer: random, mirrored and placebo groups are to move as far, the top by fine-tuning "
        "gradient further, and a group's own drift times 1.25 is to be told from itself.",
        "Refusals: the same held-out prompts at each step, Wilson intervals; before against after by McNemar's test.",
    )
    return Section(title="Methods", blocks=(Items(lines, ordered=True),))


def _weaknesses(results: Findings) -> Section:
    return Section(
        title="What weakens the conclusion",
        blocks=(Items((*weaknesses_of(results), repetitions.caveat(results), *STANDING_CAVEATS)),),
    )


def _or_say(blocks: list[Block], otherwise: str) -> tuple[Block, ...]:
    return tuple(blocks) or (Paragraph(otherwise),)


def answer_sections(answers: Sequence[Record]) -> tuple[Section, ...]:
    """One section per seed and step; none where no answer is to be shown.

    Every text goes through `clean` (one line, no control characters), and through HTML escaping in the page.
    """
    groups: dict[str, list[str]] = {}
    for row in answers:
        when = "before the alignment" if row.get("step") is None else f"seed {row['seed']}, step {row['step']}"
        mark = clean(row.get("verdict")) + ("" if row.get("coherent", True) else ", incoherent")
        groups.setdefault(when, []).append(
            f"[{clean(row.get('judge'))}: {mark}] {clean(row.get('prompt'))} → {clean(row.get('response'), 'no text')}"
        )
    return tuple(
        Section(
            title=f"Answers to harmful requests, {when}",
            blocks=(Paragraph(WARNING), Items(tuple(entries), ordered=True)),
        )
        for when, entries in groups.items()
    )
