"""A study: its folder, and its stages in order, each skipped when it is done and its inputs have not changed.

Read the stages from top to bottom: align, score, groups, finetune, evaluate, analyze, report. Every stage reads
files of the stages above it, writes its own and marks itself done with a manifest.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import tomli_w

from neurondrift.base.errors import ArtifactError, ConfigError
from neurondrift.base.files import (
    manifest_stands,
    remove_scratch,
    require_space,
    sha256_of_file,
    sha256_of_value,
    write_manifest,
    write_text,
)
from neurondrift.base.memory import release_memory
from neurondrift.base.processes import is_first_process, process_count
from neurondrift.models.data import DataReference
from neurondrift.study.folder import StudyFolder, record
from neurondrift.study.settings import Study, load_file

logger = logging.getLogger(__name__)

Say = Callable[[str], None]

STAGE_FORMAT = 2  # raise it when a stage's files change, so that older ones are made again
# Settings that change how much memory a stage takes, and not its result.
MEMORY_ONLY = {"checkpoint_activations"}


@dataclass(frozen=True, kw_only=True)
class Step:
    """One stage (for one seed where it is repeated): what it depends on, and how it is done."""

    stage: str
    inputs: str
    seed: int | None
    outputs: Callable[[], list[Path]]
    run: Callable[[], str]
    root: Callable[[], Path]  # what the outputs' paths are relative to in the manifest

    @property
    def title(self) -> str:
        return self.stage if self.seed is None else f"{self.stage} (seed {self.seed})"


STAGES = ("align", "score", "groups", "finetune", "evaluate", "analyze", "report")


class StudyRun:
    """Runs stages of a study in a folder.

    Parameters
    ----------
    study
        The resolved configuration.
    output_dir
        The study's folder.
    say
        Receives one line a stage.

    Raises
    ------
    ConfigError
        The folder holds another study.
    """

    def __init__(self, study: Study, output_dir: Path, *, say: Say = lambda line: None) -> None:
        self.study, self.folder, self.say = study, StudyFolder(Path(output_dir), study), say
        self._check_folder()

    def _check_folder(self) -> None:
        """Refuse a folder that belongs to another study: another name or another model."""
        file = self.folder.root / "study.toml"
        if not file.exists():
            return
        standing = load_file(file)
        old = (standing.get("name"), standing.get("model", {}).get("reference"))
        new = (self.study.name, self.study.model.reference)
        if old != new:
            raise ConfigError(
                f"The output folder holds another study: {old[0]} of {old[1]}",
                received=f"{new[0]} of {new[1]}, --output-dir {self.folder.root}",
                fix="choose another --output-dir, or delete that study with neurondrift clean --everything",
            )

    def run(self, stages: Sequence[str] = STAGES, *, force: Sequence[str] = (), keep_scores: bool = False) -> None:
        """Do the stages, in order, as far as they are not done.

        `force` names stages that are done again even where they stand. A stage asked for on its own needs the
        stages above it to stand (`ArtifactError` otherwise). The scores are deleted once the groups stand, unless
        `keep_scores`.
        """
        for name in force:
            if name not in STAGES:
                raise ConfigError("There is no such stage", received=name, allowed=", ".join(STAGES))
        if process_count() > 1 and tuple(stages) != ("score",):
            raise ConfigError(
                "Only the stage score runs in several processes",
                received=f"{', '.join(stages)} in {process_count()} processes",
                fix="torchrun ... -m neurondrift.cli score, then neurondrift run in one process",
            )
        if is_first_process():
            self._write_study_file()
        for stage in STAGES:
            if stage not in stages:
                continue
            for step in self.steps(stage):
                self._require(stage, stages)
                self._do(step, force=stage in force)
            if stage == "groups" and not keep_scores:
                remove_scratch(self.folder.root)

    def _do(self, step: Step, *, force: bool) -> None:
        manifest = self.folder.manifest(step.stage, step.seed)
        if not force and (self._stands(step) or self._no_longer_needed(step)):
            self.say(f"{step.title:<20} stands")
            return
        if is_first_process():
            manifest.unlink(missing_ok=True)
        began = time.perf_counter()
        summary = step.run()
        seconds = time.perf_counter() - began
        if not is_first_process():
            return
        write_manifest(
            manifest,
            root=step.root(),
            stage=step.stage,
            inputs=step.inputs,
            outputs=step.outputs(),
            details={"seconds": round(seconds, 1), "summary": summary},
        )
        self.say(f"{step.title:<20} {_duration(seconds):>7}  {summary}")
        release_memory()

    def _stands(self, step: Step) -> bool:
        return manifest_stands(self.folder.manifest(step.stage, step.seed), root=step.root(), inputs=step.inputs)

    def _no_longer_needed(self, step: Step) -> bool:
        """Scores are scratch: once the groups stand, they need not."""
        return step.stage == "score" and all(self._stands(later) for later in self.steps("groups"))

    def _require(self, stage: str, asked: Sequence[str]) -> None:
        """Raise unless the stages that `stage` reads from stand or are being done in this run."""
        for needed in NEEDS[stage]:
            if needed in asked:
                continue
            missing = [step for step in self.steps(needed) if not (self._stands(step) or self._no_longer_needed(step))]
            if missing:
                raise ArtifactError(
                    f"The stage {stage} needs the stage {missing[0].title}, which is not done for these settings",
                    fix=f"neurondrift {needed} --output-dir {self.folder.root}, or neurondrift run",
                )

    def steps(self, stage: str) -> list[Step]:
        """The steps of a stage: one, or one for each training seed."""
        if stage == "align" and not self.study.align.enabled:
            return []
        if stage in ("finetune", "evaluate"):
            return [self._step(stage, seed) for seed in self.study.seeds]
        return [self._step(stage, None)]

    def _step(self, stage: str, seed: int | None) -> Step:
        from neurondrift.study.stages import alignment, analysis, evaluation, finetuning, grouping, reporting, scoring

        modules = (alignment, scoring, grouping, finetuning, evaluation, analysis, reporting)
        module = dict(zip(STAGES, modules, strict=True))[stage]
        function, outputs = getattr(module, stage), getattr(module, f"{stage}_outputs")
        key = self.key(stage, seed)
        arguments: tuple[Any, ...] = (self.study, self.folder) if seed is None else (self.study, self.folder, seed)
        extra = (key,) if stage == "finetune" else ()
        return Step(
            stage=stage,
            inputs=key,
            seed=seed,
            outputs=lambda: outputs(*arguments),
            run=lambda: function(*arguments, *extra),
            root=lambda: self.folder.scratch if stage == "score" else self.folder.root,
        )

    def key(self, stage: str, seed: int | None = None) -> str:
        """Fingerprint of everything that a stage's result depends on: its settings, its data, the stages above."""
        study, section = self.study, getattr(self.study, stage, None)
        content: dict[str, Any] = {"stage": stage, "format": STAGE_FORMAT, "seed": seed}
        if section is not None:
            content["settings"] = section.model_dump(mode="json", exclude=MEMORY_ONLY)
            content["data"] = {name: data_key(value) for name, value in section if isinstance(value, DataReference)}
        if stage == "evaluate" and study.evaluate.attack.suffixes:
            content["suffixes"] = data_key(DataReference(source=study.evaluate.attack.suffixes))
        if stage == "groups" and study.finetune.freeze_granularity == "unit":
            content["units"] = True  # the groups of hidden units are made only where one is to be frozen
        if stage == "finetune" and study.finetune.freeze:
            content["frozen group"] = data_key(DataReference(source=study.finetune.freeze))
        if stage == "align" or not study.align.enabled:
            content["model"] = study.model.model_dump(mode="json")
        if stage in ("align", "score", "groups", "analyze"):
            content["first seed"] = study.seed
        for needed in NEEDS[stage]:
            if needed == "align" and not study.align.enabled:
                continue
            seeds: Sequence[int | None] = [None]
            if needed in ("finetune", "evaluate"):
                seeds = study.seeds if seed is None else [seed]
            content[f"after {needed}"] = [self.key(needed, one) for one in seeds]
        return sha256_of_value(content)[:16]

    def _write_study_file(self) -> None:
        """`study.toml`: the resolved configuration, and what it ran on."""
        require_space(self.folder.root, 50_000_000, purpose="the study")
        text = self.study.to_toml() + "\n" + tomli_w.dumps({"record": record()})
        write_text(self.folder.root / "study.toml", text)


