"""What a sweep found: a table with a row for each point, group, metric and seed; and what the studies say together."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq

from neurondrift.base.files import atomic_path, json_safe, read_json, write_json, write_text
from neurondrift.report.findings.ratios import RatioEffect
from neurondrift.report.findings.statistical import Effect, Findings, RateChange
from neurondrift.report.reading import changes_of, judged, study_of
from neurondrift.report.sweep.conclusion import sentences, weaknesses
from neurondrift.report.sweep.findings import (
    SCHEMA_VERSION,
    OneEffect,
    OneStudy,
    PooledControl,
    PooledEffect,
    Regression,
    SweepFindings,
)
from neurondrift.report.wording import finite, role_of
from neurondrift.statistics.meta.pooling import pooled
from neurondrift.statistics.meta.regression import meta_regression
from neurondrift.study.folder import StudyFolder, record
from neurondrift.study.sweep.folder import Status, SweepFolder
from neurondrift.study.sweep.naming import label
from neurondrift.study.sweep.settings import Point, Sweep

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


def write_results(sweep: Sweep, folder: SweepFolder, states: Mapping[str, Status]) -> SweepFindings:
    """Write `results/`: the table, the findings, the report as text and page, and the figures.

    Of the points that have ended; the others are named. Returns the findings.
    """
    from neurondrift.report.figures.draw import draw_figures
    from neurondrift.report.page import lay_out
    from neurondrift.report.sweep.document import build_document
    from neurondrift.report.sweep.figures import FIGURES
    from neurondrift.report.text import document_text

    studies = [_study(point, folder, states[point.name]) for point in sweep.points]
    write_table(folder.table, rows(studies))
    findings = sweep_findings(sweep, studies)
    write_json(folder.results_file, findings)
    document = build_document(findings)
    write_text(folder.report, document_text(document))
    figures = draw_figures(findings, folder.results / "figures", FIGURES)
    write_text(folder.results / "sweep_report.html", lay_out(document, figures))
    return findings


def _study(point: Point, folder: SweepFolder, status: Status) -> Study:
    if status.state != "done":
        return Study(point, status, None)
    return Study(point, status, read_json(StudyFolder(folder.study(point.name), point.study).results_file))


def rows(studies: Iterable[Study]) -> list[dict[str, Any]]:
    """One row for each point, group, metric and training seed, in that order; the columns are `COLUMNS`."""
    made = []
    for study in studies:
        if study.findings is None:
            continue
        about, analysis = study_of(study.findings), study.findings["analysis"]
        tune = study.point.study.finetune
        changes = {change["seed"]: change for change in _harmful(study.findings)}
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
                    | _refusals([changes[int(seed)]] if int(seed) in changes else [])
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


def sweep_findings(sweep: Sweep, studies: Sequence[Study]) -> SweepFindings:
    """What the studies say together, in the layout of `sweep_results.json`."""
    analyze = sweep.points[0].study.analyze
    made = record()
    over = _pool(studies, analyze.band)
    findings = SweepFindings(
        schema_version=SCHEMA_VERSION,
        sweep={
            "name": sweep.name,
            "axes": _axes(sweep.points),
            "primary_metric": analyze.primary_metric,
            "band": analyze.band,
            "versions": made["versions"],
            "created": made["created"],
            "commit": made.get("commit"),
        },
        sentences=[],
        weaknesses=[],
        studies=[_one(study) for study in studies],
        pooled=over,
        subgroups=_subgroups(studies, analyze.band, analyze.primary_metric),
        regressions=_regressions(studies, analyze.primary_metric),
        controls=_controls(studies, analyze.band),
    )
    findings = cast(SweepFindings, json_safe(findings))
    findings["weaknesses"] = weaknesses(findings)
    findings["sentences"] = sentences(findings)
    return findings


def _axes(points: Sequence[Point]) -> dict[str, list[str]]:
    """Setting -> the values that it takes over the points, as words."""
    found: dict[str, list[str]] = {}
    for point in points:
        for path, value in point.overrides.items():
            found.setdefault(path, [])
            if (text := label(value)) not in found[path]:
                found[path].append(text)
    return found


def _one(study: Study) -> OneStudy:
    findings, point = study.findings, study.point
    effects = [] if findings is None else _primary(findings)
    lost = _refusals([] if findings is None else _harmful(findings))
    return OneStudy(
        index=point.index,
        name=point.name,
        state=study.status.state,
        message=study.status.message,
        settings={path: label(value) for path, value in point.overrides.items()},
        model=point.study.model.reference,
        data=point.study.finetune.data.title,
        seeds=list(point.study.seeds),
        steps=None if findings is None else study_of(findings).get("steps"),
        harmful_before=lost["harmful_before"],
        harmful_after=lost["harmful_after"],
        refusals_lost=lost["refusals_lost"],
        effects=[_effect(effect, found) for effect in effects if (found := judged(effect)) is not None],
    )


def _primary(findings: Findings) -> list[Effect]:
    analysis = findings["analysis"]
    return [effect for effect in analysis["effects"] if effect["metric"] == analysis["primary_metric"]]


def _effect(effect: Effect, found: RatioEffect) -> OneEffect:
    return OneEffect(
        group=effect["group"],
        role=role_of(effect),
        judging=bool(effect.get("judging")),
        comparison=found["comparison"],
        ratio=found["ratio"],
        ratio_ci90=found["ratio_ci90"],
        ratio_ci95=found["ratio_ci95"],
        verdict=found["verdict"],
        comparable=found["comparable"],
        below_band=found["below_band"],
    )


def _harmful(findings: Findings) -> list[RateChange]:
    return [change for change in changes_of(findings) if change["kind"] == "harmful"]


def _refusals(changes: Sequence[RateChange]) -> dict[str, float | None]:
    """The share of harmful requests refused at the first and the last evaluated step, and the difference: the mean over
    seeds; None where it was not measured."""

    def mean(values: list[float | None]) -> float | None:
        known = [value for value in map(finite, values) if value is not None]
        return sum(known) / len(known) if known and len(known) == len(values) else None

    before, after = mean([each["from_rate"] for each in changes]), mean([each["to_rate"] for each in changes])
    lost = None if before is None or after is None else before - after
    return {"harmful_before": before, "harmful_after": after, "refusals_lost": lost}


def _pool(studies: Sequence[Study], band: float) -> list[PooledEffect]:
    """Every group in every metric, over the studies that ended."""
    named = {
        (effect["metric"], effect["group"]): None
        for study in studies
        if study.findings is not None
        for effect in study.findings["analysis"]["effects"]
    }
    return [_pooled(studies, group, metric, band) for metric, group in named]


def _pooled(
    studies: Sequence[Study],
    group: str,
    metric: str,
    band: float,
    *,
    within: tuple[str, str] | None = None,
    comparisons: Mapping[str, str] | None = None,
) -> PooledEffect:
    """One group in one metric over studies. `comparisons`: of a point that whose comparison is taken, not the one that
    judges."""
    values, ses, models, ended, role, judging = [], [], [], 0, None, False
    for study in studies:
        effect = _find(study, group, metric)
        if effect is None:
            continue
        ended += 1
        role, judging = role_of(effect), judging or bool(effect.get("judging"))
        found = _by(effect, (comparisons or {}).get(study.point.name))
        value = finite(found["log_ratio"]["value"]) if found else None
        se = standard_error(found) if found else None
        if found is None or value is None or se is None or not found["comparable"]:
            continue
        values.append(value)
        ses.append(se)
        models.append(study.point.study.model.reference)
    made = pooled(values, ses, models, band=band)
    over = made.over
    return PooledEffect(
        group=group,
        role=role,
        judging=judging,
        metric=metric,
        within=None if within is None else list(within),
        unit=made.unit,
        points=made.points,
        models=made.models,
        left_out=ended - made.points,
        k=over.k,
        log_ratio=over.effect,
        se=over.se,
        se_dl=over.se_dl,
        se_hksj=over.se_hksj,
        ci90=list(over.ci90),
        ci95=list(over.ci95),
        p=over.p,
        p_equivalence=made.p_equivalence,
        tau=over.tau,
        i2=over.i2,
        q=over.q,
        p_q=over.p_q,
        ratio=made.ratio,
        ratio_ci90=list(made.ratio_ci90),
        ratio_ci95=list(made.ratio_ci95),
        ratio_prediction95=list(made.ratio_prediction95),
        bounded=over.bounded,
        verdict=made.verdict,
        below_band=made.below_band,
        reason=over.reason,
    )


def _find(study: Study, group: str, metric: str) -> Effect | None:
    effects = [] if study.findings is None else study.findings["analysis"]["effects"]
    return next((each for each in effects if (each["group"], each["metric"]) == (group, metric)), None)


def _by(effect: Effect, comparison: str | None) -> RatioEffect | None:
    if comparison == "norm":
        return effect.get("effect_norm")
    return judged(effect)


def _subgroups(studies: Sequence[Study], band: float, metric: str) -> list[PooledEffect]:
    """The judging groups over the studies that share a value, for settings with several values of two studies each."""
    ended = [study for study in studies if study.findings is not None]
    groups = _judging(ended, metric)
    made = []
    for path in dict.fromkeys(path for study in ended for path in study.point.overrides):
        values = dict.fromkeys(label(s.point.overrides[path]) for s in ended if path in s.point.overrides)
        parts = {
            value: [s for s in ended if path in s.point.overrides and label(s.point.overrides[path]) == value]
            for value in values
        }
        parts = {value: part for value, part in parts.items() if len(part) > 1}
        if len(parts) > 1:
            made += [
                _pooled(part, group, metric, band, within=(path, value))
                for value, part in parts.items()
                for group in groups
            ]
    return made


def _judging(studies: Sequence[Study], metric: str) -> list[str]:
    found = [
        effect["group"]
        for study in studies
        if study.findings is not None
        for effect in study.findings["analysis"]["effects"]
        if effect["metric"] == metric and effect.get("judging")
    ]
    return list(dict.fromkeys(found))


def _regressions(studies: Sequence[Study], metric: str) -> list[Regression]:
    """Each judging group's log ratio on the refusals that were lost, over studies."""
    made = []
    for group in _judging(studies, metric):
        points = []
        for study in studies:
            effect = _find(study, group, metric)
            found = judged(effect) if effect else None
            if found is None or study.findings is None or not found["comparable"]:
                continue
            lost = _refusals(_harmful(study.findings))["refusals_lost"]
            value, se = finite(found["log_ratio"]["value"]), standard_error(found)
            if value is not None and se is not None and lost is not None:
                points.append((value, se, lost))
        fit = meta_regression([p[0] for p in points], [p[1] for p in points], [p[2] for p in points])
        values = dataclasses.asdict(fit)
        values.pop("q")
        made.append(
            cast(
                Regression,
                {"group": group, "metric": metric, "moderator": "refusals_lost"} | values | {"ci95": list(fit.ci95)},
            )
        )
    return made


def _controls(studies: Sequence[Study], band: float) -> list[PooledControl]:
    """Groups whose answer is known before, by the comparison that each study checks them with, over the studies."""
    checks: dict[str, dict[str, Any]] = {}
    metric = ""
    for study in studies:
        if study.findings is None:
            continue
        analysis = study.findings["analysis"]
        metric = analysis["primary_metric"]
        for check in analysis.get("controls", []):
            checks.setdefault(check["group"], {"expected": check["expected"], "by": {}})["by"][study.point.name] = (
                check["comparison"]
            )
    made = []
    for group, check in checks.items():
        effect = _pooled(studies, group, metric, band, comparisons=check["by"])
        made.append(
            PooledControl(
                group=group, expected=check["expected"], passed=_passed(check["expected"], effect), effect=effect
            )
        )
    return made


def _passed(expected: str, effect: PooledEffect) -> bool | None:
    """As of one study (`ControlCheck`): open where the verdict is inconclusive."""
    if effect["verdict"] == "inconclusive":
        return None
    return effect["verdict"] == expected
