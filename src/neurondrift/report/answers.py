"""Answers to harmful requests, for reports that were asked to show them."""

from collections.abc import Sequence

from neurondrift.report.blocks import Items, Paragraph, Section
from neurondrift.report.wording import Record, clean

WARNING = (
    "What follows was written by the model, on harmful requests. It was asked for with --show-responses, and no person "
    "has read it."
)


def answer_sections(answers: Sequence[Record]) -> tuple[Section, ...]:
    """One section a seed and step; none where no answer is to be shown.

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
