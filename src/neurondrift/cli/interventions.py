"""The command that acts on groups: prune, rewind, transplant, freeze, against matched random groups."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from neurondrift.base.errors import ConfigError
from neurondrift.base.memory import tune_allocator
from neurondrift.cli.app import NO_FLAGS, NO_SOURCE, Flags, Source, app, study_of


@app.command
def intervene(
    source: Source = NO_SOURCE,
    flags: Flags = NO_FLAGS,
    *,
    group: Annotated[
        list[str] | None, Parameter(help="group's name or file; default: the safety groups", negative="")
    ] = None,
    intervention: Annotated[
        list[Literal["prune", "rewind", "transplant", "freeze"]] | None,
        Parameter(help="may be repeated; default: all", negative=""),
    ] = None,
    draws: Annotated[int, Parameter(help="matched random groups for each group")] = 20,
    dose_draws: Annotated[int, Parameter(help="the same at each smaller dose")] = 3,
    freeze_draws: Annotated[int, Parameter(help="the same for freeze, which trains again for each")] = 20,
    stop_early: Annotated[
        Literal["freeze", "all", "none"],
        Parameter(help="whose draws stop once p can hardly be small any more (two or more as extreme as the group)"),
    ] = "freeze",
    doses: Annotated[
        str | None, Parameter(help="shares of the group by importance, such as 0.1,0.5,1 (default 0.1,0.25,0.5,1)")
    ] = None,
    granularity: Annotated[Literal["neuron", "weight", "unit"], Parameter(help="what the groups are of")] = "neuron",
    mode: Annotated[Literal["zero", "mean"], Parameter(help="what pruned weights become")] = "zero",
    prompts: Annotated[int, Parameter(help="harmful requests of each run")] = 32,
    ordinary: Annotated[int, Parameter(help="ordinary prompts, and held-out answers, of each run")] = 8,
    tokens: Annotated[int, Parameter(help="longest answer that is judged")] = 16,
    seed: Annotated[int | None, Parameter(help="training seed that is acted on; default: the first")] = None,
    scores: Annotated[Path | None, Parameter(help="score file that orders the members for doses")] = None,
    adapter: Annotated[Path | None, Parameter(help="adapter made elsewhere, of --model; --group names files")] = None,
    json: Annotated[Path | None, Parameter(help="write the findings here too")] = None,
) -> None:
    """Act on groups, and on matched random groups: prune, rewind, transplant, freeze. Drift alone shows no cause.

    Runs that are done are not made again. The findings go to results/interventions.json and into the report.
    """
    study = study_of(source, flags)
    for name, count in (("--prompts", prompts), ("--ordinary", ordinary), ("--tokens", tokens)):
        if count < 1:
            raise ConfigError(f"{name} must be at least 1", received=count)
    if adapter is not None and not group:
        raise ConfigError("An adapter made elsewhere needs groups", allowed="--adapter and --group FILE together")
    shares = None if doses is None else _shares(doses)
    from neurondrift.base.files import write_json
    from neurondrift.interventions.trials import Draws
    from neurondrift.report.tables.causes import section
    from neurondrift.report.text import render_tables
    from neurondrift.study.experiments.intervene import Options, intervene, results_file
    from neurondrift.study.folder import StudyFolder

    tune_allocator()
    folder = StudyFolder(source.output_dir, study)
    found = intervene(
        study,
        folder,
        Options(
            groups=tuple(group or ()),
            interventions=tuple(intervention or ()),
            draws=Draws(whole=draws, dose=dose_draws, freeze=freeze_draws, stop_early=stop_early),
            doses=shares,
            granularity=granularity,
            mode=mode,
            seed=seed,
            harmful=prompts,
            ordinary=ordinary,
            answers=ordinary,
            max_new_tokens=tokens,
            scores=scores,
            adapter=adapter,
        ),
        say=lambda line: print(line, flush=True),
    )
    print("\n".join(render_tables(section(found))))
    print(f"written to {results_file(folder)}")
    if json is not None:
        write_json(json, found)
    if adapter is None and folder.results_file.exists():
        from neurondrift.study.stages.reporting import report

        print(f"the report: cat {report(study, folder)}")


def _shares(text: str) -> tuple[float, ...]:
    try:
        shares = tuple(float(part) for part in text.split(","))
    except ValueError:
        shares = (0.0,)
    if not all(0 < share <= 1 for share in shares):
        raise ConfigError("--doses takes shares", received=text, allowed="numbers in (0, 1], such as 0.1,0.5,1")
    return shares
