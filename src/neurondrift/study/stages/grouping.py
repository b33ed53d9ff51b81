"""The stage groups: the recipe of a study's groups and of their matched controls, and how they are read again."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from neurondrift.groups.controls import matched
from neurondrift.groups.doses import importance_of, write_importance
from neurondrift.groups.group import Granularity, Group, load_group
from neurondrift.groups.selection import Scores, random_group, select_top, set_difference
from neurondrift.importance.scores import ScoreFile, check_compatible
from neurondrift.models.parts import unit_scores
from neurondrift.models.sites import Sites, magnitudes_of
from neurondrift.study.base_model import load_base
from neurondrift.study.folder import StudyFolder
from neurondrift.study.population import MATCHED
from neurondrift.study.settings import GroupsSection, Study

# The granularities that every study makes; hidden units are added where such are to be frozen.
GRANULARITIES: tuple[Granularity, ...] = ("neuron", "weight")
# What a group says of the scores that it was made from.
NOTED = ("model", "method", "data")


def scored_groups(
    scores: Mapping[str, Scores],
    settings: GroupsSection,
    granularity: Granularity,
    *,
    headers: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, Group]:
    """The three groups of a study that follow from its scores: safety by top share and by set difference, utility.

    Parameters
    ----------
    scores
        `safety` and `utility`: site name -> `[out, in]`; for hidden units MLP name -> `[units]` (`unit_scores`).
    settings
        The shares.
    granularity
        Of the groups.
    headers
        What the scores of each purpose say of themselves (`ScoreFile.header`): model, method and data are noted in the
        groups. Default: nothing.

    Raises
    ------
    GroupError
        Scores of different models or sites, or that are not finite; a set difference that is empty in every site.
    """
    about = {purpose: {key: own[key] for key in NOTED if key in own} for purpose, own in (headers or {}).items()}
    of_safety, of_utility = about.get("safety", {}), about.get("utility", {})
    return {
        "safety_top": select_top(
            scores["safety"],
            fraction=settings.top_fraction,
            granularity=granularity,
            provenance={**of_safety, "role": "safety"},
        ),
        "safety_set_difference": set_difference(
            scores["safety"],
            scores["utility"],
            p=settings.set_difference_p,
            q=settings.set_difference_q,
            granularity=granularity,
            provenance={**of_safety, "utility_data": of_utility.get("data"), "role": "safety"},
        ),
        "utility_top": select_top(
            scores["utility"],
            fraction=settings.top_fraction,
            granularity=granularity,
            provenance={**of_utility, "role": "utility"},
        ),
    }


def study_groups(
    scores: Mapping[str, Scores],
    settings: GroupsSection,
    granularity: Granularity,
    *,
    seed: int,
    headers: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, Group]:
    """The four groups of a study, by name: those of `scored_groups`, whose parameters and errors these are, and as many
    members at random, drawn with `seed`."""
    made = scored_groups(scores, settings, granularity, headers=headers)
    top = made["safety_top"]
    made["random"] = random_group(
        top.shapes,
        fraction=settings.top_fraction,
        seed=seed,
        granularity=granularity,
        provenance={key: value for key, value in top.provenance.items() if key == "model"},
    )
    assert tuple(made) == GROUP_NAMES
    return made


def control_of(group: Group, magnitudes: Mapping[str, Any], settings: GroupsSection, *, seed: int) -> Group:
    """The matched control of a study's group. `magnitudes` and errors are those of `groups.matched`."""
    (control,) = matched(group, magnitudes, seed=seed, bins=bins_of(settings, group.granularity))
    return control


def bins_of(settings: GroupsSection, granularity: Granularity) -> int:
    """Quantile bins of |w| per site that controls of a granularity are matched on."""
    return settings.weight_bins if granularity == "weight" else settings.bins


def groups(study: Study, folder: StudyFolder) -> str:
    """The four groups, each with its matched control: of neurons, of weights, and of hidden units where such are to be
    frozen."""
    files = {purpose: ScoreFile(folder.score_file(purpose)) for purpose in ("safety", "utility")}
    check_compatible(files["safety"], files["utility"])
    headers = {purpose: file.header for purpose, file in files.items()}
    # Loading maps the weight files: reading |w| from them without a model is no faster and takes no less memory.
    sites = Sites(load_base(study, folder)[0])
    folder.groups.mkdir(parents=True, exist_ok=True)
    counts = []
    for granularity in _granularities(study):
        scores = _scores_of_units(files, sites) if granularity == "unit" else files
        made = study_groups(scores, study.groups, granularity, seed=study.seed, headers=headers)
        magnitudes = magnitudes_of(sites, granularity)
        save = partial(_save, study, folder, scores=scores, magnitudes=magnitudes)
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(save, made, made.values()))
        counts.append(f"{len(made['safety_set_difference']):,} {granularity}s by set difference")
    return "; ".join(counts)


def _granularities(study: Study) -> tuple[Granularity, ...]:
    return (*GRANULARITIES, "unit") if study.finetune.freeze_granularity == "unit" else GRANULARITIES


def _scores_of_units(files: Mapping[str, ScoreFile], sites: Sites) -> dict[str, Scores]:
    return {purpose: unit_scores(file, sites.units) for purpose, file in files.items()}


def _save(
    study: Study,
    folder: StudyFolder,
    name: str,
    group: Group,
    *,
    scores: Mapping[str, Scores],
    magnitudes: Mapping[str, Any],
) -> None:
    """Write a group and its control; of neurons also plain JSON and the importance of each member."""
    control = control_of(group, magnitudes, study.groups, seed=study.seed)
    group.save(folder.group_file(name, group.granularity))
    control.save(folder.group_file(name, group.granularity, matched=True))
    if group.granularity == "neuron":
        group.save(folder.group_file(name, group.granularity, suffix="json"))
        importance = importance_of(group, scores["utility" if name == "utility_top" else "safety"])
        write_importance(folder.importance_file(name, group.granularity), group, importance)


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
