"""Who is compared with whom, and with what weights, in a whole model: the designs of both comparisons and their gate.

A design is made of sites, covariates and membership, never of a drift. What it gives is one coefficient per neuron, so
that an effect is a sum of coefficient times log drift, site by site. Shapes: N neurons, J sites, H strata, K
covariates.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from neurondrift.statistics.design.balancing import balance_site, effective_size
from neurondrift.statistics.results import ComparisonName, CovariateBalance, Incomparable

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]

#: The gate: largest |standardised mean difference| (Stuart 2010), and share of members without a counterfactual.
LARGEST_DIFFERENCE, LARGEST_SHARE = 0.1, 0.05
#: A slope within strata rests on at least so many degrees of freedom: of the controls in strata with members, else of
#: all controls of the site.
FREEDOM_OF_STRATA, FREEDOM_OF_SITE = 20, 10
NO_DIFFERENCE = "no member is compared, or the covariate does not vary within sites"


class Design(NamedTuple):
    """The comparison of one group.

    Attributes
    ----------
    coefficient_N
        1 for a member that is compared, mostly negative for controls, 0 for all others. In every site they sum to 0,
        and so does coefficient times log norm (`norm`), or times every covariate that is balanced (`matched`).
    compared_N
        Members that are compared.
    weight_N
        Weights of the controls, which sum to the members compared in every site; without the regression's part.
    balance
        Balance of every covariate that is known.
    members, undefined, without_control
        Members; those without a log drift; those others that are not compared.
    sites_left_out
        Sites with such a member and none that is compared.
    because
        Why the group has no counterfactual; empty where it is comparable.
    """

    name: ComparisonName
    coefficient_N: FloatArray
    compared_N: BoolArray
    weight_N: FloatArray
    balance: tuple[CovariateBalance, ...]
    members: int
    undefined: int
    without_control: int
    sites_left_out: int
    because: tuple[Incomparable, ...]

    @property
    def effective_controls(self) -> float:
        """Kish's effective number of the weights."""
        return effective_size(self.weight_N)


def norm_design(
    site_N: IntArray,
    member_N: BoolArray,
    candidate_N: BoolArray,
    usable_N: BoolArray,
    stratum_N: IntArray,
    logs: Mapping[str, FloatArray],
) -> Design:
    """Controls of the same stratum of site and |w|, with a regression for the log norm that is left within strata.

    In stratum h with m members and c controls every control weighs m / c. The remaining difference of log norm in a
    site is taken off with the slope of log drift on log norm within strata among the site's controls (weighted as
    above; among all controls of the site where those leave fewer than `FREEDOM_OF_STRATA` degrees of freedom; not at
    all below `FREEDOM_OF_SITE`).

    Parameters
    ----------
    site_N, stratum_N
        Site and dense stratum of each neuron.
    member_N, candidate_N
        Members, and neurons that may be controls; disjoint.
    usable_N
        Neurons with a log drift and a log norm.
    logs
        Logs of the covariates, ``norm`` among them; NaN where undefined.

    References
    ----------
    Abadie and Imbens (2011), Bias-corrected matching estimators for average treatment effects, JBES 29.
    """
    site, stratum = site_N[usable_N], stratum_N[usable_N]
    member, control = member_N[usable_N], candidate_N[usable_N]
    x = logs["norm"][usable_N]
    strata, sites = _count_of(stratum_N), _count_of(site_N)
    members_H = np.bincount(stratum[member], minlength=strata)
    controls_H = np.bincount(stratum[control], minlength=strata)
    paired_H = (members_H > 0) & (controls_H > 0)
    compared = member & paired_H[stratum]
    ratio_H = np.divide(members_H, controls_H, out=np.zeros(strata), where=controls_H > 0)
    weight = np.where(control, ratio_H[stratum], 0.0)
    gap_J = np.bincount(site, weights=(compared - weight) * x, minlength=sites)
    mean_H = np.bincount(stratum[control], weights=x[control], minlength=strata) / np.maximum(controls_H, 1)
    centred = np.where(control, x - mean_H[stratum], 0.0)
    coefficient: FloatArray = compared.astype(np.float64) - weight
    done_J = np.zeros(sites, dtype=np.bool_)
    site_of_H = np.zeros(strata, dtype=np.int64)
    site_of_H[stratum] = site
    for used_H, own, fewest in (
        (paired_H, weight, FREEDOM_OF_STRATA),
        (controls_H > 0, control.astype(np.float64), FREEDOM_OF_SITE),
    ):
        freedom_H = np.where(used_H, controls_H - 1, 0)
        freedom_J = np.bincount(site_of_H, weights=freedom_H, minlength=sites)
        square_J = np.bincount(site, weights=own * centred**2, minlength=sites)
        here_J = ~done_J & (freedom_J >= fewest) & (square_J > 0)
        share_J = np.divide(gap_J, square_J, out=np.zeros(sites), where=here_J)
        coefficient = coefficient - share_J[site] * own * centred
        done_J |= here_J
    return _design("norm", site_N, member_N, candidate_N, usable_N, compared, weight, coefficient, logs, ("norm",))


