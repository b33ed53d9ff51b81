"""The command that acts on groups: prune, unalign, rewind, transplant, patch, freeze, against matched random groups."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from neurondrift.base.errors import ConfigError
from neurondrift.base.locks import only_one
from neurondrift.base.processes import tune_allocator
from neurondrift.base.roles import Intervention
from neurondrift.cli.app import NO_FLAGS, NO_SOURCE, Flags, SettingFlags, Source, app, asked, study_of
from neurondrift.cli.study import run_experiment, say


def _shares(text: str) -> list[float]:
    try:
        shares = [float(part) for part in text.split(",")]
    except ValueError:
        shares = [0.0]
    if not all(0 < share <= 1 for share in shares):
        raise ConfigError("--doses takes shares", received=text, allowed="numbers in (0, 1], such as 0.1,0.5,1")
    return shares


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class InterveneFlags(SettingFlags):
    """What the interventions are asked for."""

    group: Annotated[
        list[str] | None, asked("intervene.groups", "group's name or file; default: the safety groups")
    ] = None
    intervention: Annotated[
        list[Intervention] | None,
        asked("intervene.interventions", "may be repeated; default: all"),
    ] = None
    outcome: Annotated[
        Literal["margin", "refusals", "both"] | None,
        asked("intervene.outcome", "the refusal margin (fast), written refusals, or both (default)"),
    ] = None
    draws: Annotated[int | None, asked("intervene.draws", "matched random groups for each group")] = None
    dose_draws: Annotated[int | None, asked("intervene.dose_draws", "the same at each smaller dose")] = None
    freeze_draws: Annotated[
        int | None, asked("intervene.freeze_draws", "the same for freeze, which trains again for each")
    ] = None
    stop_early: Annotated[
        Literal["freeze", "all", "none"] | None,
        asked(
            "intervene.stop_early",
            "whose draws stop once p can hardly be small any more (two or more as extreme as the group)",
        ),
    ] = None
    doses: Annotated[
        str | None,
        asked(
            "intervene.doses",
            "shares of the group by importance, such as 0.1,0.5,1 (default 0.1,0.25,0.5,1)",
            read=_shares,
        ),
    ] = None
    granularity: Annotated[
        Literal["neuron", "weight", "unit"] | None, asked("intervene.granularity", "what the groups are of")
    ] = None
    mode: Annotated[Literal["zero", "mean"] | None, asked("intervene.mode", "what pruned weights become")] = None
    prompts: Annotated[int | None, asked("intervene.harmful", "harmful requests of each run")] = None
    ordinary: Annotated[
        int | None, asked("intervene.ordinary", "ordinary prompts, and held-out answers, of each run")
    ] = None
    tokens: Annotated[int | None, asked("intervene.max_new_tokens", "longest answer that is judged")] = None
    seed: Annotated[int | None, asked("intervene.seed", "training seed that is acted on; default: the first")] = None
    scores: Annotated[Path | None, asked("intervene.scores", "score file that orders the members for doses")] = None
    adapter: Annotated[
        Path | None, asked("intervene.adapter", "adapter made elsewhere, of --model; --group names files")
    ] = None

    def check(self) -> None:
        """Raise `ConfigError` for counts that are none, and for an adapter made elsewhere without its groups."""
        for name in ("prompts", "ordinary", "tokens"):
            count = getattr(self, name)
            if count is not None and count < 1:
                raise ConfigError(f"--{name} must be at least 1", received=count)
        if self.adapter is not None and not self.group:
            raise ConfigError("An adapter made elsewhere needs groups", allowed="--adapter and --group FILE together")


NOTHING_ASKED = InterveneFlags()


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class DoseFlags(SettingFlags):
    """What the dose-response is asked for."""

    doses: Annotated[
        str | None,
        asked("dose_response.doses", "top shares of neurons (default 0.01,0.02,0.05,0.1)", read=_shares),
    ] = None
    intervention: Annotated[
        list[Literal["rewind", "patch"]] | None,
        asked("dose_response.interventions", "may be repeated; default: both"),
    ] = None
    ranking: Annotated[
        Literal["budget", "path"] | None,
        asked("dose_response.ranking", "along the saved steps (default), or straight to the last"),
    ] = None
    draws: Annotated[int | None, asked("dose_response.draws", "permutations of the ranking within site and |w|")] = None
    uniform_draws: Annotated[int | None, asked("dose_response.uniform_draws", "permutations within the site alone")] = (
        None
    )
    prompts: Annotated[int | None, asked("dose_response.harmful", "harmful prompts, both halves together")] = None
    seed: Annotated[int | None, asked("dose_response.seed", "training seed; default: the first")] = None


NO_DOSES = DoseFlags()


@app.command
def intervene(
    source: Source = NO_SOURCE,
    flags: Flags = NO_FLAGS,
    asks: InterveneFlags = NOTHING_ASKED,
    *,
    json: Annotated[Path | None, Parameter(help="write the findings here too")] = None,
) -> None:
    """Act on groups, and on matched random groups: prune, rewind, transplant, patch, freeze.

    Drift alone shows no cause. Runs that are done are not made again. The findings go to results/interventions.json
    and into the report.
    """
    asks.check()
    study = study_of(source, flags, asks)
    from neurondrift.base.files import read_json, write_json
    from neurondrift.study.experiments.intervene import intervene as act
    from neurondrift.study.experiments.intervene import results_file, show
    from neurondrift.study.folder import StudyFolder

    folder = StudyFolder(source.output_dir, study)
    if study.intervene.adapter is None:
        run_experiment("intervene", study, source.output_dir, lambda: show(folder, say=say))
    else:  # of no study: nothing has to stand, and no report takes it up
        tune_allocator()
        with only_one(source.output_dir, writes=("results",)):
            act(study, folder, study.intervene, say=say)
        show(folder, say=say)
    if json is not None:
        write_json(json, read_json(results_file(folder)))


@app.command
def dose_response(source: Source = NO_SOURCE, flags: Flags = NO_FLAGS, asks: DoseFlags = NO_DOSES) -> None:
    """Out of sample: rank neurons by what they contributed to the lost margin on half of the harmful prompts, put the
    top shares back or patch them, and measure the margin on the other half, beside other rankings and random groups.
    """
    study = study_of(source, flags, asks)
    from neurondrift.study.experiments.dose_response import show
    from neurondrift.study.folder import StudyFolder

    folder = StudyFolder(source.output_dir, study)
    run_experiment("dose-response", study, source.output_dir, lambda: show(folder, say=say))
