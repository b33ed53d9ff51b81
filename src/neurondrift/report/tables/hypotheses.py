"""The section on H1 and H2: the measures that the study names, and what each of them can and cannot show."""

from __future__ import annotations

from neurondrift.report import wording
from neurondrift.report.blocks import Block, Items, Paragraph, Section, Table, table
from neurondrift.report.change.deciding import decision
from neurondrift.report.findings.statistical import Effect, Findings
from neurondrift.report.reading import (
    conclusion_of,
    effects_of,
    interventions_of,
    is_older,
    judged,
    primary_of,
    sentences_of,
    study_of,
)
from neurondrift.report.tables.drift import CONFOUNDED
from neurondrift.report.wording import Footnotes, clean, is_safety, metric_words

TITLE = "H1 and H2, evaluated"
MEASURES = (
    "Cohen's d against the random group: how far the group's drift lies from that of neurons that chance chose. It "
    "shows a difference between two kinds of neurons, in SD. It cannot show what makes it: the groups differ in site, "
    "|w|, gradients and use, and a fixed threshold on d tests nothing.",
    "Relative change ‖Δw‖/‖w₀‖: shows how far a neuron moved for its size. With ‖w₀‖ below the line it is smaller for "
    "neurons of large weights by construction, which importance scores that hold |w| prefer.",
    "L2 ‖Δw‖: shows the bare length. It cannot show which length matters: 0.01 is little for one neuron and much for "
    "another.",
    "Cosine distance 1 − cos(w₀, wₜ): shows how far a neuron turned. For small drifts it is about half the squared "
    "relative change across w₀, so that it is no second witness.",
    "The ratio to comparable neurons: shows whether the group moved further, as far or less far than neurons that are "
    "alike in site, norm, and (where it is matched) utility score and gradient scale, under this optimiser. It cannot "
    "show whether safety was lost there, nor why.",
    "The share of the lost refusal margin: shows through which weights the loss went. It cannot show that safety could "
    "not have been lost another way, nor whether the group's old activations would bring it back: patching does.",
)
EXPECTED = (
    "H1 (fragile safety) expects safety neurons to move further than comparable ones, H2 (pathway creation) as far. "
    "Neither follows from the length that it expects: H1 is that they carry more of the lost margin than comparable "
    "neurons, beyond the band; H2 that they do not, and that their original activations bring no refusals back."
)
#: What a length leaves open, by the verdict of the ratio.
OPEN = {
    "more": "a longer drift. H1 expects it; but so does any use that the fine-tuning makes of these neurons, as in the "
    "positive control. Undecided by lengths.",
    "similar": "a similar length of drift. H2 expects it; but AdamW gives it to all weights alike, and safety can be "
    "lost by moving as far in another direction. Undecided by lengths.",
    "protected": "a shorter drift, which neither H1 nor H2 expects. Safety can be lost with it all the same.",
    "inconclusive": "no length that can be told from that of comparable neurons, or shown to be like it. Undecided.",
}


def section(results: Findings) -> Section:
    """The measures of each safety group, what they can show, and what is left open."""
    effects = [effect for effect in effects_of(results) if is_safety(effect)]
    if not effects:
        return Section(title=TITLE, blocks=(Paragraph("There is no group whose role is safety."),))
    blocks: list[Block] = [Paragraph(f"{EXPECTED} {wording.LENGTHS_ALONE}")]
    blocks += [_measure_table(effects), Items(MEASURES)]
    blocks.append(Items(tuple(_left_open(e, results) for e in effects if e["metric"] == primary_of(results))))
    if not is_older(results):
        acted = interventions_of(results)
        sentences = [*decision(results).sentences, *sentences_of(results), *(conclusion_of(acted) if acted else [])]
        blocks.append(Paragraph(f"In sum: {clean(' '.join(sentences))}"))
    return Section(title=TITLE, blocks=tuple(blocks))


def _measure_table(effects: list[Effect]) -> Table:
    notes, rows = Footnotes(), []
    for effect in effects:
        found = judged(effect)
        rows.append(
            (
                clean(effect["group"]),
                clean(effect["metric"]).replace("_", " "),
                notes.number(effect["mean_members"], "value", wording.drift),
                notes.number(effect["mean_others"], "value", wording.drift),
                notes.number(effect["d_random"], "value", wording.effect),
                notes.ratio(found),
                wording.verdict(found) if found else "not judged",
            )
        )
    return table(
        "Safety groups in the measures that the study names",
        ("group", "measure", "mean", "all others*", "Cohen's d vs random*", "ratio to comparable [95 %]", "moved"),
        rows,
        "llrrrrl",
        (CONFOUNDED, *notes.notes()),
    )


def _left_open(effect: Effect, results: Findings) -> str:
    """What the length of one group says about either hypothesis."""
    found, name = judged(effect), f"{clean(effect['group'])}, {metric_words(effect['metric'])}"
    if found is None:
        return f"{name}: judged by an older version, which knew no ratio."
    if not found["comparable"]:
        return f"{name}: {wording.NOT_COMPARABLE} with the neurons outside it. Neither hypothesis can be evaluated."
    said = wording.ratio_with_interval(found)
    if said is None:
        return f"{name}: neither hypothesis can be evaluated ({wording.reason(found, 'ratio_ci95')})."
    under = (
        wording.optimiser_words(study_of(results).get("optimiser", "")) if study_of(results).get("optimiser") else ""
    )
    text = f"{name}{f', under {under}' if under else ''}: ratio {said}, {OPEN[found['verdict']]}"
    if found["verdict"] == "inconclusive":
        power = wording.number(found, "smallest_more", wording.ratio)
        text += f" The smallest ratio that would be called further with 80 % power is {power}."
    return text
