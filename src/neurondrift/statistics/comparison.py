"""One group in one metric: everything that the report says about it.

Owns the population and the figures of a single comparison; which comparisons a study makes is in `analysis`.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from neurondrift.base.errors import DataError
from neurondrift.statistics import estimates, inference
from neurondrift.statistics.estimates import BoolArray, FloatArray, IntArray, MatchedEffect, MatchedSums
from neurondrift.statistics.inference import Inference
from neurondrift.statistics.matching import balance
from neurondrift.statistics.results import Estimate, GroupEffect, SiteEffect, Subgroup, decide

RANDOM = "random"
THIRDS = ("first third", "middle third", "last third")
UNDEFINED_DRIFT = "drift not finite in at least one seed (for example a weight vector of zero norm)"
NO_INTERVAL = "descriptive figure: no interval"


@dataclass(frozen=True, kw_only=True)
class Population:
    """All neurons of the adapted sites and their drift.

    Attributes
    ----------
    site
        Site code of each neuron, int [n]: an index into `site_names`.
    site_names, module_type, layer
        Per site: its name, its kind (such as ``q_proj``) and its decoder block, or None.
    row
        Output row of each neuron in its site, int [n].
    norm
        Row norm of w0, float64 [n]: the matching variable |w|.
    drift
        Metric name -> float64 [n_seeds, n]; NaN where undefined.
    """

    site: IntArray
    site_names: tuple[str, ...]
    module_type: tuple[str, ...]
    layer: tuple[int | None, ...]
    row: IntArray
    norm: FloatArray
    drift: dict[str, FloatArray]

    def __post_init__(self) -> None:
        n, sites = len(self.site), len(self.site_names)
        if n == 0 or sites == 0:
            raise DataError(
                "There are no neurons to analyse",
                received=(n, sites),
                allowed="at least one site",
                fix="check that the drift snapshots cover the adapted sites",
            )
        if len(self.module_type) != sites or len(self.layer) != sites:
            raise DataError(
                "Module types and layers do not fit the sites",
                received=(len(self.module_type), len(self.layer)),
                allowed=f"{sites} of each",
            )
        if np.min(self.site) < 0 or np.max(self.site) >= sites:
            raise DataError(
                "A site code lies outside the site names",
                received=int(np.max(self.site)),
                allowed=f"0 to {sites - 1}",
            )
        for name, values in {"row": self.row, "norm": self.norm}.items():
            if np.shape(values) != (n,):
                raise DataError(f"{name} does not fit the neurons", received=np.shape(values), allowed=f"({n},)")
        if not self.drift:
            raise DataError("There is no drift metric to analyse", allowed="at least one array [n_seeds, n]")
        seeds = {np.shape(values)[0] if np.ndim(values) == 2 else 0 for values in self.drift.values()}
        if len(seeds) != 1 or 0 in seeds or any(np.shape(v)[1] != n for v in self.drift.values()):
            raise DataError(
                "The drift arrays do not fit",
                received={k: np.shape(v) for k, v in self.drift.items()},
                allowed=f"one shape [n_seeds, {n}] for all metrics",
            )


class Settings(NamedTuple):
    """What every estimate of a study shares."""

    sesoi: float
    resamples: int
    rng_seed: int


class Comparison(NamedTuple):
    """One group in one metric, cut down to the measured neurons (finite drift in every seed)."""

    member: BoolArray
    site: IntArray
    stratum: IntArray
    drift: FloatArray
    matched: MatchedSums


class RawFigures(NamedTuple):
    """Means, medians, ratios and Cohen's d, as in `GroupEffect`."""

    mean_members: Estimate
    mean_controls: Estimate
    mean_others: Estimate
    median_members: Estimate
    median_controls: Estimate
    median_others: Estimate
    ratio_unmatched: Estimate
    ratio_matched: Estimate
    d_random: Estimate


def compare(
    population: Population, member: BoolArray, stratum: IntArray, measured: BoolArray, metric: str
) -> Comparison:
    """The matched comparison of a group among the neurons measured in one metric."""
    drift = np.asarray(population.drift[metric], dtype=np.float64)
    site = np.asarray(population.site, dtype=np.int64)
    if not measured.all():
        drift, site, member, stratum = drift[:, measured], site[measured], member[measured], stratum[measured]
    site_of_stratum = np.zeros(int(stratum.max()) + 1 if len(stratum) else 0, dtype=np.int64)
    site_of_stratum[stratum] = site
    sums = estimates.matched_sums(drift, member, stratum, site_of_stratum, len(population.site_names))
    return Comparison(member, site, stratum, drift, sums)


