"""The whole analysis: all verdicts reachable, the confound undone, honest NaN, mistakes named."""

import json
import math

import numpy as np
import pytest

from helpers.populations import make_population, run
from neurondrift.base.errors import ConfigError, DataError, GroupError, UserError
from neurondrift.report.conclusion import conclusion
from neurondrift.statistics.design.matching import quantile_bins
from neurondrift.statistics.design.population import Population
from neurondrift.statistics.results import decide, to_json


@pytest.fixture(scope="module")
def study():
    population, groups = make_population(np.random.default_rng(1), seeds=3, effect=0.6, seed_sd=0.02)
    return population, groups, run(population, groups)


@pytest.mark.parametrize(
    ("effect", "layers", "site_sd", "verdict"),
    [(0.8, 30, 0.1, "more"), (0.0, 30, 0.1, "similar"), (-0.6, 30, 0.1, "protected"), (0.2, 2, 0.6, "inconclusive")],
)
def test_each_verdict_is_reached_by_a_simulated_study(effect, layers, site_sd, verdict):
    population, groups = make_population(np.random.default_rng(7), effect=effect, layers=layers, site_sd=site_sd)
    result = run(population, groups)
    found = result.effect("safety_top", "relative")
    assert found.verdict == verdict
    text = conclusion(result)
    said = {
        "more": "moved further than comparable",
        "similar": "moved as far as comparable",
        "protected": "moved less far than comparable",
        "inconclusive": "cannot be told apart from comparable neurons, nor shown to move as far",
    }[verdict]
    first, second = text.split(". ")[:2]
    assert said in first or (verdict == "similar" and "by less than the band, than comparable" in first)
    assert "do not decide between H1" in second
    assert "one training seed" in text


def test_three_seeds_reach_more_and_say_how_few_three_are(study):
    _, _, result = study
    found = result.effect("safety_top", "relative")
    assert found.verdict == "more"
    assert found.g.ci95[0] < 0.6 < found.g.ci95[1]
    assert "2 degrees of freedom" in conclusion(result)
    assert len(found.per_seed) == 3
    assert np.mean([seed.value for seed in found.per_seed]) == pytest.approx(found.g.value, rel=1e-3)


@pytest.mark.parametrize(
    ("ci90", "ci95", "verdict"),
    [
        ((0.05, 0.15), (0.03, 0.17), "similar"),
        ((0.05, 0.21), (0.03, 0.22), "more"),
        ((-0.3, -0.1), (-0.4, -0.01), "protected"),
        ((0.01, 0.3), (-0.02, 0.33), "inconclusive"),
        ((-0.2, 0.1), (-0.25, 0.15), "inconclusive"),
        ((math.nan, 0.1), (0.1, 0.2), "inconclusive"),
    ],
)
def test_decision_rule(ci90, ci95, verdict):
    assert decide(ci90, ci95, 0.2) == verdict


