"""The figure of a plant: how well each score finds it, and the margin as the units that rank first are put back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes

from neurondrift.base.files import atomic_path
from neurondrift.report.figures.draw import METADATA
from neurondrift.report.figures.style import GREY, INK, OTHER_MARKS, RC, SAFETY_MARKS, letters, new_figure, words
from neurondrift.report.plants.tables import known

#: So many scores have a curve of their own: those that find the most.
MOST_CURVES = 6
MARKS = (*SAFETY_MARKS, *OTHER_MARKS)


def draw_localisation(found: Mapping[str, Any], folder: Path, name: str) -> list[Path]:
    """Draw it as PNG and SVG.

    Parameters
    ----------
    found
        The content of `localisation.json`.
    folder, name
        Where `<name>.png` and `<name>.svg` go.
    """
    written = []
    settings: Any = {**{key: v for key, v in matplotlib.rcParamsDefault.items() if "backend" not in key}, **RC}
    with matplotlib.rc_context(settings):
        curves = [one for one in found["curves"] if one["way"] == "put back"]
        board = list(found["board"])
        figure = new_figure(
            1.4 + 0.17 * max(8, len(board)), f"Which scores find what was planted: {found['about']['plant']}"
        )
        axes = figure.subplots(1, 2 if curves else 1, squeeze=False)[0]
        _board(axes[0], board)
        if curves:
            _curves(axes[1], curves, board, found["curves"])
        letters(axes)
        for suffix, metadata in METADATA.items():
            path = Path(folder) / f"{name}.{suffix}"
            with atomic_path(path) as partial:
                figure.savefig(partial, format=suffix, metadata=metadata)
            figure.set_layout_engine("none")
            written.append(path)
    return written


def _board(ax: Axes, board: Sequence[Mapping[str, Any]]) -> None:
    """AUROC within site with its interval, against those that moved as far, and of the decoy."""
    ax.axvline(0.5, color=GREY, lw=0.8, zorder=0)
    for at, row in enumerate(reversed(board)):
        low, high = known(row.get("auroc_low")), known(row.get("auroc_high"))
        if low is not None and high is not None:
            ax.plot([low, high], [at, at], color=INK, lw=1.2, zorder=2)
        for key, mark, colour in (("auroc", "o", INK), ("as_far", "|", SAFETY_MARKS[0].colour), ("decoy", "x", GREY)):
            value = known(row[key])
            if value is not None:
                ax.plot([value], [at], marker=mark, color=colour, ls="", zorder=3, label=key if not at else None)
    ax.set_yticks(range(len(board)), [words(row["score"]) for row in reversed(board)], fontsize=7)
    ax.set(xlim=(0, 1.02), ylim=(-0.7, len(board) - 0.3), xlabel="AUROC within site")
    ax.set_title("planted (●), as far (|), decoy (×)")


def _curves(
    ax: Axes,
    curves: Sequence[Mapping[str, Any]],
    board: Sequence[Mapping[str, Any]],
    everything: Sequence[Mapping[str, Any]],
) -> None:
    """The margin against how many units are put back, of the scores that find the most, and of random units."""
    whole = next((one for one in everything if one["score"] == "model"), None)
    named = [str(row["score"]) for row in board][:MOST_CURVES]
    for name, mark in zip(named, MARKS, strict=False):
        _curve(ax, curves, name, whole, color=mark.colour, marker=mark.marker)
    _curve(ax, curves, "random", whole, color=GREY, marker=".", ls=":")
    planted = [one for one in curves if one["score"] == "planted"]
    ax.plot([one["dose"] for one in planted], [one["margin"] for one in planted], "*", color=INK, ms=8, label="planted")
    ax.axhline(0.0, color=GREY, lw=0.6, zorder=0)
    ax.set(xlabel="units put back, × as many as planted", ylabel="refusal margin, nats")
    ax.set_title("put back to W0")
    ax.legend(fontsize=6.5)


def _curve(
    ax: Axes, curves: Sequence[Mapping[str, Any]], name: str, whole: Mapping[str, Any] | None, **how: Any
) -> None:
    own = [one for one in curves if one["score"] == name]
    doses = sorted({one["dose"] for one in own})
    values = [_mean([float(one["margin"]) for one in own if one["dose"] == dose]) for dose in doses]
    start = ([0.0], [float(whole["margin"])]) if whole is not None and own else ([], [])
    ax.plot([*start[0], *doses], [*start[1], *values], label=words(name), **how)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
