"""Shares of a whole that is spread over sites: what part of a change of weights lies in a subspace.

Sites are the clusters, as in every other interval here. Shapes: S seeds, J sites.
"""

from typing import NamedTuple

import numpy as np

from neurondrift.statistics.effects import FloatArray
from neurondrift.statistics.inference import Inference, infer


class RatioOfSums(NamedTuple):
    """Σ part / Σ whole per seed, from totals [weight, part of each seed, whole of each seed], with its gradient."""

    seeds: int

    def __call__(self, totals: FloatArray) -> FloatArray:
        whole = totals[..., 1 + self.seeds :]
        with np.errstate(invalid="ignore", divide="ignore"):
            ratio: FloatArray = totals[..., 1 : 1 + self.seeds] / np.where(whole > 0, whole, np.nan)
        return ratio

    def gradient(self, totals: FloatArray) -> FloatArray:
        """Derivatives, [..., Q, S]; column s belongs to seed s."""
        whole = totals[..., 1 + self.seeds :]
        out = np.zeros((*totals.shape, self.seeds))
        seed = np.arange(self.seeds)
        with np.errstate(invalid="ignore", divide="ignore"):
            out[..., 1 + seed, seed] = 1 / whole
            out[..., 1 + self.seeds + seed, seed] = -self(totals) / whole
        return out


class SharePair(NamedTuple):
    """`of_sum`: Σ part / Σ whole, so that sites count by their size. `of_sites`: the mean of the sites' shares."""

    of_sum: Inference
    of_sites: Inference


def share(part_SJ: FloatArray, whole_SJ: FloatArray, *, resamples: int, rng_seed: int) -> SharePair:
    """Share of a whole in a part, over all sites and averaged over seeds, with cluster bootstrap over sites.

    Parameters
    ----------
    part_SJ, whole_SJ
        Non-negative amounts of each seed and site; `part` may be a difference of two parts. A site whose whole is
        0 in a seed has no share of its own: it is left out of `of_sites` (and adds nothing to `of_sum`).
    resamples, rng_seed
        As in `infer`.

    Raises
    ------
    ValueError
        No site with a whole above 0.
    """
    known = (whole_SJ > 0).all(axis=0)
    if not known.any():
        raise ValueError("no site has a whole above 0")
    part, whole = part_SJ[:, known], whole_SJ[:, known]
    # In units of the mean whole: squares of tiny changes stay far from underflow.
    scale = whole.mean()
    part, whole = part / scale, whole / scale
    statistic = RatioOfSums(len(part))

    def inferred(parts: FloatArray, wholes: FloatArray) -> Inference:
        sums = np.concatenate([wholes.mean(axis=0)[None], parts, wholes]).T  # [J, 1 + 2 S]
        return infer(sums, statistic, resamples=resamples, rng_seed=rng_seed)

    return SharePair(inferred(part, whole), inferred(part / whole, np.ones_like(whole)))
