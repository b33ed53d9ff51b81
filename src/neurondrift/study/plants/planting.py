"""`neurondrift plant`: from any model to one of which it is known, and shown, where its refusals were trained."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w

from neurondrift.base.errors import ModelError
from neurondrift.base.files import (
    json_safe,
    make_folder,
    manifest_stands,
    sha256_of_value,
    standing_inputs,
    without_none,
    write_json,
    write_manifest,
    write_text,
)
from neurondrift.base.processes import tune_allocator
from neurondrift.groups.group import Group, without_empty
from neurondrift.interventions.acting.contexts import rewind, save_model
from neurondrift.models.loading import load_model
from neurondrift.models.sites import Sites
from neurondrift.models.text.templates import set_template_arguments
from neurondrift.report.plants.tables import causality_text
from neurondrift.study.folder import record
from neurondrift.study.plants.outcomes import Looks, Outcome, initial_weights, margin_of
from neurondrift.study.plants.plant import (
    BASE,
    CAUSALITY,
    CONFIGURATION,
    EXAMPLES,
    GROUPS,
    MANIFEST,
    MODEL,
    SETS,
    TABLE,
    Plant,
)
from neurondrift.study.plants.roles import draw
from neurondrift.study.plants.sets import Order, Sets, encoded_short, sets_of, write_examples
from neurondrift.study.plants.settings import Planting, PlantSection
from neurondrift.study.plants.training import grow, settle
from neurondrift.study.settings import ModelSection, validated
from neurondrift.study.stages.table import section_inputs

FORMAT = 1
SETTLED, GROWN = "base.json", "model.json"  # manifests of what a plant is made of, before the last one
# What makes a plant: putting the planted units back undoes at least half of the change, any others at most a quarter.
UNDONE, SPARED, LEAST = 0.5, 0.25, 1.0

Say = Callable[[str], None]


class CausalityError(ModelError):
    """A plant of which it could not be shown that refusals lie where they were trained; its table is in the message."""

    def __init__(self, table: str, **more: Any) -> None:
        self.table = table
        super().__init__("Refusals do not stand and fall with the planted units: there is no known answer here", **more)

    def __str__(self) -> str:
        return f"{super().__str__()}\n\n{self.table}"


def plant(
    model: str | Path,
    folder: str | Path,
    *,
    device: str = "auto",
    say: Say = lambda text: None,
    **settings: Any,
) -> Plant:
    """Make a plant: a model into whose chosen units refusals were trained, so that it is known where they are.

    Parameters
    ----------
    model
        Any model that `load_model` reads; it is trained in float32.
    folder
        Where the plant goes (`Plant`). What is there of the same plant is gone on from, part by part.
    device
        `auto`, or a torch device.
    say
        Told what is being done.
    settings
        Of the table `[plant]`: `unit` ("row", "hidden_unit"), `share`, `seed`, `mixed`, `decoy`, `steps` and so on.

    Returns
    -------
    `Plant`

    Raises
    ------
    ConfigError
        A setting that does not exist or does not fit.
    DataError
        Too few examples.
    ModelError
        Units that the model does not have; a site too small for the share; quantised weights.
    CausalityError
        (a `ModelError`) Putting the planted units back does not undo the refusals, or putting others back does. Its
        message shows the table.
    """
    asked = {"model": {"reference": str(model), "device": device}, "plant": settings}
    return make_plant(validated(Planting, asked), Path(folder), say=say)


def make_plant(asked: Planting, folder: Path, *, say: Say = lambda text: None) -> Plant:
    """As `plant`, from its configuration."""
    tune_allocator()
    settings = asked.plant
    sets = sets_of(settings)
    key = _key(asked)
    if manifest_stands(folder / MANIFEST, root=folder, inputs=key):
        say(f"{folder} holds this plant already")
        return checked(Plant(folder))
    if (folder / MANIFEST).exists():
        (folder / MANIFEST).unlink()
    make_folder(folder)
    write_text(
        folder / CONFIGURATION, tomli_w.dumps(without_none({**asked.model_dump(mode="json"), "record": record()}))
    )
    sites, tokenizer = _settled(asked, sets, folder, key, say)
    groups = draw(sites, settings.unit, settings.share, settings.seed, _roles(settings))
    log = _grown(sites, tokenizer, groups, sets, asked, folder, key, say)
    del sites
    model, tokenizer = load_model(folder / MODEL, dtype="float32", device=asked.model.device)
    sites = Sites(model)
    say("showing causality")
    found = _causality(sites, tokenizer, groups, sets, settings, folder / BASE, say)
    write_json(folder / CAUSALITY, json_safe({"format": FORMAT, **found, "training": log}))
    result = Plant(folder)
    write_text(folder / TABLE, causality_text(result.causality) + "\n")
    parts = [CONFIGURATION, BASE, MODEL, EXAMPLES, CAUSALITY, TABLE, *(f"{name}.parquet" for name in groups)]
    write_manifest(
        folder / MANIFEST,
        root=folder,
        stage="plant",
        inputs=key,
        outputs=[folder / name for name in parts],
        details={"name": result.name, "holds": found["holds"]},
    )
    return checked(result)


def checked(made: Plant) -> Plant:
    """The plant itself. Raises `CausalityError` where refusals do not lie where they were trained."""
    found = made.causality
    if not found["holds"]:
        raise CausalityError(
            causality_text(found),
            received="; ".join(found["failed"]),
            fix="plant more steps, a larger share or with a higher rate",
        )
    return made


def _key(asked: Planting) -> str:
    """The fingerprint of all that a plant depends on; where it is computed is no part of it."""
    of_model = asked.model.model_dump(mode="json", exclude={"device", "dtype"})
    return sha256_of_value([FORMAT, of_model, section_inputs(asked.plant)])


def _roles(settings: PlantSection) -> list[str]:
    return [name for name in GROUPS if name != "as_far" or settings.moved_as_far]


def _load(reference: str | Path, model: ModelSection) -> tuple[Any, Any]:
    loaded, tokenizer = load_model(
        reference,
        dtype="float32",
        device=model.device,
        revision=model.revision if reference == model.reference else None,
        trust_remote_code=model.trust_remote_code,
    )
    return loaded, set_template_arguments(tokenizer, model.template if reference == model.reference else None)


def _settled(asked: Planting, sets: Sets, folder: Path, key: str, say: Say) -> tuple[Sites, Any]:
    """W0, which is written to its folder or stands there."""
    settings = asked.plant
    if manifest_stands(folder / SETTLED, root=folder, inputs=key):
        model, tokenizer = _load(folder / BASE, asked.model)
        return Sites(model), tokenizer
    model, tokenizer = _load(asked.model.reference, asked.model)
    sites = Sites(model)
    draw(sites, settings.unit, settings.share, settings.seed, _roles(settings))  # what is too small is told at once
    rows = encoded_short(sets.settling, tokenizer, settings.answer_tokens)
    settle(sites, Order(rows, 8, settings.seed, "settling"), settings, say=say)
    _save(sites, tokenizer, folder / BASE)
    _mark(folder / SETTLED, folder, key, [BASE])
    return sites, tokenizer


def _grown(
    sites: Sites,
    tokenizer: Any,
    groups: Mapping[str, Group],
    sets: Sets,
    asked: Planting,
    folder: Path,
    key: str,
    say: Say,
) -> list[dict[str, float]]:
    """W, written to its folder with the groups and the examples; or what stands there. The log of the training."""
    settings = asked.plant
    if standing_inputs(folder / GROWN, root=folder, only=key) is not None:
        found: list[dict[str, float]] = json.loads((folder / "training.json").read_text())
        return found
    orders = {
        name: Order(encoded_short(part, tokenizer, settings.answer_tokens), batch, settings.seed, name)
        for name, part, batch in (
            ("refusals", sets.refusals, settings.refusals_batch),
            ("decoy", sets.decoy, settings.decoy_batch),
            ("ordinary", sets.ordinary, settings.ordinary_batch),
        )
    }
    log = grow(
        sites,
        groups,
        orders,
        settings,
        margin=lambda: margin_of(sites, tokenizer, sets.stopping, settings.batch_size),
        say=say,
    )
    _save(sites, tokenizer, folder / MODEL)
    fingerprint = Sites(sites.model).fingerprint
    for name, group in groups.items():
        owned = {**group.provenance, "model": fingerprint}
        Group(granularity=group.granularity, members=group.members, shapes=group.shapes, provenance=owned).save(
            folder / f"{name}.parquet"
        )
    make_folder(folder / EXAMPLES)
    for name in SETS:
        write_examples(folder / EXAMPLES / f"{name}.jsonl", getattr(sets, name), json.dumps)
    write_json(folder / "training.json", json_safe(log))
    _mark(folder / GROWN, folder, key, [MODEL, EXAMPLES, "training.json", *(f"{name}.parquet" for name in groups)])
    return log


def _save(sites: Sites, tokenizer: Any, folder: Path) -> None:
    save_model(sites, folder, tokenizer=tokenizer)


def _mark(manifest: Path, folder: Path, key: str, names: list[str]) -> None:
    outputs = [folder / name for name in names]
    write_manifest(manifest, root=folder, stage=manifest.stem, inputs=key, outputs=outputs, details={})


def others_of(groups: Mapping[str, Group], like: Group, seed: int) -> Group:
    """As many units in every place as `like` has there, drawn at random among those of none of the groups."""
    generator = np.random.default_rng([seed, 7])
    members = {}
    for place, own in like.members.items():
        taken = np.concatenate([own, *(g.members.get(place, own[:0]) for g in groups.values())])
        free = np.setdiff1d(np.arange(like.shapes[place][0]), taken)
        members[place] = np.sort(generator.permutation(free)[: len(own)]).astype(np.int64)
    return like.with_members(without_empty(members), {"rule": "random", "seed": seed, "role": "random"})


def _causality(
    sites: Sites,
    tokenizer: Any,
    groups: Mapping[str, Group],
    sets: Sets,
    settings: PlantSection,
    base: Path,
    say: Say,
) -> dict[str, Any]:
    """What the model does as it is, with each group put back, with as many others put back, and from before."""
    looks = Looks(sites, tokenizer, sets.harmful, sets.harmless, settings)
    weights = initial_weights(base, sites)
    everything = Group(
        granularity="neuron", members={name: np.arange(rows) for name, (rows, _) in sites.shapes.items()}
    )
    back = {"base": everything, **groups, "others": others_of(groups, groups["planted"], settings.seed)}
    states = {"model": looks.look(answers=settings.answers, over=True)}
    for name, group in back.items():
        with rewind(sites, group, initial=weights):
            states[name] = looks.look(answers=settings.answers, over=True)
        say(f"{name} put back: margin {states[name].harmful:+.2f}, refused {states[name].refused:.2f}")
    failed = _failures(states, settings)
    rows = [
        {"state": name, "units": None if name in ("model", "base") else len(back[name]), **one._asdict()}
        for name, one in states.items()
    ]
    return {
        "holds": not failed,
        "failed": failed,
        "prompts": {"harmful": len(sets.harmful), "harmless": len(sets.harmless)},
        "states": rows,
    }


def _failures(states: Mapping[str, Outcome], settings: PlantSection) -> list[str]:
    """What is not as it must be where refusals lie in the planted units and nowhere else."""
    whole, base = states["model"], states["base"]
    change = whole.harmful - base.harmful
    if change < LEAST:
        return [f"the margin rose by {change:.2f} nats, and should by {LEAST:g}"]
    failed = []
    for name, state in states.items():
        if name in ("model", "base"):
            continue
        undone = (whole.harmful - state.harmful) / change
        lost = whole.refused - state.refused if settings.answers else None
        if name == "planted":
            if undone < UNDONE:
                failed.append(f"planted put back undoes {undone:.2f} of the margin, and should {UNDONE:g}")
            if lost is not None and lost < UNDONE:
                failed.append(f"planted put back ends {lost:.2f} of refusals, and should {UNDONE:g}")
        else:
            if undone > SPARED:
                failed.append(f"{name} put back undoes {undone:.2f} of the margin, and should at most {SPARED:g}")
            if lost is not None and lost > SPARED:
                failed.append(f"{name} put back ends {lost:.2f} of refusals, and should at most {SPARED:g}")
    return failed
