"""The section on the rank level: shares of the change in the safety and utility subspaces, and what removal does."""

from __future__ import annotations

from collections.abc import Sequence

from neurondrift.report import wording
from neurondrift.report.blocks import Block, Paragraph, Section, Table, table
from neurondrift.report.wording import Footnotes, Record, clean

SUBSPACES = {
    "safety": "safety",
    "utility": "utility",
    "safety_only": "safety only, outside utility",
}
MEASURES = {
    "weights": "the change of the weights",
    "safety_outputs": "the change of the outputs on safety examples",
    "utility_outputs": "the change of the outputs on utility examples",
}
REMOVALS = {
    "none": "nothing removed",
    "safety": "safety directions",
    "utility": "utility directions",
    "safety_only": "safety, orthogonal to utility",
    "random": "random directions",
}


def section(found: Record, fingerprint: object = None) -> Section:
    """The section from the content of `results/subspaces.json`.

    `fingerprint` is that of the model of the findings that the section stands beside: figures of another model are
    not shown; None: not compared.
    """
    study = found.get("study") or {}
    if fingerprint is not None and study.get("model_fingerprint") != fingerprint:
        text = "results/subspaces.json is of another model: run neurondrift subspaces again."
        return Section(title="Rank level", blocks=(Paragraph(text),))
    blocks: list[Block] = [Paragraph(_what(found)), *_share_tables(found)]
    behaviour = found.get("behaviour")
    if behaviour:
        blocks.append(_removal_table(behaviour, found.get("settings") or {}))
    else:
        blocks.append(Paragraph("Refusals after removal: not measured (--draws 0)."))
    return Section(title="Rank level", blocks=tuple(blocks))


def _what(found: Record) -> str:
    settings, summary = found.get("settings") or {}, found.get("subspaces") or {}
    explained = summary.get("explained") or {}
    ranks = summary.get("mean_rank") or {}

    def mean(record: Record, name: str) -> str:
        value = wording.finite(record.get(name))
        return "undefined" if value is None else wording.plain(value) if record is ranks else wording.share(value)

    chance = mean(summary, "overlap_by_chance")
    return (
        f"The subspaces are the output directions of each site that carry most of W·X at the response tokens of the "
        f"safety ({clean((settings.get('examples') or {}).get('safety'))}) and utility "
        f"({clean((settings.get('examples') or {}).get('utility'))}) examples (ActSVD, Wei et al. 2024): on average "
        f"{mean(ranks, 'safety')} and {mean(ranks, 'utility')} directions a site, with {mean(explained, 'safety')} and "
        f"{mean(explained, 'utility')} of ‖W·X‖². The share of the safety subspace within the utility one is "
        f"{mean(summary, 'overlap')} ({chance} by chance); {mean(ranks, 'safety_only')} directions a site are the "
        f"safety subspace outside it. Means over {clean(summary.get('sites'))} sites."
    )


def _share_tables(found: Record) -> list[Table]:
    tables = []
    for measure, words in MEASURES.items():
        rows = [row for row in found.get("shares") or [] if row.get("measure") == measure]
        if rows:
            contrasts = [c for c in found.get("contrasts") or [] if c.get("measure") == measure]
            tables.append(_share_table(rows, contrasts, words))
    return tables


def _share_table(rows: Sequence[Record], contrasts: Sequence[Record], words: str) -> Table:
    notes = Footnotes()
    cells = []
    for row in rows:
        random = row.get("random") or {}
        cells.append(
            (
                SUBSPACES.get(row["subspace"], clean(row["subspace"])),
                notes.with_interval(row.get("of_sum"), _three),
                notes.number(row, "expected", _three),
                notes.number(row, "ratio", wording.ratio),
                f"{notes.number(random, 'low', _three)} to {notes.number(random, 'high', _three)}",
                notes.with_interval(row.get("of_sites"), _three),
            )
        )
    said = [
        f"{SUBSPACES[c['first']]} minus {SUBSPACES[c['second']]}: {notes.with_interval(c.get('of_sum'), _signed)}"
        for c in contrasts
    ]
    return table(
        f"Share of {words} that lies in each subspace",
        ("subspace", "share [95 %]", "by chance", "share / chance", "random subspaces", "mean of sites [95 %]"),
        cells,
        "lrrrrr",
        (
            *said,
            "Intervals: cluster bootstrap over sites. By chance: rank / outputs, weighted as the share. Differences: "
            "of the shares beyond chance.",
            *notes.notes(),
        ),
    )


def _removal_table(behaviour: Record, settings: Record) -> Table:
    conditions = behaviour.get("conditions") or []
    rows = [
        (
            REMOVALS.get(c["removed"], clean(c["removed"])) + ("" if c.get("draw") is None else f" {c['draw'] + 1}"),
            wording.rate(c.get("refusals")),
            wording.number(c, "coherent", wording.share),
            wording.number(c, "perplexity", wording.plain),
        )
        for c in conditions
    ]
    p = behaviour.get("p_random") or {}
    compared = ", ".join(
        f"{REMOVALS.get(name, clean(name))} {wording.probability(value)}"
        for name, value in p.items()
        if wording.finite(value) is not None
    )
    return table(
        "Refusals of harmful requests after directions are removed from every site (before fine-tuning)",
        ("removed", "refusals [95 %]", "coherent", "perplexity"),
        rows,
        "lrrr",
        (
            f"{clean(behaviour.get('prompts'))} harmful requests; perplexity of {clean(behaviour.get('answers'))} "
            f"held-out answers to ordinary prompts. Random removals take as many directions as the safety removal "
            f"(rank {clean(settings.get('rank'))}).",
            f"Share of random removals with as few refusals, (1 + k) / (1 + K): {compared}." if compared else "",
            "Top directions carry far more of the outputs than random ones: a fall of refusals with a broken "
            "perplexity or incoherent answers shows a broken model, not the place of safety.",
        ),
    )


def _three(value: float) -> str:
    return f"{value:.3f}"


def _signed(value: float) -> str:
    return f"{value:+.3f}"
