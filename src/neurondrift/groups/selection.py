"""Rules that make groups: the top share of scores or of a residual, the set difference of two, and random ones.

Know arrays only. Shapes: N neurons of a site, U of them usable, C covariates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from neurondrift.base.errors import GroupError
from neurondrift.groups.group import Granularity, Group, Indices, without_empty

Per = Literal["site", "row", "model"]
#: What becomes of members without a score (NaN): an error, or they take no part and `left_out` counts them.
Undefined = Literal["error", "leave out"]
FloatArray = npt.NDArray[np.float64]
Scores: TypeAlias = Mapping[str, Any]  # site -> [out, in] (or [out]) array or CPU tensor

THREADS = 2


def select_top(
    scores: Scores,
    *,
    fraction: float,
    granularity: Granularity = "weight",
    per: Per = "site",
    undefined: Undefined = "error",
    provenance: Mapping[str, Any] | None = None,
) -> Group:
    """The highest-scoring members.

    Parameters
    ----------
    scores
        Site name -> `[out, in]`, or `[out]` where the method scores neurons only. Read site by site: a
        `ScoreFile` is never in memory as a whole.
    fraction
        Share k in (0, 1]: the ⌊k·n⌋ highest, at least 1, of each site's n neurons or weights.
    granularity
        `neuron` (importance: the sum over the row), `weight`, or `unit` for scores from `unit_scores`.
    per
        `site`; `row` (weights: the share is taken within each row, as Wanda prunes); `model` (one threshold).
    undefined
        Members whose score is NaN: `error`, or `leave out`: they take no part, the share is still of all, and
        provenance counts them (`left_out`). By site only.
    provenance
        Noted in the group; `role` says what it is to a study: `safety` or `utility` (`Group.role`).

    Raises
    ------
    GroupError
        A fraction outside (0, 1], scores that are not finite, or a granularity that the scores do not have.

    Notes
    -----
    Ties go to the lower index, so that a selection is reproducible.
    """
    check_fraction("fraction", fraction)
    provenance = {"rule": "top", "fraction": fraction, "per": per, **score_provenance(scores), **(provenance or {})}
    shapes = {site: shape_of(scores[site]) for site in scores}
    if per == "model":
        members = _top_of_model(scores, fraction, granularity)
    elif undefined == "leave out":
        members, left_out = _top_of_defined(scores, fraction, granularity)
        provenance["left_out"] = left_out
    else:
        members = by_site(scores, lambda site: _top_of_site(values_of(scores, site, granularity), fraction, per, site))
    return Group(granularity=granularity, members=members, shapes=shapes, provenance=provenance)


def set_difference(
    safety: Scores,
    utility: Scores,
    *,
    p: float,
    q: float,
    granularity: Granularity = "weight",
    provenance: Mapping[str, Any] | None = None,
) -> Group:
    """Top-q of safety minus top-p of utility, site by site (Wei et al. 2024, eq. 4).

    Parameters as in `select_top`; `p` and `q` are shares in (0, 1]. A site whose difference is empty has no
    members. Raises `GroupError` where the scores are of different models or sites, or nothing is left at all.
    """
    check_fraction("p", p)
    check_fraction("q", q)
    if list(safety) != list(utility):
        raise GroupError("The safety and utility scores hold different sites")
    first, second = score_provenance(safety), score_provenance(utility)
    if first.get("model") != second.get("model"):
        raise GroupError(
            "The two score sets are of different models", received=[first.get("model"), second.get("model")]
        )

    def of_site(site: str) -> Indices:
        top_safety = _top_of_site(values_of(safety, site, granularity), q, "site", site)
        top_utility = _top_of_site(values_of(utility, site, granularity), p, "site", site)
        return np.setdiff1d(top_safety, top_utility, assume_unique=True)

    members = without_empty(by_site(safety, of_site))
    if not members:
        raise GroupError(
            "The set difference is empty in every site", received=f"p={p}, q={q}", fix="raise q or lower p"
        )
    noted = {
        "rule": "set_difference",
        "p": p,
        "q": q,
        **first,
        "utility_data": second.get("data"),
        **(provenance or {}),
    }
    return Group(
        granularity=granularity,
        members=members,
        shapes={site: shape_of(safety[site]) for site in safety},
        provenance=noted,
    )


def set_difference_like(
    scores: Scores,
    utility: Scores,
    *,
    p: float,
    like: Group,
    provenance: Mapping[str, Any] | None = None,
) -> Group:
    """The highest scores outside the top-p of utility, as many in each site as another group has there.

    The set difference whose q is chosen site by site so that its size is that of `like`: a placebo of the same size.
    Fewer only where fewer lie outside the top-p. Parameters as in `set_difference`; the granularity is that of `like`.
    Raises `GroupError` for scores of other sites.
    """
    check_fraction("p", p)
    if list(scores) != list(utility):
        raise GroupError("The scores and the utility scores hold different sites")

    def of_site(site: str) -> Indices:
        values = values_of(scores, site, like.granularity).reshape(-1)
        top_utility = _top_of_site(values_of(utility, site, like.granularity), p, "site", site)
        rest = np.setdiff1d(np.arange(len(values)), top_utility, assume_unique=True)
        wanted = len(like.members.get(site, ()))
        return rest[top_indices(values[rest], wanted, site)] if wanted and len(rest) else rest[:0]

    noted = {
        "rule": "set_difference_like",
        "p": p,
        "members": len(like),
        **score_provenance(scores),
        "utility_data": score_provenance(utility).get("data"),
        **(provenance or {}),
    }
    return Group(
        granularity=like.granularity,
        members=without_empty(by_site(scores, of_site)),
        shapes={site: shape_of(scores[site]) for site in scores},
        provenance=noted,
    )


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


def random_group(
    shapes: Mapping[str, tuple[int, int]],
    *,
    fraction: float,
    seed: int,
    granularity: Granularity = "weight",
    provenance: Mapping[str, Any] | None = None,
) -> Group:
    """⌊k·n⌋ (at least 1) members of each site, drawn without replacement from the generator of `seed`."""
    check_fraction("fraction", fraction)
    generator = np.random.default_rng(seed)
    members = {}
    for site, (out_features, in_features) in shapes.items():
        n = out_features * (in_features if granularity == "weight" else 1)
        members[site] = np.sort(generator.choice(n, size=count_of(fraction, n), replace=False)).astype(np.int64)
    noted = {"rule": "random", "role": "random", "fraction": fraction, "seed": seed, **(provenance or {})}
    return Group(granularity=granularity, members=members, shapes=dict(shapes), provenance=noted)


def check_fraction(name: str, value: float) -> None:
    """Raise `GroupError` unless 0 < value <= 1."""
    if not 0 < value <= 1:
        raise GroupError(f"{name} is no share", received=value, allowed="a number in (0, 1]")


def count_of(fraction: float, n: int) -> int:
    """⌊k·n⌋, at least 1."""
    # 0.1 * 30 is 3.0000000000000004 and 0.29 * 100 is 28.999999999999996: round away the representation first.
    return max(1, int(np.floor(round(fraction * n, 9))))


def shape_of(array: Any) -> tuple[int, int]:
    """`(out, in)` of a site's scores; `(out, 1)` where they are of neurons."""
    rows, *columns = array.shape
    return int(rows), int(columns[0]) if columns else 1


