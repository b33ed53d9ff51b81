"""Top of a residual: neurons whose score is higher than other scores of theirs tell, site by site.

Knows arrays only. Shapes: N neurons of a site, U of them usable, C covariates.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from neurondrift.base.errors import GroupError
from neurondrift.groups.group import Group, Indices, without_empty
from neurondrift.groups.selection import (
    Scores,
    by_site,
    check_fraction,
    count_of,
    score_provenance,
    shape_of,
    top_indices,
    values_of,
)

FloatArray = npt.NDArray[np.float64]


def select_residual(
    scores: Scores,
    covariates: Mapping[str, Scores],
    *,
    fraction: float,
    provenance: Mapping[str, Any] | None = None,
) -> Group:
    """The neurons with the highest residual of log score on the logs of covariates: what a score has of its own.

    Parameters
    ----------
    scores
        Site name -> `[out, in]` (a neuron's score is the sum over its row) or `[out]`, not negative.
    covariates
        Name -> the same sites, `[out, in]` or `[out]`: other scores of the neurons, their norm.
    fraction
        Share k in (0, 1]: the ⌊k·n⌋ highest, at least 1, of each site's n neurons (fewer where fewer are usable).
    provenance
        Noted in the group, beside the rule and its numbers: `left_out` counts the neurons with a score or covariate
        that is zero or not finite, which take no part; `sites_left_out` the sites with too few others for a fit (no
        more than it has coefficients), which have no members.

    Returns
    -------
    Group
        Of neurons. Within each site log score = b₀ + Σ b_c log covariate_c + residual by ordinary least squares, so
        that the residuals of a site are uncorrelated with every covariate's logarithm there.

    Raises
    ------
    GroupError
        A fraction outside (0, 1], no covariates, other sites or sizes than those of the scores, or no members at all.

    Notes
    -----
    Ties go to the lower index. The factor of a covariate or of the scores (their unit) changes nothing.
    """
    check_fraction("fraction", fraction)
    if not covariates:
        raise GroupError("A residual needs at least one covariate", received={})
    for name, values in covariates.items():
        if list(values) != list(scores):
            raise GroupError(f"The covariate {name} is of other sites than the scores")
    left_out: dict[str, int] = {}

    def of_site(site: str) -> Indices:
        columns = {name: values_of(values, site, "neuron") for name, values in covariates.items()}
        own_N = values_of(scores, site, "neuron")
        for name, column in columns.items():
            if column.shape != own_N.shape:
                raise GroupError(
                    f"The covariate {name} does not fit {site}", received=column.shape, allowed=str(own_N.shape)
                )
        residual_N = residuals(own_N, list(columns.values()))
        usable_U = np.flatnonzero(np.isfinite(residual_N))
        left_out[site] = len(own_N) - len(usable_U)
        if not len(usable_U):
            return usable_U
        return usable_U[top_indices(residual_N[usable_U], count_of(fraction, len(own_N)), site)]

    members = by_site(scores, of_site)
    noted = {
        "rule": "residual",
        "fraction": fraction,
        "on": list(covariates),
        **score_provenance(scores),
        **(provenance or {}),
        "left_out": sum(left_out.values()),
        "sites_left_out": sum(not len(own) for own in members.values()),
    }
    if noted["sites_left_out"] == len(members):
        raise GroupError("No site has enough neurons with positive scores and covariates for a residual")
    shapes = {site: shape_of(scores[site]) for site in scores}
    return Group(granularity="neuron", members=without_empty(members), shapes=shapes, provenance=noted)


def residuals(score_N: npt.NDArray[Any], covariates: list[npt.NDArray[Any]]) -> FloatArray:
    """Residual of log score on the logs of the covariates by ordinary least squares, with an intercept: float64 `[N]`.

    NaN for the neurons with a value that is zero, negative or not finite, and for all where there are no more usable
    ones than coefficients. Covariates that depend on each other (or do not vary) do no harm.
    """
    values_CN = np.stack([np.asarray(values, dtype=np.float64) for values in (score_N, *covariates)])
    usable_N: npt.NDArray[np.bool_] = np.all(np.isfinite(values_CN) & (values_CN > 0), axis=0)
    result_N = np.full(len(usable_N), np.nan)
    if usable_N.sum() <= len(values_CN):
        return result_N
    logs_CU = np.log(values_CN[:, usable_N])
    logs_CU -= logs_CU.mean(axis=1, keepdims=True)  # the intercept; what is left is fitted without one
    target_U, design_UC = logs_CU[0], logs_CU[1:].T
    spread_C = design_UC.std(axis=0)
    design_UC = design_UC[:, spread_C > 1e-12] / spread_C[spread_C > 1e-12]
    coefficients_C = np.linalg.lstsq(design_UC, target_U, rcond=1e-10)[0]
    result_N[usable_N] = target_U - design_UC @ coefficients_C
    return result_N
