"""Does the inference hold its error rates? Simulated studies with known truth, through the pipeline's own functions.

Run:  python benchmarks/calibration.py [--studies 2000] [--workers 2] [--out FILE] [--row NAME] [--list]

With ``--out`` every study's outcome is appended to FILE, and what is there already is not done again: the run can be
stopped and taken up. Each row of the table is a process that draws drifts, and one of the two comparisons:

- Sites are those of a small Llama (per layer 192, 192, 576, 576, 576, 1536 and 1536 neurons). Every neuron has a log
  norm, log utility score and log gradient scale, correlated as below, and a log safety score that goes with all three;
  in o_proj and down_proj most of it is that of the coordinate of the residual stream, so that rows are members in many
  layers at once.
  The group is the set difference: the top 3 % by safety score without the top 3 % by utility score, site by site, so
  that membership depends on every covariate. Sites, covariates, members and so the designs (strata, regression,
  entropy balancing) are those of one of `DESIGNS` draws; studies take them in turn.
- Log drift of neuron i of site j in seed s is: level of the site + slopes of the site times the covariates (`norm`
  rows: only norm has a slope, for strata of norm claim no more; `matched` rows: all three) + for members the true log
  ratio + b_j + l_layer + r_row + a_s + noise. Noise has SD 0.5, half of its variance kept over seeds, with heavy tails
  (Student's t with 4 degrees of freedom, on the log scale). b, l, r and a are normal with the SDs of the row: they are
  effects that members of a site, a layer, a coordinate of the residual stream (rows of o_proj and down_proj) or a
  training seed share. With one seed the interval promises the effect of that run, so that a is 0.

Columns: ratio, bias of the estimate as a factor at ratio 1; FPR, p < 0.05 at ratio 1 (aim 3.5 to 6.5 %); cover, 95 %
interval at ratios 1, 1.25 and 1 / 1.25 (the least; aim 93 % or more); wrong similar, verdict at ratio 1.25 | 1 / 1.25
(aim at most 5 %, and 1 % for what 2,000 studies cannot tell); power, share of "more" at the ratio that
`smallest_more` names (aim 80 %); layer, share of studies in which layers had the larger standard error.

Below: what the gate says of groups that have no counterfactual. With ``--shares N`` instead: shares of a lost sum, N
studies a row. A neuron's part is -1 on average, goes with its covariates, and has noise of SD 3 with the same tails;
members carry as much as comparable neurons, or as much as the edge of the band, with effects that a site and a layer
share. Columns: cover, 95 % interval of the difference (aim 93 % or more); at the edge "more" (aim at most 2.5 %) and "not
more" (at most 5 %), each 1.5 % more for what so few studies cannot tell; "more" and "not more" without a difference.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import json
import time
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from neurondrift.statistics.design.designs import Design
from neurondrift.statistics.design.plans import MATCHED_ON, Plans
from neurondrift.statistics.design.population import Population
from neurondrift.statistics.design.ratios import Rules, called, infer_ratio, ratio_sums, to_estimate
from neurondrift.statistics.design.shares import share_effect

KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SIZES = (576, 192, 192, 576, 1536, 1536, 576)
DESIGNS, CHUNK = 4, 20
NOISE, KEPT, TAIL = 0.5, 0.5, 4
#: Correlations of log norm, log utility score, log gradient scale and log safety score; their SDs.
CORRELATION = np.array([[1, 0.5, 0.3, 0.5], [0.5, 1, 0.6, 0.8], [0.3, 0.6, 1, 0.6], [0.5, 0.8, 0.6, 1]])
SPREAD = np.array([0.2, 0.6, 0.5, 0.6])
#: Share of their variance that rows of o_proj and down_proj have in common with the same row of all layers.
PERSISTENT = 0.8
SLOPES = {"norm": np.array([-0.4, 0.0, 0.0]), "matched": np.array([-0.4, 0.1, 0.15])}
BAND, RESAMPLES = 1.25, 1000
LOG_BAND = float(np.log(BAND))


class Row(NamedTuple):
    comparison: str
    layers: int
    seeds: int
    site: float
    layer: float = 0.0
    seed: float = 0.0
    row: float = 0.0
    judged: bool = True

    @property
    def name(self) -> str:
        shared = f"{self.site:g}-{self.layer:g}-{self.row:g}-{self.seed:g}"
        return f"{self.comparison}-{self.layers}x{self.seeds}-{shared}"


ROWS = tuple(
    row
    for comparison in ("norm", "matched")
    for row in (
        Row(comparison, 30, 1, 0.1),
        Row(comparison, 30, 1, 0.1, 0.1),
        Row(comparison, 30, 1, 0.1, 0.2),
        Row(comparison, 30, 1, 0.1, 0.1, row=0.3),
        Row(comparison, 30, 3, 0.1, 0.1, 0.05),
        Row(comparison, 30, 3, 0.1, 0.2, 0.1),
        Row(comparison, 12, 1, 0.1, 0.1),
        Row(comparison, 12, 3, 0.1, 0.1, 0.05),
        Row(comparison, 6, 1, 0.1, 0.1),
        Row(comparison, 6, 3, 0.1, 0.1, 0.05),
        Row(comparison, 3, 1, 0.1, 0.1, judged=False),
        Row(comparison, 30, 1, 0.1, 0.1, 0.1, judged=False),
    )
)


class Plan(NamedTuple):
    """A population with its group and designs; the drift of the population is a placeholder."""

    population: Population
    member: NDArray[np.bool_]
    logs: NDArray[np.float64]
    designs: dict[str, Design]


def covariates(layers: int, rng: np.random.Generator) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Site of each neuron and its log norm, utility, gradient and safety score, [N, 4]."""
    sizes = np.array(SIZES * layers)
    site = np.repeat(np.arange(len(sizes)), sizes)
    plain = rng.standard_normal((len(site), 4))
    of_row = rng.standard_normal((max(SIZES), 4))
    row = np.concatenate([np.arange(size) for size in sizes])
    writes = np.repeat(np.tile([kind in ("o_proj", "down_proj") for kind in KINDS], layers), sizes)
    plain[writes] = np.sqrt(PERSISTENT) * of_row[row[writes]] + np.sqrt(1 - PERSISTENT) * plain[writes]
    return site, plain @ np.linalg.cholesky(CORRELATION).T * SPREAD


