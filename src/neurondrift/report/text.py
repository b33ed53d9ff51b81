"""The report as plain text, at most 100 columns wide."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from dataclasses import replace

from neurondrift.base.terminal import plain
from neurondrift.report.blocks import LEFT, Block, Document, Items, Paragraph, Section, Table
from neurondrift.report.document import build_document
from neurondrift.report.findings.statistical import Findings
from neurondrift.report.wording import Record

WIDTH = 100
GAP = "  "
#: A column of words is wrapped no narrower than this while another can still give way.
NARROW = 12
#: A header is given room until it takes no more lines than this.
HEADER_LINES = 2
#: So few more characters are always given, where there is room, to bring a header onto one line.
SHORT = 3


class _CellWrapper(textwrap.TextWrapper):
    """Breaks at spaces and, where a name is too long, after an underscore."""

    wordsep_re = re.compile(r"(\s+|(?<=_)(?=[^_]))")


def render_text(results: Findings, answers: Sequence[Record] = ()) -> str:
    """The whole report, one screen of answer first.

    Parameters
    ----------
    results
        The content of `statistical_results.json`.
    answers
        Answers to harmful requests that are to be shown.

    Returns
    -------
    str
        UTF-8 text with a final newline; no line is longer than 100 characters. No other model answer is in it.
    """
    return document_text(build_document(results, answers))


def document_text(document: Document) -> str:
    """A document as such a text."""
    lines = [*_wrap(document.title), *_wrap(document.subtitle), "═" * WIDTH]
    lines += _body(document.answer)
    for section in document.sections:
        lines += ["", "═" * WIDTH, *_wrap(section.title.upper()), "", *_body(section)]
    return plain("\n".join(line.rstrip() for line in lines)) + "\n"


def render_section(section: Section) -> list[str]:
    """One section without its title, as lines of at most 100 characters."""
    return [line.rstrip() for line in _body(section)]


def render_tables(section: Section) -> list[str]:
    """The same without the section's lists: what a screen shows of it."""
    return render_section(replace(section, blocks=tuple(b for b in section.blocks if not isinstance(b, Items))))


def _body(section: Section) -> list[str]:
    lines: list[str] = []
    for before, block in zip((None, *section.blocks), section.blocks, strict=False):
        if before is not None and not (isinstance(before, Paragraph) and isinstance(block, Items)):
            lines.append("")
        lines += _block(block)
    return lines


def _block(block: Block) -> list[str]:
    if isinstance(block, Paragraph):
        return _wrap(block.text)
    if isinstance(block, Items):
        marks = [f"{i}. " if block.ordered else "- " for i in range(1, len(block.entries) + 1)]
        return [
            line
            for mark, entry in zip(marks, block.entries, strict=True)
            for line in _wrap(entry, first=mark, rest=" " * len(mark))
        ]
    return _table(block)


def _table(table: Table) -> list[str]:
    widths = _widths(table)
    lines = [
        *_wrap(table.title),
        *_row(table.headers, widths, table.align, bottom=True),
        "─" * (sum(widths) + len(GAP) * (len(widths) - 1)),
    ]
    for row in table.rows:
        lines += _row(row, widths, table.align)
    for note in table.notes:
        lines += _wrap(note, first="  ", rest="    ")
    return lines


def _row(cells: tuple[str, ...], widths: list[int], align: str, *, bottom: bool = False) -> list[str]:
    """The lines of one row; cells too wide for their column go over several, headers stand at the bottom."""
    wrapped = [_CellWrapper(width).wrap(cell) or [""] for cell, width in zip(cells, widths, strict=True)]
    height = max(map(len, wrapped))
    padded = [[""] * (height - len(c)) + c if bottom else c + [""] * (height - len(c)) for c in wrapped]
    return [
        GAP.join(
            part.ljust(width) if side == LEFT else part.rjust(width)
            for part, width, side in zip(line, widths, align, strict=True)
        )
        for line in zip(*padded, strict=True)
    ]


def _widths(table: Table) -> list[int]:
    """Columns as wide as their cells; headers wrap at words, and wide columns of words give way first."""
    widths = []
    for index, header in enumerate(table.headers):
        longest_word = max(map(len, header.split()), default=1)
        widths.append(max([longest_word, *(len(row[index]) for row in table.rows)]))
    room = WIDTH - len(GAP) * (len(widths) - 1)
    assert room >= len(widths), table.title
    while sum(widths) > room:
        words = [i for i, side in enumerate(table.align) if side == LEFT and widths[i] > NARROW]
        widest = max(words or range(len(widths)), key=lambda i: widths[i])
        widths[widest] -= 1
    while sum(widths) < room:  # spare room goes to the header that takes most lines
        lines = [len(textwrap.wrap(header, width)) for header, width in zip(table.headers, widths, strict=True)]
        tallest = max(range(len(widths)), key=lambda i: lines[i])
        if lines[tallest] <= HEADER_LINES:
            break
        widths[tallest] += 1
    for index, header in enumerate(table.headers):
        wanted = len(header) - widths[index]
        if 0 < wanted <= min(room - sum(widths), SHORT):
            widths[index] += wanted
    return widths


def _wrap(text: str, *, first: str = "", rest: str = "") -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=first, subsequent_indent=rest) or [first.rstrip()]