def test_confounded_group_differs_naively_and_is_similar_when_matched():
    """Delta does not depend on the group; the group is chosen for large |w| (a score that contains it)."""
    rng = np.random.default_rng(3)
    sizes = np.array([192, 576, 576, 1536] * 15)
    site = np.repeat(np.arange(len(sizes)), sizes)
    norm = np.exp(rng.standard_normal(len(site)))
    score = norm * np.exp(1.2 * rng.standard_normal(len(site)))
    member = np.zeros(len(site), dtype=bool)
    for code, size in enumerate(sizes):
        inside = np.flatnonzero(site == code)
        member[inside[np.argsort(-score[inside])[: size // 100]]] = True
    delta = np.exp(0.5 * rng.standard_normal((1, len(site))))
    population = Population(
        site=site,
        site_names=tuple(map(str, range(len(sizes)))),
        module_type=("q_proj",) * len(sizes),
        layer=tuple(i // 4 for i in range(len(sizes))),
        row=np.zeros(len(site), dtype=int),
        norm=norm,
        drift={"relative": delta / norm, "l2": delta},
    )
    result = run(population, {"safety_top": member})
    relative, absolute = result.effect("safety_top", "relative"), result.effect("safety_top", "l2")
    assert relative.raw.ratio_unmatched.value < 1 / 5
    assert relative.verdict == "similar"
    assert absolute.verdict == "similar"
    assert abs(relative.balance.after) < abs(relative.balance.before) / 5
    assert "ratio_unmatched" in relative.confounded


def test_the_same_seed_gives_the_same_result_and_another_seed_another_interval(study):
    population, groups, result = study
    assert to_json(run(population, groups)) == to_json(result)
    other = run(population, groups, rng_seed=1)
    assert other.effect("safety_top", "relative").g.ci95 != result.effect("safety_top", "relative").g.ci95
    assert other.effect("safety_top", "relative").g.value == result.effect("safety_top", "relative").g.value


def test_a_group_is_judged_alone_and_in_any_unit(study):
    population, groups, result = study
    scaled = Population(**{**vars(population), "drift": {k: v * 1e-7 for k, v in population.drift.items()}})
    alone = run(scaled, {"safety_top": groups["safety_top"]}, contrasts=())
    assert alone.effect("safety_top", "relative").g.value == pytest.approx(
        result.effect("safety_top", "relative").g.value
    )
    assert alone.effect("safety_top", "relative").g.ci95 == pytest.approx(
        result.effect("safety_top", "relative").g.ci95
    )
    assert alone.effect("safety_top", "relative").raw.d_random.reason


def test_undefined_drift_is_counted_and_left_out():
    population, groups = make_population(np.random.default_rng(0), seeds=3)
    lost = np.flatnonzero(groups["safety_top"])[:7]
    population.drift["relative"][1, lost] = np.nan
    result = run(population, groups)
    found = result.effect("safety_top", "relative")
    assert (found.n_undefined, found.n_measured) == (7, found.n_members - 7)
    assert "zero norm" in found.undefined_reason
    assert math.isfinite(found.g.value)
    assert result.effect("safety_top", "l2").n_undefined == 0
    assert "7 members of safety_top have no defined drift" in conclusion(result)
    assert found.n_measured == found.g.n + found.matched.n_unmatched


def test_strata_without_controls_are_counted():
    population, groups = make_population(np.random.default_rng(0))
    member = groups["safety_top"].copy()
    member[population.site == 0] = True
    found = run(population, {"safety_top": member}).effect("safety_top", "relative")
    assert found.matched.n_unmatched == 192
    assert found.matched.strata_unmatched >= 10
    assert found.g.n == member.sum() - 192
    assert found.g.sites == 23
    every = np.ones(len(member), dtype=bool)
    result = run(population, {"safety_top": every})
    found = result.effect("safety_top", "relative")
    assert math.isnan(found.g.value)
    assert found.g.reason == "no matched member"
    assert found.verdict == "inconclusive"


def test_constant_drift_gives_nan_with_a_reason():
    population, groups = make_population(np.random.default_rng(0))
    for values in population.drift.values():
        values[:] = 0.0
    result = run(population, groups)
    found = result.effect("safety_top", "relative")
    assert math.isnan(found.g.value)
    assert found.g.reason == "no variation of drift within strata"
    encoded = json.loads(json.dumps(to_json(result), allow_nan=False))
    assert encoded["effects"][0]["g"]["value"] is None
    assert encoded["effects"][0]["g"]["value_reason"] == "no variation of drift within strata"


@pytest.mark.parametrize("layers", [1, 3])
def test_json_is_safe_and_every_null_has_its_own_reason(layers):
    population, groups = make_population(np.random.default_rng(0), layers=layers)
    population.drift["relative"][0, :5] = np.nan
    encoded = json.dumps(to_json(run(population, groups)), allow_nan=False)
    assert "undefined in these data" not in encoded
    found = json.loads(encoded)
    assert found["schema_version"] == 1
    nulls = 0

    def walk(node):
        nonlocal nulls
        if isinstance(node, dict):
            for key, value in node.items():
                if value is None and key != "layer":
                    nulls += 1
                    assert node[f"{key}_reason"]
                walk(value)
        elif isinstance(node, list):
            for value in node:
                walk(value)

    walk(found)
    assert nulls > 0


def test_result_holds_subgroups_contrasts_overlaps_and_family(study):
    _, _, result = study
    found = result.effect("safety_top", "relative")
    assert [part.name for part in found.by_module] == ["q_proj", "k_proj", "o_proj", "up_proj"]
    assert [part.name for part in found.by_layer_third] == ["first third", "middle third", "last third"]
    assert sum(part.g.n for part in found.by_module) == found.g.n == sum(site.n for site in found.by_site)
    contrast = next(c for c in result.contrasts if c.metric == "relative")
    other = result.effect("utility_top", "relative")  # of which few members are left out, as safety_top's too
    assert contrast.shared == next(
        o.shared for o in result.overlaps if (o.first, o.second) == ("safety_top", "utility_top")
    )
    assert contrast.difference.value == pytest.approx(found.g.value - other.g.value, abs=0.05)
    expected = found.effect_norm.log_ratio.value - other.effect_norm.log_ratio.value
    assert contrast.log_ratio.value == pytest.approx(expected, abs=0.05)
    assert contrast.verdict == "more"
    assert result.family_size == 2 * 2 + 2
    assert math.isnan(result.effect("random", "relative").p_holm)
    assert found.p_holm >= found.p
    assert len(result.overlaps) == 3


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"metrics": ("nonsense",)}, ConfigError, "metric is unknown"),
        ({"seed_labels": ["0", "1"]}, ConfigError, "seed labels"),
        ({"sesoi": 0.0}, ConfigError, "smallest effect of interest"),
        ({"resamples": 5}, ConfigError, "number of resamples is too small. Received: 5"),
        ({"primary_metric": "cosine_distance"}, ConfigError, "primary metric"),
        ({"contrasts": [("safety_top", "absent")]}, GroupError, "unknown group"),
    ],
)
def test_mistakes_are_named(change, error, message):
    population, groups = make_population(np.random.default_rng(0), layers=1)
    with pytest.raises(error, match=message):
        run(population, groups, **change)


def test_groups_that_do_not_fit_are_refused():
    population, groups = make_population(np.random.default_rng(0), layers=1)
    with pytest.raises(GroupError, match="'empty' has no member"):
        run(population, {"empty": np.zeros(len(population.site), dtype=bool)})
    with pytest.raises(GroupError, match="does not fit"):
        run(population, {"short": groups["random"][:-1]})
    with pytest.raises(DataError, match="norm does not fit"):
        Population(**{**vars(population), "norm": population.norm[:-1]})
    with pytest.raises(UserError, match="not finite"):
        quantile_bins(np.zeros(2, dtype=int), np.array([1.0, np.nan]), 10)
