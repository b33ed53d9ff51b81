"""Commands about groups and ranks: how stable groups are, how far two overlap, which directions carry safety."""

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


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class SubspacesFlags(SettingFlags):
    """What the rank level is asked for."""

    rank: Annotated[int | None, asked("subspaces.rank", "safety directions of each site")] = None
    utility_rank: Annotated[int | None, asked("subspaces.utility_rank", "utility directions of each site")] = None
    limit: Annotated[
        int | None, asked("subspaces.limit", "examples of each set at most; default: as many as scores use")
    ] = None
    draws: Annotated[
        int | None, asked("subspaces.draws", "random removals to compare refusals with; 0: measure no refusals")
    ] = None


NO_RANKS_ASKED = SubspacesFlags()


@app.command
def subspaces(source: Source = NO_SOURCE, flags: Flags = NO_FLAGS, asks: SubspacesFlags = NO_RANKS_ASKED) -> None:
    """The rank level (ActSVD) of a fine-tuned study: how much of the change lies in the safety and utility subspaces,
    and what removing them does to refusals.
    """
    study = study_of(source, flags, asks)
    from neurondrift.study.experiments.subspaces import show
    from neurondrift.study.folder import StudyFolder

    folder = StudyFolder(source.output_dir, study)
    run_experiment("subspaces", study, source.output_dir, lambda: show(folder, say=say))
