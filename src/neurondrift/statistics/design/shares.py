"""A design applied to parts of a sum: which share of it members carry, beside what their controls would carry.

Parts have signs, so that no ratio of them has a logarithm: shares are compared by their difference, and by a band
around what is expected. The effect is linear in the parts, with the clusters of ratios. Shapes: N neurons, S seeds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from neurondrift.statistics.design.designs import Design
from neurondrift.statistics.design.ratios import NAN, Places, Rules, infer_ratio, sums_of, to_estimate
from neurondrift.statistics.estimates import BoolArray, FloatArray
from neurondrift.statistics.inference import Inference
from neurondrift.statistics.results import Cluster, ComparisonName, CovariateBalance, Estimate, Incomparable

#: `more`: beyond the expected share by more than the band; `not_more`: shown not to be; else `inconclusive`.
ShareVerdict = Literal["more", "not_more", "inconclusive"]
NOTHING_LOST = "nothing was lost in at least one seed: there is nothing to have a share of"
NOT_POSITIVE = "comparable neurons carry no positive share"
SHARE_FIELDS = ("share_of_group", "share", "expected", "ratio", "smallest_more", "p_more", "p_not_more")


@dataclass(frozen=True, kw_only=True)
class ShareEffect:
    """Which share of a sum the members of a group carry.

    `share_of_group` is of all members; `share` of those that are compared, `expected` what their controls carry,
    weighted to be as many; all means over seeds. `difference` is share - expected. `margin` is what counts as the band:
    (band - 1) times the larger of `expected` and `share_of_neurons`, the part of all neurons that is compared. `excess`
    is difference - margin: "more" where its 95 % interval lies above 0, "not_more" where its 90 % interval lies below.
    `ratio` is share / expected, NaN where that is not positive. `p_more` tests "not beyond the band", `p_not_more`
    "beyond the band", one-sided. `smallest_more`: the smallest true share that would be called "more" with 80 % power.
    """

    comparison: ComparisonName
    share_of_group: float
    share: float
    expected: float
    share_of_neurons: float
    ratio: float
    difference: Estimate
    margin: float
    excess: Estimate
    p_more: float
    p_not_more: float
    verdict: ShareVerdict
    comparable: bool
    not_comparable_because: tuple[Incomparable, ...]
    smallest_more: float
    n_members: int
    n_compared: int
    n_without_control: int
    sites: int
    balance: tuple[CovariateBalance, ...]
    cluster: Cluster
    per_seed: tuple[float, ...]
    expected_per_seed: tuple[float, ...]
    reasons: Mapping[str, str] = dataclasses.field(default_factory=dict)


def share_effect(
    design: Design, member_N: BoolArray, parts_SN: FloatArray, totals_S: FloatArray, places: Places, rules: Rules
) -> ShareEffect:
    """The share of one group under one design, which must have been made for all neurons with a finite part.

    Parameters
    ----------
    member_N
        Membership, bool.
    parts_SN
        What each neuron contributed, finite, in any unit; neurons that did not move contribute 0.
    totals_S
        The sum that the shares are of, of the sign of a loss: shares are undefined unless each is below 0.
    rules
        `band` above 1, as for ratios.
    """
    lost = bool((totals_S < 0).all())
    shares_SN = parts_SN / np.where(totals_S < 0, totals_S, np.nan)[:, None]
    compared = int(design.compared_N.sum())
    own_S = shares_SN[:, design.compared_N].sum(axis=1)
    away_S = (shares_SN * np.where(np.isfinite(shares_SN), design.coefficient_N, 0.0)).sum(axis=1)
    expected_S = own_S - away_S
    share, expected = float(own_S.mean()), float(expected_S.mean())
    of_neurons = compared / len(places.site_N)
    by_expected = expected >= of_neurons
    size = rules.band - 1
    margin = size * (expected if by_expected else of_neurons)
    # The band around what is expected varies with it; around a share of neurons it is a constant.
    factor = rules.band if by_expected else 1.0
    shift = 0.0 if by_expected else margin

    def inferred(times: float, minus: float) -> tuple[Inference, Cluster]:
        coefficient_N = np.where(design.compared_N, design.coefficient_N, times * design.coefficient_N)
        found = infer_ratio(sums_of(coefficient_N, design.compared_N, shares_SN, places), places, rules)
        mean = found.inferred
        return (
            mean._replace(
                value=mean.value * compared - minus,
                se=mean.se * compared,
                per_seed=mean.per_seed * compared - minus,
            ),
            found.cluster,
        )

    difference, _ = inferred(1.0, 0.0)
    excess, cluster = inferred(factor, shift)
    if not lost or not compared:
        share = expected = NAN
    if not lost:
        difference, excess = (each._replace(reason=NOTHING_LOST) for each in (difference, excess))
    estimate = to_estimate(excess, compared)
    comparable = not design.because
    reasons: dict[str, str] = {}
    if excess.reason:
        reasons |= dict.fromkeys(("smallest_more", "p_more", "p_not_more"), excess.reason)
    if not expected > 0:
        reasons["ratio"] = NOT_POSITIVE
    if not compared:
        reasons |= dict.fromkeys(SHARE_FIELDS[1:], excess.reason)
    if not lost:
        reasons = dict.fromkeys(SHARE_FIELDS, NOTHING_LOST)
    p_more, p_not_more, smallest = NAN, NAN, NAN
    if excess.reference is not None and lost:
        at = excess.value / excess.se
        p_more, p_not_more = excess.reference.upper(at), excess.reference.lower(at)
        smallest = expected + margin + excess.se * (excess.reference.quantile(0.975) - excess.reference.quantile(0.2))
    return ShareEffect(
        comparison=design.name,
        share_of_group=float(shares_SN[:, member_N].sum(axis=1).mean()),
        share=share,
        expected=expected,
        share_of_neurons=of_neurons,
        ratio=share / expected if expected > 0 else NAN,
        difference=to_estimate(difference, compared),
        margin=margin,
        excess=estimate,
        p_more=p_more,
        p_not_more=p_not_more,
        verdict=called_share(estimate) if comparable and lost else "inconclusive",
        comparable=comparable,
        not_comparable_because=design.because,
        smallest_more=smallest,
        n_members=design.members,
        n_compared=compared,
        n_without_control=design.without_control,
        sites=difference.sites,
        balance=design.balance,
        cluster=cluster,
        per_seed=tuple(own_S.tolist()),
        expected_per_seed=tuple(expected_S.tolist()),
        reasons=reasons,
    )


def called_share(excess: Estimate) -> ShareVerdict:
    """The verdict that the intervals of an excess over the band allow: `excess` is a difference of shares."""
    if excess.ci95[0] > 0:
        return "more"
    return "not_more" if excess.ci90[1] < 0 else "inconclusive"
