"""The stage groups: the recipe of a study's groups and of their matched controls, and how they are read again."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import rankdata

from neurondrift.base.roles import GROUP_NAMES, GROUP_ROLES, PUBLISHED_GROUPS
from neurondrift.groups.controls import matched, unlike
from neurondrift.groups.covariates import write_covariates
from neurondrift.groups.doses import importance_of, write_importance
from neurondrift.groups.group import Granularity, Group, load_group
from neurondrift.groups.selection import (
    Scores,
    random_group,
    row_sums,
    select_residual,
    select_top,
    set_difference,
    set_difference_like,
    shape_of,
)
from neurondrift.importance.scores import ScoreFile, check_compatible
from neurondrift.models.parts import unit_scores
from neurondrift.models.sites import Sites, magnitudes_of
from neurondrift.study.base_model import load_base
from neurondrift.study.folder import StudyFolder
from neurondrift.study.population import MATCHED
from neurondrift.study.settings import GroupsSection, Study
from neurondrift.study.stages.attribution.alignment import OfAlignment, of_alignment
from neurondrift.study.stages.scoring import purpose_names, purposes

# The granularities that every study makes; hidden units are added where such are to be frozen.
GRANULARITIES: tuple[Granularity, ...] = ("neuron", "weight")
# What a group says of the scores that it was made from.
NOTED = ("model", "method", "data")
# The scores that order a group's members, by which doses of it are taken; of all others, those of safety.
ORDERED_BY = {
    "utility_top": "utility",
    "utility_set_difference": "utility",
    "style_set_difference": "style",
    "gradient_top": "gradient",
}
PURPOSES = ("safety", "utility", "style", "gradient")


def scored_groups(
    scores: Mapping[str, Scores],
    settings: GroupsSection,
    granularity: Granularity,
    *,
    headers: Mapping[str, Mapping[str, Any]] | None = None,
    norms: Mapping[str, Any] | None = None,
    shapes: Mapping[str, tuple[int, int]] | None = None,
) -> dict[str, Group]:
    """The groups of a study that follow from its scores.

    Of every granularity the published three: safety by top share and by set difference, utility by top share. Of
    neurons also the controls' and the residual, as far as what they are made from is given (see `docs/methods.md`).

    Parameters
    ----------
    scores
        `safety` and `utility`: site name -> `[out, in]`; for hidden units MLP name -> `[units]` (`unit_scores`). Of
        neurons also `style` and `gradient`, `[out]`.
    settings
        The shares.
    granularity
        Of the groups.
    headers
        What the scores of each purpose say of themselves (`ScoreFile.header`): model, method and data are noted in the
        groups. Default: nothing.
    norms
        Site name -> ‖w‖ of each neuron, `[out]`, for the residual.
    shapes
        Site name -> `(out, in)`, where the scores of neurons are given as `[out]`. Default: those of the scores.

    Raises
    ------
    GroupError
        Scores of different models or sites, or that are not finite; a set difference that is empty in every site.
    """
    about = {purpose: {key: own[key] for key in NOTED if key in own} for purpose, own in (headers or {}).items()}
    of_safety, of_utility = about.get("safety", {}), about.get("utility", {})
    if granularity == "neuron":
        shapes = shapes or {site: shape_of(scores["safety"][site]) for site in scores["safety"]}
        scores = {purpose: row_sums(own) for purpose, own in scores.items()}
    made = {
        "safety_top": select_top(
            scores["safety"],
            fraction=settings.top_fraction,
            granularity=granularity,
            provenance={**of_safety, "role": GROUP_ROLES["safety_top"]},
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
            provenance={**of_utility, "role": GROUP_ROLES["utility_top"]},
        ),
    }
    if granularity != "neuron" or shapes is None:
        return made
    made |= _of_neurons(scores, made, settings, about, norms)
    return {name: replace(group, shapes=shapes) for name, group in made.items()}


def _of_neurons(
    scores: Mapping[str, Scores],
    made: Mapping[str, Group],
    settings: GroupsSection,
    about: Mapping[str, Mapping[str, Any]],
    norms: Mapping[str, Any] | None,
) -> dict[str, Group]:
    """The residual, and the negative and positive controls."""
    like = made["safety_set_difference"]
    notes = {purpose: dict(about.get(purpose, {})) for purpose in PURPOSES}
    data = {purpose: note.get("data") for purpose, note in notes.items()}
    found: dict[str, Group] = {}
    if "gradient" in scores and norms is not None:
        covariates = {"utility_score": scores["utility"], "gradient_scale": scores["gradient"], "norm": norms}
        found["safety_residual"] = select_residual(
            scores["safety"],
            covariates,
            fraction=settings.top_fraction,
            provenance={**notes["safety"], "utility_data": data["utility"], "gradient_data": data["gradient"]},
        )
    found["utility_set_difference"] = set_difference(
        scores["utility"],
        scores["safety"],
        p=settings.set_difference_p,
        q=settings.set_difference_q,
        granularity="neuron",
        provenance={**notes["utility"], "utility_data": data["safety"]},  # the data of what is taken out
    )
    if "style" in scores:
        found["style_set_difference"] = set_difference_like(
            scores["style"],
            scores["utility"],
            p=settings.set_difference_p,
            like=like,
            provenance={**notes["style"], "utility_data": data["utility"]},
        )
    if "gradient" in scores:
        found["gradient_top"] = select_top(
            scores["gradient"], fraction=settings.top_fraction, granularity="neuron", provenance=notes["gradient"]
        )
    return {
        name: replace(group, provenance={**group.provenance, "role": GROUP_ROLES[name]})
        for name, group in found.items()
    }


def study_groups(
    scores: Mapping[str, Scores],
    settings: GroupsSection,
    granularity: Granularity,
    *,
    seed: int,
    headers: Mapping[str, Mapping[str, Any]] | None = None,
    norms: Mapping[str, Any] | None = None,
    shapes: Mapping[str, tuple[int, int]] | None = None,
) -> dict[str, Group]:
    """The groups of a study, by name in the order of `GROUP_NAMES`: those of `scored_groups`, whose parameters and
    errors these are, and as many members as its top share at random, drawn with `seed`."""
    made = scored_groups(scores, settings, granularity, headers=headers, norms=norms, shapes=shapes)
    top = made["safety_top"]
    made["random"] = random_group(
        top.shapes,
        fraction=settings.top_fraction,
        seed=seed,
        granularity=granularity,
        provenance={key: value for key, value in top.provenance.items() if key == "model"},
    )
    return {name: made[name] for name in GROUP_NAMES if name in made}


def control_of(
    group: Group,
    magnitudes: Mapping[str, Any],
    settings: GroupsSection,
    *,
    seed: int,
    changes: Mapping[str, Any] | None = None,
) -> Group:
    """The matched control of a study's group. `magnitudes` and errors are those of `groups.matched`; with `changes`
    (site -> ‖Δ‖ of the alignment) it is drawn among those that the alignment moved about as far as the members."""
    apart = () if changes is None else (unlike(group, changes),)
    (control,) = matched(group, magnitudes, seed=seed, bins=bins_of(settings, group.granularity), exclude=apart)
    return control


def bins_of(settings: GroupsSection, granularity: Granularity) -> int:
    """Quantile bins of |w| per site that controls of a granularity are matched on."""
    return settings.weight_bins if granularity == "weight" else settings.bins


def groups(study: Study, folder: StudyFolder) -> str:
    """The groups, each with its matched control: of neurons, of weights, and of hidden units where such are to be
    frozen; and what is known of every neuron beside them."""
    files = {purpose: ScoreFile(folder.score_file(purpose)) for purpose in purpose_names(study)}
    for file in files.values():
        check_compatible(files["safety"], file)
    headers = {purpose: file.header for purpose, file in files.items()}
    # Loading maps the weight files: reading |w| from them without a model is no faster and takes no less memory.
    model, tokenizer = load_base(study, folder)
    sites = Sites(model)
    texts = purposes(study) if study.base is not None else {}
    aligned = of_alignment(
        study, folder, sites, tokenizer, *(texts[name].examples if texts else [] for name in ("safety", "utility"))
    )
    folder.groups.mkdir(parents=True, exist_ok=True)
    for old in (path for name in GROUP_NAMES for path in folder.groups.glob(f"{name}.*")):
        old.unlink()  # also of groups that are not made any more
    counts = []
    for granularity in _made(study):
        scores, magnitudes = _scores_of(files, granularity, sites), magnitudes_of(sites, granularity)
        chosen, of_neurons = scores_to_cut(study, scores, granularity, magnitudes)
        if granularity == "neuron":
            of_neurons["shapes"] = sites.shapes
        made = study_groups(chosen, study.groups, granularity, seed=study.seed, headers=headers, **of_neurons)
        if granularity == "neuron":
            made = {name: both[name] for both in [aligned.groups | made] for name in GROUP_NAMES if name in both}
        save = partial(_save, study, folder, scores=scores, magnitudes=magnitudes, aligned=aligned)
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(save, made, made.values()))
        counts.append(f"{len(made['safety_set_difference']):,} {granularity}s by set difference")
        if granularity == "neuron":
            write_covariates(
                folder.covariates, _covariates(_ranked(study, scores), magnitudes, aligned), _about(headers)
            )
            counts.append(f"{len(made['safety_residual']):,} by residual")
    return "; ".join([*counts, aligned.said])


def granularities(study: Study) -> tuple[Granularity, ...]:
    """What groups are made of: of neurons, and of weights where the score has those."""
    if not study.score.of_weights:
        return ("neuron",)
    return GRANULARITIES


def _made(study: Study) -> tuple[Granularity, ...]:
    """The same, and hidden units where such are to be frozen."""
    units: tuple[Granularity, ...] = ("unit",) if study.finetune.freeze_granularity == "unit" else ()
    return (*granularities(study), *(units if study.score.of_weights else ()))


def scores_to_cut(
    study: Study, scores: Mapping[str, Scores], granularity: Granularity, norms: Mapping[str, Any]
) -> tuple[Mapping[str, Scores], dict[str, Any]]:
    """What groups of a granularity are cut from, and what `scored_groups` is told besides."""
    if granularity != "neuron":
        return scores, {}
    chosen, kept = _in_scored_sites(_ranked(study, scores), norms)
    return chosen, {"norms": kept}


def _ranked(study: Study, scores: Mapping[str, Scores]) -> Mapping[str, Scores]:
    """Scores of neurons that may have a sign or be undefined as ranks within their site, (k + 1) / n; the least where
    there is no score, NaN where a site has none. Ranks are enough to cut groups by; the residual and what is matched on
    take logarithms."""
    if study.score.of_weights:
        return scores
    return {
        purpose: own if purpose == "gradient" else {site: _ranks(values) for site, values in own.items()}
        for purpose, own in scores.items()
    }


def _ranks(values: Any) -> npt.NDArray[np.float32]:
    """Ranks within a site, above 0 and up to 1; of equal values the lower place comes first."""
    values_N = np.asarray(values)
    if np.isnan(values_N).all():
        return np.full(len(values_N), np.nan, dtype=np.float32)
    known_N = np.where(np.isnan(values_N), -np.inf, values_N)
    return (rankdata(known_N[::-1], method="ordinal")[::-1] / len(known_N)).astype(np.float32)


def _in_scored_sites(scores: Mapping[str, Scores], norms: Mapping[str, Any]) -> tuple[Mapping[str, Scores], Any]:
    """Scores and norms without the sites in which nothing has a score."""
    kept = [site for site in norms if not any(np.isnan(np.asarray(own[site])).all() for own in scores.values())]
    if len(kept) == len(norms):
        return scores, norms
    return {purpose: {site: own[site] for site in kept} for purpose, own in scores.items()}, {s: norms[s] for s in kept}


def _scores_of(files: Mapping[str, ScoreFile], granularity: Granularity, sites: Sites) -> Mapping[str, Scores]:
    """The scores that groups of a granularity are made from; of neurons their sums over each row, formed once."""
    if granularity == "unit":
        return {purpose: unit_scores(files[purpose], sites.units) for purpose in ("safety", "utility")}
    return {purpose: row_sums(file) for purpose, file in files.items()} if granularity == "neuron" else files


def _about(headers: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What the file of covariates says of itself."""
    of_purposes = {purpose: {key: own[key] for key in (*NOTED, "examples")} for purpose, own in headers.items()}
    return {"model": headers["safety"]["model"], "scores": of_purposes}


