"""Whether a group of chance is as often an outlier among its random groups as the p-value says, and what is found.

    python benchmarks/nulls.py [--studies 2000] [--draws 19] [--sites 10] [--size 300] [--share 0.1]

Groups are drawn, matched by the sampler that interventions use (`groups.matched`), and acted on: the outcome of a group
is the sum of effects of its neurons, which are heavy-tailed (Student's t, 3 degrees of freedom), of another mean and
scale in every site, and know nothing of membership. So a p-value at or below a must come up in a share a of the
studies. Three nulls:

- apart: non-members only (what was done before, and what `*.matched.*` files hold);
- widened: the same, their distances from their mean times √((1 + r)/(1 - r)), r = members / candidates of the site;
- exchangeable: labels permuted among members and candidates (what interventions do).

The groups are `random`, or `large`: rather of large |w|, as scores that contain |w| choose them. `slope`: effects that
rise with |w| by so many of their standard deviations, which matching has to take out. `power`: p <= .05 where the mean
effect of a member is raised so that the group's outcome rises by `--raised` of its standard deviations. `own`: members
of the group among those of an exchangeable draw. Prints one row per case; 100 studies share a group and its draws.
"""

import argparse
import time
from typing import Any, NamedTuple

import numpy as np

from neurondrift.groups.controls import comparable_part, matched
from neurondrift.groups.group import Group
from neurondrift.statistics.null import empirical_p

SHARES = (0.01, 0.04, 0.1, 0.2, 0.4)
LEVELS = (0.05, 0.1)
EACH = 100  # studies of one group and its draws

Values = dict[str, np.ndarray[Any, Any]]


class Case(NamedTuple):
    """Members per neuron of a site, how they are chosen, and how effects rise with |w|."""

    share: float
    chosen: str
    slope: float


CASES = [
    Case(share, chosen, slope)
    for chosen, slope in (("random", 0.0), ("large", 0.0), ("large", 0.3))
    for share in SHARES
]


class Found(NamedTuple):
    """P-values `[2, R]`: of effects as they are, and of raised ones."""

    p: np.ndarray[Any, Any]

    def level(self, alpha: float) -> float:
        return float((self.p[0] <= alpha + 1e-9).mean())

    def power(self, alpha: float = LEVELS[0]) -> float:
        return float((self.p[1] <= alpha + 1e-9).mean())


def labelled(case: Case, sites: int, size: int, generator: np.random.Generator) -> tuple[Group, Values]:
    """A group of chance, and the |w| of every neuron (heavy-tailed, of another scale in every site)."""
    members, magnitudes = {}, {}
    count = max(1, round(case.share * size))
    for index in range(sites):
        norms = generator.normal(size=size)
        key = generator.gumbel(size=size) + (0.5 * norms if case.chosen == "large" else 0.0)
        members[f"s{index}"] = np.sort(np.argsort(key)[size - count :]).astype(np.int64)
        magnitudes[f"s{index}"] = np.exp(0.3 * norms + generator.normal())
    return Group(granularity="neuron", members=members, shapes={site: (size, 1) for site in members}), magnitudes


def effects(magnitudes: Values, slope: float, generator: np.random.Generator) -> Values:
    """Site -> effect of each neuron in each study `[R, N]`."""
    made = {}
    for site, values in magnitudes.items():
        scale = np.exp(generator.normal(scale=0.7, size=(EACH, 1)))
        shift = generator.normal(scale=0.5, size=(EACH, 1))
        norms = np.log(values)
        rising = slope * np.sqrt(3) * (norms - norms.mean()) / norms.std()  # the t distribution's SD is √3
        made[site] = scale * (generator.standard_t(3, size=(EACH, len(values))) + shift + rising)
    return made


def outcomes(group: Group, made: Values, bonus: Values) -> np.ndarray[Any, Any]:
    """The group's outcome in each study `[2, R]`: effects as they are, and with the bonus."""
    plain = np.sum([made[site][:, own].sum(axis=1) for site, own in group.members.items()], axis=0)
    extra = sum(bonus[site][own].sum() for site, own in group.members.items())
    return np.stack([plain, plain + extra])


