"""A map as SVG: a panel beside the other, each cell with its words, so that it can be read without a script."""

from __future__ import annotations

from html import escape

from neurondrift.report.blocks import Cell, Map, Panel

#: Width and height of a cell, and how far apart cells are, in units of the drawing (pixels at its natural size).
WIDTH, HEIGHT, GAP = 16, 10, 1
#: Units that a character of a label takes, and that lie between labels and cells.
LETTER, BESIDE = 6.2, 5
#: Units that a label of a row is high, and how many such labels there are, at most by one.
LABEL_HEIGHT, MOST_LABELS = 14, 10


def map_html(made: Map) -> str:
    """The whole map: its title, what the colours say, the panels, notes."""
    panels = "\n".join(_panel(made, panel) for panel in made.panels)
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in made.notes)
    return (
        f'<div class="map" role="group" aria-label="{escape(made.title)}">\n'
        f'<p class="map-title">{escape(made.title)}</p>\n{_key(made)}\n'
        f'<div class="panels{" one" if len(made.panels) == 1 else ""}">\n{panels}\n</div>\n{notes}</div>'
    )


def _key(made: Map) -> str:
    """What the colours say."""
    cells = [cell for panel in made.panels for cell in panel.cells]
    named: list[tuple[float | None, str]] = list(made.key)
    if any(cell.value is None for cell in cells):
        named.append((None, "undefined"))
    swatches = "".join(
        f'<li><svg viewBox="0 0 20 12" aria-hidden="true">{_rect("", value, 0.5, 0.5, 19, 11)}</rect></svg>'
        f"{escape(label)}</li>"
        for value, label in named
    )
    is_full = len(cells) == len(made.panels) * len(made.rows) * len(made.columns)
    return f'<ul class="key">{swatches}{"" if is_full else "<li>blank: nothing there</li>"}</ul>'


def _panel(made: Map, panel: Panel) -> str:
    left = max((len(row) for row in made.rows), default=0) * LETTER + BESIDE
    top = len(made.rows) * HEIGHT
    below = max((len(column) for column in made.columns), default=0) * LETTER + BESIDE
    width, height = left + len(made.columns) * WIDTH, top + below
    every = max(-(-LABEL_HEIGHT // HEIGHT), len(made.rows) // MOST_LABELS)
    rows = "".join(
        f'<text x="{left - BESIDE:g}" y="{_y(made, at) + HEIGHT / 2:g}" class="row">{escape(made.rows[at])}</text>'
        for at in range(0, len(made.rows), every)
    )
    columns = "".join(
        f'<text class="column" transform="translate({left + (at + 0.5) * WIDTH:g} {top + BESIDE:g}) rotate(-90)">'
        f"{escape(name)}</text>"
        for at, name in enumerate(made.columns)
    )
    cells = "\n".join(_cell(made, cell, left) for cell in panel.cells)
    return (
        f'<figure class="panel" data-name="{escape(panel.title)}" style="--width:{width:g}">'
        f"<figcaption>{_breakable(panel.title)}</figcaption>\n"
        f'<svg viewBox="0 0 {width:g} {height:g}" role="group" '
        f'aria-label="{escape(panel.title)}">{rows}{columns}\n{cells}</svg></figure>'
    )


def _cell(made: Map, cell: Cell, left: float) -> str:
    place = f"layer {made.rows[cell.row]}, {made.columns[cell.column]}"
    at = f' tabindex="-1" role="img" data-at="{cell.row} {cell.column}" data-text="{escape(cell.text)}"'
    rect = _rect(at, cell.value, left + cell.column * WIDTH, _y(made, cell.row), WIDTH - GAP, HEIGHT - GAP)
    return f"{rect}<title>{escape(f'{place}: {cell.text}')}</title></rect>"


def _rect(more: str, value: float | None, x: float, y: float, width: float, height: float) -> str:
    """An open `rect`: of the colour of its side, the more so the further the value is from 0."""
    side = "unknown" if value is None else "more" if value > 0 else "less"
    share = "" if value is None else f' style="--v:{abs(value):.2f}"'
    return f'<rect class="{side}"{more} x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}"{share}>'


def _y(made: Map, row: int) -> float:
    """The first row lies at the bottom."""
    return (len(made.rows) - 1 - row) * HEIGHT


def _breakable(name: str) -> str:
    """A name that may be broken after an underscore."""
    return escape(name).replace("_", "_<wbr>")
