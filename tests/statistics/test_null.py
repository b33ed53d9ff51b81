"""The null of random groups: calibrated p-values, and when enough have been drawn."""

import numpy as np
import pytest


def test_the_empirical_p_counts_the_group_itself_and_is_calibrated():
    from neurondrift.statistics.null import empirical_p

    assert empirical_p(5.0, [0.0] * 19) == 1 / 20
    assert empirical_p(0.0, [0.0] * 19) == 1.0
    assert empirical_p(-1.0, [0.0, 0.5, -0.5, 0.2]) == 1 / 5  # two-sided
    assert np.isnan(empirical_p(1.0, []))
    generator = np.random.default_rng(0)
    outcomes = generator.binomial(32, 0.8, size=(1500, 20))  # ties, as rates of few prompts have
    p = np.array([empirical_p(row[0], row[1:]) for row in outcomes])
    for level in (0.05, 0.1, 0.25, 0.5):
        assert (p <= level + 1e-9).mean() <= level + 3 * np.sqrt(level / 1500)
    smooth = generator.normal(size=(1500, 20))
    p = np.array([empirical_p(row[0], row[1:]) for row in smooth])
    assert (p <= 0.05).mean() == pytest.approx(0.05, abs=0.02)


def test_the_comparison_is_its_definition_and_its_interval_covers():
    from neurondrift.statistics.null import compare_with_null, share_of_change

    generator = np.random.default_rng(1)
    group, null = generator.random(12) < 0.3, generator.random((7, 12)) < 0.8
    weights = generator.integers(1, 9, size=12)
    found = compare_with_null(group, null, weights_P=weights)
    means = np.average(null, axis=1, weights=weights)
    assert found.value == pytest.approx(np.average(group, weights=weights))
    assert found.effect == pytest.approx(found.value - means.mean())
    assert found.null_sd == pytest.approx(means.std(ddof=1))
    assert (found.null_low, found.null_high) == pytest.approx((means.min(), means.max()))
    assert found.direction == "lower" and found.p_floor == 1 / 8 and found.draws == 7 and found.n == 12
    assert found.ci95[0] < found.effect < found.ci95[1]
    covered = 0
    for trial in range(200):
        chance = generator.beta(2, 2, size=40)  # prompts differ; group and draws share them
        group, null = generator.random(40) < chance * 0.5, generator.random((20, 40)) < chance
        low, high = compare_with_null(group, null, resamples=400, rng_seed=trial).ci95
        covered += low <= -0.25 <= high
    assert 0.90 <= covered / 200 <= 0.985
    assert share_of_change(0.9, 0.8, start=0.7, end=0.9) == pytest.approx((1.0, 0.5))
    assert np.isnan(share_of_change(0.9, 0.8, start=0.7, end=0.7)).all()


def drawn_until_settled(group, null):
    """The p-value and the number of draws of a null that may stop early."""
    from neurondrift.statistics.null import empirical_p, is_settled

    planned = len(null)
    made = next((k for k in range(planned) if is_settled(group, null[:k], planned=planned)), planned)
    return empirical_p(group, null[:made]), made


@pytest.mark.parametrize("planned", [19, 20, 39, 99])
@pytest.mark.parametrize("prompts", [4, 32])
def test_a_null_that_stops_early_finds_nothing_that_the_whole_null_does_not(planned, prompts):
    from neurondrift.statistics.null import empirical_p

    generator = np.random.default_rng(planned)
    chance = generator.beta(8, 3, size=(600, 1))  # groups and draws are exchangeable, and tied as shares of prompts are
    outcomes = generator.binomial(prompts, chance, size=(600, 1 + planned)) / prompts
    whole = np.array([empirical_p(row[0], row[1:]) for row in outcomes])
    stopped, made = np.array([drawn_until_settled(row[0], row[1:]) for row in outcomes]).T
    assert (stopped[made < planned] > 0.1).all()
    assert (stopped[made == planned] == whole[made == planned]).all()
    for level in (0.05, 0.1):
        assert not ((stopped <= level) & (whole > level)).any()
        assert (stopped <= level).mean() <= (whole <= level).mean() <= level + 3 * np.sqrt(level / 600)
    assert made.min() >= 2
    assert made.mean() < planned / 2
    strong = [drawn_until_settled(0.25, row[1:] * 0.1 + 0.9) for row in outcomes]
    assert strong == [(1 / (1 + planned), planned)] * 600


def test_when_a_null_is_settled():
    from neurondrift.statistics.null import empirical_p, is_settled

    assert not is_settled(0.5, [], planned=20)
    assert not is_settled(0.5, [0.5], planned=20)
    assert is_settled(0.5, [0.5, 0.5], planned=20) and not is_settled(0.5, [0.5, 0.5], planned=29)
    assert is_settled(0.6, [0.5, 0.7], planned=20)
    assert not is_settled(0.9, [0.5, 0.6, 0.5, 0.6], planned=20)
    for planned in range(1, 200):  # the least p-value that a stopped null can have: h as extreme, one draw left
        needed = next(h for h in range(1, 300) if is_settled(0.0, [0.0] * h, planned=planned))
        assert needed >= 2 and (1 + needed) / (1 + planned) > 0.1
        assert needed == 2 or needed / (1 + planned) <= 0.1 + 1e-9
    assert empirical_p(0.0, [0.0, 0.0]) == 1