def top(site: NDArray[np.int64], score: NDArray[np.float64], share: float) -> NDArray[np.bool_]:
    """The highest `share` of every site."""
    order = np.lexsort((-score, site))
    sizes = np.bincount(site)
    rank = np.empty(len(site), dtype=np.int64)
    rank[order] = np.arange(len(site)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return rank < np.maximum(1, (share * sizes).astype(int))[site]


def plan_of(
    layers: int, number: int, member: NDArray[np.bool_] | None = None, values: NDArray[np.float64] | None = None
) -> Plan:
    rng = np.random.default_rng([20240514, layers, number])
    site, drawn = covariates(layers, rng)
    values = drawn if values is None else values
    if member is None:
        member = top(site, values[:, 3], 0.03) & ~top(site, values[:, 1], 0.03)
    sizes = np.array(SIZES * layers)
    population = Population(
        site=site,
        site_names=tuple(map(str, range(len(sizes)))),
        module_type=KINDS * layers,
        layer=tuple(np.repeat(np.arange(layers), len(KINDS)).tolist()),
        row=np.concatenate([np.arange(size) for size in sizes]),
        norm=np.exp(values[:, 0]),
        drift={"l2": np.ones((1, len(site)))},
        covariates={"utility_score": np.exp(values[:, 1]), "gradient_scale": np.exp(values[:, 2])},
    )
    both = Plans(population, ["l2"], 10).of(member, ~member, "l2", MATCHED_ON)
    assert both.matched is not None
    return Plan(population, member, values[:, :3], {"norm": both.norm, "matched": both.matched})


@lru_cache(maxsize=DESIGNS)
def plan(layers: int, number: int) -> Plan:
    return plan_of(layers, number)


@lru_cache(maxsize=1)
def tails() -> NDArray[np.float32]:
    """Scales that turn normal noise into Student's t of SD 1; studies read them from a place of their own."""
    rng = np.random.default_rng(7)
    freedom = rng.chisquare(TAIL, 1 << 21) / TAIL
    return np.sqrt((TAIL - 2) / TAIL / freedom).astype(np.float32)


def noise(rng: np.random.Generator, n: int) -> NDArray[np.float32]:
    start = int(rng.integers(0, len(tails()) - n))
    return rng.standard_normal(n, dtype=np.float32) * tails()[start : start + n]


def simulate(row: Row, number: int) -> dict[str, Any]:
    """One study: what the pipeline makes of a drift with no effect in the mean, and of the same with one."""
    fixed = plan(row.layers, number % DESIGNS)
    design, people, places = fixed.designs[row.comparison], fixed.population, fixed.population.places()
    key = [number, row.layers, row.seeds, *(int(1000 * sd) for sd in (row.site, row.layer, row.seed, row.row))]
    rng = np.random.default_rng(key)
    used = np.flatnonzero(design.coefficient_N)
    site, sites = people.site[used], len(people.site_names)
    slope = SLOPES[row.comparison] * (1 + 0.5 * rng.standard_normal((sites, 3)))
    level = rng.normal(-5, 0.5, sites)[site] + (slope[site] * fixed.logs[used]).sum(axis=1)
    own = row.site * rng.standard_normal(sites) + (row.layer * rng.standard_normal(row.layers))[places.layer_of_site]
    shared = own[site] + np.where(
        places.writes_residual[site], (row.row * rng.standard_normal(max(SIZES)))[people.row[used]], 0.0
    )
    of_seed = row.seed * rng.standard_normal(row.seeds)
    kept = np.sqrt(KEPT) * noise(rng, len(used))
    drift = np.ones((row.seeds, len(people.site)))
    member = fixed.member[used]
    for seed in range(row.seeds):
        log = level + np.where(member, shared + of_seed[seed], 0.0)
        drift[seed, used] = np.exp(log + NOISE * (kept + np.sqrt(1 - KEPT) * noise(rng, len(used))))
    sums = ratio_sums(design, drift, places)
    rules = Rules(BAND, RESAMPLES, number % DESIGNS)
    found = infer_ratio(sums, places, rules)
    smallest = found.inferred.smallest_more(LOG_BAND)
    outcome: dict[str, Any] = {
        "row": row.name,
        "number": number,
        "value": found.inferred.value,
        "se": found.inferred.se,
        "p": found.inferred.p_value(),
        "cluster": found.cluster,
        "row_share": found.row_share,
        "smallest": smallest,
    }
    for label, effect in (("none", 0.0), ("up", LOG_BAND), ("down", -LOG_BAND), ("smallest", smallest)):
        # A true ratio moves the estimate and nothing else, as a test asks: the study need not be analysed again.
        moved = to_estimate(found.inferred._replace(value=found.inferred.value + effect), 0)
        outcome[label] = [bool(moved.ci95[0] <= effect <= moved.ci95[1]), called(moved, BAND)]
    return outcome


def chunk(row: Row, numbers: list[int]) -> list[dict[str, Any]]:
    return [simulate(row, number) for number in numbers]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=2000, help="simulated studies per row")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, help="file of outcomes, one JSON object a line; taken up where it stops")
    parser.add_argument("--row", action="append", help="only rows whose name begins so; may be given again")
    parser.add_argument("--shares", type=int, default=0, help="shares of a sum instead, so many studies a row")
    parser.add_argument("--list", action="store_true", help="print the rows' names and stop")
    options = parser.parse_args()
    rows = [row for row in ROWS if not options.row or row.name.startswith(tuple(options.row))]
    if options.list:
        print("\n".join(row.name for row in rows))
        return
    if options.shares:
        shares(options.shares, options.workers)
        return
    began = time.perf_counter()
    done = read(options.out)
    print(
        f"{options.studies} studies per row; sites {SIZES} per layer; noise SD {NOISE}, t with {TAIL} df on the log "
        f"scale; {RESAMPLES} resamples; band x{BAND:g}"
    )
    print(
        f"{'comparison':<11}{'layers':>6}{'seeds':>6}{'site':>6}{'layer':>6}{'row':>5}{'seed':>6}"
        f"{'bias':>8}{'FPR':>7}{'cover':>8}{'wrong similar':>16}{'power':>7}{'layer':>7}   ok"
    )
    good = True
    with ProcessPoolExecutor(options.workers) as pool:
        for row in rows:
            known = {o["number"]: o for o in done.get(row.name, []) if o["number"] < options.studies}
            missing = [number for number in range(options.studies) if number not in known]
            parts = [missing[i : i + CHUNK] for i in range(0, len(missing), CHUNK)]
            for future in [pool.submit(chunk, row, part) for part in parts]:
                outcomes = future.result()
                append(options.out, outcomes)
                known |= {o["number"]: o for o in outcomes}
            good &= show(row, list(known.values())) or not row.judged
    print(f"\n{'all judged rows within their aims' if good else 'SOME ROWS MISS THEIR AIMS'}")
    gate()
    print(f"{time.perf_counter() - began:.0f} s")


