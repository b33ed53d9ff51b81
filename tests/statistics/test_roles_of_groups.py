"""Roles in the analysis: who is held against whom, what stays outside the family, and what the JSON keeps."""

import dataclasses
import json

import numpy as np
import pytest

from neurondrift.report.conclusion import analysis_findings, conclusion
from neurondrift.statistics.analysis import analyze
from neurondrift.statistics.design.population import Population
from neurondrift.statistics.results import GroupEffect, MatchedCounts, RawFigures, to_json

NAMES = ("first", "second", "third")


def population(seed=0):
    rng = np.random.default_rng(seed)
    site = np.repeat(np.arange(10), 90)
    return Population(
        site=site,
        site_names=tuple(f"layers.{i}.q_proj" for i in range(10)),
        module_type=("q_proj",) * 10,
        layer=tuple(range(10)),
        row=np.tile(np.arange(90), 10),
        norm=np.exp(0.2 * rng.standard_normal(900)),
        drift={"relative": np.exp(0.4 * rng.standard_normal((1, 900)))},
    )


def analysed(names=NAMES, **arguments):
    rng = np.random.default_rng(1)
    groups = {name: rng.random(900) < 0.1 for name in names}
    return analyze(population(), groups, metrics=["relative"], seed_labels=["0"], resamples=100, **arguments)


def encoded(result):
    return {effect["group"]: effect for effect in to_json(result)["effects"]}


def test_roles_decide_and_not_the_names():
    roles = {"first": "safety", "second": "random", "third": None}
    effects = encoded(analysed(roles=roles))
    assert {name: effect["role"] for name, effect in effects.items()} == roles
    assert effects["second"]["p_holm"] is None
    assert "negative control" in effects["second"]["p_holm_reason"]
    assert effects["first"]["d_random"]["value"] is not None
    assert effects["second"]["d_random"]["value"] is None
    misleading = analysed(("safety_top", "random", "third"), roles={"safety_top": None, "random": "safety"})
    assert encoded(misleading)["random"]["p_holm"] is not None
    assert conclusion(misleading).startswith(("Under this optimiser random ", "Inconclusive: random "))


def test_without_roles_the_names_say_them_and_the_figures_are_the_same():
    by_name = analysed(("safety_top", "random", "utility_top"))
    roles = {"first": "safety", "second": "random", "third": "utility"}
    by_role = encoded(analysed(roles=roles))
    for (name, effect), (_, other) in zip(encoded(by_name).items(), by_role.items(), strict=True):
        assert effect["role"] == other["role"]
        assert effect["g"] == other["g"], name
        assert effect["d_random"] == other["d_random"], name


def test_a_control_is_a_negative_control_too_but_nothing_is_held_against_it():
    result = analysed(roles={"first": "safety", "second": "control", "third": None})
    effects = encoded(result)
    assert effects["second"]["p_holm"] is None
    assert effects["first"]["d_random"]["value"] is None
    assert result.family == "overall effects of all groups but 'random' and 'control', and contrasts, in all metrics"
    assert conclusion(result).startswith(("Under this optimiser first ", "Inconclusive: first "))


def test_an_effect_holds_its_parts_and_the_json_shows_their_fields_flat_and_in_place():
    result = analysed()
    effect = result.effects[0]
    assert isinstance(effect.matched, MatchedCounts)
    assert isinstance(effect.raw, RawFigures)
    expected = []
    for field in dataclasses.fields(GroupEffect):
        part = {"matched": MatchedCounts, "raw": RawFigures}.get(field.name)
        expected += [field.name] if part is None else [inner.name for inner in dataclasses.fields(part)]
    expected.remove("reasons")
    keys = [key for key in encoded(result)["first"] if not key.endswith("_reason") or key == "undefined_reason"]
    assert keys == expected
    assert keys[8:12] == ["n_unmatched", "n_controls", "strata", "strata_unmatched"]
    assert keys[12:22] == [
        "mean_members", "mean_controls", "mean_others", "median_members", "median_controls", "median_others",
        "ratio_unmatched", "ratio_matched", "d_random", "effect_norm",
    ]  # fmt: skip


@pytest.mark.parametrize("roles", [None, {"first": "safety", "second": "random"}])
def test_findings_with_roles_are_json(roles):
    findings = json.loads(json.dumps(analysis_findings(analysed(roles=roles)), allow_nan=False))
    assert all("role" in effect for effect in findings["effects"])
