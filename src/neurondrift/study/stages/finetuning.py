"""The stage finetune: fine-tuning with a drift snapshot at every interval."""

from __future__ import annotations

import shutil
from pathlib import Path

from neurondrift.base.errors import ConfigError
from neurondrift.base.files import json_safe, read_json, write_json
from neurondrift.base.progress import progress
from neurondrift.drift.callback import DriftCallback
from neurondrift.interventions.freezing import FreezeCallback
from neurondrift.models.data import encode, load_examples
from neurondrift.models.disk.initial import CheckpointWeights
from neurondrift.models.sites import Sites
from neurondrift.study.base_model import autocasts, load_base
from neurondrift.study.folder import StudyFolder
from neurondrift.study.settings import Study
from neurondrift.study.stages.grouping import weight_groups
from neurondrift.study.training import evaluated_steps, total_steps
from neurondrift.study.training import finetune as finetune_model


def finetune(study: Study, folder: StudyFolder, seed: int, key: str) -> str:
    """Fine-tune on ordinary instructions, with a drift snapshot at every interval.

    `key` is the fingerprint of all that the stage depends on: what an interrupted run with the same key has left is
    gone on from, anything else is deleted.
    """
    settings = study.finetune
    freeze = None if folder.frozen_group is None else FreezeCallback(folder.frozen_group)
    full = settings.method == "full"
    if full and not Path(folder.base_model).is_dir():
        raise ConfigError(
            "Full fine-tuning measures drift against the initial weights, which must lie in a local folder",
            received=folder.base_model,
            fix="download the model and name its folder as the reference",
        )
    model, tokenizer = load_base(study, folder, dtype="float32" if full else None)
    encoded = encode(load_examples(settings.data), tokenizer, max_length=settings.max_length)
    total = total_steps(len(encoded), settings)
    keep = evaluated_steps(total, settings.drift_interval, settings.evaluated_steps)
    initial = CheckpointWeights(folder.base_model, Sites(model)) if full else None
    callback = DriftCallback(
        folder.drift(seed),
        every=settings.drift_interval,
        groups=weight_groups(folder),
        initial=initial,
        on_full_disk="stop",  # the command is run again and resumes
    )
    target = folder.adapters(seed)
    _start_over_if_changed(target, folder.drift(seed), key)
    with progress(f"finetune, seed {seed}", total) as advance:
        _, log = finetune_model(
            model,
            tokenizer,
            encoded,
            settings,
            seed=seed,
            folder=target,
            save_at=keep,
            autocast=autocasts(study),
            callbacks=[callback] if freeze is None else [freeze, callback],
            advance=advance,
        )
    write_json(target / "training_log.json", json_safe(log))
    tokenizer.save_pretrained(str(target / "tokenizer"))
    shutil.rmtree(target / "trainer", ignore_errors=True)
    loss = f", loss {log[0]['loss']:.2f} → {log[-1]['loss']:.2f}" if log else ""
    frozen = "" if freeze is None else f"; {freeze.report}"
    return f"{total} steps, {len(callback.log.steps())} drift snapshots{loss}{frozen}"


def outputs(study: Study, folder: StudyFolder, seed: int) -> list[Path]:
    return [folder.adapters(seed), folder.drift(seed)]


def _start_over_if_changed(target: Path, drift: Path, key: str) -> None:
    """Keep what an interrupted run with the same inputs has left, so that it resumes; delete anything else."""
    marker = target / "in_progress.json"
    if (target / "trainer").is_dir() and marker.exists() and read_json(marker) == key:
        return
    for path in (target, drift):
        if path.is_dir():
            shutil.rmtree(path)
    write_json(marker, key)