def read(file: Path | None) -> dict[str, list[dict[str, Any]]]:
    """The outcomes in a file by row; a last line that was cut off is left out."""
    out: dict[str, list[dict[str, Any]]] = {}
    if file is None or not file.exists():
        return out
    for line in file.read_text().splitlines():
        try:
            outcome = json.loads(line)
        except json.JSONDecodeError:
            continue
        out.setdefault(outcome["row"], []).append(outcome)
    return out


def append(file: Path | None, outcomes: list[dict[str, Any]]) -> None:
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a") as stream:
            stream.write("".join("\n" + json.dumps(outcome) for outcome in outcomes))


def show(row: Row, outcomes: list[dict[str, Any]]) -> bool:
    """Print one row; whether it meets the aims."""

    def share(label: str, verdict: str) -> float:
        return float(np.mean([o[label][1] == verdict for o in outcomes]))

    bias = float(np.exp(np.mean([o["value"] for o in outcomes])))
    rate = float(np.mean([o["p"] < 0.05 for o in outcomes]))
    cover = min(float(np.mean([o[label][0] for o in outcomes])) for label in ("none", "up", "down"))
    wrong = [share(label, "similar") for label in ("up", "down")]
    power, layer = share("smallest", "more"), float(np.mean([o["cluster"] == "layer" for o in outcomes]))
    good = 0.035 <= rate <= 0.065 and cover >= 0.93 and max(wrong) <= 0.06
    print(
        f"{row.comparison:<11}{row.layers:>6}{row.seeds:>6}{row.site:>6.2f}{row.layer:>6.2f}{row.row:>5.1f}"
        f"{row.seed:>6.2f}{bias:>8.3f}{rate:>7.1%}{cover:>8.1%}{wrong[0]:>9.1%} |{wrong[1]:>5.1%}{power:>7.0%}"
        f"{layer:>7.0%}   {('yes' if good else 'NO') if row.judged else '(not judged)'}",
        flush=True,
    )
    return good