def permutations(name: str, comparisons: Mapping[str, Comparison], settings: Settings) -> dict[str, float]:
    """Sharp-null p per metric; metrics with the same measured neurons share their permutations."""
    out: dict[str, float] = {}
    batches: dict[bytes, list[str]] = {}
    for metric, comparison in comparisons.items():
        key = comparison.member.tobytes() + comparison.stratum.tobytes()
        batches.setdefault(key, []).append(metric)
    for batch in batches.values():
        first = comparisons[batch[0]]
        if not first.member.any():
            out.update(dict.fromkeys(batch, float("nan")))
            continue
        values = np.stack(
            [(comparisons[m].drift / estimates.raw_scale(comparisons[m].drift)[:, None]).mean(axis=0) for m in batch]
        )
        rng = np.random.default_rng([settings.rng_seed, zlib.crc32(name.encode())])
        p = inference.permutation_p(values, first.member, first.stratum, resamples=settings.resamples, rng=rng)
        out.update(zip(batch, p.tolist(), strict=True))
    return out


def infer_matched(matched: MatchedSums, settings: Settings) -> Inference:
    """g of a matched comparison, with its standard error and reference distribution."""
    statistic = MatchedEffect(matched.seeds, estimates.hedges_correction(float(matched.freedom.sum())))
    return inference.infer(matched.sums, statistic, resamples=settings.resamples, rng_seed=settings.rng_seed)


def to_estimate(found: Inference, n: int) -> Estimate:
    """An inference as a record for the report; `n` counts neurons."""
    return Estimate(
        value=found.value,
        se=found.se,
        ci90=found.equivalence_interval(),
        ci95=found.interval(0.95),
        n=n,
        sites=found.sites,
        seeds=len(found.per_seed),
        method=found.method,
        reason=found.reason,
    )


def group_effect(
    population: Population,
    name: str,
    metric: str,
    members: Mapping[str, BoolArray],
    measured: BoolArray,
    all_strata: IntArray,
    comparison: Comparison,
    p_permutation: float,
    settings: Settings,
) -> GroupEffect:
    """Everything about one group in one metric; Holm's adjustment is left to the caller."""
    matched = comparison.matched
    found = infer_matched(matched, settings)
    g = to_estimate(found, matched.n_matched)
    n_members = int(members[name].sum())
    n_measured = int(comparison.member.sum())
    reference = members[RANDOM][measured] if RANDOM in members and name != RANDOM else None
    reasons = {field: found.reason for field in ("p", "p_equivalence", "detectable") if found.reason}
    if np.isnan(p_permutation):
        reasons["p_permutation"] = "no stratum holds both members and controls"
    raw = _raw_figures(comparison, reference)
    return GroupEffect(
        group=name,
        metric=metric,
        n_members=n_members,
        n_measured=n_measured,
        n_undefined=n_members - n_measured,
        undefined_reason=UNDEFINED_DRIFT if n_members > n_measured else "",
        n_unmatched=matched.n_unmatched,
        n_controls=matched.n_controls,
        strata=matched.strata,
        strata_unmatched=matched.strata_unmatched,
        mean_members=raw.mean_members,
        mean_controls=raw.mean_controls,
        mean_others=raw.mean_others,
        median_members=raw.median_members,
        median_controls=raw.median_controls,
        median_others=raw.median_others,
        ratio_unmatched=raw.ratio_unmatched,
        ratio_matched=raw.ratio_matched,
        d_random=raw.d_random,
        g=g,
        p=found.p_value(),
        p_holm=float("nan"),
        p_permutation=p_permutation,
        p_equivalence=found.p_equivalence(settings.sesoi),
        verdict=decide(g.ci90, g.ci95, settings.sesoi),
        detectable=found.detectable(),
        per_seed=_per_seed(matched, settings),
        by_module=_subgroups(matched, _module_of_site(population), settings),
        by_layer_third=_subgroups(matched, _third_of_site(population), settings),
        by_site=_sites(matched, population),
        balance=balance(population.site, population.norm, members[name], all_strata, len(population.site_names)),
        reasons=reasons,
    )


