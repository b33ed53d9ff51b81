"""Who is compared with whom: balancing, strata with a regression, and the gate, against dense numpy."""

import numpy as np
import pytest
from scipy import optimize

from neurondrift.statistics.design.balancing import balance_site, effective_size, entropy_weights
from neurondrift.statistics.design.designs import LARGEST_DIFFERENCE, matched_design, norm_design
from neurondrift.statistics.design.matching import refine_bins

SITES = 8


def drawn(rng, share=0.03, size=300):
    """Sites, three correlated log covariates, and members that depend on all of them."""
    site = np.repeat(np.arange(SITES), size)
    common = rng.standard_normal(len(site))
    logs = {
        name: 0.4 * (common + rng.standard_normal(len(site))) for name in ("norm", "utility_score", "gradient_scale")
    }
    score = sum(logs.values()) + rng.standard_normal(len(site))
    member = np.zeros(len(site), dtype=bool)
    for code in range(SITES):
        inside = np.flatnonzero(site == code)
        member[inside[np.argsort(-score[inside])[: int(share * size)]]] = True
    return site, logs, member


def designs_of(site, logs, member, usable=None, bins=10):
    usable = np.ones(len(site), dtype=bool) if usable is None else usable
    stratum = refine_bins(site, np.exp(logs["norm"]), member, bins)
    return (
        norm_design(site, member, ~member, usable, stratum, logs),
        matched_design(site, member, ~member, usable, logs, tuple(logs)),
        stratum,
    )


def test_entropy_weights_reach_the_means_and_are_the_nearest_to_uniform():
    rng = np.random.default_rng(0)
    controls, target = rng.standard_normal((60, 3)), np.array([0.6, -0.3, 0.4])
    weights = entropy_weights(controls, target)
    np.testing.assert_allclose(weights @ controls, target, atol=1e-7)
    assert weights.sum() == pytest.approx(1) and weights.min() > 0
    constraints = [{"type": "eq", "fun": lambda w: np.concatenate([[w.sum() - 1], w @ controls - target])}]
    oracle = optimize.minimize(
        lambda w: (w * np.log(np.maximum(w, 1e-300))).sum(),
        np.full(60, 1 / 60),
        bounds=[(1e-12, 1)] * 60,
        constraints=constraints,
        method="SLSQP",
        options={"maxiter": 500, "ftol": 1e-14},
    )
    np.testing.assert_allclose(weights, oracle.x, atol=2e-5)


def test_means_beyond_the_controls_have_no_weights():
    rng = np.random.default_rng(0)
    controls = rng.standard_normal((60, 2))
    assert entropy_weights(controls, np.array([9.0, 0.0])) is None
    corner = controls.max(axis=0)  # within the range of each covariate, but outside the hull
    assert entropy_weights(controls, corner) is None
    assert entropy_weights(controls, np.array([1.2, 1.2]), fewest=30) is None
    assert effective_size(entropy_weights(controls, np.array([1.2, 1.2]))) < 30


def test_a_covariate_that_does_not_vary_or_repeats_another_is_no_obstacle():
    rng = np.random.default_rng(0)
    one = rng.standard_normal((100, 1))
    controls = np.hstack([one, 2 * one, np.ones((100, 1))])
    members = np.add(controls[:4], [0.1, 0.2, 0])
    found = balance_site(controls, members)
    assert found.kept.all()
    np.testing.assert_allclose(found.weights @ controls, members.sum(axis=0), atol=1e-5)


def test_the_farthest_members_are_left_out_and_no_more_than_need_be():
    rng = np.random.default_rng(1)
    controls, members = rng.standard_normal((200, 2)), 0.5 * rng.standard_normal((8, 2))
    members[2], members[5] = (40, 0), (0, 60)
    found = balance_site(controls, members)
    assert np.flatnonzero(~found.kept).tolist() == [2, 5]
    np.testing.assert_allclose(found.weights @ controls / 6, members[found.kept].mean(axis=0), atol=1e-6)
    assert found.weights.sum() == pytest.approx(6)
    assert effective_size(found.weights) >= 6
    far = balance_site(controls, members[[2, 5]])
    assert not far.kept.any() and not far.weights.any()


def test_coefficients_sum_to_nothing_and_annihilate_what_is_adjusted_for_in_every_site():
    site, logs, member = drawn(np.random.default_rng(2))
    norm, matched, _ = designs_of(site, logs, member)
    for design, names in ((norm, ["norm"]), (matched, list(logs))):
        a = design.coefficient_N
        assert (a[design.compared_N] == 1).all() and not a[member & ~design.compared_N].any()
        np.testing.assert_allclose(np.bincount(site, weights=a), 0, atol=1e-9)
        for name in names:
            np.testing.assert_allclose(np.bincount(site, weights=a * logs[name]), 0, atol=1e-6)
        assert design.members == design.undefined + design.without_control + design.compared_N.sum()


