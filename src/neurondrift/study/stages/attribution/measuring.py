"""The stage attribute: what the fine-tuning change does to the refusal margin, to outputs, and whose update it is."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from neurondrift.attribution.changes import change_along
from neurondrift.attribution.openings import Openings
from neurondrift.attribution.tables import Asked, measure
from neurondrift.base.processes import from_first, sharing_work
from neurondrift.behaviour.requests import system_prompt
from neurondrift.models.data import DataReference, Example, load_examples
from neurondrift.study.base_model import load_base
from neurondrift.study.folder import StudyFolder, saved_step, saved_steps
from neurondrift.study.population import read_table
from neurondrift.study.sections.attribute import OWN
from neurondrift.study.settings import Study
from neurondrift.study.stages.attribution.openings import openings_of

#: What the parts of a margin may miss of its change; where more points do not help, that is written down.
TOLERANCE = 0.02


def attribute(study: Study, folder: StudyFolder, seed: int, say: Callable[[str], None]) -> str:
    """All measures of the change from the model that is fine-tuned to the fine-tuned one, LoRA or all weights.

    One `Change` is given to all of them: LoRA in its factors, full models read from their files site by site.
    """
    settings, evaluated = study.attribute, study.evaluate
    target, adapters = folder.attribution(seed), folder.adapters(seed)
    from_first(lambda: shutil.rmtree(target) if target.is_dir() else None)
    steps = saved_steps(adapters)
    asked = Asked(
        safety=load_examples(study.score.safety)[: settings.examples],
        utility=load_examples(study.score.utility)[: settings.examples],
        harmful=_prompts(evaluated.harmful, settings.prompts, kind="harmful"),
        harmless=_prompts(evaluated.ordinary, settings.prompts, kind="ordinary"),
        openings=openings_of_seed(study, folder, seed),
        points=settings.points,
        tolerance=TOLERANCE,
        batch_size=settings.batch_size,
        max_length=study.score.max_length,
        system=system_prompt(evaluated.system_prompt),
        chat_template=evaluated.attack.chat_template,
        most_points=settings.most_points,
        incomplete="keep",
    )
    # Weights that are moved whole must not be rounded to 16 bits on their way.
    model, tokenizer = load_base(study, folder, dtype="float32" if study.finetune.method == "full" else None)
    along = steps if settings.along_steps else steps[-1:]
    change = change_along(model, [saved_step(adapters, step) for step in along])
    root = folder.root.resolve()
    base = _within(root, folder.aligned) if study.align.enabled else folder.base_model
    change.references = [base, *(_within(root, saved_step(adapters, step)) for step in along)]
    with sharing_work():
        found = measure(change, tokenizer, asked, target).summary["margin"]
    for name, margin in found.items():
        if margin["adds_up"] is False:
            say(f"the parts of margin_{name} miss {margin['missed']:.1%} of its change: that is written beside them")
    both = [found[name] for name in ("harmful", "harmless")]
    moved = ", of ordinary ones ".join(f"{one['values'][0]:+.2f} → {one['values'][-1]:+.2f}" for one in both)
    worst = max((one["missed"] for one in found.values()), default=float("nan"))
    return f"margin of harmful requests {moved} nats; parts add up to {worst:.1%}"


def _prompts(reference: DataReference, count: int, **how: Any) -> list[Example]:
    return load_examples(reference, require_response=False, **how)[:count]


def _within(root: Path, path: Path) -> str:
    """A path of the study's folder as it is called in it."""
    resolved = path.resolve()
    return resolved.relative_to(root).as_posix() if resolved.is_relative_to(root) else str(path)


def openings_of_seed(study: Study, folder: StudyFolder, seed: int) -> Openings | None:
    """The openings that a study names; the model's own are those of what it answered before fine-tuning."""
    return openings_of(study, _first_answers(folder, seed) if study.attribute.openings == OWN else [])


def _first_answers(folder: StudyFolder, seed: int) -> list[dict[str, Any]]:
    """What the model answered before fine-tuning."""
    return read_table(saved_step(folder.behaviour(seed), 0, ".parquet"))


def outputs(study: Study, folder: StudyFolder, seed: int) -> list[Path]:
    return [folder.attribution(seed)]
