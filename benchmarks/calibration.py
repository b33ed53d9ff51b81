"""Does the inference hold its error rates? Simulated studies with known truth, and the naive t-test beside.

Run:  python benchmarks/calibration.py [--studies 2000] [--workers 2]

Each simulated study has the sites of a small Llama (per layer 192, 192, 576, 576, 576, 1536 and 1536
neurons), 1 % members per site, chosen by |w| times noise, so that the group is enriched in large |w|. The
drift of neuron i of site j in seed s is

    scale_j * |w_i|^0.3 * exp(0.5 z_si - 0.125),   z_si = sqrt(0.5) z_i + sqrt(0.5) z'_si,
    log scale_j ~ N(0, 0.5)  (0.5 the standard deviation)

and members move by (effect + b_j + a_s) within-site SDs more, b_j ~ N(0, site SD), a_s ~ N(0, seed SD). The
heavy tails are those of the lognormal (skewness 1.75, excess kurtosis 5.9). b, a, scale and z are new in each
study; |w|, members and strata are fixed. The truth is the g that this process has in an endless population
of sites and seeds. With one seed the interval promises the effect of that run, so the seed SD is 0 in those
rows, but for the row that shows what a single run does not cover.

Columns: FPR, p < 0.05 at effect 0 (aim 3.5 to 6.5 %); cover, 95 % interval at effects 0 and 0.2 (aim 93 % or
more); wrong similar, at either edge of the band, effect +0.2 | -0.2 (aim at most 5 %); naive, Welch's t-test on
pooled neurons at effect 0, seeds stacked; permut., the label permutation (sharp null) at effect 0, on up to 500
studies.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import special

from neurondrift.statistics.design.matching import refine_bins
from neurondrift.statistics.estimates import MatchedEffect, hedges_correction, matched_sums
from neurondrift.statistics.inference import infer, permutation_p
from neurondrift.statistics.results import decide

SITE_SIZES = (576, 192, 192, 576, 1536, 1536, 576)
MEMBERS = 0.01
LOG_SD, NEURON_SHARE, SCALE_LOG_SD, NORM_LOG_SD, NORM_SLOPE = 0.5, 0.5, 0.5, 0.2, 0.3
SESOI, RESAMPLES, PERMUTATIONS, PERMUTED_STUDIES = 0.2, 1000, 199, 500
POWER_AT = (0.0, 0.025, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4)


class Scenario(NamedTuple):
    name: str
    layers: int
    seeds: int
    site_sd: float
    seed_sd: float
    judged: bool = True


SCENARIOS = (
    Scenario("1 seed, 210 sites", 30, 1, 0.1, 0.0),
    Scenario("1 seed, 210 sites", 30, 1, 0.3, 0.0),
    Scenario("3 seeds, 210 sites", 30, 3, 0.1, 0.03),
    Scenario("3 seeds, 210 sites", 30, 3, 0.2, 0.1),
    Scenario("3 seeds, 42 sites", 6, 3, 0.3, 0.05),
    Scenario("3 seeds, 42 sites", 6, 3, 0.2, 0.2),
    Scenario("1 seed, 42 sites", 6, 1, 0.2, 0.0),
    Scenario("1 seed, 21 sites", 3, 1, 0.2, 0.0),
    Scenario("1 seed, 14 sites", 2, 1, 0.2, 0.0),
    Scenario("1 seed, 42 sites, truth = mean over runs", 6, 1, 0.2, 0.1, judged=False),
)


class Design(NamedTuple):
    """What stays fixed over the studies of a scenario."""

    site: NDArray[np.int64]
    norm: NDArray[np.float64]
    member: NDArray[np.bool_]
    stratum: NDArray[np.int64]
    site_of_stratum: NDArray[np.int64]
    sizes: NDArray[np.int64]
    unit: float  # truth in g of a shift of one within-site SD


class Outcome(NamedTuple):
    """Of one study and one true effect: rejected, covered, similar, more."""

    effect: float
    p: float
    covered: bool
    similar: bool
    more: bool


@lru_cache(maxsize=1)
def design(layers: int) -> Design:
    rng = np.random.default_rng(20240514)
    sizes = np.array(SITE_SIZES * layers)
    site = np.repeat(np.arange(len(sizes)), sizes)
    norm = np.exp(NORM_LOG_SD * rng.standard_normal(len(site)))
    score = norm * np.exp(0.5 * rng.standard_normal(len(site)))
    member = np.zeros(len(site), dtype=bool)
    for code, size in enumerate(sizes):
        inside = np.flatnonzero(site == code)
        member[inside[np.argsort(-score[inside])[: max(1, int(MEMBERS * size))]]] = True
    stratum = refine_bins(site, norm, member, 10)
    site_of_stratum = np.zeros(stratum.max() + 1, dtype=np.int64)
    site_of_stratum[stratum] = site
    # Variance of the drift within a stratum, in units of the site's scale, as the members meet it.
    count = np.bincount(stratum)
    first = np.bincount(stratum, weights=norm**NORM_SLOPE) / count
    second = np.bincount(stratum, weights=norm ** (2 * NORM_SLOPE)) / count
    variance = second * np.exp(LOG_SD**2) - first**2
    unit = np.sqrt(np.exp(LOG_SD**2) - 1) * np.exp(-(SCALE_LOG_SD**2) / 2) / np.sqrt(variance[stratum[member]].mean())
    return Design(site, norm, member, stratum, site_of_stratum, sizes, float(unit))


def simulate(scenario: Scenario, effects: Sequence[float], number: int) -> tuple[list[Outcome], float, float]:
    """One study, analysed at each true effect; also the naive p and the permutation p at effect 0."""
    plan = design(scenario.layers)
    rng = np.random.default_rng(
        [number, scenario.layers, scenario.seeds, int(1000 * scenario.site_sd), int(1000 * scenario.seed_sd)]
    )
    n, sites, seeds = len(plan.site), len(plan.sizes), scenario.seeds
    scale = np.exp(SCALE_LOG_SD * rng.standard_normal(sites))
    shared = rng.standard_normal(n, dtype=np.float32)
    drift = np.empty((seeds, n))
    base = scale[plan.site] * plan.norm**NORM_SLOPE
    for seed in range(seeds):
        own = rng.standard_normal(n, dtype=np.float32)
        log = LOG_SD * (np.sqrt(NEURON_SHARE) * shared + np.sqrt(1 - NEURON_SHARE) * own) - LOG_SD**2 / 2
        drift[seed] = base * np.exp(log)
    unit_shift = scale * np.sqrt(np.exp(LOG_SD**2) - 1)  # [J]
    moved = (
        scenario.site_sd * rng.standard_normal(sites)[None] + scenario.seed_sd * rng.standard_normal(seeds)[:, None]
    ) * unit_shift  # [S, J]
    drift[:, plan.member] += moved[:, plan.site[plan.member]]
    matched = matched_sums(drift, plan.member, plan.stratum, plan.site_of_stratum, sites)
    statistic = MatchedEffect(seeds, hedges_correction(float(matched.freedom.sum())))
    outcomes = []
    for effect in effects:
        sums = matched.sums.copy()  # a constant shift moves differences and leaves variances
        sums[:, 2 : 2 + seeds] += (sums[:, 0] * unit_shift[matched.sites] * effect / plan.unit)[:, None]
        found = infer(sums, statistic, resamples=RESAMPLES, rng_seed=number)
        ci90, ci95 = found.equivalence_interval(), found.interval(0.95)
        verdict = decide(ci90, ci95, SESOI)
        outcomes.append(
            Outcome(effect, found.p_value(), ci95[0] <= effect <= ci95[1], verdict == "similar", ci95[0] > 0)
        )
    sharp = float("nan")
    if number < PERMUTED_STUDIES:
        sharp = float(
            permutation_p(drift.mean(axis=0)[None], plan.member, plan.stratum, resamples=PERMUTATIONS, rng=rng)[0]
        )
    return outcomes, welch(drift[:, plan.member].ravel(), drift[:, ~plan.member].ravel()), sharp


def welch(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Two-sided p of Welch's t-test; the normal stands for Student's t, with over 100 degrees of freedom."""
    t = (a.mean() - b.mean()) / np.sqrt(a.var(ddof=1) / len(a) + b.var(ddof=1) / len(b))
    return float(2 * special.ndtr(-abs(t)))