def _raw_figures(comparison: Comparison, reference: BoolArray | None) -> RawFigures:
    """Means, medians and ratios; `reference` is the random group among the measured neurons."""
    member, drift, matched = comparison.member, comparison.drift, comparison.matched
    seeds, n_sites = len(drift), int(comparison.site.max()) + 1 if len(comparison.site) else 1

    def sums(chosen: BoolArray) -> FloatArray:
        return estimates.raw_sums(drift, chosen, comparison.site, n_sites)

    def plain(parts: list[FloatArray], statistic: estimates.Statistic, n: int, present: FloatArray) -> Estimate:
        return to_estimate(inference.infer_plain(np.concatenate(parts, axis=1)[present > 0], statistic), n)

    def median(values: list[float], n: int) -> Estimate:
        nan = (float("nan"), float("nan"))
        return Estimate(
            value=float(np.mean(values)),
            se=float("nan"),
            ci90=nan,
            ci95=nan,
            n=n,
            seeds=seeds,
            sites=len(matched.sites),
            method="median, averaged over seeds",
            reason=NO_INTERVAL,
        )

    inside, outside = sums(member), sums(~member)
    n_in, n_out = int(member.sum()), int((~member).sum())
    both = inside[:, 0] + outside[:, 0]
    mean = estimates.mean_statistic(seeds, estimates.raw_scale(drift) if len(member) else np.ones(seeds))
    expected = np.concatenate([matched.sums[:, :1], matched.expected], axis=1)
    if reference is None:
        nan = (float("nan"), float("nan"))
        d_random = Estimate(
            value=float("nan"),
            se=float("nan"),
            ci90=nan,
            ci95=nan,
            n=n_in,
            sites=0,
            seeds=seeds,
            method="Cohen's d",
            reason=f"no group {RANDOM!r} other than this one to compare with",
        )
    else:
        chance = sums(reference)
        d_random = plain(
            [inside, chance],
            estimates.cohens_d_statistic(seeds),
            n_in + int(reference.sum()),
            inside[:, 0] + chance[:, 0],
        )
    return RawFigures(
        mean_members=plain([inside], mean, n_in, inside[:, 0]),
        mean_controls=plain(
            [expected], estimates.mean_statistic(seeds, np.ones(seeds)), matched.n_controls, expected[:, 0]
        ),
        mean_others=plain([outside], mean, n_out, outside[:, 0]),
        median_members=median([float(np.median(v[member])) if n_in else float("nan") for v in drift], n_in),
        median_controls=median(
            [estimates.stratified_median(v, comparison.stratum, member) if n_in else float("nan") for v in drift],
            matched.n_controls,
        ),
        median_others=median([float(np.median(v[~member])) if n_out else float("nan") for v in drift], n_out),
        ratio_unmatched=plain([inside, outside], estimates.ratio_statistic(seeds), n_in + n_out, both),
        ratio_matched=plain(
            [matched.expected, matched.sums[:, 2 : 2 + seeds]],
            estimates.matched_ratio_statistic(seeds),
            matched.n_matched,
            matched.sums[:, 0],
        ),
        d_random=d_random,
    )


def _per_seed(matched: MatchedSums, settings: Settings) -> tuple[Estimate, ...]:
    """g of each seed alone; its interval covers sites only."""
    seeds = matched.seeds
    out = []
    for seed in range(seeds):
        alone = matched._replace(
            sums=matched.sums[:, [0, 1, 2 + seed, 2 + seeds + seed]], expected=matched.expected[:, [seed]]
        )
        out.append(to_estimate(infer_matched(alone, settings), matched.n_matched))
    return tuple(out)


def _module_of_site(population: Population) -> list[str]:
    return list(population.module_type)


def _third_of_site(population: Population) -> list[str]:
    """The third of the network's depth of each site; empty where it has no layer."""
    layers = sorted({layer for layer in population.layer if layer is not None})
    rank = {layer: index for index, layer in enumerate(layers)}
    return ["" if layer is None else THIRDS[rank[layer] * 3 // len(layers)] for layer in population.layer]


def _subgroups(matched: MatchedSums, label_of_site: list[str], settings: Settings) -> tuple[Subgroup, ...]:
    labels = np.array(label_of_site, dtype=object)[matched.sites]
    out = []
    for name in dict.fromkeys(label for label in label_of_site if label):
        keep = labels == name
        if not keep.any():
            continue
        part = matched.subset(keep)
        found = infer_matched(part, settings)
        g = to_estimate(found, part.n_matched)
        out.append(
            Subgroup(
                name=name,
                g=g,
                p=found.p_value(),
                verdict=decide(g.ci90, g.ci95, settings.sesoi),
                reason=found.reason,
            )
        )
    return tuple(out)


def _sites(matched: MatchedSums, population: Population) -> tuple[SiteEffect, ...]:
    out = []
    for row, site in enumerate(matched.sites.tolist()):
        statistic = MatchedEffect(matched.seeds, estimates.hedges_correction(float(matched.freedom[row])))
        g = float(statistic(matched.sums[row]).mean())
        out.append(
            SiteEffect(
                site=population.site_names[site],
                module_type=population.module_type[site],
                layer=population.layer[site],
                n=int(matched.sums[row, 0]),
                g=g,
                reason="" if np.isfinite(g) else "no variation of drift within strata",
            )
        )
    return tuple(out)
