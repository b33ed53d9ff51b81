"""The importance of a group's members, its file, the doses taken by it; nested groups of rankings, also permuted.

A group holds no scores, and scores are deleted once the groups stand. For groups of neurons, where it is cheap (one
number per member), a study keeps the importance beside the group; for single weights it is read from a score file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from neurondrift.base.errors import ArtifactError, GroupError
from neurondrift.base.files import atomic_path, read_parquet
from neurondrift.groups.group import Group
from neurondrift.groups.selection import select_top

Importance: TypeAlias = Mapping[str, npt.NDArray[np.float32]]  # site -> importance of each of its members, in order


def importance_of(group: Group, scores: Mapping[str, Any]) -> dict[str, npt.NDArray[np.float32]]:
    """Importance of each member, site by site, in the order of `group.members`.

    Parameters
    ----------
    group
        Of neurons (the sum of their row), weights, or hidden units (then `scores` are those of `unit_scores`).
    scores
        Site name -> `[out, in]`, or `[out]`.

    Raises
    ------
    GroupError
        A site without scores; scores of neurons for a group of weights.
    """
    result = {}
    for site, members in group.members.items():
        if site not in scores:
            raise GroupError(f"There are no scores of {site}, which the group names")
        values = np.asarray(scores[site])
        if group.granularity == "weight":
            if values.ndim == 1:
                raise GroupError(f"The scores of {site} are of neurons: they do not order weights")
            result[site] = values.reshape(-1)[members].astype(np.float32)
        else:
            rows = values[members]
            result[site] = (rows if rows.ndim == 1 else rows.sum(axis=1, dtype=np.float64)).astype(np.float32)
    return result


def dose_of(group: Group, importance: Importance, share: float) -> Group:
    """The most important share of a group: about the same share of each site's members, doses within each other.

    Members are ordered by their place within their site, (k + 1/2) / m for the k-th of m, so that the scores of
    different sites are never compared; of equal places the earlier site comes first. A dose is the first
    round(share · n) of them, at least 1.

    Raises `GroupError` for a share outside (0, 1], or importances that are not those of the group.
    """
    if not 0 < share <= 1:
        raise GroupError("A dose is no share", received=share, allowed="a number in (0, 1]")
    if share == 1:
        return group
    places, sites, members = [], [], []
    for number, (site, own) in enumerate(group.members.items()):
        values = importance.get(site)
        if values is None or len(values) != len(own):
            raise GroupError(f"The importances of {site} are not those of the group's members")
        order = np.argsort(-values.astype(np.float64), kind="stable")
        places.append((np.arange(len(own)) + 0.5) / max(len(own), 1))
        sites.append(np.full(len(own), number))
        members.append(own[order])
    every_site = np.concatenate(sites)
    first = np.lexsort((every_site, np.concatenate(places)))[: max(1, round(share * len(group)))]
    chosen, which = np.concatenate(members)[first], every_site[first]
    kept = {site: np.sort(chosen[which == number]) for number, site in enumerate(group.members)}
    role = {"role": group.role} if group.role else {}  # a dose of a group is to a study what the group is
    return group.with_members(kept, {"rule": "dose", **role, "share": share, "of": dict(group.provenance)})


def nested(scores: Mapping[str, Any], fractions: Sequence[float]) -> dict[float, Group]:
    """The top shares of each site's neurons by one ranking, each within the next larger one.

    `scores`: site -> `[out]`, finite. Raises `GroupError` as `select_top`.
    """
    tops = {share: select_top(scores, fraction=share, granularity="neuron") for share in sorted(fractions)}
    return {share: replace(group, shapes={}) for share, group in tops.items()}  # of rows alone: not those of sites


def permuted(
    scores: Mapping[str, Any], magnitudes: Mapping[str, Any], *, bins: int, seed: int, draw: int
) -> dict[str, npt.NDArray[np.float32]]:
    """The scores of a ranking permuted within strata: every stratum keeps its scores, its neurons get them anew.

    Parameters
    ----------
    scores
        Site -> `[out]`.
    magnitudes
        Site -> |w| `[out]` of its neurons.
    bins
        Strata of a site: bins of its |w| that hold as many neurons; 1: the site is one stratum.
    seed, draw
        Of the permutation.

    Notes
    -----
    The nested groups of permuted scores hold at *every* share as many neurons of every stratum as those of the scores
    themselves. So where a ranking says nothing about an outcome beyond site and |w|, its whole curve over the shares is
    one of theirs, and a permutation test of any number made of it is exact.
    """
    found = {}
    for number, (site, values) in enumerate(scores.items()):
        generator = np.random.default_rng([seed, draw, number])
        own = np.array(values, dtype=np.float32)
        order = np.argsort(np.asarray(magnitudes[site]), kind="stable")
        for stratum in np.array_split(order, min(bins, len(order))):
            own[stratum] = own[generator.permutation(stratum)]
        found[site] = own
    return found


def write_importance(path: Path, group: Group, importance: Importance) -> None:
    """Write the importance of a group's members as Parquet: site, row (a flat index for weights), importance."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    sites = list(group.members)
    counts = [len(group.members[site]) for site in sites]
    codes = pa.array(np.repeat(np.arange(len(sites), dtype=np.int32), counts))
    table = pa.table(
        {
            "site": pa.DictionaryArray.from_arrays(codes, pa.array(sites, pa.string())),
            "row": np.concatenate([group.members[site] for site in sites]) if sites else np.empty(0, np.int64),
            "importance": np.concatenate([importance[site] for site in sites]) if sites else np.empty(0, np.float32),
        }
    )
    with atomic_path(path) as partial:
        pq.write_table(table, partial, compression="zstd", write_page_checksum=True)


def read_importance(path: Path, group: Group) -> dict[str, npt.NDArray[np.float32]]:
    """Read what `write_importance` wrote. Raises `ArtifactError` where it is missing or of another group."""
    if not Path(path).exists():
        raise ArtifactError(
            "The importance of this group's members was not kept, so that no dose can be taken from it",
            received=str(path),
            fix="make the groups again (neurondrift score --force, then neurondrift groups --force), pass --scores, "
            "or ask for --doses 1 only",
        )
    try:
        table = read_parquet(path)
        names, rows, values = (table[name].to_numpy() for name in ("site", "row", "importance"))
        values = values.astype(np.float32)
    except (ArtifactError, KeyError, ValueError, TypeError) as error:
        raise ArtifactError(f"{path} holds no importance of members ({type(error).__name__})") from error
    result = {}
    for site, own in group.members.items():
        here = names == site
        if not np.array_equal(rows[here], own):
            raise ArtifactError("The importances are of another group", received=f"{path}, {site}")
        result[site] = values[here]
    return result


def digest(group: Group) -> str:
    """A short hash of a group's members: equal where two groups hold the same."""
    hashed = hashlib.sha256(group.granularity.encode())
    for site in sorted(group.members):
        hashed.update(site.encode() + b"\0" + np.ascontiguousarray(group.members[site], dtype="<i8").tobytes())
    return hashed.hexdigest()[:16]