def simulate(
    case: Case,
    *,
    studies: int,
    draws: int,
    sites: int,
    size: int,
    raised: float,
    seed: int = 0,
    only: str | None = None,
) -> tuple[dict[str, Found], float, float]:
    """Null -> p-values; the share of members in sites without support, and of members in an exchangeable draw."""
    generator = np.random.default_rng([seed, round(1000 * case.share)])
    found: dict[str, list[np.ndarray[Any, Any]]] = {}
    left_out, own_shares = [], []
    for number in range(max(1, studies // EACH)):
        group, magnitudes = labelled(case, sites, size, generator)
        made = effects(magnitudes, case.slope, generator)
        part, support = comparable_part(group, magnitudes)
        left_out.append(support.left_out / support.members)
        spread = np.sqrt(len(group)) * np.sqrt(3) * np.exp(0.7**2)  # root of the sum of members' variances
        for null, tested in (("apart", group), ("exchangeable", part)):
            if only not in (None, null) or not len(tested):
                continue
            free = null == "exchangeable"
            rest = (group - tested,)
            controls = matched(tested, magnitudes, seed=number, draws=draws, exclude=rest, exchangeable=free)
            if free:
                own_shares += [len(tested & control) / len(tested) for control in controls]
            bonus = {site: np.zeros(size) for site in magnitudes}
            for site, own in tested.members.items():
                bonus[site][own] = raised * spread / len(group)
            own_2R = outcomes(tested, made, bonus)
            null_K2R = np.array([outcomes(control, made, bonus) for control in controls])
            found.setdefault(null, []).append(_p_values(own_2R, null_K2R))
            if null == "apart":
                ratio = case.share / (1 - case.share)
                centre = null_K2R.mean(axis=0)
                wider = centre + (null_K2R - centre) * np.sqrt((1 + ratio) / (1 - ratio))
                found.setdefault("widened", []).append(_p_values(own_2R, wider))
    together = {null: Found(np.concatenate(parts, axis=1)) for null, parts in found.items()}
    return together, float(np.mean(left_out)), float(np.mean(own_shares)) if own_shares else float("nan")


def _p_values(own_2R: np.ndarray[Any, Any], null_K2R: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.array([[empirical_p(own_2R[b, i], null_K2R[:, b, i]) for i in range(EACH)] for b in (0, 1)])


def main() -> None:
    parser = argparse.ArgumentParser(description="The levels of the nulls of interventions.")
    parser.add_argument("--studies", type=int, default=2000)
    parser.add_argument("--draws", type=int, default=19)
    parser.add_argument("--sites", type=int, default=10)
    parser.add_argument("--size", type=int, default=300)
    parser.add_argument("--raised", type=float, default=4.0)
    parser.add_argument("--share", type=float, choices=SHARES, action="append", help="default: all")
    given = parser.parse_args()
    began = time.perf_counter()
    print(f"{given.studies} studies a row, {given.draws} draws, {given.sites} sites of {given.size} neurons")
    print(
        f"{'group':<8}{'slope':>6}{'share':>7}  {'null':<14}{'p<=.05':>8}{'p<=.1':>8}{'power':>8}{'left out':>10}{'own':>6}"
    )
    for case in CASES:
        if case.share not in (given.share or SHARES):
            continue
        settings = {"studies": given.studies, "draws": given.draws, "sites": given.sites, "size": given.size}
        nulls, left_out, own = simulate(case, raised=given.raised, **settings)
        for null, found in nulls.items():
            levels = "".join(f"{found.level(alpha):>8.3f}" for alpha in LEVELS)
            known = f"{left_out:>10.0%}{own:>6.0%}" if null == "exchangeable" else ""
            print(
                f"{case.chosen:<8}{case.slope:>6}{case.share:>7.0%}  {null:<14}{levels}{found.power():>8.2f}{known}",
                flush=True,
            )
    print(f"{time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
