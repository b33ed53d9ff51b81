"""The report as one self-contained HTML page: no script, no external resource, light and dark, printable."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path

from neurondrift.report.blocks import LEFT, Block, Items, Paragraph, Section, Table
from neurondrift.report.document import build_document
from neurondrift.report.findings.statistical import Findings
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
    "refusals_over_training": "Share of prompts refused over training, above the refusal margin and the drift of the "
    "safety groups",
}
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --soft: #5a626b; --paper: #ffffff; --panel: #f3f5f7;
  --line: #d4d9de; --accent: #0060a0; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7ea; --soft: #9da6af; --paper: #14171a;
  --panel: #1d2226; --line: #363d44; --accent: #6cb8ee; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 62rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.75rem 0 .75rem; padding-top: .75rem; border-top: 1px solid var(--line); }
p, li { max-width: 46rem; overflow-wrap: anywhere; }
li { margin: .3rem 0; }
.subtitle { color: var(--soft); margin: .25rem 0 1.5rem; }
.answer { background: var(--panel); border-left: 4px solid var(--accent); padding: .5rem 1.25rem 1rem; }
.answer h2 { border: 0; margin: .75rem 0 0; padding: 0; }
.wide { overflow-x: auto; margin: 1.25rem 0; }
table { border-collapse: collapse; font-size: .86rem; line-height: 1.4; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding: 0 0 .4rem; }
th, td { padding: .28rem .9rem .28rem 0; vertical-align: top; text-align: left; }
th { font-weight: 600; color: var(--soft); vertical-align: bottom; border-bottom: 1px solid var(--ink); }
td { border-bottom: 1px solid var(--line); }
.number { text-align: right; white-space: nowrap; }
th.number { white-space: normal; }
.note { color: var(--soft); font-size: .82rem; margin: .25rem 0; }
figure { margin: 1.5rem 0; }
figure img { display: block; width: 100%; height: auto; background: #ffffff; padding: .5rem; border-radius: 4px; }
@media print {
  :root { --ink: #000; --soft: #444; --paper: #fff; --panel: #fff; --line: #bbb; --accent: #000; }
  body { max-width: none; padding: 0; font-size: 10.5pt; }
  .wide { overflow: visible; } tr, figure, .answer { break-inside: avoid; } h2 { break-after: avoid; }
  table { font-size: 8.5pt; } th, td { padding-right: .5rem; }
}
"""


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
        A complete document. Every text from `results` is escaped; a content policy forbids scripts and loading.

    Raises
    ------
    OSError
        A figure cannot be read.
    """
    document = build_document(results, answers)
    chosen = _choose(figures)
    placed = {name for section in (document.answer, *document.sections) for name in section.figures}
    parts = [
        f"<h1>{escape(document.title)}</h1>",
        f'<p class="subtitle">{escape(document.subtitle)}</p>',
        '<section class="answer">',
        *_section(document.answer),
        "</section>",
    ]
    parts += _figures(document.answer.figures, chosen)
    for section in document.sections:
        parts += ["<section>", *_section(section), *_figures(section.figures, chosen), "</section>"]
    parts += _figures([name for name in chosen if name not in placed], chosen)
    body = "\n".join(parts)
    return (
        "<!DOCTYPE html>\n"
        '<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(POLICY)}">\n'
        f"<title>{escape(document.title)}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _choose(figures: Sequence[Path]) -> dict[str, Path]:
    """Figure name -> the file to embed."""
    chosen: dict[str, Path] = {}
    for path in map(Path, figures):
        if path.suffix in MEDIA_TYPES and (path.stem not in chosen or path.suffix == ".svg"):
            chosen[path.stem] = path
    return chosen


def _figures(names: Sequence[str], chosen: dict[str, Path]) -> list[str]:
    out = []
    for name in names:
        if name in chosen:
            data = base64.b64encode(chosen[name].read_bytes()).decode("ascii")
            alternative = escape(ALTERNATIVES.get(name, name.replace("_", " ")))
            out.append(
                f'<figure><img src="data:{MEDIA_TYPES[chosen[name].suffix]};base64,{data}" '
                f'alt="{alternative}"></figure>'
            )
    return out


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
    return (
        f'<div class="wide"><table><caption>{escape(table.title)}</caption>\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{rows}\n</tbody></table></div>{notes}"
    )
