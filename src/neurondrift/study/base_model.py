"""What several stages need: the model that a study scores and fine-tunes."""

from __future__ import annotations

from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from neurondrift.attribution.changes import Change, change_along, change_from
from neurondrift.attribution.measures.material import base_of
from neurondrift.models.disk.checkpoints import Checkpoint
from neurondrift.models.disk.initial import CheckpointWeights, Weights
from neurondrift.models.loading import folder_of, load_model, resolve_device, resolve_dtype
from neurondrift.models.sites import Sites
from neurondrift.models.text.templates import set_template_arguments
from neurondrift.study.folder import StudyFolder
from neurondrift.study.settings import Study


def load_named(
    study: Study, *, dtype: str | None = None, device: str | None = None, adapter: Path | None = None
) -> tuple[Any, Any]:
    """The model that the study's section `model` names, as it is before any alignment, and its tokenizer."""
    return _load(study, study.model.reference, dtype, device, revision=study.model.revision, adapter=adapter)


def load_base(
    study: Study, folder: StudyFolder, *, dtype: str | None = None, device: str | None = None
) -> tuple[Any, Any]:
    """The model that is scored and fine-tuned (aligned, where the study aligns), and its tokenizer."""
    if not study.align.enabled:
        return load_named(study, dtype=dtype, device=device)
    return _load(study, folder.base_model, dtype, device)


def change_of_alignment(study: Study, folder: StudyFolder, sites: Sites, tokenizer: Any) -> Change:
    """The change from the model before the alignment to the one that is scored, which is loaded; its weights are read
    from their files site by site. Not to be asked for where no base is known.

    Raises `ModelError` for a base with another tokenizer, `ArtifactError` for one of another shape.
    """
    assert study.base is not None
    base = base_of(study.base, tokenizer)
    narrow = next(iter(sites.values())).tensor.dtype.itemsize < 4
    reference = folder.base_model
    if not narrow or reference.startswith("tiny:"):
        return change_from(sites, base)
    # Rounded to 16 bits the loaded weights would hide the change: both ends are read as they are stored.
    if study.model.revision and not study.align.enabled:
        reference = f"{reference}@{study.model.revision}"
    both = change_along(sites, [base, reference])
    first, last = both.states[-2:]
    return Change(both.vessel, (first, last), unknown=both.unknown, kept=both.kept)


def weights_before_alignment(base: str, model: nn.Module, tokenizer: Any) -> Weights:
    """The weights of a loaded model's sites from before the alignment, `[out, in]` in the dtype on disk.

    The base is looked for when the first is asked for, with the errors of `change_of_alignment`.
    """

    @cache
    def stored() -> tuple[ExitStack, CheckpointWeights]:
        reference = base_of(base, tokenizer)
        with ExitStack() as stack:
            folder = stack.enter_context(folder_of(reference))
            weights = CheckpointWeights(folder, Sites(model), checkpoint=Checkpoint(folder, reference))
            return stack.pop_all(), weights  # a temporary folder is there as long as they are

    return lambda site: stored()[1](site)


def _load(
    study: Study, reference: str | Path, dtype: str | None, device: str | None = None, **more: Any
) -> tuple[Any, Any]:
    settings = study.model
    if device is not None and dtype is None:  # the dtype is that of the device where the model is used
        dtype = _dtype_name(study)
    model, tokenizer = load_model(
        reference,
        dtype=dtype or settings.dtype,
        device=device or settings.device,
        trust_remote_code=settings.trust_remote_code,
        **more,
    )
    return model, set_template_arguments(tokenizer, settings.template)


def dtype_of(study: Study) -> torch.dtype:
    """The dtype that the study's models are loaded in where nothing else is asked for."""
    return resolve_dtype(study.model.dtype, resolve_device(study.model.device))


def arithmetic(study: Study) -> str:
    """What a stage computes in on this machine: `bfloat16 on cpu`. Training keeps its weights in float32."""
    return f"{_dtype_name(study)} on {resolve_device(study.model.device).type}"


def _dtype_name(study: Study) -> str:
    return str(dtype_of(study)).removeprefix("torch.")


def autocasts(study: Study) -> bool:
    """Whether training computes in bfloat16 over float32 weights."""
    return dtype_of(study) == torch.bfloat16
