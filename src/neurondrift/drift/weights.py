"""Drift of single weights, summed up by group and site: moments, and a histogram from which quantiles are read.

Owns the bins and the pass over the sites. Writes no files. Shapes: O = out, I = in, N = a group's members in a site.

The bins are those of a float32's own bits: each octave is cut into 2⁶ equal parts, so that a bin is between 0.8 % and
1.6 % wide, every positive float32 has a bin, and binning is a shift.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from neurondrift.drift.exact import DriftMeter
from neurondrift.groups import Group, weights_of_units
from neurondrift.sites import Site, mlp_units
from neurondrift.threads import threads_for

if TYPE_CHECKING:
    import pandas as pd

Metric = Literal["absolute", "relative"]

#: A float32 without its lowest 17 bits: 8 bits of exponent, 6 of mantissa.
SHIFT = 17


@dataclass(frozen=True)
class WeightDrift:
    """|Δ| (`absolute`) or |Δ|/|w₀| (`relative`) of a group's weights in one site, or pooled over sites.

    `count` members, of which `undefined` have no finite value (w₀ = 0, or a training that diverged) and are in no
    other figure, and `zeros` have not moved. `mean` and `variance` (divided by the count) are over the defined
    values, zeros included; NaN where there are none. `bins` int64 counts the positive ones, bin `first_bin` and
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
    bins: npt.NDArray[np.int64]

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


def summarise(
    values: npt.NDArray[np.float32], *, group: str = "", site: str = "", metric: Metric = "absolute"
) -> WeightDrift:
    """Count, moments (sums in float64) and histogram of non-negative float32 values `[N]`."""
    count = len(values)
    if count and not np.isfinite(values.max()):  # the maximum of NaN is NaN
        values = values[np.isfinite(values)]
    undefined = count - len(values)
    positive = values if len(values) and values.min() > 0 else values[values > 0]
    zeros = len(values) - len(positive)
    first, bins = 0, np.zeros(0, dtype=np.int64)
    if len(positive):
        codes = positive.view(np.int32) >> SHIFT
        first = int(codes.min())
        bins = np.bincount(np.subtract(codes, first, dtype=np.int64))
    mean = variance = math.nan
    if len(values):
        wide = values.astype(np.float64)
        mean = float(wide.sum()) / len(wide)
        wide -= mean
        variance = float(wide @ wide) / len(wide)
    return WeightDrift(group, site, metric, count, zeros, undefined, mean, variance, first, bins)


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
    Kept in memory: an index of four bytes a member, and from the first measurement on w₀ of each member in the dtype
    that it is stored in (two bytes in bfloat16). While measuring: Δ of one site in float32.
    """

    def __init__(
        self, groups: Mapping[str, Group], sites: Mapping[str, Site], *, every_site: Mapping[str, Site]
    ) -> None:
        self._indices: dict[str, list[tuple[str, torch.Tensor]]] = {}
        self._magnitudes: dict[str, list[torch.Tensor]] = {}
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
                self._indices[site] = [(name, torch.from_numpy(flat.astype(small))) for name, flat in chosen.items()]

    def bytes_kept(self) -> int:
        """Memory of the indices and, after the first measurement, of the |w₀|."""
        kept = [flat for groups in self._indices.values() for _, flat in groups]
        kept += [magnitude for parts in self._magnitudes.values() for magnitude in parts]
        return sum(tensor.numel() * tensor.element_size() for tensor in kept)

    @torch.no_grad()
    def measure(self, meter: DriftMeter) -> list[WeightDrift]:
        """|Δ| and |Δ|/|w₀| of every group in every site where it has members, now."""
        found: list[WeightDrift] = []
        with threads_for(math.prod(meter.sites[site].shape) for site in self._indices):
            for site, groups in self._indices.items():
                if site not in self._magnitudes:
                    base = meter.base(site).reshape(-1)
                    self._magnitudes[site] = [base.index_select(0, flat.to(base.device)).abs_() for _, flat in groups]
                delta = meter.delta(site).reshape(-1)
                for (name, flat), magnitude in zip(groups, self._magnitudes[site], strict=True):
                    found += _drift_of(delta, flat, magnitude, group=name, site=site)
        return found


def _drift_of(
    delta: torch.Tensor, flat_N: torch.Tensor, magnitude_N: torch.Tensor, *, group: str, site: str
) -> tuple[WeightDrift, WeightDrift]:
    """Both metrics of the entries `flat_N` of one site's Δ, float32 `[out * in]`, and their |w₀|."""
    absolute_N = delta.index_select(0, flat_N.to(delta.device)).abs_()
    relative_N = absolute_N / magnitude_N.to(delta.device, torch.float32)  # by zero: NaN or infinite, so undefined
    return (
        summarise(absolute_N.cpu().numpy(), group=group, site=site, metric="absolute"),
        summarise(relative_N.cpu().numpy(), group=group, site=site, metric="relative"),
    )


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
