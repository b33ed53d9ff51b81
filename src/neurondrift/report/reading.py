"""Typed access to the findings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from neurondrift.base.roles import NEGATIVE_CONTROLS, Role, role_of_name
from neurondrift.report.wording import KINDS, Record, role_of


def analysis_of(results: Record) -> Record:
    """The analysis part; empty where the study has none."""
    found = results.get("analysis")
    return found if isinstance(found, Mapping) else {}


def primary_of(results: Record) -> str:
    """The primary metric."""
    return str(analysis_of(results).get("primary_metric") or "relative")


def metrics_of(results: Record) -> list[str]:
    """The analysed metrics, the primary one first."""
    analysis = analysis_of(results)
    named = [*(analysis.get("metrics") or []), *(e["metric"] for e in analysis.get("effects") or [])]
    return sorted(dict.fromkeys(named), key=lambda metric: metric != primary_of(results))


def effects_of(results: Record, metric: str | None = None) -> list[Record]:
    """The effects in one metric (default: in all, primary metric first); safety groups first, random last."""
    effects = analysis_of(results).get("effects") or []
    metrics = [metric] if metric is not None else metrics_of(results)
    chosen = [effect for name in metrics for effect in effects if effect["metric"] == name]
    order = group_order(results)
    return sorted(chosen, key=lambda e: (metrics.index(e["metric"]), *order(e["group"])))


class Roles(dict[str, Role | None]):
    """Group -> what it is to the study; of a group that the analysis does not hold, what its name tells of."""

    def __missing__(self, group: str) -> Role | None:
        return role_of_name(group)


def roles_of(results: Record) -> Roles:
    """What each analysed group is to the study."""
    return Roles({str(effect["group"]): role_of(effect) for effect in analysis_of(results).get("effects") or []})


def group_order(results: Record) -> Callable[[str], tuple[bool, bool]]:
    """Sort key of groups (the sort is stable): those that the question is about first, negative controls last."""
    roles = roles_of(results)
    return lambda group: (roles[group] != "safety", roles[group] in NEGATIVE_CONTROLS)


def behaviour_of(results: Record) -> Record:
    """The behaviour part; empty where the study has none."""
    found = results.get("behaviour")
    return found if isinstance(found, Mapping) else {}


def rates_of(results: Record, seed: Any = None, kind: str | None = None) -> list[Record]:
    """The measured rates of a seed and a kind of prompt, in the order of the steps."""
    found = [
        r
        for r in behaviour_of(results).get("rates") or []
        if (seed is None or r["seed"] == seed) and (kind is None or r["kind"] == kind)
    ]
    return sorted(found, key=lambda r: r["step"])


def behaviour_seeds(results: Record) -> list[Any]:
    """Seeds with measured behaviour, in their order."""
    return list(dict.fromkeys(r["seed"] for r in behaviour_of(results).get("rates") or []))


def kinds_of(results: Record) -> list[str]:
    """The kinds of prompts measured, harmful first."""
    known = list(KINDS)
    return sorted(
        dict.fromkeys(str(r["kind"]) for r in behaviour_of(results).get("rates") or []),
        key=lambda kind: known.index(kind) if kind in known else len(known),
    )
