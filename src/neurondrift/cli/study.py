"""The commands of a study: all its stages at once, each by itself, and what surrounds them; and of many: sweep."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from cyclopts import Parameter, validators

from neurondrift.base.errors import ConfigError, ResourceError
from neurondrift.base.locks import only_one
from neurondrift.base.processes import is_first_process, tune_allocator
from neurondrift.base.terminal import plain
from neurondrift.cli.app import NO_FLAGS, NO_SOURCE, Flag, Flags, SettingFlags, Source, app, study_of
from neurondrift.study.settings import Section, Study, merge, nested, validated
from neurondrift.study.sweep.engines import require_answer
from neurondrift.study.sweep.settings import EngineSection, SweepSection


def run_stages(
    stages: Sequence[str] | None, source: Source, flags: Flags, force: Sequence[str] = (), *, keep_scores: bool = False
) -> None:
    """Run stages of the study that the flags describe; None: all of them."""
    study = study_of(source, flags)
    from neurondrift.study.runner import StudyRun

    tune_allocator()
    StudyRun(study, source.output_dir, say=say).run(stages, force=force, keep_scores=keep_scores)


def run_experiment(name: str, study: Study, output_dir: Path, show: Callable[[], None]) -> None:
    """Ask a study for an optional stage, show what came of it, and write anew what reads it.

    A stage that reads it is left alone where something else that it reads does not stand.
    """
    from neurondrift.study.runner import StudyRun

    tune_allocator()
    study_run = StudyRun(study, output_dir, say=say)
    study_run.run([name])
    show()
    if readers := study_run.readers(name):
        study_run.run(readers)
        say(f"the report: cat {output_dir / 'results' / 'drift_analysis_report.txt'}")


def say(line: str) -> None:
    """A line on the screen at once, without what a terminal would act on; of several processes the first says it."""
    if is_first_process():
        print(plain(line), flush=True)


Keep = Annotated[bool, Parameter(help="keep the scores after the groups are formed", negative="")]
Again = Annotated[bool, Parameter(help="do the stage again even where it stands", negative="")]


@app.command
def run(
    source: Source = NO_SOURCE,
    flags: Flags = NO_FLAGS,
    *,
    force: Annotated[list[str] | None, Parameter(help="stage to do again; may be repeated", negative="")] = None,
    keep_scores: Keep = False,
) -> None:
    """Run the whole study, or what is left of it: stages that stand and whose inputs have not changed are skipped."""
    run_stages(None, source, flags, force or (), keep_scores=keep_scores)
    report_file = source.output_dir / "results" / "drift_analysis_report.txt"
    say(f"\nThe answer: cat {report_file}")


def _stage_command(name: str, text: str) -> None:
    def command(source: Source = NO_SOURCE, flags: Flags = NO_FLAGS, *, force: Again = False) -> None:
        run_stages([name], source, flags, [name] if force else ())

    command.__doc__ = text
    command.__name__ = name
    app.command(command, name=name)


_stage_command("align", "Teach the model to refuse first (only where the study says so, as in demo).")
_stage_command("score", "Score every weight for safety and for utility.")


@app.command
def groups(
    source: Source = NO_SOURCE, flags: Flags = NO_FLAGS, *, force: Again = False, keep_scores: Keep = False
) -> None:
    """Form the groups of neurons and weights, and their matched controls; then delete the scores."""
    run_stages(["groups"], source, flags, ["groups"] if force else (), keep_scores=keep_scores)


_stage_command("finetune", "Fine-tune while measuring the drift of every neuron.")


@app.command
def analyze(
    source: Source = NO_SOURCE,
    flags: Flags = NO_FLAGS,
    *,
    force: Again = False,
    drift: Annotated[list[Path] | None, Parameter(help="folder of drift snapshots made elsewhere; one a seed")] = None,
    group: Annotated[list[Path] | None, Parameter(help="group of neurons made elsewhere, .parquet or .json")] = None,
) -> None:
    """Compare the drift of each group with its matched controls.

    With --drift and --group: of snapshots (a DriftCallback in any script) and groups that were made elsewhere; the
    findings and the report go to the output folder.
    """
    if not drift and not group:
        run_stages(["analyze"], source, flags, ["analyze"] if force else ())
        return
    if not drift or not group:
        raise ConfigError(
            "Drift made elsewhere needs groups, and groups need drift", allowed="--drift and --group together"
        )
    if (source.output_dir / "study.toml").exists():
        raise ConfigError(
            "The output folder holds a study", received=str(source.output_dir), fix="choose another --output-dir"
        )
    study = study_of(source, flags)
    from neurondrift.study.folder import StudyFolder
    from neurondrift.study.stages.analysis import analyze_files

    with only_one(source.output_dir, writes=("results",)):
        findings = analyze_files(study, StudyFolder(source.output_dir, study), drift=drift, group_files=group)
    say(findings["analysis"]["conclusion"])
    say(f"\nThe report: cat {source.output_dir / 'results' / 'drift_analysis_report.txt'}")


@app.command
def verify(
    source: Source = NO_SOURCE,
    flags: Flags = NO_FLAGS,
    *,
    processes: Annotated[
        int, Parameter(help="that are to share the study, as torchrun starts them", validator=validators.Number(gte=1))
    ] = 1,
) -> None:
    """Check that this machine can run the study: packages, device, memory, disk, model, data; and what it will cost."""
    study = study_of(source, flags)
    from neurondrift.study.verify import verify as check

    tune_allocator()
    check(study, source.output_dir, say=say, processes=processes)


@app.command
def clean(
    *,
    output_dir: Annotated[Path, Parameter(help="the study's folder")] = Path(),
    everything: Annotated[
        bool, Parameter(help="delete all that the study made, not only its scratch files", negative="")
    ] = False,
) -> None:
    """Delete the scratch files of a study (scores)."""
    from neurondrift.study.folder import clean as delete

    if not output_dir.is_dir():
        say("nothing to delete")
        return
    with only_one(output_dir):
        removed = delete(output_dir, everything=everything)
    say("\n".join(f"deleted {path}" for path in removed) or "nothing to delete")


def _engine(path: str, text: str) -> Flag:
    default = EngineSection.model_fields[path.partition(".")[2]].default
    return Flag(path, text, shows_path=False, default=default)


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class EngineFlags(SettingFlags):
    """Where the points run; they override the sweep file's table `engine`."""

    configures: ClassVar[type[Section]] = SweepSection

    engine: Annotated[str | None, _engine("engine.kind", "local (one after the other) or ray")] = None
    address: Annotated[str | None, _engine("engine.address", "Ray cluster: host:port or auto; default: here")] = None
    workers: Annotated[int | None, _engine("engine.workers", "points at once on Ray; default: as many as fit")] = None
    num_cpus: Annotated[
        float | None, _engine("engine.num_cpus", "CPUs, and threads, of each point; default: all, 1 on Ray")
    ] = None
    num_gpus: Annotated[float | None, _engine("engine.num_gpus", "the same of GPUs; default: 1 where there are")] = None
    tries: Annotated[int | None, _engine("engine.tries", "how often a point is begun whose process dies")] = None


