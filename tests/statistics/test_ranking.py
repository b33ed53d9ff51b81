"""How well a score finds what is known: by counting pairs and thresholds."""

import numpy as np
import pytest

from neurondrift.statistics.known.ranking import (
    auroc_of,
    average_precision,
    found,
    percentiles,
    precision_at,
    within,
)


def roc_auc_score(positive, score):
    """Every pair of a positive and another, counted."""
    difference = score[positive][:, None] - score[~positive]
    return ((difference > 0) + 0.5 * (difference == 0)).mean()


def average_precision_score(positive, score):
    """The area under precision against recall, threshold by threshold."""
    area, recall = 0.0, 0.0
    for threshold in sorted(set(score), reverse=True):
        chosen = score >= threshold
        reached = (positive & chosen).sum() / positive.sum()
        area, recall = area + (reached - recall) * positive[chosen].mean(), reached
    return area


@pytest.fixture
def drawn():
    generator = np.random.default_rng(3)
    score = (4 * generator.normal(size=400)).round() / 4  # with ties, exact also where a site adds to them
    positive = generator.random(400) < 0.1
    score[positive] += 0.75
    return score, positive, np.repeat(np.arange(8), 50)


def test_auroc_and_average_precision_are_what_counting_gives(drawn):
    score, positive, _ = drawn
    assert auroc_of(score, positive) == pytest.approx(roc_auc_score(positive, score))
    assert average_precision(score, positive) == pytest.approx(average_precision_score(positive, score))


def test_auroc_is_taken_within_strata(drawn):
    score, positive, stratum = drawn
    shifted = score + 100 * stratum  # the site says nothing of who is planted
    mean = within(shifted, stratum, positive, np.ones(400, dtype=bool))
    own = [roc_auc_score(positive[stratum == s], score[stratum == s]) for s in range(8) if positive[stratum == s].any()]
    assert mean.mean.mean == pytest.approx(np.mean(own))
    assert mean.strata == len(own)
    half = 2.3646 * np.std(own, ddof=1) / np.sqrt(len(own))  # t of 7 degrees of freedom
    assert mean.mean.high - mean.mean.mean == pytest.approx(half, rel=1e-3)


def test_precision_cuts_a_tie_evenly():
    score, positive = np.array([3.0, 1.0, 1.0, 1.0, 0.0]), np.array([True, True, False, False, True])
    assert precision_at(score, positive, 3) == pytest.approx((1 + 2 / 3) / 3)
    assert precision_at(np.zeros(5), positive, 3) == pytest.approx(0.6)  # all alike: the base rate


def test_what_is_undefined_ranks_last():
    score, positive = np.array([np.nan, -5.0, 2.0]), np.array([True, False, False])
    assert auroc_of(score, positive) == 0
    assert percentiles(score, np.zeros(3, dtype=int)).tolist() == pytest.approx([1 / 6, 1 / 2, 5 / 6])


def test_decoy_and_as_far_compare_with_the_right_ones():
    stratum = np.zeros(8, dtype=int)
    planted, decoy, far = (np.array([letter == c for letter in "PPQQVVRR"]) for c in "PQV")
    score = np.array([5.0, 4.0, 9.0, 8.0, 3.0, 2.0, 1.0, 0.0])  # Q over P over V over the rest
    row = found(score, stratum, planted, decoy, decoy | far)
    assert row.auroc.mean == pytest.approx(8 / 12)
    assert row.as_far.mean == pytest.approx(4 / 8)
    assert row.decoy.mean == 1
    assert row.precision == 0
    assert row.base_rate == 0.25


def test_nothing_to_compare_is_undefined():
    none = np.zeros(4, dtype=bool)
    row = found(np.arange(4.0), np.zeros(4, dtype=int), none, none, none)
    assert np.isnan([row.auroc.mean, row.decoy.mean, row.as_far.mean, row.average_precision, row.precision]).all()
