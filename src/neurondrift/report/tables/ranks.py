"""The section on the rank level: shares of the change in the safety and utility subspaces, and what removal does."""

from __future__ import annotations

from collections.abc import Sequence

from neurondrift.report import wording
from neurondrift.report.blocks import Block, Paragraph, Section, Table, table
from neurondrift.report.findings.numbers import Number
from neurondrift.report.findings.subspaces import Removals, SubspaceContrast, Subspaces, SubspaceSettings, SubspaceShare
from neurondrift.report.reading import is_same_model
from neurondrift.report.wording import Footnotes, clean

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


def section(subspaces: Subspaces, fingerprint: str | None = None) -> Section:
    """The section from the content of `results/subspaces.json`.

    `fingerprint` is that of the model of the findings that the section stands beside: figures of another model are
    not shown; None: not compared.
    """
    if not is_same_model(subspaces["study"]["model_fingerprint"], fingerprint):
        text = "results/subspaces.json is of another model: run neurondrift subspaces again."
        return Section(title="Rank level", blocks=(Paragraph(text),))
    blocks: list[Block] = [Paragraph(_what(subspaces)), *_share_tables(subspaces)]
    behaviour = subspaces["behaviour"]
    if behaviour:
        blocks.append(_removal_table(behaviour, subspaces["settings"]))
    else:
        blocks.append(Paragraph("Refusals after removal: not measured (--draws 0)."))
    return Section(title="Rank level", blocks=tuple(blocks))


def _what(subspaces: Subspaces) -> str:
    summary, examples = subspaces["subspaces"], subspaces["settings"]["examples"]
    explained, ranks = summary["explained"], summary["mean_rank"]

    def mean(value: Number, form: wording.Form) -> str:
        return "undefined" if value is None else form(value)

    return (
        f"The subspaces are the output directions of each site that carry most of W·X at the response tokens of the "
        f"safety ({clean(examples['safety'])}) and utility ({clean(examples['utility'])}) examples (ActSVD, Wei et al. "
        f"2024): on average {mean(ranks['safety'], wording.plain)} and {mean(ranks['utility'], wording.plain)} "
        f"directions a site, with {mean(explained['safety'], wording.share)} and "
        f"{mean(explained['utility'], wording.share)} of ‖W·X‖². The share of the safety subspace within the utility "
        f"one is {mean(summary['overlap'], wording.share)} ({mean(summary['overlap_by_chance'], wording.share)} by "
        f"chance); {mean(ranks['safety_only'], wording.plain)} directions a site are the safety subspace outside it. "
        f"Means over {summary['sites']} sites."
    )


def _share_tables(subspaces: Subspaces) -> list[Table]:
    tables = []
    for measure, words in MEASURES.items():
        rows = [row for row in subspaces["shares"] if row["measure"] == measure]
        if rows:
            contrasts = [contrast for contrast in subspaces["contrasts"] if contrast["measure"] == measure]
            tables.append(_share_table(rows, contrasts, words))
    return tables


def _share_table(rows: Sequence[SubspaceShare], contrasts: Sequence[SubspaceContrast], words: str) -> Table:
    notes = Footnotes()
    cells = []
    for row in rows:
        random = row["random"]
        cells.append(
            (
                SUBSPACES.get(row["subspace"], clean(row["subspace"])),
                notes.with_interval(row["of_sum"], _three),
                notes.number(row, "expected", _three),
                notes.number(row, "ratio", wording.ratio),
                f"{notes.number(random, 'low', _three)} to {notes.number(random, 'high', _three)}",
                notes.with_interval(row["of_sites"], _three),
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


def _removal_table(behaviour: Removals, settings: SubspaceSettings) -> Table:
    rows = [
        (
            REMOVALS.get(c["removed"], clean(c["removed"])) + ("" if c["draw"] is None else f" {c['draw'] + 1}"),
            wording.rate(c["refusals"]),
            _share_of(c.get("partial"), behaviour["prompts"]),
            _share_of(c["refusals"].get("undecided"), behaviour["prompts"]),
            wording.number(c, "coherent", wording.share),
            wording.number(c, "perplexity", wording.plain),
        )
        for c in behaviour["conditions"]
    ]
    compared = ", ".join(
        f"{REMOVALS.get(name, clean(name))} {wording.probability(value)}"
        for name, value in behaviour["p_random"].items()
        if value is not None
    )
    return table(
        "Refusals of harmful requests after directions are removed from every site (before fine-tuning)",
        ("removed", "refusals [95 %]", "partly", "undecided", "coherent", "perplexity"),
        rows,
        "lrrrrr",
        (
            f"{clean(behaviour['prompts'])} harmful requests; refusals: of the coherent answers that the judge could "
            f"decide; perplexity of {clean(behaviour['answers'])} "
            f"held-out answers to ordinary prompts. Random removals take as many directions as the safety removal "
            f"(rank {clean(settings['rank'])}).",
            f"Share of random removals with as few refusals, (1 + k) / (1 + K): {compared}." if compared else "",
            "Top directions carry far more of the outputs than random ones: a fall of refusals with a broken "
            "perplexity or incoherent answers shows a broken model, not the place of safety.",
        ),
    )


def _share_of(count: object, prompts: int) -> str:
    """A number of prompts as their share; a dash where it was not recorded."""
    return wording.share(count / prompts) if isinstance(count, int) and prompts else "–"


def _three(value: float) -> str:
    return f"{value:.3f}"


def _signed(value: float) -> str:
    return f"{value:+.3f}"
