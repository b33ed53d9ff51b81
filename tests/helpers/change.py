"""Findings with what the change does: parts of a lost margin planted into groups, compared as a study compares them."""

import functools
import json

import numpy as np

from helpers.results import groups_of, make_results, population
from neurondrift.base.files import json_safe
from neurondrift.base.roles import role_of_name
from neurondrift.report.findings.statistical import Findings
from neurondrift.statistics.design.ratios import Rules
from neurondrift.study.population import Compared
from neurondrift.study.stages.attribution.comparing import Measured, compare_groups

JUDGING = ("safety_set_difference", "safety_residual")


def margin_of(parts, before):
    """The summary of one margin, as the stage attribute writes it."""
    change = float(parts.sum())
    return {
        "values": [before, before + change],
        "change": change,
        "attributed": change,
        "missed": 0.001,
        "adds_up": True,
        "sites": change,
        "elsewhere": 0.0,
        "elsewhere_by_kind": {},
        "points": [3],
    }


@functools.cache
def _attribution(seeds: int, times: tuple[tuple[str, float], ...], noise: float, mean: float) -> str:
    rng = np.random.default_rng(7)
    people = population(seeds, rng)
    groups = groups_of(people, rng)
    n = len(people.site)
    scale = np.ones(n)
    for name, factor in times:
        scale[groups[name]] = factor
    columns = {}
    for way in ("margin_", "budget_margin_"):
        for prompts in ("harmful", "harmless"):
            columns[way + prompts] = (mean * scale + noise * rng.standard_normal((seeds, n))) / n
    for name in ("drift_safety", "drift_utility"):
        columns[name] = people.drift["l2"] ** 2 * rng.lognormal(0, 0.3, (seeds, n))
    columns["provenance_directional"] = rng.normal(0, 0.1, (seeds, n))
    summaries = {
        seed: {
            "asked": {"prompts": {"harmful": 24, "harmless": 24}},
            "margin": {
                way.replace("margin_", "") + prompts: margin_of(columns[way + prompts][seed], 3.0)
                for way in ("margin_", "budget_margin_")
                for prompts in ("harmful", "harmless")
            },
        }
        for seed in range(seeds)
    }
    roles = {name: role_of_name(name) for name in groups}
    compared = Compared(
        population=people,
        members=groups,
        roles=roles,
        judging=JUDGING,
        on=dict.fromkeys(groups, ("norm",)),
        rules=Rules(1.25, 200, 0),
        bins=4,
    )
    found = compare_groups(Measured(columns, ["path", "budget"], summaries), compared)
    return json.dumps(json_safe(found), allow_nan=False)


def with_change(seeds=1, *, times=3.0, noise=1.0, mean=-1.0, **others: float) -> Findings:
    """A study's findings; members of the judging groups lost `times` as much margin as other neurons did."""
    planted = {name: others.get(name, times) for name in JUDGING}
    results = make_results(seeds)
    results["attribution"] = json.loads(_attribution(seeds, tuple(planted.items()), noise, mean))
    behaviour = results["behaviour"]
    lost = [t["change"] for t in results["attribution"]["totals"] if (t["way"], t["prompts"]) == ("budget", "harmful")]
    behaviour["margins"] = [
        {"seed": seed, "step": step, "kind": kind, "mean": 3 + share * lost[seed], "low": 2.5, "high": 4.0, "n": 96}
        for seed in range(seeds)
        for kind in ("harmful", "ordinary")
        for step, share in ((0, 0.0), (20, 0.4), (50, 0.8), (75, 1.0))
    ]
    early = {"seed": None, "step": None, "kind": "harmful", "mean": -2.0, "low": -2.5, "high": -1.5, "n": 96}
    behaviour["margins_before_alignment"] = [early]
    behaviour["margin_changes"] = [
        {"seed": seed, "kind": "harmful", "from_step": 0, "to_step": 75, "n": 96, "change": change, "ci95": limits}
        for seed, change in enumerate(lost)
        for limits in [[change - 0.3, change + 0.3]]
    ]
    return results


def patched(standing: str, *, found: float | None = 0.4, groups=JUDGING):
    """Interventions that put original activations back, with how each group stood."""
    reference = {"harmful": {"rate": 0.9, "n": 32, "asked": 32}, "ordinary": {}, "answers": {}}
    return {
        "model_fingerprint": "sha256:1f0c9ab2",
        "references": {"before": reference, "after": reference},
        "conclusion": "",
        "sentences": [],
        "effects": [
            {
                "intervention": "patch",
                "group": group,
                "dose": 1,
                "draws": 20,
                "standing": standing,
                "found": {"effect": found, "share": found, "draws": 20, "reason": ""},
            }
            for group in groups
        ],
    }