def test_what_is_undefined_says_why():
    from neurondrift.base.errors import DataError
    from neurondrift.statistics.null import compare_with_null

    same = compare_with_null([1, 0, 1], [[1, 0, 1]] * 4)
    assert same.effect == 0 and np.isnan(same.ci95).all() and "no prompt tells" in same.reason and same.p == 1
    one = compare_with_null([1, 0, 1], [[1, 1, 1]])
    assert np.isnan(one.null_sd) and "no spread" in one.reason and one.p_floor == one.p == 1
    none = compare_with_null([1, 0, 1], [])
    assert np.isnan(none.p) and "no random group" in none.reason
    with pytest.raises(DataError, match="do not fit"):
        compare_with_null([1, 0], [[1, 0, 1]])


def test_answers_that_do_not_count_are_in_no_mean_and_a_draw_without_any_is_extreme():
    from neurondrift.statistics.null import compare_with_null, empirical_p, is_settled

    nan = np.nan
    found = compare_with_null([1, nan, 0, 1], [[1, 0, 0, nan], [nan, nan, 0, 0], [1, 1, 0, 0]])
    assert found.value == pytest.approx(2 / 3)
    assert found.null_mean == pytest.approx((1 / 3 + 0 + 1 / 2) / 3)
    assert found.ci95[0] <= found.effect <= found.ci95[1]
    whole = compare_with_null([1, 0, 1], [[1, 0, 0], [0, 0, 1]], rng_seed=3)
    padded = compare_with_null([1, 0, 1, nan], [[1, 0, 0, nan], [0, 0, 1, nan]], rng_seed=3)
    assert padded.effect == whole.effect and padded.p == whole.p  # an answer that never counts changes nothing
    assert empirical_p(5.0, [0.0, nan, 0.0]) == 2 / 4  # a draw that broke the model might have been anything
    assert is_settled(0.5, [nan, nan], planned=20) and not is_settled(nan, [nan, nan], planned=20)
    silent = compare_with_null([nan, nan], [[1, 0]] * 3)
    assert np.isnan(silent.p) and np.isnan(silent.effect) and "no answer that counts" in silent.reason
    broken = compare_with_null([1, 0], [[nan, nan]] * 3)
    assert np.isnan(broken.effect) and "no random group" in broken.reason


def test_harmful_minus_ordinary_is_the_difference_of_the_comparisons():
    from neurondrift.statistics.null import compare_difference, compare_with_null, outcome_of

    generator = np.random.default_rng(2)
    harmful = generator.random(20) < 0.9, generator.random((9, 20)) < 0.4
    ordinary = generator.random(8) < 0.5, generator.random((9, 8)) < 0.3
    first, second = compare_with_null(*harmful), compare_with_null(*ordinary)
    both = compare_difference(outcome_of(*harmful), outcome_of(*ordinary))
    assert both.value == pytest.approx(first.value - second.value)
    assert both.effect == pytest.approx(first.effect - second.effect)
    widths = [c.ci95[1] - c.ci95[0] for c in (first, second, both)]
    assert max(widths[:2]) < widths[2] < sum(widths[:2])


def test_who_stands_out():
    from neurondrift.statistics.null import compare_with_null, draws_needed, standing

    null = np.zeros((20, 32))
    null[:, :4] = 1
    strong = np.zeros(32)
    strong[:20] = 1
    found = compare_with_null(strong, null)
    asked = {"tests": 1, "expected": "higher", "smallest_effect": 0.1}
    assert standing(found, found.p, **asked) == "stands_out"
    assert standing(found, found.p, **asked | {"expected": "lower"}) == "opposite"
    assert standing(found, found.p, **asked, was_stopped=True) == "stopped"
    assert standing(found, found.p * 2, **asked | {"tests": 2}) == "too_few_draws"
    assert standing(found, 0.2, **asked) == "not"
    assert standing(found, found.p, **asked | {"smallest_effect": 0.6}) == "small"
    one_flips = null[0].copy()
    one_flips[4] = 1
    small = compare_with_null(one_flips, null)
    assert small.p == 1 / 21 and standing(small, small.p, **asked) == "small"
    assert standing(compare_with_null([np.nan], [[1.0]]), np.nan, **asked) == "undefined"
    assert [draws_needed(tests) for tests in (1, 2, 8)] == [19, 39, 159]


@pytest.mark.parametrize(("draws", "tests"), [(20, 1), (99, 4)])
def test_what_a_design_could_have_found_is_found_so_often(draws, tests):
    from neurondrift.statistics.null import compare_with_null, smallest_found, standing

    sd, n, smallest = 0.05, 64, 0.1
    planned = {"null_sd": sd, "n": n, "draws": draws, "tests": tests, "smallest_effect": smallest}
    effect = smallest_found(**planned)
    assert smallest < effect < 0.6
    generator = np.random.default_rng(4)
    found, studies = 0, 150
    for trial in range(studies):
        # A share of prompts answers at random from group to group (spread), the rest alike; the group turns some more.
        null = np.zeros((draws, n))
        for k in range(draws):
            null[k, : round(np.clip(generator.normal(0.3, sd), 0, 1) * n)] = 1
        own = np.zeros(n)
        own[: round(np.clip(generator.normal(0.3, sd), 0, 1) * n)] = 1
        own[(generator.random(n) < effect / 0.7) & (own == 0)] = 1
        found_here = compare_with_null(own, null, resamples=300, rng_seed=trial)
        p_holm = min(1.0, found_here.p * tests)
        asked = {"tests": tests, "expected": "higher", "smallest_effect": smallest}
        found += standing(found_here, p_holm, **asked) == "stands_out"
    assert 0.68 <= found / studies <= 0.97
    assert np.isnan(smallest_found(**planned | {"tests": 20 * draws}))
    assert smallest_found(**planned | {"null_sd": 0.5}) == np.inf
