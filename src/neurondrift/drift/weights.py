"""Drift of single weights, summed up by group and site: moments, and a histogram from which quantiles are read.

Owns the bins and the pass over the sites. Writes no files. Shapes: O = out, I = in, N = the groups' members in a site.

The bins are those of a float32's own bits: each octave is cut into 2⁶ equal parts, so that a bin is between 0.8 % and
1.6 % wide, every positive float32 has a bin, and binning is a shift.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt
import torch

from neurondrift.drift.deltas import Change, LowRank, dense_delta
from neurondrift.drift.exact import DriftMeter
from neurondrift.groups import Group, weights_of_units
from neurondrift.sites import Site, mlp_units
from neurondrift.threads import at_once, side_by_side, threads_for

if TYPE_CHECKING:
    import pandas as pd

    from neurondrift.drift.kernels import Tallies, Tally

Metric = Literal["absolute", "relative"]

#: A float32 without its lowest 17 bits: 8 bits of exponent, 6 of mantissa.
SHIFT = 17


@dataclass(frozen=True)
class WeightDrift:
    """|Δ| (`absolute`) or |Δ|/|w₀| (`relative`) of a group's weights in one site, or pooled over sites.

    `count` members, of which `undefined` have no finite value (w₀ = 0, or a training that diverged) and are in no
    other figure, and `zeros` have not moved. `mean` and `variance` (divided by the count) are over the defined
    values, zeros included; NaN where there are none. `bins` (integers) counts the positive ones, bin `first_bin` and
    upwards (see `bin_edges`).
    """

    group: str
    site: str
    metric: Metric
    count: int
    zeros: int
    undefined: int
    mean: float
    variance: float
    first_bin: int
    bins: npt.NDArray[np.integer[Any]]

    @property
    def defined(self) -> int:
        """Members with a finite value."""
        return self.count - self.undefined

    def quantile(self, q: float) -> float:
        """The q-quantile (inverse of the distribution function), as the middle of the bin that holds it.

        It is within 0.8 % of the true one, exactly 0 where that is; NaN where no value is defined.
        """
        if not self.defined:
            return math.nan
        rank = max(1, math.ceil(q * self.defined - 1e-9))
        if rank <= self.zeros:
            return 0.0
        code = self.first_bin + int(np.searchsorted(np.cumsum(self.bins), rank - self.zeros))
        return float(bin_edges(code, 2).mean())


def bin_edges(first: int, count: int) -> npt.NDArray[np.float64]:
    """`count` consecutive edges of bins, from the lower edge of bin `first` on."""
    codes = np.arange(first, first + count, dtype=np.int64) << SHIFT
    edges = codes.astype(np.int32).view(np.float32).astype(np.float64)
    return np.where(np.isinf(edges), 2.0**128, edges)


def pooled(parts: Iterable[WeightDrift]) -> WeightDrift:
    """One group's figures over several sites as one, as if all values had been summed up together.

    Raises `ValueError` where there is no part. The parts must be of one group and metric.
    """
    kept = list(parts)
    if not kept:
        raise ValueError("nothing to pool")
    known = [part for part in kept if part.defined]
    total = sum(part.defined for part in known)
    mean = variance = math.nan
    if total:
        mean = math.fsum(part.defined * part.mean for part in known) / total
        variance = math.fsum(part.defined * (part.variance + (part.mean - mean) ** 2) for part in known) / total
    filled = [part for part in known if len(part.bins)]
    first = min((part.first_bin for part in filled), default=0)
    bins = np.zeros(max((part.first_bin + len(part.bins) for part in filled), default=first) - first, dtype=np.int64)
    for part in filled:
        bins[part.first_bin - first :][: len(part.bins)] += part.bins
    return WeightDrift(
        kept[0].group,
        "",
        kept[0].metric,
        sum(part.count for part in kept),
        sum(part.zeros for part in kept),
        sum(part.undefined for part in kept),
        mean,
        variance,
        first,
        bins,
    )


class Members(NamedTuple):
    """The members of the groups in one site: the groups' names, how many each has, and the flat indices of all, int32
    or int64 `[N]`, one group after the other, each ascending."""

    groups: list[str]
    counts: list[int]
    flat: npt.NDArray[Any]


class WeightMeter:
    """Sums up the drift of groups of weights, again and again, site by site.

    Parameters
    ----------
    groups
        Name -> group of weights or of hidden units (all weights of their rows and columns).
    sites
        The trained sites. Members elsewhere have not moved; they are left out and counted in `outside`.

    Attributes
    ----------
    members
        Name -> how many weights are measured.
    outside
        Name -> how many members lie in untrained sites.

    Notes
    -----
    Kept in memory: an index of four bytes a member. While measuring: a few rows of Δ of one site, all of it where it
    has no low-rank form.
    """

    def __init__(
        self, groups: Mapping[str, Group], sites: Mapping[str, Site], *, every_site: Mapping[str, Site]
    ) -> None:
        self._members: dict[str, Members] = {}
        self.members: dict[str, int] = {}
        self.outside: dict[str, int] = {}
        in_weights = {name: as_weights(group, every_site) for name, group in groups.items()}
        for name, group in in_weights.items():
            self.outside[name] = sum(len(flat) for site, flat in group.members.items() if site not in sites)
            self.members[name] = len(group) - self.outside[name]
        for site, matrix in sites.items():
            rows, columns = matrix.shape
            small = np.int32 if rows * columns < 1 << 31 else np.int64
            chosen = {name: group.members[site] for name, group in in_weights.items() if site in group.members}
            if chosen:
                counts = [len(flat) for flat in chosen.values()]
                self._members[site] = Members(list(chosen), counts, np.concatenate([*chosen.values()], dtype=small))

    def bytes_kept(self) -> int:
        """Memory of the indices."""
        return sum(members.flat.nbytes for members in self._members.values())

    @torch.no_grad()
    def measure(self, meter: DriftMeter) -> list[WeightDrift]:
        """|Δ| and |Δ|/|w₀| of every group in every site where it has members, now."""
        from neurondrift.drift.kernels import Tallies

        rooms = threading.local()

        def summed(part: tuple[str, Change, torch.Tensor]) -> list[WeightDrift]:
            if not hasattr(rooms, "own"):
                rooms.own = Tallies()
            site, change, base = part
            members = self._members[site]
            both = zip(members.groups, members.counts, _summed(change, base, members, rooms.own), strict=True)
            return [
                WeightDrift(group, site, metric, count, *tally)
                for group, count, tallies in both
                for metric, tally in zip(get_args(Metric), tallies, strict=True)
            ]

        sites = [meter.sites[name] for name in self._members]
        several = at_once() if all(site.tensor.device.type == "cpu" for site in sites) else 1
        parts = ((site.name, meter.change(site.name), meter.base(site.name)) for site in sites)
        with threads_for(math.prod(site.shape) for site in sites):
            return [drift for of_site in side_by_side(summed, parts, threads=several) for drift in of_site]


def _summed(change: Change, base_OI: torch.Tensor, members: Members, tallies: Tallies) -> list[tuple[Tally, Tally]]:
    """Both metrics of each group."""
    flat_N, counts = members.flat, members.counts
    if base_OI.device.type != "cpu":  # only the members are brought to the CPU
        chosen = torch.from_numpy(flat_N).to(base_OI.device)
        delta_N, base_N = (
            weight.reshape(-1).index_select(0, chosen).cpu() for weight in (dense_delta(change, base_OI), base_OI)
        )
        return tallies.dense(delta_N, base_N, np.arange(len(flat_N)), counts)
    if isinstance(change, LowRank):
        return tallies.low_rank(change.a, change.b, base_OI, flat_N, counts)
    return tallies.dense(dense_delta(change, base_OI), base_OI, flat_N, counts)


def as_weights(group: Group, sites: Mapping[str, Site]) -> Group:
    """A group of weights as it is, one of hidden units as the weights of their rows and columns."""
    if group.granularity != "unit":
        return group
    return weights_of_units(group, mlp_units(dict(sites)), {name: site.shape for name, site in sites.items()})


def weight_drifts(rows: pd.DataFrame) -> list[WeightDrift]:
    """What `DriftLog.weights` has read, row by row as `WeightDrift`: for `quantile` and `pooled`."""
    columns: dict[str, Any] = {field.name: rows[field.name].tolist() for field in fields(WeightDrift)}
    columns["bins"] = [np.asarray(counts, dtype=np.int64) for counts in rows["bins"]]
    return [WeightDrift(**dict(zip(columns, row, strict=True))) for row in zip(*columns.values(), strict=True)]