def _covariates(
    scores: Mapping[str, Scores], norms: Mapping[str, Any], aligned: OfAlignment
) -> dict[str, Mapping[str, Any]]:
    """The columns of the file of covariates."""
    named = {"safety_score": "safety", "utility_score": "utility", "gradient_scale": "gradient"}
    change = {} if aligned.lengths is None else {"alignment_change": aligned.lengths}
    return {"norm": norms, **{column: scores[purpose] for column, purpose in named.items()}, **change}


def _save(
    study: Study,
    folder: StudyFolder,
    name: str,
    group: Group,
    *,
    scores: Mapping[str, Scores],
    magnitudes: Mapping[str, Any],
    aligned: OfAlignment,
) -> None:
    """Write a group and its control; of neurons also plain JSON and the importance of each member."""
    changes = aligned.lengths if name in aligned.groups else None
    control = control_of(group, magnitudes, study.groups, seed=study.seed, changes=changes)
    group.save(folder.group_file(name, group.granularity))
    control.save(folder.group_file(name, group.granularity, matched=True))
    if group.granularity == "neuron":
        group.save(folder.group_file(name, group.granularity, suffix="json"))
        importance = importance_of(group, aligned.scores.get(name) or scores[ORDERED_BY.get(name, "safety")])
        write_importance(folder.importance_file(name, group.granularity), group, importance)


def outputs(study: Study, folder: StudyFolder) -> list[Path]:
    return [folder.groups]


def neuron_groups(folder: StudyFolder) -> dict[str, Group]:
    """The groups of neurons that a study made, by name: the published ones, and of the others those that are there
    (older studies have none, and no placebo is made without a style)."""
    files = {name: folder.group_file(name, "neuron") for name in GROUP_NAMES}
    return {name: load_group(file) for name, file in files.items() if name in PUBLISHED_GROUPS or file.exists()}


def weight_groups(folder: StudyFolder) -> dict[str, Group]:
    """The groups of weights that a study made, each followed by its matched control, `NAME.matched`; none where it is
    scored by a method of neurons only."""
    published = PUBLISHED_GROUPS if folder.study.score.of_weights else ()
    files = {f"{name}{mark}": (name, bool(mark)) for name in published for mark in ("", MATCHED)}
    return {
        label: load_group(folder.group_file(name, "weight", matched=matched))
        for label, (name, matched) in files.items()
    }
