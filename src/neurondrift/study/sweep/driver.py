"""The course of a sweep: which point comes next, what is tried again, and what is said of it.

A point waits while another is making a stage that both have in common, so that each is made once. A study that fails
stops no other; one whose process dies is begun again and goes on from where it was.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from neurondrift.base.errors import ConfigError, ResourceError
from neurondrift.base.locks import only_one
from neurondrift.base.progress import duration
from neurondrift.study.runner import StudyRun
from neurondrift.study.sweep.engines import Ended, Engine, LocalEngine, RayEngine, wait_a_little
from neurondrift.study.sweep.folder import Status, SweepFolder, write_configuration
from neurondrift.study.sweep.screen import Board, shown
from neurondrift.study.sweep.settings import EngineSection, Point, Sweep
from neurondrift.study.sweep.sharing import Plan, Store, plan

Say = Callable[[str], None]


def run_sweep(
    sweep: Sweep,
    folder: SweepFolder,
    *,
    engine: EngineSection | None = None,
    only: Sequence[str] = (),
    say: Say = lambda line: None,
) -> dict[str, Status]:
    """Do the points of a sweep, as far as they are not done, and keep what they have in common.

    Parameters
    ----------
    sweep, folder
        The sweep, and where it lies.
    engine
        Where the points run; default: as the sweep file says.
    only
        Indices or names of the points to do; default: all. Several such calls may work in one folder at a time, each
        on points of its own.
    say
        Receives a line about each point that has ended.

    Returns
    -------
    dict
        Name -> status of every point of the sweep.

    Raises
    ------
    ConfigError, ResourceError
        No such point, no such cluster, another command at work in the folder.
    """
    chosen = [sweep.point(name) for name in only] if only else list(sweep.points)
    settings = engine or sweep.engine
    if settings.kind == "local" and settings.address is not None:
        raise ConfigError("An address is of a Ray cluster", received=settings.address, fix="--engine ray")
    alone = contextlib.nullcontext() if only else only_one(folder.root)
    with alone:
        write_configuration(sweep, folder)
        course = _Course(sweep, folder, chosen, settings, say)
        course.run()
        return course.states()


class _Course:
    """One run over the points that are chosen."""

    def __init__(
        self, sweep: Sweep, folder: SweepFolder, chosen: Sequence[Point], settings: EngineSection, say: Say
    ) -> None:
        self.sweep, self.folder, self.settings, self.say = sweep, folder, settings, say
        self.plan: Plan = plan(sweep, folder)
        self.store = Store(folder.shared)
        self.names = [point.name for point in chosen]
        self.waiting = [point.name for point in chosen if not self._stands(point)]
        self.running: dict[str, int] = {}
        self.deaths = dict.fromkeys(self.names, 0)

    def run(self) -> None:
        standing = len(self.names) - len(self.waiting)
        if standing:
            self.say(f"{standing} of {len(self.names)} points stand")
        if not self.waiting:
            return
        for name in self.waiting:
            before = self.folder.status(name)
            self.folder.set_status(name, Status(), seconds=before.seconds)
        engine = self._engine()
        board = Board(self.names, room=1 if isinstance(engine, LocalEngine) else engine.room, standing=standing)
        try:
            with shown(board):
                while self.waiting or self.running:
                    self._begin(engine)
                    for ended in engine.ended():
                        self._take(ended)
                    board.update(self.states())
                    if self.running:
                        wait_a_little()
        finally:
            engine.close()
            for name in self.running:  # Ctrl-C, or a fault of ours
                self.folder.set_status(name, self.folder.status(name), state="stopped", progress="")
        if all(self.folder.status(point.name).state == "done" for point in self.sweep.points):
            self.store.drop_scratch()

    def states(self) -> dict[str, Status]:
        return {point.name: self.folder.status(point.name) for point in self.sweep.points}

    def _engine(self) -> LocalEngine | RayEngine:
        return LocalEngine(self.folder, self.settings) if self.settings.kind == "local" else self._ray()

    def _ray(self) -> RayEngine:
        on_cpu = all(point.study.model.device == "cpu" for point in self.sweep.points)
        return RayEngine(self.folder, self.settings, on_cpu=on_cpu)

    def _stands(self, point: Point) -> bool:
        """Whether a point's study stands, every file checked; its status is put right where it does."""
        root = self.folder.study(point.name)
        if not (root / "study.toml").exists() or StudyRun(point.study, root).unfinished():
            return False
        status = self.folder.status(point.name)
        if status.state != "done":
            self.folder.set_status(point.name, status, state="done", stage="", progress="", message="", code=0)
        return True

    def _begin(self, engine: Engine) -> None:
        """Begin points in their order, passing over those that wait for a stage that another is making."""
        for name in list(self.waiting):
            if not engine.has_room(len(self.running)):
                return
            if not self._must_wait(name):
                self.waiting.remove(name)
                self.running[name] = 1
                engine.begin(name)

    def _must_wait(self, name: str) -> bool:
        making = {pair for other in self.running for pair in self.plan.of(other) if not self.store.holds(*pair)}
        return any(pair in making for pair in self.plan.of(name))

    def _take(self, ended: Ended) -> None:
        """What has ended: done, failed, or to be tried again."""
        self.running.pop(ended.name)
        status = self.folder.status(ended.name)
        if ended.code is None:
            self.deaths[ended.name] += 1
            if self.deaths[ended.name] < self.settings.tries:
                self.say(f"{ended.name}: its process died ({ended.how}); it is begun again and goes on")
                self.folder.set_status(ended.name, replace(status, state="waiting", stage="again", progress=""))
                self.waiting.insert(0, ended.name)
                return
            message = f"its process died {self.deaths[ended.name]} times ({ended.how})"
            self.folder.set_status(ended.name, status, state="failed", progress="", message=message, code=1)
        elif status.state not in ("done", "failed"):  # it ended without saying so
            message = ended.how or f"its process ended with the code {ended.code}"
            self.folder.set_status(ended.name, status, state="failed", progress="", message=message, code=ended.code)
        status = self.folder.status(ended.name)
        if status.state == "done":
            self.say(f"{ended.name:<40} done, {duration(status.seconds)}")
        else:
            self.say(f"{ended.name:<40} FAILED: {status.message} (log: {self.folder.log(ended.name)})")


def failures(states: dict[str, Status]) -> dict[str, Status]:
    """The points that failed."""
    return {name: status for name, status in states.items() if status.state == "failed"}


def check_failures(states: dict[str, Status], folder: Path) -> None:
    """Raise `ResourceError` where points failed, all by mistakes of the user's; end with code 1 where one is a
    fault."""
    failed = failures(states)
    if not failed:
        return
    first = next(iter(failed.values()))
    text = f"{len(failed)} of {len(states)} points failed: {', '.join(failed)}"
    if all(status.code == 2 for status in failed.values()):
        raise ResourceError(
            f"{text}. The first says: {first.message.removesuffix('.')}",
            fix=f"put it right, then neurondrift sweep {folder}: what is done stands",
        )
    raise SystemExit(1)
