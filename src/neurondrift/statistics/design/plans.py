"""The designs of a study's groups: which covariates each balances, made once for all metrics that share them.

Shapes: N neurons.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from neurondrift.base.errors import ConfigError
from neurondrift.base.roles import POSITIVE_CONTROLS, Role
from neurondrift.statistics.design.designs import Design, matched_design, norm_design
from neurondrift.statistics.design.matching import refine_bins
from neurondrift.statistics.design.population import Population
from neurondrift.statistics.design.ratios import log_of
from neurondrift.statistics.estimates import BoolArray, FloatArray

#: What the judging comparison balances; of a group that is chosen by one of them, the others (`analyze.match_on`).
MATCHED_ON = ("norm", "utility_score", "gradient_scale")


class Designs(NamedTuple):
    """Both comparisons of a group: `matched` is None without covariates, and judges where it is there."""

    norm: Design
    matched: Design | None

    @property
    def judging(self) -> Design:
        return self.matched or self.norm


def designs(
    population: Population,
    logs: Mapping[str, FloatArray],
    member_N: BoolArray,
    candidate_N: BoolArray,
    usable_N: BoolArray,
    bins: int,
    match_on: tuple[str, ...],
) -> Designs:
    """Who is compared with whom among `usable_N`, the neurons with a log drift; `match_on` names keys of `logs`."""
    site_N = np.asarray(population.site, dtype=np.int64)
    usable_N = usable_N & np.isfinite(logs["norm"])
    stratum_N = refine_bins(site_N, population.norm, member_N, bins)
    norm = norm_design(site_N, member_N, candidate_N, usable_N, stratum_N, logs)
    if len(match_on) < 2:
        return Designs(norm, None)
    return Designs(norm, matched_design(site_N, member_N, candidate_N, usable_N, logs, match_on))


def _with_log(drift_SN: NDArray[np.float64]) -> BoolArray:
    """Neurons whose drift has a logarithm in every seed."""
    return np.asarray(np.isfinite(log_of(drift_SN)).all(axis=0), dtype=np.bool_)


def covariates_of_groups(
    population: Population, roles: Mapping[str, Role | None], asked: Mapping[str, Sequence[str]]
) -> dict[str, tuple[str, ...]]:
    """What the matched comparison of each group balances."""
    known = ("norm", *population.covariates)
    for names in asked.values():
        if unknown := [name for name in names if name not in known]:
            raise ConfigError("A covariate is unknown", received=unknown, allowed=", ".join(known))
    usual = tuple(name for name in MATCHED_ON if name in known)
    without = tuple(name for name in usual if name != "gradient_scale")
    return {
        name: tuple(asked.get(name, without if role in POSITIVE_CONTROLS else usual)) for name, role in roles.items()
    }


class Plans:
    """Designs of groups. They look at no drift but for which neurons have one, so that metrics share them."""

    def __init__(self, population: Population, metrics: Sequence[str], bins: int) -> None:
        self.population, self.bins = population, bins
        self.usable = {metric: _with_log(population.drift[metric]) for metric in metrics}
        self.logs = population.logs()
        self.made: dict[tuple[bytes, tuple[str, ...]], Designs] = {}

    def of(self, member_N: BoolArray, candidate_N: BoolArray, metric: str, on: tuple[str, ...]) -> Designs:
        """Of members among candidates, for the neurons with a log drift in a metric, balanced on `on`."""
        flags = np.stack([member_N, candidate_N, self.usable[metric]])
        key = hashlib.sha256(np.packbits(flags).tobytes()).digest(), on
        if key not in self.made:
            self.made[key] = designs(
                self.population, self.logs, member_N, candidate_N, self.usable[metric], self.bins, on
            )
        return self.made[key]
