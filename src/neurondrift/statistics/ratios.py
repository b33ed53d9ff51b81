"""The ratio of two means over the same sites, with sites as the unit that varies.

Takes sums and returns values; used where only sums per site are kept, as of single weights.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from neurondrift.statistics.effects import FloatArray, ratio_statistic
from neurondrift.statistics.inference import infer_plain


class Ratio(NamedTuple):
    """A ratio of means with its 95 % interval; NaN with a reason where it is undefined."""

    value: float
    low: float
    high: float
    reason: str


def ratio_of_means(first: FloatArray, second: FloatArray) -> Ratio:
    """Mean of the first arm over that of the second, from count and sum per site, `[sites, 2]` each.

    The interval is that of a jackknife over sites with Student's t on sites - 1 degrees of freedom
    (`inference.infer_plain`): it holds for this run and for sites like these.
    """
    nothing = np.zeros((len(first), 1))  # in the place of the sums of squares, which a ratio does not read
    found = infer_plain(np.hstack([first, nothing, second, nothing]), ratio_statistic(1))
    if not np.isfinite(found.value):
        return Ratio(np.nan, np.nan, np.nan, "no member has moved, or none is defined")
    low, high = found.interval(0.95)
    return Ratio(found.value, low, high, found.reason)