SHARE_ROWS = ((30, 1, 0.0), (30, 1, 0.2), (30, 3, 0.2), (12, 1, 0.2), (6, 1, 0.2))
PART_NOISE, PART_SLOPES = 3.0, np.array([0.3, -0.2, 0.4])


def lost(layers: int, seeds: int, spread: float, number: int) -> list[tuple[bool, str]]:
    """One study of parts of a sum: coverage of the difference and the verdict, at the edge of the band and without a
    difference. `spread`: SD of what the members of a site, and of a layer, have in common, in mean parts."""
    fixed = plan(layers, number % DESIGNS)
    design, people, places = fixed.designs["matched"], fixed.population, fixed.population.places()
    rng = np.random.default_rng([21, number, layers, seeds, int(1000 * spread)])
    n, sites = len(people.site), len(people.site_names)
    usual = -(1 + (fixed.logs / SPREAD[:3]) @ PART_SLOPES)
    shared = rng.standard_normal(sites) + rng.standard_normal(layers)[places.layer_of_site]
    total = usual.sum()
    compared = design.compared_N
    expected = usual[compared].sum() / total
    edge = (BAND - 1) * max(expected, compared.sum() / n)  # of the difference
    found = []
    for difference in (edge, 0.0):
        more = difference * total / compared.sum() - spread * shared[people.site]
        parts = np.stack([usual + np.where(fixed.member, more, 0.0) + PART_NOISE * noise(rng, n) for _ in range(seeds)])
        rules = Rules(BAND, RESAMPLES, number % DESIGNS)
        effect = share_effect(design, fixed.member, parts, np.full(seeds, total), places, rules)
        low, high = effect.difference.ci95
        found.append((bool(low <= difference <= high), effect.verdict))
    return found


