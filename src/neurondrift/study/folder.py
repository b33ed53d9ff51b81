"""A study's folder: where every file lies, what it made to be deleted, and the record of what it ran on."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from neurondrift import __version__
from neurondrift.base.errors import ArtifactError
from neurondrift.base.files import find_scratch, remove_scratch
from neurondrift.study.settings import Study


class StudyFolder:
    """Where everything of a study lies. The first training seed's files lie at the top, the others' under
    `replicates/seed=N`. `common` is a folder in which studies that have something in common keep it for each other."""

    GROUPS, MODELS, DRIFT, BEHAVIOUR = "neuron_groups", "finetuned_models", "drift", "behaviour"
    ATTRIBUTION = "attribution"
    RESULTS, REPLICATES, MANIFESTS, CONFIGURATION = "results", "replicates", ".neurondrift", "study.toml"
    TRACKERS = "trackers"
    MADE = (GROUPS, MODELS, DRIFT, BEHAVIOUR, ATTRIBUTION, RESULTS, REPLICATES, MANIFESTS, CONFIGURATION, TRACKERS)

    def __init__(self, root: Path, study: Study, common: Path | None = None) -> None:
        self.root, self.study, self.common = Path(root), study, common

    @property
    def configuration(self) -> Path:
        return self.root / self.CONFIGURATION

    @property
    def aligned(self) -> Path:
        return self.root / self.MODELS / "aligned"

    @property
    def groups(self) -> Path:
        return self.root / self.GROUPS

    @property
    def results(self) -> Path:
        return self.root / self.RESULTS

    @property
    def results_file(self) -> Path:
        return self.results / "statistical_results.json"

    @property
    def base_model(self) -> str:
        """Reference of the model that is scored and fine-tuned."""
        return str(self.aligned) if self.study.align.enabled else self.study.model.reference

    def of_seed(self, seed: int) -> Path:
        return self.root if seed == self.study.seed else self.root / self.REPLICATES / f"seed={seed}"

    def adapters(self, seed: int) -> Path:
        return self.of_seed(seed) / self.MODELS / self.study.finetune.method

    def drift(self, seed: int) -> Path:
        return self.of_seed(seed) / self.DRIFT

    def trackers(self, seed: int) -> Path:
        """Where TensorBoard's files of a training lie; no part of the study's result."""
        return self.of_seed(seed) / self.TRACKERS

    def behaviour(self, seed: int) -> Path:
        return self.of_seed(seed) / self.BEHAVIOUR

    def attribution(self, seed: int) -> Path:
        return self.of_seed(seed) / self.ATTRIBUTION

    def group_file(self, name: str, granularity: str, *, matched: bool = False, suffix: str = "parquet") -> Path:
        """`safety_top.neurons.parquet`, and `safety_top.matched.neurons.parquet` for its control."""
        return self.groups / f"{name}{'.matched' if matched else ''}.{granularity}s.{suffix}"

    def importance_file(self, name: str, granularity: str) -> Path:
        """Importance of each member of a group, by which doses of it are taken."""
        return self.group_file(name, granularity, suffix="importance.parquet")

    @property
    def covariates(self) -> Path:
        """What is known of every scored neuron before training: its norm, its scores, its gradient scale."""
        return self.groups / "covariates.parquet"

    @property
    def frozen_group(self) -> Path | None:
        """The group that fine-tuning holds still: one of the study's (`finetune.freeze`), or a file; or None."""
        settings = self.study.finetune
        if settings.freeze is None or settings.freeze.endswith((".parquet", ".json")):
            return None if settings.freeze is None else Path(settings.freeze).expanduser()
        name = settings.freeze.removeprefix("matched:")
        return self.group_file(name, settings.freeze_granularity, matched=name != settings.freeze)

    def manifest(self, stage: str, seed: int | None = None) -> Path:
        name = stage if seed is None else f"{stage}.seed={seed}"
        return self.root / self.MANIFESTS / f"{name}.json"

    def parts(self, stage: str, seed: int | None = None) -> Path:
        """What a stage that is being done has finished: for one seed, or what all seeds share."""
        return self.root / self.MANIFESTS / (f"{stage}.parts" if seed is None else f"{stage}.seed={seed}.parts")

    def shared_parts(self, stage: str, key: str) -> Path:
        """What all seeds share, by its fingerprint; so do all studies with a folder in common."""
        return self.parts(stage) if self.common is None else self.common / f"parts-{stage}-{key}"

    @property
    def scratch(self) -> Path:
        """Where the scores lie: the scratch folder, or where it would be beside the study."""
        return find_scratch(self.root) or self.root / "scratch"

    def score_file(self, purpose: str) -> Path:
        return self.scratch / f"{purpose}.safetensors"


def saved_step(folder: Path, step: int, suffix: str = "") -> Path:
    """Where what was saved at a training step lies in a folder: `step=000025`, or `step=000025.parquet`."""
    return folder / f"step={step:06d}{suffix}"


def saved_steps(folder: Path, suffix: str = "") -> list[int]:
    """The training steps at which something was saved in a folder, in order; none where the folder does not exist."""
    names = (re.fullmatch(rf"step=(\d+){re.escape(suffix)}", entry.name) for entry in folder.glob("step=*"))
    return sorted(int(name[1]) for name in names if name)


def clean(output_dir: Path, *, everything: bool = False) -> list[Path]:
    """Delete a study's scratch files, or with `everything` all that a study made in the folder.

    Returns what was deleted. With `everything` the folder must hold a `study.toml`.
    """
    removed = remove_scratch(output_dir)
    if everything:
        if not (output_dir / StudyFolder.CONFIGURATION).exists():
            raise ArtifactError("There is no study in this folder", received=str(output_dir))
        for path in (output_dir / name for name in StudyFolder.MADE):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
                removed.append(path)
            elif path.exists() or path.is_symlink():
                path.unlink()  # of a link the link: what it leads to lies outside of the study
                removed.append(path)
    return removed


def last_step(folder: StudyFolder, seed: int) -> int:
    """The last step whose adapter (or model) is kept."""
    steps = saved_steps(folder.adapters(seed))
    if not steps:
        raise ArtifactError(
            f"The study has no fine-tuned model of seed {seed}",
            received=str(folder.adapters(seed)),
            fix="neurondrift run --output-dir " + str(folder.root),
        )
    return steps[-1]


def record() -> dict[str, Any]:
    """What a study ran on: versions, machine, commit of the package's source where it is a checkout."""
    names = ("torch", "transformers", "peft", "datasets", "numpy", "scipy", "statsmodels", "pyarrow")
    result: dict[str, Any] = {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "versions": {"neurondrift": __version__, **{name: version_of(name) for name in names}},
    }
    if commit := _commit():
        result["commit"] = commit
    return result


def version_of(name: str) -> str:
    """Of an installed package; what is only on the path has none."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _commit() -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            timeout=5,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
