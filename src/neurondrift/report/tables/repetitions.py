"""The section on what varies between honest repetitions and is in no interval, with how far re-drawn groups agree."""

from __future__ import annotations

from neurondrift.report import wording
from neurondrift.report.blocks import Block, Paragraph, Section, Table, table
from neurondrift.report.findings.stability import Stability
from neurondrift.report.findings.statistical import Findings
from neurondrift.report.reading import analysis_of, is_same_model, study_of
from neurondrift.report.wording import Footnotes, clean

TITLE = "What varies between honest repetitions, and is in no interval"


def section(results: Findings) -> Section:
    """The sources of variation that no interval covers; where `neurondrift stability` was run, its figures."""
    stability = _redrawn(results)
    blocks: list[Block] = [Paragraph(wording.sentence_case(f"{caveat(results)}."))]
    if stability:
        blocks.append(_table(stability))
    else:
        text = "How far groups from re-drawn calibration examples agree: not measured (neurondrift stability)."
        if results.get("stability"):
            text = "results/stability.json is of another model: run neurondrift stability again."
        blocks.append(Paragraph(text))
    return Section(title=TITLE, blocks=tuple(blocks))


def _redrawn(results: Findings) -> Stability | None:
    """The figures of the model of these findings; None where there are none."""
    stability, known = results.get("stability"), study_of(results).get("model_fingerprint")
    fits = stability and ("model_fingerprint" not in stability or is_same_model(stability["model_fingerprint"], known))
    return stability if stability and fits else None


def caveat(results: Findings) -> str:
    """What a repetition would vary, without a full stop."""
    varied = ["the draw of calibration examples, which chooses the groups", "the score and the share that is taken"]
    if study_of(results).get("aligned_first", True):
        varied.insert(0, "the alignment run")
    text = (
        f"intervals cover sites or layers, and training seeds where there are three or more; not {', '.join(varied)}, "
        "the fine-tuning examples or the learning rate: another honest repetition may differ by more"
    )
    if redrawn := _agreement(results):
        text += f" (groups of re-drawn examples have a Jaccard of {redrawn})"
    return text


def _agreement(results: Findings) -> str:
    """How far re-drawn groups of the neurons that judge agree; empty where that was not measured."""
    stability, analysis = _redrawn(results), analysis_of(results)
    if stability is None or analysis is None:
        return ""
    known = {name: stability["groups"].get(name, {}).get("neuron") for name in analysis.get("judging", [])}
    return ", ".join(
        f"{wording.number(figures, 'jaccard', wording.share)} for {clean(name)}"
        for name, figures in known.items()
        if figures
    )


def _table(stability: Stability) -> Table:
    notes, rows = Footnotes(), []
    for group, by_granularity in stability["groups"].items():
        for granularity, figures in by_granularity.items():
            spread = wording.interval([figures["jaccard_low"], figures["jaccard_high"]], wording.share)
            rows.append(
                (
                    clean(group),
                    clean(granularity),
                    notes.number(figures, "members", _count),
                    f"{notes.number(figures, 'jaccard', wording.share)} {spread or ''}".strip(),
                    notes.number(figures, "chance_jaccard", wording.share),
                    notes.number(figures, "overlap", wording.share),
                )
            )
    drawn = ", ".join(
        f"{stability['examples'][name]} of {stability['pool'][name]} {clean(name)}" for name in stability["examples"]
    )
    return table(
        f"Groups of {stability['draws']} draws of calibration examples on the same model, compared in pairs",
        ("group", "of", "members", "Jaccard [range]", "by chance", "shared / smaller"),
        rows,
        "llrrrr",
        (f"examples: {drawn}; a set of which all are used is the same in every draw", *notes.notes()),
    )


def _count(value: float) -> str:
    return f"{value:,.0f}"
