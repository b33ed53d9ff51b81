"""The command sweep: many studies over one configuration, here or on Ray, and what they say together."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from cyclopts import Parameter

from neurondrift.base.errors import ResourceError
from neurondrift.base.locks import only_one
from neurondrift.cli.app import Flag, SettingFlags, app
from neurondrift.cli.study import say
from neurondrift.study.settings import Section, merge, nested, validated
from neurondrift.study.sweep.engines import require_answer
from neurondrift.study.sweep.settings import EngineSection, SweepSection


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
    num_cpus: Annotated[float | None, _engine("engine.num_cpus", "CPUs that each point asks Ray for")] = None
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
