"""Strata and balance: quantile bins within sites, and what refining them mends."""

import numpy as np

from helpers.populations import make_population
from neurondrift.statistics.design.matching import balance, quantile_bins, refine_bins


def test_quantile_bins_are_equal_sized_ordered_and_within_site():
    rng = np.random.default_rng(0)
    site = rng.integers(0, 4, 1000)
    magnitude = rng.random(1000)
    code = quantile_bins(site, magnitude, 10)
    assert (code // 10 == site).all()
    for s in range(4):
        inside = np.flatnonzero(site == s)
        counts = np.bincount(code[inside] % 10, minlength=10)
        assert counts.max() - counts.min() <= 1
        ordered = inside[np.argsort(magnitude[inside])]
        assert (np.diff(code[ordered]) >= 0).all()


def test_quantile_bins_do_not_depend_on_the_order_of_tied_neurons():
    rng = np.random.default_rng(0)
    site, magnitude = rng.integers(0, 3, 600), rng.integers(0, 9, 600) / 2
    code, order = quantile_bins(site, magnitude, 10), rng.permutation(600)
    assert (quantile_bins(site[order], magnitude[order], 10) == code[order]).all()
    for s in range(3):
        for value in np.unique(magnitude):
            assert len(np.unique(code[(site == s) & (magnitude == value)])) <= 1


def test_small_sites_get_fewer_bins():
    assert len(np.unique(quantile_bins(np.zeros(16, dtype=int), np.arange(16.0), 10))) == 3


def test_refinement_splits_within_bins_and_balances():
    rng = np.random.default_rng(0)
    site = np.repeat(np.arange(20), 1000)
    magnitude = np.exp(rng.standard_normal(len(site)))
    member = rng.random(len(site)) < 0.02 * np.minimum(1, (magnitude / 8) ** 2) + 0.001
    coarse = refine_bins(site, magnitude, member, 10, rounds=0)
    fine = refine_bins(site, magnitude, member, 10)
    assert len(np.unique(coarse)) == 200
    parents = np.unique(np.stack([fine, coarse]), axis=1)
    assert len(parents.T) == len(np.unique(fine)) > 200
    before, after = (balance(site, magnitude, member, s, 20).after for s in (coarse, fine))
    assert abs(after) < abs(before) / 1.5


def test_balance_of_a_random_group_is_near_zero_and_by_site():
    population, groups = make_population(np.random.default_rng(0))
    stratum = refine_bins(population.site, population.norm, groups["random"], 10)
    found = balance(population.site, population.norm, groups["random"], stratum, len(population.site_names))
    assert abs(found.before) < 0.3
    assert found.site_before.shape == (24,)
    assert found.n_matched == found.n_members
