"""The stage finetune, with a drift snapshot at every interval, and the training that the stage and others repeat."""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import TrainerCallback

from neurondrift.base.errors import ArtifactError, ConfigError
from neurondrift.base.files import json_safe, read_json, write_json
from neurondrift.base.processes import from_first
from neurondrift.base.progress import progress
from neurondrift.drift.callback import DriftCallback
from neurondrift.groups.group import Group, load_group
from neurondrift.interventions.acting.freezing import FreezeCallback, FreezeReport
from neurondrift.models.data import encode, load_examples
from neurondrift.models.disk.initial import CheckpointWeights
from neurondrift.models.sites import Sites
from neurondrift.study.base_model import autocasts, load_base
from neurondrift.study.folder import StudyFolder
from neurondrift.study.parallel.checks import check_strategy, cut_on, enough_for_each
from neurondrift.study.sections.finetuning import evaluated_steps, total_steps
from neurondrift.study.settings import Study
from neurondrift.study.stages.grouping import weight_groups
from neurondrift.study.training import finetune as finetune_model
from neurondrift.study.training import last_checkpoint

#: Trackers of the Trainer, and the packages of which one is enough.
TRACKERS = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",), "trackio": ("trackio",)}


class Trainee(NamedTuple):
    """What a study fine-tunes: the model as it is before, its tokenizer, and the encoded examples."""

    model: Any
    tokenizer: Any
    encoded: Sequence[Mapping[str, Any]]


class Finetuned(NamedTuple):
    """The trained model (LoRA around the model that was given), the Trainer's log, and what was held still."""

    model: Any
    log: list[dict[str, float]]
    frozen: FreezeReport | None


def load_trainee(study: Study, folder: StudyFolder, *, device: str | None = None) -> Trainee:
    """The study's base and training examples; in float32 where all of its weights are trained."""
    dtype = "float32" if study.finetune.method == "full" else None
    return trainee_of(study, *load_base(study, folder, dtype=dtype, device=device))


def trainee_of(study: Study, model: Any, tokenizer: Any) -> Trainee:
    """The study's training examples beside a model that is loaded."""
    settings = study.finetune
    return Trainee(model, tokenizer, encode(load_examples(settings.data), tokenizer, max_length=settings.max_length))


def finetune_study(
    study: Study,
    trainee: Trainee,
    seed: int,
    *,
    freeze: Group | None = None,
    keep_in: Path | None = None,
    beside: Sequence[Path] = (),
    save_at: Sequence[int] = (),
    callbacks: Sequence[TrainerCallback] = (),
    advance: Callable[[int], None] = lambda steps: None,
    tracked_in: Path | None = None,
    shard_on: torch.device | None = None,
) -> Finetuned:
    """Fine-tune as the study says, with one training seed.

    Parameters
    ----------
    study, trainee, seed
        The settings, what is trained with them, and the seed.
    freeze
        A group that is held still; its errors are those of `freezing`.
    keep_in
        The folder of checkpoints, which are resumed from, and of the adapters (models) of the steps `save_at`.
        Default: nothing is kept.
    beside
        Further folders that a resumed run goes on from.
    callbacks, advance, tracked_in, shard_on
        As in `training.finetune`.
    """
    hold = None if freeze is None else FreezeCallback(freeze)
    with nullcontext(keep_in) if keep_in is not None else tempfile.TemporaryDirectory() as target:
        trained, log = finetune_model(
            trainee.model,
            trainee.tokenizer,
            trainee.encoded,
            study.finetune,
            seed=seed,
            folder=Path(target),
            save_at=save_at,
            autocast=autocasts(study),
            callbacks=callbacks if hold is None else [hold, *callbacks],
            advance=advance,
            resumable=keep_in is not None,
            beside=beside,
            tracked_in=tracked_in,
            shard_on=shard_on,
        )
    return Finetuned(trained, log, None if hold is None else hold.report)


