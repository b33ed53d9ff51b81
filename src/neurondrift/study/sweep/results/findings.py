"""What the studies of a sweep say together: groups pooled over them, in the layout of `sweep_results.json`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import cast

from neurondrift.base.files import json_safe, read_json, write_json, write_text
from neurondrift.report.findings.ratios import RatioEffect
from neurondrift.report.findings.statistical import Effect, Findings
from neurondrift.report.reading import judged, study_of
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
from neurondrift.statistics.results import Expected
from neurondrift.study.folder import StudyFolder, record
from neurondrift.study.sweep.folder import Status, SweepFolder
from neurondrift.study.sweep.naming import label
from neurondrift.study.sweep.results.table import (
    Study,
    harmful_changes,
    refusals,
    rows,
    standard_error,
    write_table,
)
from neurondrift.study.sweep.settings import Point, Sweep


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
    lost = refusals([] if findings is None else harmful_changes(findings))
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
            lost = refusals(harmful_changes(study.findings))["refusals_lost"]
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
    expected: dict[str, Expected] = {}
    comparisons: dict[str, dict[str, str]] = {}
    metric = ""
    for study in studies:
        if study.findings is None:
            continue
        analysis = study.findings["analysis"]
        metric = analysis["primary_metric"]
        for check in analysis.get("controls", []):
            expected.setdefault(check["group"], check["expected"])
            comparisons.setdefault(check["group"], {})[study.point.name] = check["comparison"]
    made = []
    for group, wanted in expected.items():
        effect = _pooled(studies, group, metric, band, comparisons=comparisons[group])
        made.append(PooledControl(group=group, expected=wanted, passed=_passed(wanted, effect), effect=effect))
    return made


def _passed(expected: Expected, effect: PooledEffect) -> bool | None:
    """As of one study (`ControlCheck`): open where the verdict is inconclusive."""
    if effect["verdict"] == "inconclusive":
        return None
    return effect["verdict"] == expected
