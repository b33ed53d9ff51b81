"""Stages that several points have in common: done once, kept by their fingerprints, and linked into each study.

Which these are follows from the table of stages: those that no training seed repeats and that read nothing but such.
A stage's fingerprint holds all that its result depends on, so two points with the same one have the same files. They
are linked (copied where the disk cannot link), which is safe as a study replaces its files and never writes into one.
The answers before fine-tuning are a part of a stage that is each point's own; that stage finds them by itself, in the
same folder (`StudyFolder.shared_parts`).
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from neurondrift.base.errors import ArtifactError
from neurondrift.base.files import (
    atomic_path,
    make_folder,
    manifest_stands,
    read_json,
    remove_scratch,
    scratch_directory,
    write_json,
)
from neurondrift.base.locks import only_one
from neurondrift.study.runner import TABLE, Step, StudyRun
from neurondrift.study.sweep.folder import SweepFolder
from neurondrift.study.sweep.settings import Point, Sweep

MANIFEST, FILES = "manifest.json", "files"


def _shared() -> tuple[str, ...]:
    found: list[str] = []
    for name, stage in TABLE.items():
        if not (stage.per_seed or stage.optional) and set(stage.reads) <= set(found):
            found.append(name)
    return tuple(found)


#: Names of the stages that points may share, in order.
SHARED = _shared()


@dataclass(frozen=True)
class Plan:
    """Which shared stages each point has, as name -> {stage: fingerprint}; and those worth keeping for others.

    Scratch (scores) is kept only where points that share it go on to different groups.
    """

    keys: Mapping[str, Mapping[str, str]]
    kept: frozenset[tuple[str, str]]

    def of(self, point: str) -> list[tuple[str, str]]:
        """The stages of a point that are kept, with their fingerprints."""
        return [pair for pair in self.keys[point].items() if pair in self.kept]


def plan(sweep: Sweep, folder: SweepFolder) -> Plan:
    """The plan of a sweep's points. Reads their data, whose content is in the fingerprints."""
    keys = {point.name: _keys(point, folder) for point in sweep.points}
    pairs = [pair for own in keys.values() for pair in own.items()]
    kept = set()
    for name, key in set(pairs):
        until = TABLE[name].scratch_until
        sharers = [own for own in keys.values() if own.get(name) == key]
        distinct = {own.get(until) for own in sharers} if until is not None else sharers
        if len(distinct) > 1:
            kept.add((name, key))
    return Plan(keys, frozenset(kept))


def _keys(point: Point, folder: SweepFolder) -> dict[str, str]:
    run = StudyRun(point.study, folder.study(point.name))
    return {name: step.inputs for name in SHARED for step in run.steps(name)}


class Store:
    """What shared stages have made, each whole in a folder named for the stage and its fingerprint."""

    def __init__(self, root: Path) -> None:
        self.root = Path(root)

    def entry(self, stage: str, key: str) -> Path:
        return self.root / f"{stage}-{key}"

    def holds(self, stage: str, key: str) -> bool:
        """Whether the stage's files are there; they are checked when they are taken."""
        return (self.entry(stage, key) / MANIFEST).is_file()

    def give(self, run: StudyRun, step: Step) -> None:
        """Keep what a study's step has made for the others, unless it is there already."""
        if self.holds(step.stage.name, step.inputs):
            return
        made, source = run.folder.manifest(step.stage.name, step.seed), step.stage.root(run.folder)
        if not manifest_stands(made, root=source, inputs=step.inputs):
            return  # scratch that is gone
        manifest = read_json(made)
        with contextlib.suppress(FileExistsError), atomic_path(self.entry(step.stage.name, step.inputs)) as partial:
            for name in manifest["files"]:
                link(source / name, partial / FILES / name)
            write_json(partial / MANIFEST, manifest)

    def take(self, run: StudyRun, step: Step) -> bool:
        """Link what is kept of a step into a study, its manifest last; False where there is nothing whole.

        What is damaged is deleted.
        """
        entry = self.entry(step.stage.name, step.inputs)
        if not manifest_stands(entry / MANIFEST, root=entry / FILES, inputs=step.inputs):
            if entry.exists():
                shutil.rmtree(entry, ignore_errors=True)
            return False
        manifest = read_json(entry / MANIFEST)
        with only_one(run.folder.root):
            target = run.folder.manifest(step.stage.name, step.seed)
            target.unlink(missing_ok=True)
            if step.stage.scratch_until is not None:
                remove_scratch(run.folder.root)
                scratch_directory(run.folder.root, needed=sum(each["bytes"] for each in manifest["files"].values()))
            root = step.stage.root(run.folder)
            for output in step.stage.outputs(run.study, run.folder):
                self._place(entry / FILES, output.relative_to(root), list(manifest["files"]), output)
            write_json(target, manifest)
        return True

    def _place(self, files: Path, name: Path, known: Sequence[str], output: Path) -> None:
        """One file or folder of a stage, whole."""
        inside = [each for each in known if Path(each).is_relative_to(name)]
        if not inside:
            raise ArtifactError("A shared stage lacks a file", received=str(files / name), fix="delete it")
        with atomic_path(output) as partial:
            for each in inside:
                rest = Path(each).relative_to(name)
                link(files / each, partial if rest == Path() else partial / rest)

    def drop_scratch(self) -> None:
        """Delete the scratch that is kept: no point needs it any more."""
        for name in SHARED:
            if TABLE[name].scratch_until is not None:
                for entry in self.root.glob(f"{name}-*"):
                    shutil.rmtree(entry, ignore_errors=True)


def link(source: Path, target: Path) -> None:
    """Let `target` be the file `source`: by a hard link, or as a copy where the disk cannot link them."""
    make_folder(target.parent)
    with contextlib.suppress(OSError):  # another disk, a file system without links, too many of them
        os.link(source, target)
        return
    shutil.copy2(source, target)


def do_shared(run: StudyRun, store: Store, kept: frozenset[tuple[str, str]]) -> None:
    """The shared stages of a study: taken where they are kept, done otherwise, and kept for those that share them."""
    steps = [step for name in SHARED for step in run.steps(name)]
    for step in reversed(steps):  # where the groups are kept, no scores are needed
        if (step.stage.name, step.inputs) in kept and not run.is_done(step) and store.take(run, step):
            run.say(f"{step.title:<20} is shared with another point")
    for step in steps:
        run.run([step.stage.name])
        if (step.stage.name, step.inputs) in kept:
            store.give(run, step)
