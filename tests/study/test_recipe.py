"""The recipe of a study's groups: one rule for neurons, weights and hidden units."""

import numpy as np
import pytest

import neurondrift as nd
from helpers.families import build
from neurondrift.base.errors import GroupError
from neurondrift.base.roles import ALIGNMENT_GROUPS, GROUP_ROLES, PUBLISHED_GROUPS, group_names
from neurondrift.groups.controls import matched
from neurondrift.groups.selection import row_sums
from neurondrift.models.parts import unit_scores
from neurondrift.models.sites import linear_sites, magnitudes_of
from neurondrift.study.settings import GroupsSection
from neurondrift.study.stages.grouping import control_of, scored_groups, study_groups

SETTINGS = GroupsSection(top_fraction=0.1, set_difference_p=0.2, set_difference_q=0.25, bins=3, weight_bins=7)
HEADERS = {
    purpose: {"model": "m", "method": "snip", "data": f"data of {purpose}", "examples": 4}
    for purpose in ("safety", "utility")
}


def scores_of(model, granularity):
    sites = linear_sites(model)
    generator = np.random.default_rng(1)
    scores = {
        purpose: {name: generator.random(site.shape).astype(np.float32) for name, site in sites.items()}
        for purpose in ("safety", "utility")
    }
    if granularity != "unit":
        return scores
    return {purpose: unit_scores(own, sites.units) for purpose, own in scores.items()}


def same(one, two):
    return one.members.keys() == two.members.keys() and all(
        np.array_equal(one.members[site], two.members[site]) for site in one.members
    )


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("granularity", ["neuron", "weight", "unit"])
def test_the_recipe_is_the_public_rules(family, granularity):
    model = build(family)
    scores = scores_of(model, granularity)
    made = study_groups(scores, SETTINGS, granularity, seed=5, headers=HEADERS)
    few = (*PUBLISHED_GROUPS, "utility_set_difference")
    assert tuple(made) == (few if granularity == "neuron" else PUBLISHED_GROUPS)
    sites = linear_sites(model)
    shapes = {name: site.shape for name, site in sites.items()}
    if granularity == "unit":
        shapes = {name: (unit.count, 1) for name, unit in sites.units.items()}
    by_hand = {
        "safety_top": nd.select_top(scores["safety"], fraction=0.1, granularity=granularity),
        "safety_set_difference": nd.set_difference(
            scores["safety"], scores["utility"], p=0.2, q=0.25, granularity=granularity
        ),
        "utility_top": nd.select_top(scores["utility"], fraction=0.1, granularity=granularity),
        "random": nd.random_group(shapes, fraction=0.1, seed=5, granularity=granularity),
        "utility_set_difference": nd.set_difference(
            scores["utility"], scores["safety"], p=0.2, q=0.25, granularity=granularity
        ),
    }
    for name, group in made.items():
        assert same(group, by_hand[name]), name
        assert group.granularity == granularity
        assert dict(group.shapes) == shapes
        assert group.provenance["model"] == "m"
        assert group.role == GROUP_ROLES[name]
    assert made["safety_top"].provenance["data"] == "data of safety"
    assert made["utility_top"].provenance["data"] == "data of utility"
    assert made["safety_set_difference"].provenance["utility_data"] == "data of utility"
    assert made["random"].provenance == {
        "rule": "random",
        "role": "random",
        "fraction": 0.1,
        "seed": 5,
        "model": "m",
    }


def test_controls_take_the_bins_of_their_granularity():
    model = build("llama")
    for granularity, bins in (("neuron", 3), ("unit", 3), ("weight", 7)):
        magnitudes = magnitudes_of(linear_sites(model), granularity)
        group = study_groups(scores_of(model, granularity), SETTINGS, granularity, seed=5)["safety_top"]
        control = control_of(group, magnitudes, SETTINGS, seed=9)
        (by_hand,) = matched(group, magnitudes, seed=9, bins=bins)
        assert same(control, by_hand) and control.provenance == by_hand.provenance
        assert control.provenance["bins"] == bins


