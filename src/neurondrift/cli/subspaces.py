"""The command about ranks: which output directions carry safety, and how much of the change lies in them."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from neurondrift.base.memory import tune_allocator
from neurondrift.cli.app import NO_FLAGS, NO_SOURCE, Flags, Source, app, study_of


@app.command
def subspaces(
    source: Source = NO_SOURCE,
    flags: Flags = NO_FLAGS,
    *,
    rank: Annotated[int, Parameter(help="safety directions of each site")] = 32,
    utility_rank: Annotated[int, Parameter(help="utility directions of each site")] = 32,
    limit: Annotated[int | None, Parameter(help="examples of each set at most; default: as many as scores use")] = None,
    draws: Annotated[int, Parameter(help="random removals to compare refusals with; 0: measure no refusals")] = 5,
) -> None:
    """The rank level (ActSVD) of a fine-tuned study: how much of the change lies in the safety and utility subspaces,
    and what removing them does to refusals.
    """
    study = study_of(source, flags)
    from neurondrift.study.experiments.subspaces import Settings, write_subspaces
    from neurondrift.study.folder import StudyFolder

    tune_allocator()
    settings = Settings(rank=rank, utility_rank=utility_rank, limit=limit, draws=draws)
    write_subspaces(study, StudyFolder(source.output_dir, study), settings, say=print)