def shares(studies: int, workers: int) -> None:
    print(f"{studies} studies a row; noise SD {PART_NOISE} beside a mean of 1; band {BAND:g}")
    print(f"{'layers':>6}{'seeds':>6}{'shared':>8}{'cover':>8}{'edge: more | not':>19}{'none: more | not':>19}")
    with ProcessPoolExecutor(workers) as pool:
        for layers, seeds, spread in SHARE_ROWS:
            futures = [pool.submit(lost, layers, seeds, spread, number) for number in range(studies)]
            outcomes = [future.result() for future in futures]
            cover = np.mean([part[0] for outcome in outcomes for part in outcome])
            cells = [
                f"{np.mean([o[at][1] == 'more' for o in outcomes]):>11.1%} |{np.mean([o[at][1] == 'not_more' for o in outcomes]):>6.1%}"
                for at in (0, 1)
            ]
            print(f"{layers:>6}{seeds:>6}{spread:>8.1f}{cover:>8.1%}{cells[0]}{cells[1]}", flush=True)


def gate() -> None:
    """Groups chosen by one covariate, by chance, and as in the rows above: comparable or not, over ten draws each."""
    print(f"\n{'Gate, 12 layers, 10 draws':<34}{'norm: passes, SMD, alone':>34}{'matched: passes, SMD, alone':>34}")
    for name in ("norm alone", "norm, mostly", "utility alone", "gradient alone", "safety", "set difference", "random"):
        shares: dict[str, list[tuple[bool, float, float]]] = {"norm": [], "matched": []}
        for number in range(10):
            rng = np.random.default_rng([99, number])
            site, values = covariates(12, rng)
            other = rng.standard_normal(len(site))
            score = {
                "norm alone": values[:, 0],
                "norm, mostly": values[:, 0] / SPREAD[0] + 0.5 * other,
                "utility alone": values[:, 1],
                "gradient alone": values[:, 2],
                "safety": values[:, 3],
                "set difference": values[:, 3],
                "random": other,
            }[name]
            member = top(site, score, 0.03 if name == "set difference" else 0.01)
            if name == "set difference":
                member &= ~top(site, values[:, 1], 0.03)
            for label, design in plan_of(12, number, member, values).designs.items():
                worst = max((abs(b.after) for b in design.balance if b.gated), default=np.nan)
                shares[label].append((not design.because, worst, design.without_control / design.members))
        cells = []
        for found in shares.values():
            smd = np.nanmean([s for _, s, _ in found]) if np.isfinite([s for _, s, _ in found]).any() else np.nan
            passes, alone = (np.mean([part[i] for part in found]) for i in (0, 2))
            cells.append(f"{passes:>16.0%}{smd:>9.2f}{alone:>9.0%}")
        print(f"{name:<34}{cells[0]}{cells[1]}")


if __name__ == "__main__":
    main()
