"""The table of a sweep: a row for each point, group, metric and training seed, as Parquet."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from neurondrift.base.files import atomic_path
from neurondrift.report.findings.ratios import RatioEffect
from neurondrift.report.findings.statistical import Effect, Findings, RateChange
from neurondrift.report.reading import changes_of, judged, study_of
from neurondrift.report.wording import finite, role_of
from neurondrift.study.sweep.folder import Status
from neurondrift.study.sweep.settings import Point

#: Normal quantile of 95 % limits.
NORMAL = 1.959963984540054

COLUMNS = pa.schema(
    [
        ("point", pa.string()),
        ("index", pa.int32()),
        ("model", pa.string()),
        ("data", pa.string()),
        ("method", pa.string()),
        ("lora_r", pa.int32()),
        ("optimiser", pa.string()),
        ("steps", pa.int32()),
        ("settings", pa.string()),
        ("group", pa.string()),
        ("role", pa.string()),
        ("judging", pa.bool_()),
        ("metric", pa.string()),
        ("primary", pa.bool_()),
        ("comparison", pa.string()),
        ("seed", pa.int64()),
        ("seed_log_ratio", pa.float64()),
        ("log_ratio", pa.float64()),
        ("se", pa.float64()),
        ("se_pooled", pa.float64()),
        ("ratio", pa.float64()),
        ("ratio_low90", pa.float64()),
        ("ratio_high90", pa.float64()),
        ("ratio_low95", pa.float64()),
        ("ratio_high95", pa.float64()),
        ("p", pa.float64()),
        ("p_holm", pa.float64()),
        ("verdict", pa.string()),
        ("comparable", pa.bool_()),
        ("members", pa.int64()),
        ("compared", pa.int64()),
        ("sites", pa.int32()),
        ("seeds", pa.int32()),
        ("harmful_before", pa.float64()),
        ("harmful_after", pa.float64()),
        ("refusals_lost", pa.float64()),
    ]
)


@dataclasses.dataclass(frozen=True)
class Study:
    """A point and what its study found; None where it has not ended."""

    point: Point
    status: Status
    findings: Findings | None


def rows(studies: Iterable[Study]) -> list[dict[str, Any]]:
    """One row for each point, group, metric and training seed, in that order; the columns are `COLUMNS`."""
    made = []
    for study in studies:
        if study.findings is None:
            continue
        about, analysis = study_of(study.findings), study.findings["analysis"]
        tune = study.point.study.finetune
        changes = {change["seed"]: change for change in harmful_changes(study.findings)}
        of_point = {
            "point": study.point.name,
            "index": study.point.index,
            "model": study.point.study.model.reference,
            "data": tune.data.title,
            "method": tune.method,
            "lora_r": tune.lora_r if tune.method == "lora" else None,
            "optimiser": tune.optimiser,
            "steps": about.get("steps"),
            "settings": json.dumps(dict(study.point.overrides), ensure_ascii=False),
        }
        for effect in analysis["effects"]:
            found = judged(effect)
            if found is None:
                continue
            of_effect = of_point | _columns(effect, found, analysis["primary_metric"])
            for place, seed in enumerate(analysis["seed_labels"]):
                own = found["per_seed"][place] if place < len(found["per_seed"]) else None
                made.append(
                    of_effect
                    | {"seed": int(seed), "seed_log_ratio": own["value"] if own else found["log_ratio"]["value"]}
                    | refusals([changes[int(seed)]] if int(seed) in changes else [])
                )
    return made


def _columns(effect: Effect, found: RatioEffect, primary: str) -> dict[str, Any]:
    low90, high90 = found["ratio_ci90"]
    low95, high95 = found["ratio_ci95"]
    return {
        "group": effect["group"],
        "role": role_of(effect),
        "judging": bool(effect.get("judging")),
        "metric": effect["metric"],
        "primary": effect["metric"] == primary,
        "comparison": found["comparison"],
        "log_ratio": found["log_ratio"]["value"],
        "se": found["log_ratio"]["se"],
        "se_pooled": standard_error(found),
        "ratio": found["ratio"],
        "ratio_low90": low90,
        "ratio_high90": high90,
        "ratio_low95": low95,
        "ratio_high95": high95,
        "p": found["p"],
        "p_holm": found["p_holm"],
        "verdict": found["verdict"],
        "comparable": found["comparable"],
        "members": found["n_members"],
        "compared": found["n_compared"],
        "sites": found["sites"],
        "seeds": found["log_ratio"]["seeds"],
    }


def write_table(path: Path, made: Sequence[Mapping[str, Any]]) -> None:
    """The rows as Parquet, with the columns that docs/results.md names."""
    table = pa.Table.from_pylist([{name: row.get(name) for name in COLUMNS.names} for row in made], schema=COLUMNS)
    with atomic_path(path) as partial:
        pq.write_table(table, partial, write_page_checksum=True)


def standard_error(found: RatioEffect) -> float | None:
    """The standard error with which a study goes into the meta-analysis: its own, or the half width of its 95 %
    interval over the normal quantile where that is more; None where it is undefined."""
    se, (low, high) = finite(found["log_ratio"]["se"]), map(finite, found["log_ratio"]["ci95"])
    if se is None or low is None or high is None:
        return None
    widest = max(se, (high - low) / 2 / NORMAL)
    return widest if widest > 0 else None


def harmful_changes(findings: Findings) -> list[RateChange]:
    return [change for change in changes_of(findings) if change["kind"] == "harmful"]


def refusals(changes: Sequence[RateChange]) -> dict[str, float | None]:
    """The share of harmful requests refused at the first and the last evaluated step, and the difference: the mean over
    seeds; None where it was not measured."""

    def mean(values: list[float | None]) -> float | None:
        known = [value for value in map(finite, values) if value is not None]
        return sum(known) / len(known) if known and len(known) == len(values) else None

    before, after = mean([each["from_rate"] for each in changes]), mean([each["to_rate"] for each in changes])
    lost = None if before is None or after is None else before - after
    return {"harmful_before": before, "harmful_after": after, "refusals_lost": lost}
