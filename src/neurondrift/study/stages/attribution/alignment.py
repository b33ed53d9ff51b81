"""Groups of the alignment's own change: the rows that refusals were trained into, and those that pay for the margin.

Knows where the model from before comes from, on how much text its change is measured, and what the groups say of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch

from neurondrift.attribution.measures.material import Material
from neurondrift.attribution.measures.registry import measures
from neurondrift.base.roles import ALIGNMENT_GROUPS, GROUP_ROLES
from neurondrift.groups.group import Group
from neurondrift.groups.selection import Scores, select_top
from neurondrift.models.data import Example, data_fingerprint
from neurondrift.models.sites import Sites
from neurondrift.study.base_model import change_of_alignment
from neurondrift.study.folder import StudyFolder
from neurondrift.study.settings import Study

#: What each group is the top of, in the order of their names.
SCORES = dict(zip(ALIGNMENT_GROUPS, ("functional_drift_shrunk", "path_attribution"), strict=True))
LENGTH = "change_length"
T = TypeVar("T")


class OfAlignment(NamedTuple):
    """Groups by name, the scores that order each, ‖Δ‖ of every neuron (None where no base is known, or nothing moved),
    and a line that sums them up."""

    groups: dict[str, Group]
    scores: dict[str, Scores]
    lengths: Mapping[str, Any] | None
    said: str


def of_alignment(
    study: Study,
    folder: StudyFolder,
    sites: Sites,
    tokenizer: Any,
    safety: Sequence[Example],
    utility: Sequence[Example],
) -> OfAlignment:
    """The groups of the alignment's change, `ALIGNMENT_GROUPS`: none where the model from before it is not known.

    `safety` and `utility` are the study's; as many of them are taken as `[groups]` says, from all over the sets.
    Raises as `change_of_alignment`, and `DataError` for fewer than two ordinary examples.
    """
    settings = study.groups
    if study.base is None:
        return OfAlignment(
            {}, {}, None, "none of the alignment's change, as no model from before it is named (model.base)"
        )
    change = change_of_alignment(study, folder, sites, tokenizer)
    material = Material(
        model=sites,
        tokenizer=tokenizer,
        safety=spread(safety, settings.drift_examples),
        utility=spread(utility, settings.drift_examples),
        harmful=spread(safety, settings.margin_prompts),
        base=change,
        batch_size=study.score.batch_size,
        max_length=study.score.max_length,
        seed=study.seed,
    )
    lengths = dict(measures(material, [LENGTH]))[LENGTH]
    if not any(bool((own > 0).any()) for own in lengths.values()):
        return OfAlignment({}, {}, None, f"none of the alignment's change: the model is {study.base}, no weight moved")
    taken = dict(measures(material, SCORES.values()))
    scores: dict[str, Scores] = {name: _arrays(taken[score]) for name, score in SCORES.items()}
    path = material.path("safety")
    about: dict[str, dict[str, Any]] = {
        "safety_acquired": {"data": data_fingerprint(material.encoded("safety")), **_floor(material)},
        "safety_paying": {
            "prompts": len(material.prompts("safety")),
            "margin": [round(value, 4) for value in path.values],
            "attributed": round(path.attributed, 4),
            "points": sum(path.points),
        },
    }
    groups = {}
    for name, own in scores.items():
        noted = {"model": sites.fingerprint, "method": SCORES[name], "base": study.base, **about[name]}
        group = select_top(
            own,
            fraction=settings.top_fraction,
            granularity="neuron",
            undefined="leave out",
            provenance={**noted, "role": GROUP_ROLES[name]},
        )
        groups[name] = Group(
            granularity="neuron", members=group.members, shapes=sites.shapes, provenance=group.provenance
        )
    first, last = path.values[0], path.values[-1]
    counts = " and ".join(f"{len(group):,} {name}" for name, group in groups.items())
    said = f"{counts} (margin {first:+.2f} → {last:+.2f}, parts add up to {path.attributed:+.2f})"
    return OfAlignment(groups, scores, _arrays(lengths), said)


def spread(items: Sequence[T], count: int) -> list[T]:
    """As many items as asked for, evenly from all over a set; all where it has no more."""
    count = min(count, len(items))
    return [items[int(place)] for place in np.linspace(0, len(items) - 1, count).round()] if count else []


def _arrays(found: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    return {site: values.numpy() for site, values in found.items()}


def _floor(material: Material) -> dict[str, Any]:
    """How large log ratios of the two halves of the ordinary text are, and of safety to ordinary text beside them."""
    drifts = material.outputs.rows.values()
    floor, ratio = (
        torch.cat([getattr(own, name) for own in drifts]).double().numpy() for name in ("floor", "log_ratio")
    )
    within = np.nanquantile(np.abs(floor), 0.95) if np.isfinite(floor).any() else np.nan
    beyond = float((ratio > within).sum() / max(1, np.isfinite(ratio).sum()))
    return {"floor": round(float(within), 4) if np.isfinite(within) else None, "beyond_floor": round(beyond, 4)}