def finetune(study: Study, folder: StudyFolder, seed: int, key: str) -> str:
    """Fine-tune on ordinary instructions, with a drift snapshot at every interval.

    `key` is the fingerprint of all that the stage depends on: what an interrupted run with the same key has left is
    gone on from, anything else is deleted.
    """
    settings = study.finetune
    freeze = None if folder.frozen_group is None else load_group(folder.frozen_group)
    full = settings.method == "full"
    if full and not Path(folder.base_model).is_dir():
        raise ConfigError(
            "Full fine-tuning measures drift against the initial weights, which must lie in a local folder",
            received=folder.base_model,
            fix="download the model and name its folder as the reference",
        )
    shard_on = cut_on(study, folder.base_model, of_training=full)
    trainee = load_trainee(study, folder, device=None if shard_on is None else "cpu")
    total = total_steps(len(trainee.encoded), settings)
    drift = DriftCallback(
        folder.drift(seed),
        every=settings.drift_interval,
        groups=weight_groups(folder),
        initial=CheckpointWeights(folder.base_model, Sites(trainee.model)) if full else None,
        on_full_disk="stop",  # the command is run again and resumes
    )
    target = folder.adapters(seed)
    from_first(lambda: _start_over_if_changed(target, folder.drift(seed), key))
    with _threads_as_begun(target), progress(f"finetune, seed {seed}", total) as advance:
        _, log, frozen = finetune_study(
            study,
            trainee,
            seed,
            freeze=freeze,
            keep_in=target,
            beside=(folder.drift(seed),),
            save_at=evaluated_steps(total, settings.drift_interval, settings.evaluated_steps),
            callbacks=[drift],
            advance=advance,
            tracked_in=folder.trackers(seed),
            shard_on=shard_on,
        )

    def finish() -> int:
        write_json(target / "training_log.json", json_safe(log))
        trainee.tokenizer.save_pretrained(str(target / "tokenizer"))
        shutil.rmtree(target / "trainer", ignore_errors=True)
        return len(drift.log.steps())

    snapshots = from_first(finish)
    loss = f", loss {log[0]['loss']:.2f} → {log[-1]['loss']:.2f}" if log else ""
    held = "" if frozen is None else f"; {frozen}"
    return f"{total} steps, {snapshots} drift snapshots{loss}{held}"


def outputs(study: Study, folder: StudyFolder, seed: int) -> list[Path]:
    return [folder.adapters(seed), folder.drift(seed)]


def check(study: Study) -> None:
    """Raise `ConfigError` where a tracker that fine-tuning is to report to is not installed, where there are more
    processes than rows in a batch, or FSDP2 cannot do it."""
    check_strategy(study)
    enough_for_each(study.finetune.batch_size, "rows in a batch", "finetune.batch_size")
    for name in study.finetune.report_to:
        packages = TRACKERS[name]
        if not any(importlib.util.find_spec(package) for package in packages):
            raise ConfigError(
                f"finetune.report_to names {name}, whose package is not installed",
                received=name,
                fix=f"pip install {packages[0]}, or take {name} out of finetune.report_to",
            )


def _start_over_if_changed(target: Path, drift: Path, key: str) -> None:
    """Keep what an interrupted run with the same inputs has left, so that it resumes; delete anything else."""
    marker = target / "in_progress.json"
    if marker.exists() and _read_or_none(marker) == key and last_checkpoint(target / "trainer", (target, drift)):
        return
    for path in (target, drift):
        if path.is_dir():
            shutil.rmtree(path)
    write_json(marker, key)


@contextmanager
def _threads_as_begun(target: Path) -> Iterator[None]:
    """As many threads as the training began with: sums are rounded in an order that depends on it, and a resumed run
    gives the bits of one that was never stopped."""
    file, now = target / "threads.json", torch.get_num_threads()

    def known() -> int:
        begun = _read_or_none(file) if file.exists() else None
        if not isinstance(begun, int) or begun < 1:
            write_json(file, begun := now)
        return begun

    torch.set_num_threads(from_first(known))
    try:
        yield
    finally:
        torch.set_num_threads(now)


def _read_or_none(path: Path) -> Any:
    try:
        return read_json(path)
    except ArtifactError:  # damaged: as if it were not there
        return None
