"""Top of a residual: against statsmodels' least squares; zeros, units, small sites; and what is planted is found."""

import numpy as np
import pytest
import statsmodels.api as sm

import neurondrift as nd
from neurondrift.base.errors import GroupError
from neurondrift.groups.selection import residuals

SHAPES = {"a": (60, 5), "b": (33, 7)}


def drawn(seed=0, spread=0.5):
    """Scores `[out, in]`, and three covariates `[out]` that they depend on."""
    generator = np.random.default_rng(seed)
    names = ("utility", "gradient", "norm")
    covariates = {name: {s: generator.lognormal(0, 1, rows) for s, (rows, _) in SHAPES.items()} for name in names}
    scores = {}
    for site, shape in SHAPES.items():
        size = covariates["utility"][site] ** 0.8 * covariates["norm"][site] ** -0.5
        scores[site] = (generator.dirichlet(np.ones(shape[1]), shape[0]) * size[:, None]).astype(np.float32)
        scores[site] *= generator.lognormal(0, spread, (shape[0], 1)).astype(np.float32)
    return scores, covariates


def by_statsmodels(scores, covariates, site, usable):
    target = np.log(scores[site].sum(axis=1, dtype=np.float64)[usable])
    design = sm.add_constant(np.log(np.stack([values[site][usable] for values in covariates.values()], axis=1)))
    return sm.OLS(target, design).fit().resid


def test_the_members_are_the_top_of_the_least_squares_residuals():
    scores, covariates = drawn()
    group = nd.select_residual(scores, covariates, fraction=0.1, provenance={"role": "safety"})
    for site, (rows, _) in SHAPES.items():
        expected = by_statsmodels(scores, covariates, site, np.arange(rows))
        found = residuals(scores[site].sum(axis=1), [values[site] for values in covariates.values()])
        assert np.allclose(found, expected, atol=1e-5)
        assert group.members[site].tolist() == sorted(np.argsort(-expected)[: rows // 10].tolist())
        for values in covariates.values():
            assert abs(np.corrcoef(found, np.log(values[site]))[0, 1]) < 1e-7
    assert group.granularity == "neuron" and dict(group.shapes) == SHAPES and group.role == "safety"
    kept = {key: group.provenance[key] for key in ("rule", "fraction", "on", "left_out", "sites_left_out")}
    assert kept == {
        "rule": "residual",
        "fraction": 0.1,
        "on": ["utility", "gradient", "norm"],
        "left_out": 0,
        "sites_left_out": 0,
    }


def test_neurons_without_a_positive_finite_value_take_no_part_and_are_counted():
    scores, covariates = drawn(1)
    scores["a"][3] = 0
    covariates["gradient"]["a"][[5, 6]] = 0, np.nan
    covariates["norm"]["b"][2] = np.inf
    usable = np.setdiff1d(np.arange(60), [3, 5, 6])
    group = nd.select_residual(scores, covariates, fraction=0.2)
    expected = by_statsmodels(scores, covariates, "a", usable)
    assert group.members["a"].tolist() == sorted(usable[np.argsort(-expected)[:12]].tolist())
    assert group.provenance["left_out"] == 4
    everyone = nd.select_residual(scores, covariates, fraction=1)  # no more than there are
    assert everyone.members["a"].tolist() == usable.tolist()


def test_units_change_nothing():
    scores, covariates = drawn(2)
    one = nd.select_residual(scores, covariates, fraction=0.1)
    scaled = {name: {site: 1e3 * v for site, v in values.items()} for name, values in covariates.items()}
    other = nd.select_residual({site: values * 8 for site, values in scores.items()}, scaled, fraction=0.1)
    assert all(np.array_equal(one.members[site], other.members[site]) for site in SHAPES)


def test_what_a_score_has_of_its_own_is_found_and_what_its_covariates_tell_is_not():
    scores, covariates = drawn(3, spread=0.01)
    own, told = [7, 30, 41], [1, 11]
    scores["a"][own] *= 1.2  # little: their plain scores stay in the middle
    for row in told:  # much, but utility, of which the score is a power, says so
        covariates["utility"]["a"][row] *= 10
        scores["a"][row] *= 10**0.8
    group = nd.select_residual(scores, covariates, fraction=0.05)
    assert group.members["a"].tolist() == own
    plain = nd.select_top(scores, fraction=0.05, granularity="neuron")
    assert not set(own) & set(plain.members["a"].tolist())


def test_covariates_that_do_not_vary_or_depend_on_each_other_do_no_harm():
    scores, covariates = drawn(4)
    alone = nd.select_residual(scores, {"utility": covariates["utility"]}, fraction=0.1)
    constant = {site: np.ones(rows) for site, (rows, _) in SHAPES.items()}
    twice = {site: values**2 for site, values in covariates["utility"].items()}
    same = {"utility": covariates["utility"], "constant": constant, "twice": twice}
    other = nd.select_residual(scores, same, fraction=0.1)
    assert all(np.array_equal(alone.members[site], other.members[site]) for site in SHAPES)


def test_a_site_with_too_few_neurons_for_the_fit_has_no_members():
    scores, covariates = drawn(5)
    scores["b"][4:] = 0  # 4 usable neurons, 4 coefficients
    group = nd.select_residual(scores, covariates, fraction=0.1)
    assert list(group.members) == ["a"] and "b" in group.shapes
    assert group.provenance["sites_left_out"] == 1 and group.provenance["left_out"] == 33
    scores["a"][:] = 0
    with pytest.raises(GroupError, match="No site has enough neurons"):
        nd.select_residual(scores, covariates, fraction=0.1)


def test_errors():
    scores, covariates = drawn()
    with pytest.raises(GroupError, match="fraction is no share"):
        nd.select_residual(scores, covariates, fraction=0)
    with pytest.raises(GroupError, match="at least one covariate"):
        nd.select_residual(scores, {}, fraction=0.1)
    with pytest.raises(GroupError, match="covariate norm is of other sites"):
        nd.select_residual(scores, {"norm": {"a": covariates["norm"]["a"]}}, fraction=0.1)
    with pytest.raises(GroupError, match="covariate norm does not fit a"):
        nd.select_residual(scores, {"norm": covariates["norm"] | {"a": np.ones(3)}}, fraction=0.1)
