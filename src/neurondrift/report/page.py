"""The report as one HTML page: nothing is loaded; light and dark, printable, whole without its script."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path

from neurondrift.report.blocks import LEFT, Block, Document, Items, Paragraph, Section, Table
from neurondrift.report.document import build_document
from neurondrift.report.findings.statistical import Findings
from neurondrift.report.web.assets import policy, script, style
from neurondrift.report.web.cells import map_html
from neurondrift.report.web.svg import inlined
from neurondrift.report.wording import Record

MEDIA_TYPES = {".svg": "image/svg+xml", ".png": "image/png"}
#: What each figure shows, for readers who do not see it.
ALTERNATIVES = {
    "effect_sizes": "Ratio of drift to comparable neurons of each group and metric, with intervals and the band",
    "final_drift_distributions": "Distributions of the final drift of each group and of its matched controls",
    "layer_module_effects": "Ratio of each group to comparable neurons by layer and module type",
    "intervention_doses": "Share of harmful requests refused against the share of the group that was acted on, with "
    "the range of matched random groups, and how many were drawn where that was stopped early",
    "drift_over_training": "Mean drift of each group and of its matched controls over training",
    "sweep_forest": "Forest plot: the ratio of each judging group to comparable neurons in every study, and over all "
    "of them, with intervals and the band",
    "sweep_refusals": "The ratio of each judging group in every study against the refusals that were lost there",
    "refusals_over_training": "Share of prompts refused over training, above the refusal margin and the drift of the "
    "safety groups",
}


def render_page(results: Findings, figures: Sequence[Path], answers: Sequence[Record] = ()) -> str:
    """The report as HTML with its figures inside.

    Parameters
    ----------
    results
        The content of `statistical_results.json`.
    figures
        Files to embed, as `draw_figures` returns them; where both stand for one figure, the SVG is taken.
    answers
        Answers to harmful requests that are to be shown, escaped; no other answer is in the page.

    Returns
    -------
    str
        A complete document. Every text from `results` is escaped; a content policy forbids loading, and every script
        but the page's own, by its hash. Without scripts the page holds the same.

    Raises
    ------
    OSError
        A figure cannot be read.
    """
    return lay_out(build_document(results, answers), figures)


def lay_out(document: Document, figures: Sequence[Path]) -> str:
    """A document as such a page; figures that no section names come last."""
    chosen = _choose(figures)
    sections = (document.answer, *document.sections)
    mapped = {made.figure for section in sections for made in section.maps}
    placed = {name for section in sections for name in section.figures}
    places = _places(sections)
    parts = [
        f"<h1>{escape(document.title)}</h1>",
        f'<p class="subtitle">{escape(document.subtitle)}</p>',
        f'<section class="answer" id="{places[0]}">',
        *_section(document.answer),
        "</section>",
    ]
    parts += _figures(document.answer.figures, chosen)
    for section, place in zip(document.sections, places[1:], strict=True):
        parts += [f'<section id="{place}">', *_section(section), *map(map_html, section.maps)]
        parts += [*_figures([name for name in section.figures if name not in mapped], chosen), "</section>"]
    parts += _figures([name for name in chosen if name not in placed], chosen)
    body = "\n".join(parts)
    acting = script()
    return (
        "<!DOCTYPE html>\n"
        '<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(policy(acting))}">\n'
        f"<title>{escape(document.title)}</title>\n<style>{style()}</style>\n</head>\n"
        f"<body>\n{_contents(sections, places)}\n<main>\n{body}\n</main>\n<script>{acting}</script>\n</body>\n</html>\n"
    )


def _places(sections: Sequence[Section]) -> list[str]:
    """The id of each section: its title in small letters, numbered where two are the same."""
    taken: list[str] = []
    for section in sections:
        name = re.sub(r"[^a-z0-9]+", "-", section.title.lower()).strip("-") or "section"
        taken.append(name if name not in taken else f"{name}-{len(taken)}")
    return taken


def _contents(sections: Sequence[Section], places: Sequence[str]) -> str:
    """Links to every section."""
    links = "\n".join(
        f'<li><a href="#{place}">{escape(section.title)}</a></li>'
        for section, place in zip(sections, places, strict=True)
    )
    return f'<nav aria-label="Contents">\n<ul>\n{links}\n</ul>\n</nav>'


def _choose(figures: Sequence[Path]) -> dict[str, Path]:
    """Figure name -> the file to embed."""
    chosen: dict[str, Path] = {}
    for path in map(Path, figures):
        if path.suffix in MEDIA_TYPES and (path.stem not in chosen or path.suffix == ".svg"):
            chosen[path.stem] = path
    return chosen


def _figures(names: Sequence[str], chosen: dict[str, Path]) -> list[str]:
    return [f'<figure class="figure">{_figure(name, chosen[name])}</figure>' for name in names if name in chosen]


def _figure(name: str, path: Path) -> str:
    """The drawing itself where it is one of ours, which then follows dark mode; else an image."""
    alternative = ALTERNATIVES.get(name, name.replace("_", " "))
    drawn = inlined(path, alternative) if path.suffix == ".svg" else None
    if drawn is not None:
        return drawn
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    return f'<img src="data:{MEDIA_TYPES[path.suffix]};base64,{data}" alt="{escape(alternative)}">'


def _section(section: Section) -> list[str]:
    return [f"<h2>{escape(section.title)}</h2>", *(_block(block) for block in section.blocks)]


def _block(block: Block) -> str:
    if isinstance(block, Paragraph):
        return f"<p>{escape(block.text)}</p>"
    if isinstance(block, Items):
        tag = "ol" if block.ordered else "ul"
        return f"<{tag}>{''.join(f'<li>{escape(entry)}</li>' for entry in block.entries)}</{tag}>"
    return _table(block)


def _table(table: Table) -> str:
    kinds = ["" if side == LEFT else ' class="number"' for side in table.align]
    head = "".join(f'<th scope="col"{kind}>{escape(h)}</th>' for kind, h in zip(kinds, table.headers, strict=True))
    rows = "\n".join(
        "<tr>" + "".join(f"<td{kind}>{escape(cell)}</td>" for kind, cell in zip(kinds, row, strict=True)) + "</tr>"
        for row in table.rows
    )
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in table.notes)
    caption = f"<caption><span>{escape(table.title)}</span></caption>"
    return (
        f'<div class="wide"><table>{caption}\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{rows}\n</tbody></table></div>{notes}"
    )