def test_without_headers_nothing_is_noted():
    for group in scored_groups(scores_of(build("llama"), "neuron"), SETTINGS, "neuron").values():
        assert group.provenance.get("model") is None and group.provenance.get("data") is None


def test_an_empty_difference_is_an_error():
    scores = scores_of(build("llama"), "neuron")
    with pytest.raises(GroupError, match="set difference is empty"):
        study_groups(
            scores | {"utility": scores["safety"]},
            SETTINGS.model_copy(update={"set_difference_q": 0.2}),
            "neuron",
            seed=0,
        )


def all_scores(model):
    scores = scores_of(model, "neuron")
    generator = np.random.default_rng(2)
    for purpose in ("style", "gradient"):
        scores[purpose] = {
            name: generator.random(site.shape[0]).astype(np.float32) for name, site in linear_sites(model).items()
        }
    return scores


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_controls_and_the_residual_are_the_public_rules(family):
    model = build(family)
    scores, sites = all_scores(model), linear_sites(model)
    norms = magnitudes_of(sites, "neuron")
    headers = {purpose: {"model": "m", "method": "snip", "data": f"data of {purpose}"} for purpose in scores}
    made = study_groups(scores, SETTINGS, "neuron", seed=5, headers=headers, norms=norms)
    assert tuple(made) == tuple(name for name in group_names("neuron") if name not in ALIGNMENT_GROUPS)
    of_weights = study_groups(scores, SETTINGS, "weight", seed=5, headers=headers, norms=norms)
    assert tuple(of_weights) == PUBLISHED_GROUPS
    like = made["safety_set_difference"]
    by_hand = {
        "safety_residual": nd.select_residual(
            scores["safety"], {"u": scores["utility"], "g": scores["gradient"], "n": norms}, fraction=0.1
        ),
        "utility_set_difference": nd.set_difference(
            scores["utility"], scores["safety"], p=0.2, q=0.25, granularity="neuron"
        ),
        "style_set_difference": nd.set_difference_like(scores["style"], scores["utility"], p=0.2, like=like),
        "gradient_top": nd.select_top(scores["gradient"], fraction=0.1, granularity="neuron"),
    }
    for name, group in by_hand.items():
        assert same(made[name], group), name
        assert made[name].role == GROUP_ROLES[name]
        assert dict(made[name].shapes) == {site: own.shape for site, own in sites.items()}
        assert made[name].provenance["model"] == "m"
    for site, own in like.members.items():
        assert len(made["style_set_difference"].members[site]) == len(own)
    assert made["style_set_difference"].provenance["data"] == "data of style"
    assert made["gradient_top"].provenance["data"] == "data of gradient"
    assert made["utility_set_difference"].provenance["utility_data"] == "data of safety"
    assert made["safety_residual"].provenance["gradient_data"] == "data of gradient"


def test_sums_over_rows_make_the_same_groups_as_the_scores_of_weights():
    model = build("llama")
    scores, sites = all_scores(model), linear_sites(model)
    norms = magnitudes_of(sites, "neuron")
    sums = {purpose: row_sums(own) for purpose, own in scores.items()}
    whole = study_groups(scores, SETTINGS, "neuron", seed=5, headers=HEADERS, norms=norms)
    summed = study_groups(sums, SETTINGS, "neuron", seed=5, headers=HEADERS, norms=norms, shapes=sites.shapes)
    for name, group in whole.items():
        assert same(group, summed[name]) and group.provenance == summed[name].provenance
        assert dict(group.shapes) == dict(summed[name].shapes)


def test_what_is_not_scored_makes_no_group():
    model = build("llama")
    scores, norms = all_scores(model), magnitudes_of(linear_sites(model), "neuron")
    without = {purpose: own for purpose, own in scores.items() if purpose != "style"}
    made = study_groups(without, SETTINGS, "neuron", seed=5, norms=norms)
    assert set(group_names("neuron")) - set(made) == {"style_set_difference", *ALIGNMENT_GROUPS}
