"""The stage groups: the groups of a study, their matched controls, and how they are read again."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from neurondrift.groups.controls import matched
from neurondrift.groups.doses import importance_of, write_importance
from neurondrift.groups.group import Granularity, Group, load_group
from neurondrift.groups.selection import random_group, select_top, set_difference
from neurondrift.importance.scores import ScoreFile, check_compatible
from neurondrift.models.parts import unit_scores
from neurondrift.models.sites import Sites, magnitudes_of
from neurondrift.study.base_model import load_base
from neurondrift.study.folder import StudyFolder
from neurondrift.study.population import MATCHED
from neurondrift.study.settings import GROUP_NAMES, Study

GRANULARITIES: tuple[Granularity, ...] = ("neuron", "weight")


def groups(study: Study, folder: StudyFolder) -> str:
    """Safety by top share and by set difference, utility, random; each with a matched control; neurons and weights."""
    settings = study.groups
    safety, utility = (ScoreFile(folder.score_file(purpose)) for purpose in ("safety", "utility"))
    check_compatible(safety, utility)
    model, _ = load_base(study, folder)
    sites = Sites(model)
    folder.groups.mkdir(parents=True, exist_ok=True)
    counts = []
    for granularity in GRANULARITIES:
        made: dict[str, Group] = {
            "safety_top": select_top(
                safety, fraction=settings.top_fraction, granularity=granularity, provenance={"role": "safety"}
            ),
            "safety_set_difference": set_difference(
                safety,
                utility,
                p=settings.set_difference_p,
                q=settings.set_difference_q,
                granularity=granularity,
                provenance={"role": "safety"},
            ),
            "utility_top": select_top(
                utility, fraction=settings.top_fraction, granularity=granularity, provenance={"role": "utility"}
            ),
            "random": random_group(
                sites.shapes,
                fraction=settings.top_fraction,
                seed=study.seed,
                granularity=granularity,
                provenance={"model": safety.header["model"]},
            ),
        }
        assert tuple(made) == GROUP_NAMES
        magnitudes = magnitudes_of(sites, granularity)
        bins = settings.bins if granularity == "neuron" else settings.weight_bins

        def save(
            name: str,
            granularity: Granularity = granularity,
            made: Mapping[str, Group] = made,
            magnitudes: Mapping[str, Any] = magnitudes,
            bins: int = bins,
        ) -> None:
            (control,) = matched(made[name], magnitudes, seed=study.seed, bins=bins)
            made[name].save(folder.group_file(name, granularity))
            control.save(folder.group_file(name, granularity, matched=True))
            if granularity == "neuron":
                made[name].save(folder.group_file(name, granularity, suffix="json"))
                order = importance_of(made[name], utility if name == "utility_top" else safety)
                write_importance(folder.importance_file(name, granularity), made[name], order)

        with ThreadPoolExecutor(2) as pool:
            list(pool.map(save, made))
        counts.append(f"{len(made['safety_set_difference']):,} {granularity}s by set difference")
    if study.finetune.freeze_granularity == "unit":
        chosen = _unit_groups(study, folder, safety, utility, sites)
        counts.append(f"{len(chosen['safety_set_difference']):,} units by set difference")
    return "; ".join(counts)


def _unit_groups(
    study: Study, folder: StudyFolder, safety: ScoreFile, utility: ScoreFile, sites: Sites
) -> dict[str, Group]:
    """The same groups of MLP hidden units, matched on the norm of all weights of a unit: made where they are to be
    frozen."""
    settings, units = study.groups, sites.units
    about: dict[str, Any] = {name: safety.header[name] for name in ("model", "method", "data") if name in safety.header}
    about["role"] = "safety"
    of_safety, of_utility = unit_scores(safety, units), unit_scores(utility, units)
    magnitudes = magnitudes_of(sites, "unit")
    made = {
        "safety_top": select_top(of_safety, fraction=settings.top_fraction, granularity="unit", provenance=about),
        "safety_set_difference": set_difference(
            of_safety,
            of_utility,
            p=settings.set_difference_p,
            q=settings.set_difference_q,
            granularity="unit",
            provenance={**about, "utility_data": utility.header.get("data")},
        ),
        "utility_top": select_top(
            of_utility,
            fraction=settings.top_fraction,
            granularity="unit",
            provenance={**about, "data": utility.header.get("data"), "role": "utility"},
        ),
        "random": random_group(
            {name: (unit.count, 1) for name, unit in units.items()},
            fraction=settings.top_fraction,
            seed=study.seed,
            granularity="unit",
            provenance={"model": safety.header["model"]},
        ),
    }
    for name, group in made.items():
        (control,) = matched(group, magnitudes, seed=study.seed, bins=settings.bins)
        group.save(folder.group_file(name, "unit"))
        control.save(folder.group_file(name, "unit", matched=True))
    return made


def outputs(study: Study, folder: StudyFolder) -> list[Path]:
    return [folder.groups]


def neuron_groups(folder: StudyFolder) -> dict[str, Group]:
    """The groups of neurons that a study made, by name."""
    return {name: load_group(folder.group_file(name, "neuron")) for name in GROUP_NAMES}


def weight_groups(folder: StudyFolder) -> dict[str, Group]:
    """The groups of weights that a study made, each followed by its matched control, `NAME.matched`."""
    files = {f"{name}{mark}": (name, bool(mark)) for name in GROUP_NAMES for mark in ("", MATCHED)}
    return {
        label: load_group(folder.group_file(name, "weight", matched=matched))
        for label, (name, matched) in files.items()
    }
