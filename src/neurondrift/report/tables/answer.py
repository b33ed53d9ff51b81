"""The tables of the first screen: how far the groups moved, and whether the controls of known answer came out."""

from __future__ import annotations

import functools
import json
from importlib import resources

from neurondrift.report import wording
from neurondrift.report.blocks import Table, table
from neurondrift.report.findings.ratios import ControlCheck, RatioEffect
from neurondrift.report.findings.statistical import Effect, Findings
from neurondrift.report.reading import analysis_of, effects_of, is_older, judged, judged_by_matching, primary_of
from neurondrift.report.wording import Footnotes, clean, finite, is_control, metric_name, role_of

PASSED = {True: "passed", False: "FAILED", None: "open"}
NOT_PLANTED = "Whether {scores} find weights into which refusals were trained has not been measured here."


def answer_table(results: Findings) -> Table | None:
    """How far each group that is no control moved, in the primary metric; None where nothing was analysed."""
    effects = effects_of(results, primary_of(results))
    if not effects or is_older(results):
        return None
    notes, rows = Footnotes(), []
    matched, not_shown = judged_by_matching(results), []
    for effect in [e for e in effects if not is_control(e)] or effects:
        found = judged(effect)
        words = wording.verdict(found) if found else "not judged"
        rows.append(
            (
                clean(effect["group"]),
                clean(role_of(effect), "–") + "*" * bool(effect.get("judging")),
                words.upper() if effect.get("judging") else words,
                notes.ratio(found),
                *([notes.ratio(effect.get("effect_norm"))] if matched else []),
                f"{found['n_compared']:,}/{found['n_members'] - found['n_compared']:,}" if found else "–",
                notes.number(found, "smallest_more", wording.ratio),
            )
        )
        if found and found["comparable"] is False:
            not_shown.append(f"{clean(effect['group'])} is {wording.NOT_COMPARABLE}: {why(found)}")
    analysis = analysis_of(results)
    band = wording.number(analysis, "band", wording.plain)
    by = (
        "matched on site, row norm, utility score and gradient scale (judges), and on site and norm only (published)"
        if matched
        else "on site and row norm only, which judges here: no other covariates are known"
    )
    ratios = ("matched [95 %]", "norm only [95 %]") if matched else ("norm only [95 %]",)
    return table(
        f"Ratio of {metric_name(primary_of(results))} to comparable neurons, {by}:",
        ("group", "role", "moved", *ratios, "compared /without", "80 % at"),
        rows,
        "lll" + "r" * len(ratios) + "rr",
        (
            f"* judges. As far: 90 % interval within a factor of {band}. Without: members with no control, or no "
            "defined drift. 80 % at: the smallest true ratio that would be called further with 80 % power",
            *not_shown,
            *_weak(effects),
            *notes.notes(),
        ),
    )


def _weak(effects: list[Effect]) -> list[str]:
    weak = [
        clean(effect["group"])
        for effect in effects
        if effect["verdict"] in ("more", "protected") and (finite(effect["p_holm"]) or 0) > 0.05
    ]
    return [f"weak, p (Holm) above 0.05, so not beyond the correction for several tests: {', '.join(weak)}"] * bool(
        weak
    )


def why(found: RatioEffect) -> str:
    """Why a comparison has no counterfactual."""
    gated = [(b["name"], after) for b in found["balance"] if b["gated"] and (after := finite(b["after"])) is not None]
    worst, difference = max(gated, key=lambda pair: abs(pair[1]), default=("", None))
    return wording.why_not_comparable(
        found["not_comparable_because"],
        worst=worst,
        difference=difference,
        without_control=found["n_without_control"],
        of_members=found["n_compared"] + found["n_without_control"],
    )


def controls_table(results: Findings) -> Table | None:
    """Groups whose answer is known before, and each judging group with an injected difference; None without any."""
    analysis = analysis_of(results)
    if analysis is None or is_older(results):
        return None
    notes = Footnotes()
    effects = {effect["group"]: effect for effect in effects_of(results, primary_of(results))}
    rows = [_control(check, effects[check["group"]], notes) for check in _checks(results)]
    for effect in effects.values():
        injected = effect.get("injected")
        if injected is None or not effect.get("judging"):
            continue
        rows.append(
            (
                f"{clean(effect['group'])} × {wording.number(injected, 'factor', wording.plain)}",
                "injected: is found",
                wording.VERDICTS.get(injected["verdict"], clean(injected["verdict"])),
                "–",
                PASSED[injected["found"]],
            )
        )
    if not rows:
        return None
    return table(
        "Controls of known answer:",
        ("control", "expected", "moved", "ratio [95 %]", "outcome"),
        rows,
        "lllrl",
        (
            *(["compared by site and row norm: " + ", ".join(by_norm)] if (by_norm := _by_norm(results)) else []),
            *notes.notes(),
        ),
    )


def _checks(results: Findings) -> list[ControlCheck]:
    """Negative controls, then positive ones."""
    analysis = analysis_of(results)
    checks = analysis.get("controls", []) if analysis else []
    return sorted(checks, key=lambda check: check["expected"] != "similar")


def _control(check: ControlCheck, effect: Effect, notes: Footnotes) -> tuple[str, ...]:
    found = effect.get("effect_matched") if check["comparison"] == "matched" else effect.get("effect_norm")
    kind = "negative: as far" if check["expected"] == "similar" else "positive: further"
    passed = check["passed"]
    outcome = "FAILED" if passed is None and check["expected"] == "more" else PASSED[passed]
    words = wording.verdict(found) if found else wording.VERDICTS[check["verdict"]]
    return (clean(check["group"]), kind, words, notes.ratio(found), outcome)


def _by_norm(results: Findings) -> list[str]:
    """The controls that the matched comparison has no counterfactual of."""
    if not judged_by_matching(results):
        return []
    return [clean(check["group"]) for check in _checks(results) if check["comparison"] == "norm"]


def what_groups_stand_on(results: Findings) -> str | None:
    """Which score each safety group stands on, and what the benchmark of planted refusals says of it; None where that
    was not recorded."""
    by_score: dict[str, list[str]] = {}
    for group in results.get("groups", []):
        if group.get("role") == "safety" and group.get("score"):
            by_score.setdefault(clean(group["score"]), []).append(group["name"])
    if not by_score:
        return None
    measured = scores_measured()
    said = {
        score: f"{wording.group_words(names)} by {score.replace('_', ' ')}"
        + (f", which {measured[score]}" if score in measured else "")
        for score, names in by_score.items()
    }
    text = f"What the safety groups stand on: {'; '.join(said.values())}."
    unknown = [score.replace("_", " ") for score in said if score not in measured]
    return text + (f" {NOT_PLANTED.format(scores=wording.listed(unknown))}" if unknown else "")


@functools.cache
def scores_measured() -> dict[str, str]:
    """Score -> what it was found to do where refusals were planted, in words (`report/localisation.json`)."""
    file = resources.files("neurondrift.report") / "localisation.json"
    found: dict[str, str] = json.loads(file.read_text(encoding="utf-8"))["scores"]
    return found


def thirds(results: Findings) -> str | None:
    """Early and late layers of the judging groups, in one sentence; None where there are no thirds."""
    said = []
    for effect in effects_of(results, primary_of(results)):
        parts = [
            f"{clean(part['name'])} {wording.ratio_with_interval(part) or 'undefined'}"
            for part in effect["by_layer_third"]
            if "ratio" in part
        ]
        if effect.get("judging") and parts:
            said.append(f"{clean(effect['group'])} {', '.join(parts)}")
    return f"Early and late layers apart: {'; '.join(said)}." if said else None
