"""The stage align: teach the model to refuse before the study proper."""

from __future__ import annotations

import tempfile
from pathlib import Path

from neurondrift.base.files import atomic_path, json_safe, write_json
from neurondrift.base.processes import from_first
from neurondrift.base.progress import progress
from neurondrift.models.data import DataReference, Example, PromptKind, encode, load_examples
from neurondrift.models.loading import quiet_transformers
from neurondrift.study.base_model import autocasts, load_named
from neurondrift.study.folder import StudyFolder
from neurondrift.study.parallel.checks import check_strategy, cut_on, enough_for_each
from neurondrift.study.parallel.sharding import is_cut, whole_state
from neurondrift.study.settings import Study
from neurondrift.study.training import align as align_model


def alignment_examples(study: Study) -> list[Example]:
    """Refusals, ordinary and borderline answers, all that alignment trains on."""
    settings = study.align
    sets: dict[PromptKind, DataReference | None] = {
        "harmful": settings.refusals,
        "ordinary": settings.ordinary,
        "borderline": settings.borderline,
    }
    return [example for kind, source in sets.items() if source for example in load_examples(source, kind=kind)]


def align(study: Study, folder: StudyFolder) -> str:
    """Teach the model to refuse: supervised fine-tuning on refusals and ordinary answers in turn."""
    settings = study.align
    shard_on = cut_on(study, study.model.reference, of_training=settings.method == "full")
    model, tokenizer = load_named(study, dtype="float32", device=None if shard_on is None else "cpu")
    examples = alignment_examples(study)
    encoded = encode(examples, tokenizer, max_length=settings.max_length)
    with progress("align", settings.max_steps) as advance, tempfile.TemporaryDirectory() as scratch:
        log = align_model(
            model,
            encoded,
            settings,
            seed=study.seed,
            autocast=autocasts(study),
            scratch=Path(scratch),
            advance=advance,
            shard_on=shard_on,
        )
    whole = {"state_dict": whole_state(model)} if is_cut(model) else {}  # all processes help

    def save() -> None:
        with atomic_path(folder.aligned) as partial, quiet_transformers():
            model.save_pretrained(str(partial), **whole)
            tokenizer.save_pretrained(str(partial))
            write_json(partial / "training_log.json", json_safe(log))

    from_first(save)
    loss = f", loss {log[0]['loss']:.2f} → {log[-1]['loss']:.2f}" if log else ""
    how = f" of LoRA, r = {settings.lora_r}, merged," if settings.method == "lora" else ""
    return f"{settings.max_steps} steps{how} on {len(examples)} examples{loss}"


def outputs(study: Study, folder: StudyFolder) -> list[Path]:
    return [folder.aligned]


def check(study: Study) -> None:
    """Raise `ConfigError` where there are more processes than rows in a batch, or FSDP2 cannot do it."""
    if study.align.enabled:
        check_strategy(study)
        enough_for_each(study.align.batch_size, "rows in a batch", "align.batch_size")
