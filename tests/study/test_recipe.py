"""The recipe of a study's groups: one rule for neurons, weights and hidden units."""

import numpy as np
import pytest

import neurondrift as nd
from helpers.families import build
from neurondrift.base.errors import GroupError
from neurondrift.groups.controls import matched
from neurondrift.models.parts import unit_scores
from neurondrift.models.sites import linear_sites, magnitudes_of
from neurondrift.study.settings import GROUP_NAMES, GROUP_ROLES, GroupsSection
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
    assert tuple(made) == GROUP_NAMES
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