NEEDS: dict[str, tuple[str, ...]] = {
    "align": (),
    "score": ("align",),
    "groups": ("score",),
    "finetune": ("align", "groups"),
    "evaluate": ("finetune",),
    "analyze": ("groups", "finetune", "evaluate"),
    "report": ("analyze",),
}


def data_key(reference: DataReference) -> str:
    """What a data reference points to, by content where it is local."""
    source = reference.source
    if source.startswith("builtin:"):
        from neurondrift.models.data import BUILTIN

        file = BUILTIN.get(source.removeprefix("builtin:"), ("", ""))[0]
        if file:
            content = (resources.files("neurondrift.models") / "datasets" / file).read_bytes()
            return sha256_of_value([source, content.decode("utf-8")])
    elif not source.startswith("hf:") and Path(source).expanduser().is_file():
        return sha256_of_file(Path(source).expanduser())
    return source


def clean(output_dir: Path, *, everything: bool = False) -> list[Path]:
    """Delete a study's scratch files, or with `everything` all that a study made in the folder.

    Returns what was deleted. With `everything` the folder must hold a `study.toml`.
    """
    removed = remove_scratch(output_dir)
    if everything:
        if not (output_dir / "study.toml").exists():
            raise ArtifactError("There is no study in this folder", received=str(output_dir))
        made = (
            "neuron_groups",
            "finetuned_models",
            "drift",
            "behaviour",
            "results",
            "replicates",
            ".neurondrift",
            "study.toml",
        )
        for path in (output_dir / name for name in made):
            if path.is_dir():
                shutil.rmtree(path)
                removed.append(path)
            elif path.exists():
                path.unlink()
                removed.append(path)
    return removed


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}m{rest:02d}s" if minutes else f"{seconds:.1f}s"
