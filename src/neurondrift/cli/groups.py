"""Commands about groups: how stable they are, and how far two of them overlap."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from neurondrift.base.memory import tune_allocator
from neurondrift.cli.app import NO_FLAGS, NO_SOURCE, Flags, Source, app, study_of


@app.command
def stability(
    source: Source = NO_SOURCE,
    flags: Flags = NO_FLAGS,
    *,
    draws: Annotated[int, Parameter(help="how often the calibration examples are re-drawn")] = 4,
) -> None:
    """The noise floor of the groups: re-draw the calibration examples on the same model and compare."""
    study = study_of(source, flags)
    from neurondrift.study.experiments.stability import write_stability
    from neurondrift.study.folder import StudyFolder

    tune_allocator()
    write_stability(study, StudyFolder(source.output_dir, study), draws=draws, say=print)


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

    result = compare_groups(first, second, floor=floor, say=print)
    if json is not None:
        write_json(json, result)
