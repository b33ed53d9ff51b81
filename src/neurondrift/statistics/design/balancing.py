"""Weights that make controls like members in the mean of several covariates, within one site.

Looks at covariates and membership only, never at a drift. Shapes: C controls, M members, K covariates.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]

#: Largest difference of means that counts as none, in SD of the controls, and most Newton steps towards it.
TOLERANCE, STEPS = 1e-8, 60
#: Fewest controls, by Kish's effective number, that may stand for the members of a site; never fewer than the members.
FEWEST_CONTROLS = 5.0


class Balanced(NamedTuple):
    """`kept` [M]: members that have a counterfactual; `weights` [C]: of the controls, summing to the number kept."""

    kept: BoolArray
    weights: FloatArray


def effective_size(weights: FloatArray) -> float:
    """Kish's effective number, (sum w)^2 / sum w^2; 0 without weight."""
    square = float(weights @ weights)
    return float(weights.sum()) ** 2 / square if square > 0 else 0.0


def entropy_weights(controls_CK: FloatArray, target_K: FloatArray, fewest: float = 1.0) -> FloatArray | None:
    """The weights nearest to uniform, in relative entropy, under which the controls' means are `target_K`.

    Newton's method on the convex dual, log sum exp(lambda . (x - target)), whose least value is the entropy of the
    weights. Kish's effective number is at most the exponential of it, so that the search ends where that is too small.

    Parameters
    ----------
    controls_CK
        Covariates in units of about one standard deviation, float64 [C, K], finite.
    target_K
        The means to reach.
    fewest
        Smallest effective number of controls that is wanted.

    Returns
    -------
    float64 [C] or None
        Weights that sum to 1; None where the target lies outside the hull of the controls, or so near its edge that
        fewer than `fewest` effective controls reach it.

    References
    ----------
    Hainmueller (2012), Entropy balancing for causal effects, Political Analysis 20.
    """
    away_CK = controls_CK - target_K
    if (away_CK.min(axis=0) > TOLERANCE).any() or (away_CK.max(axis=0) < -TOLERANCE).any():
        return None
    tilt_K = np.zeros(len(target_K))
    score_C = np.zeros(len(away_CK))
    top, value = 0.0, np.log(len(away_CK))
    for _ in range(STEPS):
        weight_C = np.exp(score_C - top)
        weight_C /= weight_C.sum()
        mean_K = weight_C @ away_CK
        if np.abs(mean_K).max() <= TOLERANCE:
            return weight_C if effective_size(weight_C) >= fewest else None
        curvature_KK = (away_CK * weight_C[:, None]).T @ away_CK - np.outer(mean_K, mean_K)
        curvature_KK[np.diag_indices_from(curvature_KK)] += 1e-10
        step_K = -np.linalg.solve(curvature_KK, mean_K)
        slope, size = float(step_K @ mean_K), 1.0
        while True:
            new_C = away_CK @ (tilt_K + size * step_K)
            new_top = float(new_C.max())
            new_value = new_top + np.log(np.exp(new_C - new_top).sum())
            if new_value <= value + 1e-4 * size * slope + 1e-12:
                break
            size /= 2
            if size < 1e-8:
                return None
        tilt_K, score_C, top, value = tilt_K + size * step_K, new_C, new_top, new_value
        if value < np.log(fewest):
            return None
    return None


def balance_site(controls_CK: FloatArray, members_MK: FloatArray) -> Balanced:
    """Entropy weights for as many members of a site as the controls can stand for.

    Where the mean of the members cannot be reached, or only with fewer effective controls than `FEWEST_CONTROLS` or
    than members, members are left out, those first that lie farthest (Mahalanobis) from the controls; the smallest
    number that mends it is sought by bisection.
    """
    members = len(members_MK)
    none = Balanced(np.zeros(members, dtype=np.bool_), np.zeros(len(controls_CK)))
    if len(controls_CK) < FEWEST_CONTROLS or members == 0:
        return none
    centre_K, spread_K = controls_CK.mean(axis=0), controls_CK.std(axis=0)
    spread_K = np.where(spread_K > 0, spread_K, 1.0)
    scaled_CK, scaled_MK = (controls_CK - centre_K) / spread_K, (members_MK - centre_K) / spread_K
    inverse_KK = np.linalg.pinv(scaled_CK.T @ scaled_CK / len(scaled_CK), rcond=1e-8)
    distance_M = np.einsum("mk,kl,ml->m", scaled_MK, inverse_KK, scaled_MK)
    nearest = np.argsort(distance_M, kind="stable")

    def reached(count: int) -> FloatArray | None:
        target_K = scaled_MK[nearest[:count]].mean(axis=0)
        return entropy_weights(scaled_CK, target_K, max(FEWEST_CONTROLS, count))

    best, weights = members, reached(members)
    if weights is None:
        best, beyond = 0, members
        while beyond - best > 1:
            middle = (best + beyond) // 2
            found = reached(middle)
            if found is None:
                beyond = middle
            else:
                best, weights = middle, found
    if weights is None:
        return none
    kept = none.kept.copy()
    kept[nearest[:best]] = True
    return Balanced(kept, weights * best)
