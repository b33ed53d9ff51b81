"""What a report is made of, as data: sections of paragraphs, lists and tables. `text` and `page` lay them out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

LEFT, RIGHT = "l", "r"


@dataclass(frozen=True, kw_only=True)
class Table:
    """Headers and rows of finished strings. `align` has one letter a column: l (words) or r (numbers)."""

    title: str
    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    align: str
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        assert len(self.align) == len(self.headers), self.title
        assert all(len(row) == len(self.headers) for row in self.rows), self.title


@dataclass(frozen=True)
class Paragraph:
    text: str


@dataclass(frozen=True)
class Items:
    """A list; numbered where `ordered`."""

    entries: tuple[str, ...]
    ordered: bool = False


Block = Table | Paragraph | Items


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One cell of a map: `value` from -1 to 1 (None: nothing there) is its colour, `text` what is read out."""

    row: int
    column: int
    value: float | None
    text: str


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One map of several that share their rows and columns."""

    title: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True, kw_only=True)
class Map:
    """Coloured cells in rows and columns, for the page alone: a text has tables. `key` says what values mean, from -1
    to 1; `figure` names the figure that shows the same, which the page then leaves out."""

    title: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    panels: tuple[Panel, ...]
    key: tuple[tuple[float, str], ...]
    notes: tuple[str, ...] = ()
    figure: str = ""

    def __post_init__(self) -> None:
        cells = [cell for panel in self.panels for cell in panel.cells]
        assert all(cell.value is None or -1 <= cell.value <= 1 for cell in cells), self.title
        assert all(cell.row < len(self.rows) and cell.column < len(self.columns) for cell in cells), self.title


@dataclass(frozen=True, kw_only=True)
class Section:
    """`figures` are the names (without suffix) of the figures that belong here, `maps` what the page shows besides."""

    title: str
    blocks: tuple[Block, ...]
    figures: tuple[str, ...] = ()
    maps: tuple[Map, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Document:
    """The whole report: `answer` is the first screen."""

    title: str
    subtitle: str
    answer: Section
    sections: tuple[Section, ...]


def table(
    title: str, headers: Sequence[str], rows: Sequence[Sequence[str]], align: str, notes: Sequence[str] = ()
) -> Table:
    """A `Table` from any sequences."""
    return Table(title=title, headers=tuple(headers), rows=tuple(map(tuple, rows)), align=align, notes=tuple(notes))
