"""A study in its folder: its stages in order, each skipped when it is done and its inputs have not changed.

Which stages there are stands in two tables, of those that every study has (`study.stages.table`) and of those that it
may be asked for (`study.experiments.table`); this module names none. A stage reads files of the stages above it, writes
its own and is marked done with a manifest.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import tomli_w

from neurondrift.base.errors import ArtifactError, ConfigError
from neurondrift.base.files import (
    changed_file,
    manifest_stands,
    read_toml,
    remove_partial,
    remove_scratch,
    require_space,
    sha256_of_value,
    standing_inputs,
    write_manifest,
    write_text,
)
from neurondrift.base.locks import only_one
from neurondrift.base.processes import (
    from_first,
    is_first_process,
    joined_processes,
    leaving_busy_cores,
    release_memory,
)
from neurondrift.base.progress import duration, progress
from neurondrift.study.base_model import arithmetic
from neurondrift.study.experiments.table import OPTIONAL
from neurondrift.study.folder import StudyFolder, record
from neurondrift.study.settings import Study, validated
from neurondrift.study.stages.table import STAGES as ALWAYS
from neurondrift.study.stages.table import Stage, section_inputs

Say = Callable[[str], None]

STAGE_FORMAT = 2  # raise it when a stage's files change, so that older ones are made again


def in_order(stages: Iterable[Stage]) -> tuple[Stage, ...]:
    """The stages, each after those that it reads, otherwise as they come."""
    placed: dict[str, Stage] = {}
    waiting = list(stages)
    while waiting:
        ready = next(stage for stage in waiting if placed.keys() >= set(stage.reads))
        placed[ready.name] = ready
        waiting.remove(ready)
    return tuple(placed.values())


TABLE = {stage.name: stage for stage in in_order((*ALWAYS, *OPTIONAL))}
#: Names of the stages that every study has.
STAGES = tuple(name for name, stage in TABLE.items() if not stage.optional)


@dataclass(frozen=True, kw_only=True)
class Step:
    """A stage (for one seed where it is repeated) with the fingerprint of what it depends on."""

    stage: Stage
    inputs: str
    seed: int | None

    @property
    def title(self) -> str:
        return self.stage.name if self.seed is None else f"{self.stage.name} (seed {self.seed})"


class StudyRun:
    """Runs stages of a study in a folder.

    Parameters
    ----------
    study
        The resolved configuration. What the folder's study was asked beyond its stages stays in its record, where this
        configuration says nothing of it.
    output_dir
        The study's folder.
    say
        Receives one line per stage, and what a stage has to tell while it is done.
    common
        A folder in which studies (the points of a sweep) keep for each other what they have in common.

    Raises
    ------
    ConfigError
        The folder holds another study.
    """

    def __init__(
        self, study: Study, output_dir: Path, *, say: Say = lambda line: None, common: Path | None = None
    ) -> None:
        file = Path(output_dir) / StudyFolder.CONFIGURATION
        if file.exists():
            standing = read_toml(file)
            _check_same_study(study, standing, Path(output_dir))
            study = _with_what_was_asked(study, standing)
        self.study = study
        self.folder, self.say = StudyFolder(Path(output_dir), study, common), say if is_first_process() else _silent
        self._said: set[str] = set()

    def run(self, stages: Sequence[str] | None = None, *, force: Sequence[str] = (), keep_scores: bool = False) -> None:
        """Do the stages, in order, as far as they are not done.

        By default all that are part of the study: optional ones where their section says `enabled`. `force` names
        stages that are done again even where they stand, and by default asks for them. A stage asked for on its own
        needs the stages above it to stand (`ArtifactError` otherwise). Scratch is deleted once it is no longer needed,
        unless `keep_scores`. `ResourceError` where another command is at work in the folder.
        """
        for name in force:
            if name not in TABLE:
                raise ConfigError("There is no such stage", received=name, allowed=", ".join(TABLE))
        wanted = [name for name in TABLE if self._is_asked(name) or name in force] if stages is None else stages
        asked = [name for name in TABLE if name in wanted]
        for stage in (TABLE[name] for name in asked):
            if stage.checks is not None and not all(self.is_done(step) for step in self.steps(stage.name)):
                stage.checks(self.study)
        with joined_processes(), ExitStack() as held:
            from_first(lambda: self._begin(held))
            self._run(asked, force, keep_scores)

    def _begin(self, held: ExitStack) -> None:
        held.enter_context(only_one(self.folder.root))
        self._write_study_file()
        for name in StudyFolder.MADE:
            remove_partial(self.folder.root / name)
        remove_partial(self.folder.scratch)

    def _run(self, asked: Sequence[str], force: Sequence[str], keep_scores: bool) -> None:
        """Of several processes the first looks at the folder: the others do what it has seen."""
        for name in asked:
            steps: list[tuple[str, int | None]] = from_first(partial(self._inputs_and_seeds, name))
            for inputs, seed in steps:
                from_first(partial(self._require, name, asked))
                self._do(Step(stage=TABLE[name], inputs=inputs, seed=seed), force=name in force)
            if not keep_scores and any(stage.scratch_until == name for stage in TABLE.values()):
                from_first(partial(_remove_scratch, self.folder.root))

    def _inputs_and_seeds(self, name: str) -> list[tuple[str, int | None]]:
        return [(step.inputs, step.seed) for step in self.steps(name)]

    def _say_once(self, line: str) -> None:
        """What holds for one stage after the other is said once."""
        choice = line.partition(",")[0]
        if choice not in self._said and is_first_process():
            self.say(line)
        self._said.add(choice)

    def _is_asked(self, name: str) -> bool:
        stage = TABLE[name]
        return not stage.optional or (stage.section is not None and getattr(self.study, stage.section).enabled)

    def _do(self, step: Step, *, force: bool) -> None:
        stage, manifest = step.stage, self.folder.manifest(step.stage.name, step.seed)

        def stands() -> bool:
            if not force and self.is_done(step):
                self.say(f"{step.title:<20} stands")
                return True
            root = stage.root(self.folder)
            if not force and (changed := changed_file(manifest, root=root, inputs=step.inputs)) is not None:
                self.say(f"{step.title:<20} is done again: {changed} is not as it was made")
            manifest.unlink(missing_ok=True)
            return False

        def end() -> None:
            write_manifest(
                manifest,
                root=stage.root(self.folder),
                stage=stage.name,
                inputs=step.inputs,
                outputs=stage.outputs(*of),
                details={"seconds": round(seconds, 1), "summary": summary}
                | ({"arithmetic": arithmetic(self.study)} if stage.in_processes else {}),
            )
            self.say(f"{step.title:<20} {duration(seconds):>7}  {summary}")

        if from_first(stands):
            return
        of: tuple[Any, ...] = (self.study, self.folder, *([] if step.seed is None else [step.seed]))
        given = {"key": step.inputs, "shared_key": self.shared_key(stage.name), "say": self.say}
        began = time.perf_counter()
        with leaving_busy_cores(self._say_once), progress(step.title):
            work = partial(stage.run, *of, **{name: given[name] for name in stage.wants})
            summary = work() if stage.in_processes else from_first(work)
        seconds = time.perf_counter() - began
        from_first(end)
        release_memory()

    def _stands(self, step: Step) -> bool:
        manifest = self.folder.manifest(step.stage.name, step.seed)
        return manifest_stands(manifest, root=step.stage.root(self.folder), inputs=step.inputs)

    def _no_longer_needed(self, step: Step) -> bool:
        """Scratch need not stand once the stage that it was made for does."""
        until = step.stage.scratch_until
        return until is not None and all(self._stands(later) for later in self.steps(until))

    def _missing(self, name: str, asked: Sequence[str] = ()) -> list[Step]:
        """What a stage reads and neither stands nor is being done in this run."""
        stage = TABLE[name]
        seeds = (None, *stage.seeds(self.study))
        return [
            step
            for needed in stage.reads
            if needed not in asked and not TABLE[needed].optional
            for step in self.steps(needed)
            if step.seed in seeds and not self.is_done(step)
        ]

    def _require(self, name: str, asked: Sequence[str]) -> None:
        if missing := self._missing(name, asked):
            TABLE[name].lacks(self.study, self.folder)
            raise ArtifactError(
                f"The stage {name} needs the stage {missing[0].title}, which is not done for these settings",
                fix=f"neurondrift {missing[0].stage.name} --output-dir {self.folder.root}, or neurondrift run",
            )

    def readers(self, name: str) -> list[str]:
        """The stages that read this one and could be done now, as all that they read stands."""
        return [reader for reader, stage in TABLE.items() if name in stage.reads and not self._missing(reader)]

    def unfinished(self) -> list[str]:
        """The titles of the steps that a run without arguments would still do; every file is checked."""
        asked = [step for name in TABLE if self._is_asked(name) for step in self.steps(name)]
        return [step.title for step in asked if not self.is_done(step)]

    def is_done(self, step: Step) -> bool:
        """Whether a step stands, or made scratch that is no longer needed."""
        return self._stands(step) or self._no_longer_needed(step)

    def steps(self, name: str) -> list[Step]:
        """The steps of a stage: one, or one for each training seed; none where it is not part of the study."""
        stage = TABLE[name]
        if not stage.when(self.study):
            return []
        seeds: Sequence[int | None] = stage.seeds(self.study) if stage.per_seed else [None]
        return [Step(stage=stage, inputs=self.key(name, seed), seed=seed) for seed in seeds]

    def key(self, name: str, seed: int | None = None) -> str:
        """Fingerprint of everything that a stage's result depends on: its settings, its data, the stages above."""
        study, stage = self.study, TABLE[name]
        content: dict[str, Any] = {"stage": name, "format": STAGE_FORMAT, "seed": seed, **stage.extra_inputs(study)}
        if stage.section is not None:
            content |= section_inputs(getattr(study, stage.section), stage.no_result)
        # The stages that read no other start from the model; where one of them is left out, any other may.
        if not stage.reads or not all(first.when(study) for first in TABLE.values() if not first.reads):
            content["model"] = study.model.model_dump(mode="json")
        for needed in stage.reads:
            if above := self._keys_above(TABLE[needed], stage, seed):
                content[f"after {needed}"] = above
        return sha256_of_value(content)[:16]

    def shared_key(self, name: str) -> str:
        """Fingerprint of what a stage does that is the same for all training seeds: its own settings and data, the
        model, and the stages above it that are not repeated for each seed."""
        study, stage = self.study, TABLE[name]
        content: dict[str, Any] = {"stage": name, "format": STAGE_FORMAT, **stage.extra_inputs(study)}
        content["model"] = study.model.model_dump(mode="json")
        if stage.section is not None:
            content |= section_inputs(getattr(study, stage.section), stage.no_result)
        waiting, above = list(stage.reads), dict[str, str]()
        while waiting:
            needed = TABLE[waiting.pop()]
            if needed.per_seed:
                waiting += needed.reads
            elif needed.when(study) and not needed.optional:
                above[needed.name] = self.key(needed.name)
        return sha256_of_value(content | {"above": above})[:16]

    def _keys_above(self, needed: Stage, stage: Stage, seed: int | None) -> list[str]:
        """What a stage that is read contributes: its keys; of an optional one those for which its files were made."""
        if not needed.when(self.study):
            return []
        if needed.optional:
            made = standing_inputs(self.folder.manifest(needed.name), root=needed.root(self.folder))
            return [] if made is None else [made]
        if not needed.per_seed:
            return [self.key(needed.name)]
        return [self.key(needed.name, one) for one in (stage.seeds(self.study) if seed is None else [seed])]

    def _write_study_file(self) -> None:
        """`study.toml`: the resolved configuration, and what it ran on."""
        require_space(self.folder.root, 50_000_000, purpose="the study")
        text = self.study.to_toml() + "\n" + tomli_w.dumps({"record": record()})
        write_text(self.folder.configuration, text)


def _silent(line: str) -> None:
    """Of several processes the first speaks."""


def _remove_scratch(root: Path) -> None:
    remove_scratch(root)


def _check_same_study(study: Study, standing: dict[str, Any], root: Path) -> None:
    """Refuse a folder that belongs to another study: another name or another model."""
    model = standing.get("model")
    old = (standing.get("name"), model.get("reference") if isinstance(model, dict) else model)
    new = (study.name, study.model.reference)
    if old != new:
        raise ConfigError(
            f"The output folder holds another study: {old[0]} of {old[1]}",
            received=f"{new[0]} of {new[1]}, --output-dir {root}",
            fix="choose another --output-dir, or delete that study with neurondrift clean --everything",
        )


def _with_what_was_asked(study: Study, standing: dict[str, Any]) -> Study:
    """The study with the sections of optional stages that the folder's study.toml has and this configuration has not.

    They are not enabled: a run does what its configuration names.
    """
    sections = [stage.section for stage in TABLE.values() if stage.optional and stage.section is not None]
    asked = {
        name: validated(type(getattr(study, name)), standing[name] | {"enabled": False})
        for name in sections
        if isinstance(standing.get(name), dict) and name not in study.model_fields_set
    }
    return study.model_copy(update=asked)