def score_provenance(scores: Scores) -> dict[str, Any]:
    """What the scores say of themselves, as far as they do: model, method, data."""
    header = getattr(scores, "header", {})
    return {key: header[key] for key in ("model", "method", "data") if key in header}


def values_of(scores: Scores, site: str, granularity: Granularity) -> npt.NDArray[np.float32]:
    """Scores of the members of a site, flat."""
    values = np.asarray(scores[site])
    if granularity != "weight":
        values = values if values.ndim == 1 else values.sum(axis=1, dtype=np.float64).astype(np.float32)
    elif values.ndim == 1:
        raise GroupError(f"The scores of {site} are of neurons: they give no group of weights")
    return values


def row_sums(scores: Scores) -> dict[str, npt.NDArray[np.float32]]:
    """The scores of neurons, `[out]`: what those of single weights sum up to over each row; those of neurons as they
    are."""
    return {site: values_of(scores, site, "neuron") for site in scores}


def by_site(scores: Scores, of_site: Callable[[str], Indices]) -> dict[str, Indices]:
    """Site name -> what the function chooses there, a few sites at a time."""
    with ThreadPoolExecutor(THREADS) as pool:
        return dict(zip(scores, pool.map(of_site, scores), strict=True))


def _top_of_defined(scores: Scores, fraction: float, granularity: Granularity) -> tuple[dict[str, Indices], int]:
    """The top share of each site among the members that have a score, and how many have none.

    Raises `GroupError` where none has one.
    """

    def of_site(site: str) -> Indices:
        values_N = values_of(scores, site, granularity).reshape(-1)
        usable_U = np.flatnonzero(~np.isnan(values_N))
        if not len(usable_U):
            return usable_U
        return usable_U[top_indices(values_N[usable_U], count_of(fraction, len(values_N)), site)]

    members = without_empty(by_site(scores, of_site))
    if not members:
        raise GroupError("No member of any site has a score: all are undefined")
    return members, sum(int(np.isnan(values_of(scores, site, granularity)).sum()) for site in scores)