def test_the_norm_comparison_is_matching_with_a_bias_correction():
    """The dense estimator: each member minus the mean of its stratum's controls and the slope times what is left."""
    rng = np.random.default_rng(3)
    site, logs, member = drawn(rng)
    design, _, stratum = designs_of(site, logs, member)
    y = rng.standard_normal(len(site)) + logs["norm"]
    x = logs["norm"]
    for code in range(SITES):
        inside = site == code
        effect, xs, ys, ws = [], [], [], []
        for h in np.unique(stratum[member & inside]):
            of_stratum = stratum == h
            m, c = of_stratum & member, of_stratum & ~member
            if not c.any():
                continue
            effect += [(y[i] - y[c].mean(), x[i] - x[c].mean()) for i in np.flatnonzero(m)]
            xs.append(x[c] - x[c].mean())
            ys.append(y[c] - y[c].mean())
            ws.append(np.full(c.sum(), m.sum() / c.sum()))
        xs, ys, ws = map(np.concatenate, (xs, ys, ws))
        if len(xs) - len(np.unique(stratum[member & inside])) < 20:
            continue
        slope = (ws * xs * ys).sum() / (ws * xs * xs).sum()
        expected = sum(dy - slope * dx for dy, dx in effect)
        assert (design.coefficient_N * y)[inside].sum() == pytest.approx(expected)
        break
    else:
        pytest.fail("no site had enough controls in the strata of members")


def test_the_balance_is_the_difference_of_means_within_sites_in_spreads():
    site, logs, member = drawn(np.random.default_rng(4))
    _, design, _ = designs_of(site, logs, member)
    x = logs["utility_score"]
    (found,) = (b for b in design.balance if b.name == "utility_score")
    inside = [site == code for code in range(SITES)]
    counts = np.array([member[i].sum() for i in inside])
    gaps = np.array([x[i & member].mean() - x[i & ~member].mean() for i in inside])
    of_members = sum(((x[i & member] - x[i & member].mean()) ** 2).sum() for i in inside) / (counts - 1).sum()
    of_controls = (counts * [x[i & ~member].var(ddof=1) for i in inside]).sum() / counts.sum()
    assert found.before == pytest.approx((counts * gaps).sum() / counts.sum() / np.sqrt((of_members + of_controls) / 2))
    assert abs(found.after) < 1e-6 < found.before


@pytest.mark.parametrize("name", ["norm", "utility_score"])
def test_a_group_that_one_covariate_chose_is_not_comparable(name):
    site, logs, _ = drawn(np.random.default_rng(5))
    member = np.zeros(len(site), dtype=bool)
    for code in range(SITES):
        inside = np.flatnonzero(site == code)
        member[inside[np.argsort(-logs[name][inside])[:6]]] = True
    norm, matched, _ = designs_of(site, logs, member)
    assert "nothing_compared" in matched.because and matched.without_control == member.sum()
    if name == "norm":
        gap = next(b.after for b in norm.balance if b.gated)
        assert "imbalance" in norm.because and abs(gap) > LARGEST_DIFFERENCE
    else:
        assert not norm.because  # strata of norm claim nothing about utility; the balance shows it
        assert next(b.after for b in norm.balance if b.name == name) > 1


def test_members_without_a_drift_or_a_covariate_are_counted():
    site, logs, member = drawn(np.random.default_rng(6))
    usable = np.ones(len(site), dtype=bool)
    some = np.flatnonzero(member)
    usable[some[:3]] = False
    logs["gradient_scale"][some[3:5]] = np.nan
    norm, matched, _ = designs_of(site, logs, member, usable)
    assert (norm.undefined, matched.undefined) == (3, 3)
    assert matched.without_control >= 2
    assert not matched.coefficient_N[some[:5]].any() and not norm.coefficient_N[some[:3]].any()
    assert np.isfinite(matched.coefficient_N).all()
    usable[some[: len(some) // 2]] = False
    assert "undefined_drift" in designs_of(site, logs, member, usable)[0].because


def test_a_design_does_not_depend_on_the_order_of_neurons():
    rng = np.random.default_rng(7)
    site, logs, member = drawn(rng)
    order = rng.permutation(len(site))
    for one, other in zip(
        designs_of(site, logs, member)[:2],
        designs_of(site[order], {k: v[order] for k, v in logs.items()}, member[order])[:2],
        strict=True,
    ):
        np.testing.assert_allclose(other.coefficient_N, one.coefficient_N[order], atol=1e-6)
