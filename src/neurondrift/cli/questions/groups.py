"""Commands about groups: how stable they are, and how far two of them overlap."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from neurondrift.cli.app import NO_FLAGS, NO_SOURCE, Flags, SettingFlags, Source, app, asked, study_of
from neurondrift.cli.study import run_experiment, say


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class StabilityFlags(SettingFlags):
    """What the noise floor is asked for."""

    draws: Annotated[int | None, asked("stability.draws", "how often the calibration examples are re-drawn")] = None


NOTHING_ASKED = StabilityFlags()


@app.command
def stability(source: Source = NO_SOURCE, flags: Flags = NO_FLAGS, asks: StabilityFlags = NOTHING_ASKED) -> None:
    """The noise floor of the groups: re-draw the calibration examples on the same model and compare."""
    study = study_of(source, flags, asks)
    from neurondrift.study.experiments.stability import show
    from neurondrift.study.folder import StudyFolder

    folder = StudyFolder(source.output_dir, study)
    run_experiment("stability", study, source.output_dir, lambda: show(folder, say=say))


@app.command
def overlap(
    first: Annotated[Path, Parameter(help="group file")],
    second: Annotated[Path, Parameter(help="group file")],
    /,
    *,
    floor: Annotated[Path | None, Parameter(help="stability.json of one of the models")] = None,
    json: Annotated[Path | None, Parameter(help="write the figures here too")] = None,
) -> None:
    """Compare two groups, overall and by layer and module type, with the floors of chance and of re-drawing."""
    from neurondrift.base.files import write_json
    from neurondrift.study.experiments.stability import compare_groups

    result = compare_groups(first, second, floor=floor, say=say)
    if json is not None:
        write_json(json, result)