def matched_design(
    site_N: IntArray,
    member_N: BoolArray,
    candidate_N: BoolArray,
    usable_N: BoolArray,
    logs: Mapping[str, FloatArray],
    names: tuple[str, ...],
) -> Design:
    """Controls of the same site, weighted so that the means of several log covariates equal those of the members.

    Members without a finite covariate, and those that the controls of their site cannot stand for (`balance_site`),
    are not compared. Parameters as in `norm_design`; `names` are the covariates to balance, keys of `logs`.
    """
    x_NK = np.stack([logs[name] for name in names], axis=1)
    known_N = usable_N & np.isfinite(x_NK).all(axis=1)
    compared_N, weight_N = np.zeros(len(site_N), dtype=np.bool_), np.zeros(len(site_N))
    order = np.argsort(site_N, kind="stable")
    ends = np.cumsum(np.bincount(site_N))
    for code in np.unique(site_N[member_N & known_N]).tolist():
        inside = order[ends[code - 1] if code else 0 : ends[code]]
        inside = inside[known_N[inside]]
        members, controls = inside[member_N[inside]], inside[candidate_N[inside]]
        balanced = balance_site(x_NK[controls], x_NK[members])
        compared_N[members] = balanced.kept
        weight_N[controls] = balanced.weights
    compared, weight = compared_N[usable_N], weight_N[usable_N]
    return _design("matched", site_N, member_N, candidate_N, usable_N, compared, weight, compared - weight, logs, names)


def _count_of(code_N: IntArray) -> int:
    return int(code_N.max()) + 1 if len(code_N) else 0


def _design(
    name: ComparisonName,
    site_N: IntArray,
    member_N: BoolArray,
    candidate_N: BoolArray,
    usable_N: BoolArray,
    compared: BoolArray,
    weight: FloatArray,
    coefficient: FloatArray,
    logs: Mapping[str, FloatArray],
    gated: tuple[str, ...],
) -> Design:
    """The parts over the usable neurons, put among all, with balance and gate."""
    compared_N = np.zeros(len(site_N), dtype=np.bool_)
    compared_N[usable_N] = compared
    weight_N, coefficient_N = np.zeros(len(site_N)), np.zeros(len(site_N))
    weight_N[usable_N], coefficient_N[usable_N] = weight, coefficient
    balance = []
    for covariate, values_N in logs.items():
        before, after = standardised_difference(
            site_N, values_N, member_N & usable_N, candidate_N & usable_N, compared_N, weight_N
        )
        reason = "" if np.isfinite([before, after]).all() else NO_DIFFERENCE
        balance.append(
            CovariateBalance(name=covariate, before=before, after=after, gated=covariate in gated, reason=reason)
        )
    members, measured = int(member_N.sum()), int((member_N & usable_N).sum())
    lost = measured - int(compared.sum())
    because: list[Incomparable] = []
    if not compared.any():
        because.append("nothing_compared")
    if any(not abs(d.after) <= LARGEST_DIFFERENCE for d in balance if d.gated) and compared.any():
        because.append("imbalance")
    if lost > LARGEST_SHARE * measured:
        because.append("without_control")
    undefined_controls = int((candidate_N & ~usable_N).sum())
    if members - measured > LARGEST_SHARE * members or undefined_controls > LARGEST_SHARE * candidate_N.sum():
        because.append("undefined_drift")
    with_member = np.unique(site_N[member_N & usable_N])
    return Design(
        name,
        coefficient_N,
        compared_N,
        weight_N,
        tuple(balance),
        members,
        members - measured,
        lost,
        len(with_member) - len(np.unique(site_N[compared_N])),
        tuple(because),
    )


def standardised_difference(
    site_N: IntArray,
    value_N: FloatArray,
    member_N: BoolArray,
    candidate_N: BoolArray,
    compared_N: BoolArray,
    weight_N: FloatArray,
) -> tuple[float, float]:
    """Mean difference of a covariate within sites, members minus candidates, before and under weights, in SD.

    The SD is the root of the mean of two variances within sites: that of the members (pooled over sites; that of the
    candidates where no site has two) and that of the candidates (each site weighted by its members). It is the same
    before and after, so that only the numerator changes; variation between sites is not part of it.

    Returns
    -------
    tuple of float
        Before (all members), and after (members compared, weighted controls); NaN where the SD is 0 and the
        difference is not.

    References
    ----------
    Stuart (2010), Matching methods for causal inference, Statistical Science 25.
    """
    sites = _count_of(site_N)
    known_N = np.isfinite(value_N)
    counts, means, squares = [], [], []
    for arm_N in (member_N & known_N, candidate_N & known_N):
        code, value = site_N[arm_N], value_N[arm_N]
        count = np.bincount(code, minlength=sites)
        mean = np.bincount(code, weights=value, minlength=sites) / np.maximum(count, 1)
        counts.append(count)
        means.append(mean)
        squares.append(np.bincount(code, weights=(value - mean[code]) ** 2, minlength=sites))
    both = (counts[0] > 0) & (counts[1] > 0)
    members = np.where(both, counts[0], 0)
    if not both.any():
        return float("nan"), float("nan")
    variance_of_controls = float((members * squares[1] / np.maximum(counts[1] - 1, 1)).sum() / members.sum())
    freedom = int(np.maximum(members - 1, 0).sum())
    variance_of_members = float(squares[0][both].sum()) / freedom if freedom else variance_of_controls
    spread = np.sqrt((variance_of_members + variance_of_controls) / 2)
    gap_before = float((members * (means[0] - means[1])).sum() / members.sum())
    compared_N = compared_N & known_N
    weight = np.where(known_N, weight_N, 0.0)
    total, total_weight = compared_N.sum(), weight.sum()
    value = np.where(known_N, value_N, 0.0)
    if total and total_weight > 0:
        gap_after = float((compared_N * value).sum() / total - (weight * value).sum() / total_weight)
    else:
        gap_after = float("nan")

    def in_spreads(gap: float) -> float:
        if abs(gap) < 1e-12:
            return 0.0
        return float(gap / spread) if spread > 0 else float("nan")

    return in_spreads(gap_before), in_spreads(gap_after)