NO_ENGINE_FLAGS = EngineFlags()


@app.command
def sweep(
    where: Annotated[Path, Parameter(help="sweep file, or the folder of a sweep to go on with")],
    *,
    output_dir: Annotated[
        Path | None, Parameter(help="the sweep's folder; default: one of the sweep's name, here", show_default=False)
    ] = None,
    engine: EngineFlags = NO_ENGINE_FLAGS,
    only: Annotated[
        list[str] | None,
        Parameter(help="do this point alone, by its index or name; may be repeated", negative="", show_default=False),
    ] = None,
    show: Annotated[
        bool, Parameter(help="say which points there are, and do none", negative="", name="--list")
    ] = False,
) -> None:
    """Run a study for each point of a grid or a list, or what is left of them, and say what they find together.

    A study that fails stops no other. Stages that points have in common are done once. With --only several commands may
    work in one folder at a time (an array of Slurm); whichever ends last writes the results.
    """
    from neurondrift.study.sweep.folder import locate

    found, folder = locate(where, output_dir)
    if show:
        say("\n".join(f"{point.index:>4}  {point.name}" for point in found.points))
        return
    settings = validated(SweepSection, merge(found.section.model_dump(), nested(engine.overrides()))).engine
    asked = [found.point(name) for name in only] if only else found.points
    if settings.kind == "ray" and settings.address is not None:
        require_answer(settings.address)  # before anything that takes its time
    from neurondrift.study.sweep.driver import check_failures, run_sweep
    from neurondrift.study.sweep.results.findings import write_results

    states = run_sweep(found, folder, engine=settings, only=only or (), say=say)
    left = [name for name, status in states.items() if status.state in ("waiting", "running", "stopped")]
    if any(status.state == "done" for status in states.values()) and not (only and left):
        try:
            with only_one(folder.results):
                findings = write_results(found, folder, states)
            say(f"\n{findings['sentences'][0]}\n\nThe report: cat {folder.report}")
        except ResourceError as error:
            if not only or "at work" not in error.what:
                raise
            say("another command is writing the results of these points")
    check_failures({point.name: states[point.name] for point in asked}, folder.root)