def chunk(scenario: Scenario, effects: tuple[float, ...], numbers: range) -> list[tuple[list[Outcome], float, float]]:
    return [simulate(scenario, effects, number) for number in numbers]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=2000, help="simulated studies per row")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    began = time.perf_counter()
    print(
        f"{options.studies} studies per row; site sizes {SITE_SIZES} per layer; {MEMBERS:.0%} members; "
        f"log SD {LOG_SD}; {RESAMPLES} resamples; band +-{SESOI}"
    )
    print(
        f"{'scenario':<42}{'site':>6}{'seed':>6}{'FPR':>7}{'cover 0':>9}{'cover .2':>9}"
        f"{'wrong similar':>16}{'naive':>8}{'permut.':>9}   ok"
    )
    power: dict[str, list[float]] = {}
    all_good = True
    with ProcessPoolExecutor(options.workers) as pool:
        for scenario in SCENARIOS:
            results = collect(pool, scenario, (0.0, SESOI, -SESOI), range(options.studies))
            good = show(scenario, results)
            all_good &= good or not scenario.judged
        for scenario in (SCENARIOS[1], SCENARIOS[3], SCENARIOS[4]):
            some = collect(pool, scenario, POWER_AT, range(max(20, options.studies // 10)))
            label = f"{scenario.name}, site SD {scenario.site_sd}, seed SD {scenario.seed_sd}"
            outcomes = [[one[i] for one, _, _ in some] for i in range(len(POWER_AT))]
            power[f"{label}: more"] = [float(np.mean([o.more and not o.similar for o in at])) for at in outcomes]
            power[f"{label}: similar"] = [float(np.mean([o.similar for o in at])) for at in outcomes]
    print(f"\nShare of studies with each verdict by true g ({max(20, options.studies // 10)} studies)")
    print(f"{'':<58}" + "".join(f"{g:>7.3f}" for g in POWER_AT))
    for label, shares in power.items():
        print(f"{label:<58}" + "".join(f"{share:>7.0%}" for share in shares))
    print(
        f"\n{'all judged rows within their aims' if all_good else 'SOME ROWS MISS THEIR AIMS'}; "
        f"{time.perf_counter() - began:.0f} s"
    )


def collect(
    pool: ProcessPoolExecutor, scenario: Scenario, effects: tuple[float, ...], numbers: range
) -> list[tuple[list[Outcome], float, float]]:
    parts = [numbers[i : i + 25] for i in range(0, len(numbers), 25)]
    futures = [pool.submit(chunk, scenario, effects, part) for part in parts]
    return [result for future in futures for result in future.result()]


def show(scenario: Scenario, results: list[tuple[list[Outcome], float, float]]) -> bool:
    """Print one row; whether it meets the aims."""
    null, upper, lower = ([outcomes[i] for outcomes, _, _ in results] for i in range(3))
    rate = float(np.mean([o.p < 0.05 for o in null]))
    cover = [float(np.mean([o.covered for o in at])) for at in (null, upper)]
    wrong = [float(np.mean([o.similar for o in at])) for at in (upper, lower)]
    naive = float(np.mean([p < 0.05 for _, p, _ in results]))
    sharp = [p for _, _, p in results if np.isfinite(p)]
    good = 0.035 <= rate <= 0.065 and min(cover) >= 0.93 and max(wrong) <= 0.05
    print(
        f"{scenario.name:<42}{scenario.site_sd:>6.2f}{scenario.seed_sd:>6.2f}{rate:>7.1%}{cover[0]:>9.1%}"
        f"{cover[1]:>9.1%}{wrong[0]:>9.1%} |{wrong[1]:>5.1%}{naive:>8.1%}"
        f"{np.mean(np.array(sharp) <= 0.05):>9.1%}   "
        f"{('yes' if good else 'NO') if scenario.judged else '(not judged)'}",
        flush=True,
    )
    return good


if __name__ == "__main__":
    main()
