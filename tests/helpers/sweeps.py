"""Sweeps whose studies are made up: every group comparable, its ratio and standard error chosen by the test."""

import math

from helpers.results import make_results
from neurondrift.report.reading import judged
from neurondrift.statistics.results import decide
from neurondrift.study.sweep.folder import Status
from neurondrift.study.sweep.results.table import Study
from neurondrift.study.sweep.settings import read_sweep

GRID = """name = "made-up"
preset = "smoke"
[grid]
model.reference = {models}
finetune.lora_r = {ranks}
"""


def sweep_of(folder, models=("one", "two", "three"), ranks=(4, 8)):
    file = folder / "sweep.toml"
    file.write_text(GRID.format(models=list(models), ranks=list(ranks)))
    return read_sweep(file)


def findings_with(log_ratio, se, *, comparable=True, lost=0.25, seeds=1):
    """The findings of a study in which every group has this log ratio, judged as a study judges."""
    results = make_results(seeds)
    for effect in results["analysis"]["effects"]:
        for found in filter(None, (effect["effect_matched"], effect["effect_norm"])):
            ci90, ci95 = ([log_ratio - z * se, log_ratio + z * se] for z in (1.6448536, 1.959964))
            found["log_ratio"] |= {"value": log_ratio, "se": se, "ci90": ci90, "ci95": ci95}
            found |= {
                "ratio": math.exp(log_ratio),
                "ratio_ci90": [math.exp(v) for v in ci90],
                "ratio_ci95": [math.exp(v) for v in ci95],
                "verdict": decide(tuple(ci90), tuple(ci95), math.log(1.25)) if comparable else "inconclusive",
                "comparable": comparable,
                "below_band": False,
            }
            for own in found["per_seed"]:
                own["value"] = log_ratio
        assert judged(effect) is not None
    for change in results["behaviour"]["changes"]:
        if change["kind"] == "harmful":
            change |= {"from_rate": 0.9, "to_rate": 0.9 - lost}
    return results


def studies_of(sweep, effects, states=None):
    """The points with made-up findings: of each a log ratio and the keywords of `findings_with`; None: not ended."""
    made = []
    for point, effect in zip(sweep.points, effects, strict=True):
        if effect is None:
            made.append(Study(point, Status(state="failed", message="it broke", code=2), None))
        else:
            made.append(Study(point, Status(state="done", code=0), findings_with(**effect)))
    return made
