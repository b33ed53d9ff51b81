"""How figures look: palette, fonts, names, and small helpers. Knows matplotlib's object interface only."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple
from urllib.parse import quote

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from neurondrift.base.roles import Role
from neurondrift.report.web.svg import SERIES
from neurondrift.report.wording import clean

#: Width in inches of a figure over both columns of a paper.
FULL_WIDTH = 7.0
#: The narrowest figure that holds its legend.
LEAST_WIDTH = 5.0
#: Characters of the title of a narrow panel.
TITLE_WIDTH = 14
#: Characters of a title to an inch.
TITLE_DENSITY = 11.5
INK, GREY, BAND = "#222222", "#767676", "#E4ECF2"
RC: dict[str, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Arial", "Helvetica", "sans-serif"],
    "font.size": 8.0,
    "axes.titlesize": 8.5,
    "axes.labelsize": 8.0,
    "xtick.labelsize": 8.0,
    "ytick.labelsize": 8.0,
    "legend.fontsize": 8.0,
    "figure.titlesize": 9.5,
    "figure.titleweight": "bold",
    "axes.titleweight": "normal",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.grid": False,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.4,
    "lines.markersize": 4.0,
    "legend.frameon": False,
    "hatch.linewidth": 0.5,
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "savefig.facecolor": "white",
    "savefig.dpi": 160,
    "figure.dpi": 100,
    "svg.fonttype": "none",
    "svg.hashsalt": "neurondrift",
    "axes.formatter.use_mathtext": True,
    "axes.formatter.limits": (-2, 4),
    "mathtext.default": "regular",
    "path.simplify": False,
}
#: The formulas: the relative drift and the cosine distance have no unit, L2 that of the weights.
METRIC_LABELS = {"relative": "‖Δw‖ / ‖w₀‖", "l2": "‖Δw‖", "cosine_distance": "1 − cos(w₀, wₜ)"}
METRIC_TITLES = {"relative": "Relative drift", "l2": "L2 drift", "cosine_distance": "Cosine distance"}
#: Okabe and Ito (2008), and of Tol (2021): told apart with any colour vision. Kinds of prompts have their own marks.
KIND_MARKS = {"harmful": ("#000000", "o", "-"), "borderline": ("#E69F00", "^", "-."), "ordinary": ("#56B4E9", "s", ":")}


class Mark(NamedTuple):
    """How one group is drawn everywhere."""

    colour: str
    marker: str


SAFETY_MARKS = (
    Mark("#D55E00", "o"),
    Mark("#CC79A7", "D"),
    Mark("#E69F00", "P"),
    Mark("#882255", "h"),
    Mark("#8C510A", "*"),
)
OTHER_MARKS = (
    Mark("#0072B2", "s"),
    Mark("#009E73", "^"),
    Mark("#56B4E9", "v"),
    Mark("#999933", "X"),
    Mark("#332288", "p"),
)


def group_marks(groups: Iterable[str], roles: Mapping[str, Role | None]) -> dict[str, Mark]:
    """A colour and a marker for each group: warm for safety groups, cool for the others."""
    marks: dict[str, Mark] = {}
    is_safety = {group: roles[group] == "safety" for group in groups}
    for group in is_safety:
        family = SAFETY_MARKS if is_safety[group] else OTHER_MARKS
        marks[group] = family[sum(is_safety[g] == is_safety[group] for g in marks) % len(family)]
    return marks


def words(name: object) -> str:
    """A name for a label: one line, no underscores, no accidental formulas, not endless."""
    text = clean(name).replace("_", " ")
    return (text if len(text) <= 28 else text[:27] + "…").replace("$", r"\$")


def titled(name: object) -> str:
    """A name over a narrow panel, on as many lines as it needs."""
    return textwrap.fill(words(name), TITLE_WIDTH)


def new_figure(height: float, title: str, *, width: float = FULL_WIDTH) -> Figure:
    """An empty figure with its title at the left."""
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(textwrap.fill(title, round(width * TITLE_DENSITY)), x=0.008, ha="left")
    return figure


def letters(axes: Sequence[Axes], *, pad: float = 6.0) -> None:
    """Panel letters in front of the panels' titles, which stand `pad` points above their panel."""
    for letter, ax in zip("abcdefghijklmnopqrstuvwxyz", axes, strict=False):
        title = ax.get_title(loc="left")
        ax.set_title(f"({letter}) {title}" if len(axes) > 1 else title, y=1.0, pad=pad)


def step_axis(ax: Axes, last: float) -> list[float]:
    """Whole-numbered ticks from 0 to the last step; returns them."""
    ticks = [
        float(t)
        for t in MaxNLocator(5, integer=True, min_n_ticks=1).tick_values(0, max(last, 1))
        if 0 <= t <= max(last, 1)
    ]
    ax.set_xticks(ticks)
    return ticks


def as_series(artists: Iterable[Artist], name: str) -> None:
    """Mark what belongs to one curve, so that a page can switch it off: ids `series/<name>/<number>` in the SVG."""
    for number, artist in enumerate(artists):
        artist.set_gid(f"{SERIES}{quote(name, safe='')}/{number}")


def legend_below(figure: Figure, handles: Sequence[Any], *, columns: int) -> None:
    """One legend for all panels, under them."""
    figure.legend(
        handles=list(handles), loc="outside lower center", ncols=max(1, columns), handlelength=2.4, columnspacing=1.4
    )
