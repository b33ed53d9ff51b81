"""The order of the report: the answer on one screen, the tables, the methods; answers of the model where asked for."""

from __future__ import annotations

from collections.abc import Sequence

from neurondrift.report import wording
from neurondrift.report.blocks import Block, Document, Items, Paragraph, Section
from neurondrift.report.findings.statistical import Effect, Findings
from neurondrift.report.reading import (
    analysis_of,
    conclusion_of,
    effects_of,
    interventions_of,
    metrics_of,
    primary_of,
    sentences_of,
    study_of,
    weaknesses_of,
)
from neurondrift.report.tables import causes, drift, ranks, study
from neurondrift.report.wording import Record, clean, is_safety, metric_words, seeds_words

QUESTION = (
    "Question: when this model is fine-tuned, do the neurons that keep it safe drift more than comparable "
    "neurons (H1, fragile safety) or about the same (H2, pathway creation)?"
)
MAIN_CAVEATS = 3
#: What every study of this kind leaves open, for the first screen when the data themselves show nothing worse.
STANDING_CAVEATS = (
    "drift is not damage: a group may drift little and still lose its function, and read beside refusals it "
    "shows no cause",
    "only neurons of the fine-tuned sites are compared; importance scores choose the groups, and another "
    "method or calibration set may choose others",
    "one model and one fine-tuning recipe: another learning rate, data set or model may answer otherwise",
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
            _hypotheses(results),
            _contrasts(results),
            _subgroups(results),
            _seeds(results),
            _balance(results),
            _trajectories(results),
            _behaviour(results),
            _associations(results),
            *_causes(results),
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
    answer = (sentences_of(results) or ["none, drift was not analysed."])[0]
    blocks: list[Block] = [Paragraph(QUESTION), Paragraph(f"Answer: {clean(answer)}")]
    if effects_of(results, primary_of(results)):
        blocks += [drift.answer_table(results), *_other_metrics(results)]
    refusals = study.refusal_answer_table(results)
    blocks.append(refusals or Paragraph("Refusals: not measured in this study."))
    caveats = weaknesses_of(results)
    chosen = (*caveats, *STANDING_CAVEATS)[:MAIN_CAVEATS]
    blocks.append(
        Paragraph(
            "Main caveats"
            + (f" ({len(caveats) - MAIN_CAVEATS} more at the end)" if len(caveats) > MAIN_CAVEATS else "")
            + ":"
        )
    )
    blocks.append(Items(tuple(chosen), ordered=True))
    return Section(title="The answer", blocks=tuple(blocks), figures=("effect_sizes",))


def _other_metrics(results: Findings) -> list[Block]:
    """How the safety groups come out in the metrics that are not primary."""
    clauses = []
    for metric in metrics_of(results)[1:]:
        verdicts = [f"{clean(e['group'])} {clean(e['verdict'])}" for e in effects_of(results, metric) if is_safety(e)]
        if verdicts:
            clauses.append(f"{clean(metric)}: {', '.join(verdicts)}")
    return [Paragraph(f"In the other metrics: {'; '.join(clauses)}.")] if clauses else []


def _drift(results: Findings) -> Section:
    blocks: list[Block] = [drift.matched_table(results, metric) for metric in metrics_of(results)]
    if blocks:
        blocks.append(drift.unmatched_table(results))
        blocks += [drift.inference_table(results, metric) for metric in metrics_of(results)]
    return Section(
        title="Final drift by group",
        blocks=_or_say(blocks, "Drift was not analysed."),
        figures=("final_drift_distributions",),
    )


def _hypotheses(results: Findings) -> Section:
    entries = [_evaluation(effect, results) for effect in effects_of(results) if is_safety(effect)]
    blocks: list[Block] = [Items(tuple(entries))] if entries else []
    if sentences := sentences_of(results):
        acted = interventions_of(results)
        sentences = [*sentences, *(conclusion_of(acted) if acted else [])]
        blocks.append(Paragraph(f"In sum: {clean(' '.join(sentences))}"))
    return Section(title="H1 and H2, evaluated", blocks=_or_say(blocks, "There is no group whose role is safety."))


def _evaluation(effect: Effect, results: Findings) -> str:
    """One group in one metric against both hypotheses, by its verdict."""
    g, analysis = effect["g"], analysis_of(results)
    sesoi = wording.finite(analysis["sesoi"]) if analysis else None
    band = f"±{wording.share(sesoi)}" if sesoi is not None else "the band of equivalence"
    name = f"{clean(effect['group'])}, {metric_words(effect['metric'])}"
    ci95, ci90 = wording.interval(g["ci95"], wording.effect), wording.interval(g["ci90"], wording.effect)
    if ci95 is None or ci90 is None:
        return (
            f"{name}: neither hypothesis can be evaluated, the interval of g is undefined "
            f"({wording.reason(g, 'ci95')})."
        )
    head = f"{name}: g = {wording.number(g, 'value', wording.effect)}, 95 % interval {ci95}, 90 % interval {ci90}."
    verdict = effect["verdict"]
    if verdict == "more":
        return (
            f"{head} H1 (they drift more): supported, the 95 % interval lies above 0{_adjusted(effect)}. "
            f"H2 (about the same): not supported, the 90 % interval is not inside {band}."
        )
    if verdict == "similar":
        return (
            f"{head} H1 (they drift more): not supported, any difference is too small to count. "
            f"H2 (about the same): supported, the 90 % interval lies inside {band} (p of equivalence = "
            f"{wording.number(effect, 'p_equivalence', wording.probability)})."
        )
    if verdict == "protected":
        return (
            f"{head} H1 (they drift more): not supported, the 95 % interval lies below 0{_adjusted(effect)}. "
            f"H2 (about the same): not supported, the 90 % interval is not inside {band}. "
            "They drifted less: protected."
        )
    return (
        f"{head} H1 (they drift more): not shown, the 95 % interval holds 0. H2 (about the same): not shown, the "
        f"90 % interval is not inside {band}. The smallest effect that would have been found with 80 % power is "
        f"{wording.number(effect, 'detectable', wording.ratio)}."
    )


def _adjusted(effect: Effect) -> str:
    """The adjusted p in brackets, where there is one."""
    value = wording.finite(effect["p_holm"])
    return "" if value is None else f" (Holm-adjusted p = {wording.probability(value)})".replace("= <", "< ")


def _contrasts(results: Findings) -> Section:
    blocks: list[Block] = []
    analysis = analysis_of(results)
    if analysis and analysis["contrasts"]:
        blocks += [drift.contrast_table(results, metric) for metric in metrics_of(results)]
    return Section(title="Groups against each other", blocks=_or_say(blocks, "No groups were contrasted."))


def _subgroups(results: Findings) -> Section:
    where, effects = metric_words(primary_of(results)), effects_of(results, primary_of(results))
    blocks: list[Block] = []
    if any(effect["by_module"] for effect in effects):
        blocks.append(drift.subgroup_table(results, "by_module", f"By module type, {where}", "module type"))
    if any(effect["by_layer_third"] for effect in effects):
        blocks.append(drift.subgroup_table(results, "by_layer_third", f"By layer third, {where}", "layer third"))
    return Section(
        title="By module type and by layer third",
        blocks=_or_say(blocks, "There are no subgroups."),
        figures=("layer_module_effects",),
    )


def _seeds(results: Findings) -> Section:
    analysis = analysis_of(results)
    seeds = len(analysis["seed_labels"]) if analysis else 0
    text = (
        "One training seed: there is no run-to-run variation to show, and no interval here covers it."
        if seeds == 1
        else "Drift was not analysed."
    )
    blocks: list[Block] = [drift.seed_table(results)] if seeds > 1 else []
    return Section(title="By training seed", blocks=_or_say(blocks, text))


def _balance(results: Findings) -> Section:
    blocks: list[Block] = [drift.balance_table(results)] if effects_of(results, primary_of(results)) else []
    return Section(title="Matching and its balance", blocks=_or_say(blocks, "Nothing was matched."))


def _trajectories(results: Findings) -> Section:
    return Section(
        title="Drift over training",
        figures=("drift_over_training",),
        blocks=_or_say(list(drift.trajectory_tables(results)), "No snapshots in these results."),
    )


def _behaviour(results: Findings) -> Section:
    blocks: list[Block] = list(study.behaviour_tables(results))
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
    sesoi, resamples, bins = (
        wording.number(analysis, field, wording.plain) for field in ("sesoi", "resamples", "bins")
    )
    lines = (
        "Drift of a neuron (a row w of a linear weight): ‖Δw‖, ‖Δw‖/‖w₀‖ and 1 − cos(w₀, wₜ), in float32 or better.",
        f"Controls: neurons outside the group, same site, same quantile bin of ‖w₀‖ ({bins} a site, halved while "
        "unbalanced).",
        "g: mean of (member − mean of its controls) over the SD within strata, Hedges-corrected, mean over seeds.",
        f"Intervals: studentised cluster bootstrap over sites ({resamples} resamples); from 3 seeds on, seeds too.",
        "p: from the same distribution, Holm-adjusted; 'random' is the negative control, outside the family.",
        f"Equivalence: two one-sided tests against the smallest effect of interest, |g| = {sesoi}.",
        "Verdict: similar if the 90 % interval is within that band; else more (protected) if the 95 % one is above "
        "(below) 0; else inconclusive.",
        "Refusals: the same held-out prompts at each step, Wilson intervals; before against after by McNemar's test.",
    )
    return Section(title="Methods", blocks=(Items(lines, ordered=True),))


def _weaknesses(results: Findings) -> Section:
    return Section(title="What weakens the conclusion", blocks=(Items((*weaknesses_of(results), *STANDING_CAVEATS)),))


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
