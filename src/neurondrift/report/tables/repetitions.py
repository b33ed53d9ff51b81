"""The section on what varies between honest repetitions and is in no interval, with how far re-drawn groups agree."""

from __future__ import annotations

from neurondrift.report import wording
from neurondrift.report.blocks import Block, Paragraph, Section, Table, table
from neurondrift.report.findings.stability import Stability
from neurondrift.report.findings.statistical import Findings
from neurondrift.report.reading import study_of
from neurondrift.report.wording import Footnotes, clean

TITLE = "What varies between honest repetitions, and is in no interval"


def section(results: Findings) -> Section:
    """The sources of variation that no interval covers; where `neurondrift stability` was run, its figures."""
    stability = results.get("stability")
    blocks: list[Block] = [Paragraph(caveat(results))]
    blocks.append(
        _table(stability)
        if stability
        else Paragraph("How far groups from re-drawn calibration examples agree: not measured (neurondrift stability).")
    )
    return Section(title=TITLE, blocks=tuple(blocks))


def caveat(results: Findings) -> str:
    """What a repetition would vary, in one sentence."""
    varied = ["the draw of calibration examples, which chooses the groups", "the score and the share that is taken"]
    if study_of(results).get("aligned_first", True):
        varied.insert(0, "the alignment run")
    return (
        f"Intervals cover sites or layers, and training seeds where there are three or more; not {', '.join(varied)}, "
        "the fine-tuning examples and the learning rate: another honest repetition may differ by more."
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
