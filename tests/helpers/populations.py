"""Simulated drift of many neurons, with groups in it, and its analysis."""

import dataclasses

import numpy as np

from neurondrift.statistics.analysis import analyze
from neurondrift.statistics.design.population import Population

METRICS = ("relative", "l2")


def make_population(rng, *, seeds=1, layers=6, effect=0.0, site_sd=0.1, seed_sd=0.0, sizes=(192, 96, 300, 400)):
    """Sites of several sizes; 2 % members, whose drift is shifted by `effect` within-site SDs."""
    sizes = np.array(list(sizes) * layers)
    sites, n = len(sizes), sizes.sum()
    site = np.repeat(np.arange(sites), sizes)
    norm = np.exp(0.2 * rng.standard_normal(n))
    member = np.zeros(n, dtype=bool)
    for code in range(sites):
        inside = np.flatnonzero(site == code)
        member[rng.choice(inside, max(1, len(inside) // 50), replace=False)] = True
    drift = np.exp(0.5 * rng.standard_normal((seeds, n)))
    within = np.exp(0.125) * np.sqrt(np.exp(0.25) - 1)
    shift = effect + site_sd * rng.standard_normal(sites)[None] + seed_sd * rng.standard_normal(seeds)[:, None]
    drift += np.where(member, shift[:, site] * within, 0.0)
    kinds = ("q_proj", "k_proj", "o_proj", "up_proj")[: len(sizes) // layers]
    population = Population(
        site=site,
        site_names=tuple(f"layers.{i // len(kinds)}.{kinds[i % len(kinds)]}" for i in range(sites)),
        module_type=tuple(kinds[i % len(kinds)] for i in range(sites)),
        layer=tuple(i // len(kinds) for i in range(sites)),
        row=np.concatenate([np.arange(s) for s in sizes]),
        norm=norm,
        drift={"relative": drift, "l2": drift * norm},
    )
    return population, {"safety_top": member, "random": pick(rng, site, sites), "utility_top": pick(rng, site, sites)}


def pick(rng, site, sites):
    chosen = np.zeros(len(site), dtype=bool)
    for code in range(sites):
        inside = np.flatnonzero(site == code)
        chosen[rng.choice(inside, max(1, len(inside) // 50), replace=False)] = True
    return chosen


def run(population, groups, **settings):
    settings = {
        "metrics": METRICS,
        "seed_labels": [str(s) for s in range(len(population.drift["relative"]))],
        "resamples": 400,
        **settings,
    }
    return analyze(population, groups, **settings)


def make_covariates(people, member, ratio, *, slopes=(-0.4, 0.2, 0.2), noise=0.3):
    """The same sites with covariates that are larger among the members of a group (but for some as large elsewhere),
    and a drift that depends on the norm, utility score and gradient scale, and is `ratio` times as large for members."""
    rng = np.random.default_rng(5)
    n = len(people.site)
    common = rng.standard_normal(n)
    logs = [spread * (common + rng.standard_normal(n)) / np.sqrt(2) for spread in (0.2, 0.5, 0.4)]
    for log, spread in zip(logs, (0.2, 0.5, 0.4), strict=True):
        log[member] = spread * (0.6 + 0.5 * rng.standard_normal(member.sum()))
    seeds = len(next(iter(people.drift.values())))
    level = rng.normal(-4, 0.5, len(people.site_names))[people.site]
    log = level + sum(slope * values for slope, values in zip(slopes, logs, strict=True))
    drift = np.exp(log + noise * rng.standard_normal((seeds, n))) * np.where(member, ratio, 1.0)
    changed = dataclasses.replace(
        people,
        norm=np.exp(logs[0]),
        drift={"relative": drift},
        covariates={"utility_score": np.exp(logs[1]), "gradient_scale": np.exp(logs[2])},
    )
    return changed, member
