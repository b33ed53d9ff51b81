"""What the drifts of many single weights sum up to: moments, and a histogram from which quantiles are read.

The bins are those of a float32's own bits: each octave is cut into 2⁶ equal parts, so that a bin is between 0.8 % and
1.6 % wide, every positive float32 has a bin, and binning is a shift.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

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


def aligned(arms: Sequence[Mapping[str, WeightDrift]]) -> tuple[npt.NDArray[np.float64], list[npt.NDArray[np.int64]]]:
    """Histograms of several arms (site -> its part) over the same sites and bins.

    Returns
    -------
    edges
        Of the bins from the lowest to the highest that is filled (one bin where none is), float64 [E].
    counts
        Of each arm, int64 [sites, E], over the sites of all arms in their order: zeros, then each bin.
    """
    sites = list(dict.fromkeys(site for arm in arms for site in arm))
    filled = [part for arm in arms for part in arm.values() if len(part.bins)]
    first = min((part.first_bin for part in filled), default=0)
    width = max((part.first_bin + len(part.bins) for part in filled), default=first + 1) - first
    edges = bin_edges(first, width + 1)
    counts = [np.zeros((len(sites), 1 + width), dtype=np.int64) for _ in arms]
    for arm, array in zip(arms, counts, strict=True):
        for site, part in arm.items():
            row = array[sites.index(site)]
            row[0] = part.zeros
            row[1 + part.first_bin - first :][: len(part.bins)] = part.bins
    return edges, counts


def weight_drifts(rows: pd.DataFrame) -> list[WeightDrift]:
    """What `DriftLog.weights` has read, row by row as `WeightDrift`: for `quantile` and `pooled`."""
    columns: dict[str, Any] = {field.name: rows[field.name].tolist() for field in fields(WeightDrift)}
    columns["bins"] = [np.asarray(counts, dtype=np.int64) for counts in rows["bins"]]
    return [WeightDrift(**dict(zip(columns, row, strict=True))) for row in zip(*columns.values(), strict=True)]
