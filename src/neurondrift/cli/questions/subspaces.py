"""The command about ranks: which output directions carry safety, and how much of the change lies in them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from cyclopts import Parameter

from neurondrift.cli.app import NO_FLAGS, NO_SOURCE, Flags, SettingFlags, Source, app, asked, study_of
from neurondrift.cli.study import run_experiment, say


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


NOTHING_ASKED = SubspacesFlags()


@app.command
def subspaces(source: Source = NO_SOURCE, flags: Flags = NO_FLAGS, asks: SubspacesFlags = NOTHING_ASKED) -> None:
    """The rank level (ActSVD) of a fine-tuned study: how much of the change lies in the safety and utility subspaces,
    and what removing them does to refusals.
    """
    study = study_of(source, flags, asks)
    from neurondrift.study.experiments.subspaces import show
    from neurondrift.study.folder import StudyFolder

    folder = StudyFolder(source.output_dir, study)
    run_experiment("subspaces", study, source.output_dir, lambda: show(folder, say=say))