def _top_of_site(values: npt.NDArray[np.float32], fraction: float, per: Per, site: str) -> Indices:
    if per == "row" and values.ndim == 2:
        keep = np.concatenate(
            [top_indices(row, count_of(fraction, len(row)), site) + i * len(row) for i, row in enumerate(values)]
        )
        return keep.astype(np.int64)
    flat = values.reshape(-1)
    return top_indices(flat, count_of(fraction, len(flat)), site)


def top_indices(values: npt.NDArray[np.floating[Any]], count: int, name: str = "scores") -> Indices:
    """Ascending indices of the `count` highest values; among equals the lower index wins.

    Raises `GroupError` where a value is not finite.
    """
    if not np.isfinite(values.max()) or not np.isfinite(values.min()):
        raise GroupError(f"The scores of {name} are not all finite", fix="score again in float32")
    if count >= len(values):
        return np.arange(len(values), dtype=np.int64)
    threshold = np.partition(values, len(values) - count)[len(values) - count]
    above = np.flatnonzero(values > threshold)
    equal = np.flatnonzero(values == threshold)[: count - len(above)]
    return np.sort(np.concatenate([above, equal])).astype(np.int64)


def _top_of_model(scores: Scores, fraction: float, granularity: Granularity) -> dict[str, Indices]:
    """One threshold for all sites. Two passes: a site can hold at most the model's whole count, so only each
    site's own top of that many values has to be kept to find the threshold."""
    sizes = {site: values_of(scores, site, granularity).size for site in scores}
    count = count_of(fraction, sum(sizes.values()))
    candidates: dict[str, tuple[Indices, npt.NDArray[np.float32]]] = {}
    for site in scores:
        flat = values_of(scores, site, granularity).reshape(-1)
        indices = top_indices(flat, min(count, len(flat)), site)
        candidates[site] = indices, flat[indices]
    pooled = np.concatenate([values for _, values in candidates.values()])
    chosen = top_indices(pooled, count)
    members, start = {}, 0
    for site, (indices, _) in candidates.items():
        own = chosen[(chosen >= start) & (chosen < start + len(indices))] - start
        members[site], start = indices[own], start + len(indices)
    return without_empty(members)
