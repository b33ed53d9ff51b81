"""Whether a group of chance is as often an outlier among its random groups as the p-value says, and what is found.

    python benchmarks/nulls.py [--studies 4000] [--draws 19] [--sites 10] [--size 200]

Groups are drawn, matched by the sampler that interventions use (`groups.matched`), and acted on: the outcome of a group
is the sum of effects of its neurons, which are heavy-tailed (Student's t, 3 degrees of freedom), of another mean and
scale in every site, and know nothing of membership. So a p-value at or below a must come up in a share a of the
studies. Three nulls:

- apart: non-members only (what was done before, and what `*.matched.*` files hold);
- widened: the same, their distances from their mean times √((1 + r)/(1 - r)), r = members / candidates of the site;
- exchangeable: labels permuted among members and candidates.

The groups are `random`, or `large`: of large |w| before all, as scores that contain |w| choose them. `slope`: effects
that rise with |w|, which matching has to take out. `power`: the share found where the group's mean effect is raised by
the size that finds about two thirds of groups with the least share. Prints one row per case; with 4,000 studies about
four minutes on one core.
"""

import argparse
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from neurondrift.groups.controls import comparable_part, matched
from neurondrift.groups.group import Group
from neurondrift.statistics.null import empirical_p

SHARES = (0.01, 0.04, 0.1, 0.2, 0.4)
NULLS = ("apart", "widened", "exchangeable")
LEVELS = (0.05, 0.1)


class Case(NamedTuple):
    """Members per neuron of a site, how they are chosen, and whether effects rise with |w|."""

    share: float
    chosen: str
    slope: float


def labelled(case: Case, sites: int, size: int, generator: np.random.Generator) -> tuple[Group, dict[str, Any]]:
    """A group of chance, and the |w| of every neuron (heavy-tailed, of another scale in every site)."""
    members, magnitudes = {}, {}
    for index in range(sites):
        values = np.exp(generator.normal(scale=0.3, size=size) + generator.normal())
        noise = generator.gumbel(size=size)
        weight = 1.0 * (np.log(values) - np.log(values).mean()) / np.log(values).std() if case.chosen == "large" else 0.0
        count = max(1, round(case.share * size))
        members[f"s{index}"] = np.sort(np.argsort(noise + weight)[size - count :]).astype(np.int64)
        magnitudes[f"s{index}"] = values
    return Group(granularity="neuron", members=members, shapes={site: (size, 1) for site in members}), magnitudes


def effects(
    magnitudes: dict[str, Any], slope: float, studies: int, generator: np.random.Generator
) -> dict[str, np.ndarray[Any, Any]]:
    """Site -> effect of each neuron in each study `[R, N]`."""
    made = {}
    for site, values in magnitudes.items():
        scale = np.exp(generator.normal(scale=0.7, size=(studies, 1)))
        shift = generator.normal(scale=0.5, size=(studies, 1))
        rising = slope * (np.log(values) - np.log(values).mean()) / np.log(values).std()
        made[site] = scale * (generator.standard_t(3, size=(studies, len(values))) + shift + rising)
    return made


def outcomes(
    group: Group, made: dict[str, np.ndarray[Any, Any]], bonus: dict[str, np.ndarray[Any, Any]]
) -> np.ndarray[Any, Any]:
    """The group's outcome in each study, a row for effects as they are and one with the bonus."""
    plain = sum(made[site][:, own].sum(axis=1) for site, own in group.members.items())
    extra = sum(bonus[site][own].sum() for site, own in group.members.items())
    return np.stack([plain, plain + extra])


def p_values(
    case: Case, null: str, *, studies: int, draws: int, sites: int, size: int, raised: float, seed: int
) -> Iterator[tuple[np.ndarray[Any, Any], float]]:
    """The p-values `[2, R]` of many studies, group by group (without and with an effect), and the share of members in
    sites without support."""
    generator = np.random.default_rng([seed, round(1000 * case.share)])
    each = 25
    for number in range(studies // each):
        group, magnitudes = labelled(case, sites, size, generator)
        part, support = comparable_part(group, magnitudes)
        if not len(part):
            continue
        tested = part if null == "exchangeable" else group
        controls = matched(tested, magnitudes, seed=number, draws=draws, exchangeable=null == "exchangeable")
        made = effects(magnitudes, case.slope, each, generator)
        # Raised in proportion to 1/√members, so that the same share of outcomes' spread is asked for at every size.
        bonus = {site: np.zeros(size) for site in magnitudes}
        for site, own in tested.members.items():
            bonus[site][own] = raised / np.sqrt(len(tested))
        own_2R = outcomes(tested, made, bonus)
        null_K2R = np.array([outcomes(control, made, bonus) for control in controls])
        if null == "widened":
            ratio = case.share / (1 - case.share)
            centre = null_K2R.mean(axis=0)
            null_K2R = centre + (null_K2R - centre) * np.sqrt((1 + ratio) / (1 - ratio))
        found = [[empirical_p(own_2R[b, i], null_K2R[:, b, i]) for i in range(each)] for b in (0, 1)]
        yield np.array(found), support.left_out / support.members


def row(case: Case, null: str, **settings: Any) -> tuple[dict[float, float], float, float]:
    """Share of p-values at or below each level, the power at the first level, and the share of members left out."""
    made = list(p_values(case, null, **settings))
    p = np.concatenate([each for each, _ in made], axis=1)
    return (
        {level: float((p[0] <= level + 1e-9).mean()) for level in LEVELS},
        float((p[1] <= LEVELS[0] + 1e-9).mean()),
        float(np.mean([left for _, left in made])),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="The levels of the nulls of interventions.")
    parser.add_argument("--studies", type=int, default=4000)
    parser.add_argument("--draws", type=int, default=19)
    parser.add_argument("--sites", type=int, default=10)
    parser.add_argument("--size", type=int, default=300)
    parser.add_argument("--raised", type=float, default=8.0)
    parser.add_argument("--null", choices=NULLS, action="append")
    given = parser.parse_args()
    began = time.perf_counter()
    print(f"{given.studies} studies a row, {given.draws} draws, {given.sites} sites of {given.size} neurons")
    print(f"{'null':<14}{'group':<10}{'slope':>6}{'share':>7}{'p<=.05':>9}{'p<=.1':>8}{'power':>8}{'left out':>10}")
    for null in given.null or NULLS:
        for chosen, slope in (("random", 0.0), ("large", 0.0), ("large", 0.5)):
            for share in SHARES:
                case = Case(share, chosen, slope)
                settings = {"studies": given.studies, "draws": given.draws, "sites": given.sites, "size": given.size}
                levels, power, left = row(case, null, raised=given.raised, seed=0, **settings)
                print(
                    f"{null:<14}{chosen:<10}{slope:>6}{share:>7.0%}{levels[0.05]:>9.3f}{levels[0.1]:>8.3f}"
                    f"{power:>8.2f}{left:>10.0%}",
                    flush=True,
                )
    print(f"{time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
