"""The tables about drift in its own units: means, g, unmatched figures, trajectories, weights, overlaps."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from neurondrift.report import wording
from neurondrift.report.blocks import Table, table
from neurondrift.report.findings.statistical import Findings, Mean, WeightRow
from neurondrift.report.reading import analysis_of, effects_of, group_order, is_older, primary_of, trajectories_of
from neurondrift.report.wording import (
    ALL,
    Footnotes,
    clean,
    finite,
    metric_words,
    role_of,
)

CONFOUNDED = "* unmatched: confounded with |w| and with the sites that members come from; for comparison only"
RELATIVE_IS_CONFOUNDED = (
    "|Δw|/|w₀| has |w₀| below the line: a group of large weights moves less in it by construction. Beside random "
    "weights it says nothing about drift; beside controls it rests on how well their |w| match"
)
SITES_VARY = "ratio: members / controls, with its interval over sites, for this one run"
#: Steps shown in a table of drift over training.
MOST_STEPS = 7
#: The two quantities of single weights: label, average (a quotient with weights near 0 has no mean worth a word), then
#: the fields for members, controls, ratio and random group.
WEIGHT_QUANTITIES = (
    ("|Δw|", "mean", "mean_abs", "matched_mean_abs", "ratio_abs", "random_mean_abs"),
    ("|Δw|/|w₀|", "median", "median_relative", "matched_median_relative", "ratio_relative", "random_median_relative"),
)


def matched_table(results: Findings, metric: str) -> Table:
    """Members against controls in strata of site and |w|, in one metric, with g: it judges nothing."""
    notes, rows = Footnotes(), []
    for effect in effects_of(results, metric):
        g = effect["g"]
        rows.append(
            (
                clean(effect["group"]),
                notes.number(effect["mean_members"], "value", wording.drift),
                notes.number(effect["mean_controls"], "value", wording.drift),
                notes.number(effect["ratio_matched"], "value", wording.ratio),
                notes.number(g, "value", wording.effect),
                notes.interval(g, "ci95", wording.effect),
                notes.number(effect, "p_permutation", wording.probability),
                notes.number(effect, "detectable", wording.ratio),
            )
        )
    return table(
        f"Means and g within strata of site and |w|: {wording.metric_name(metric)}",
        (
            "group",
            "mean of members",
            "mean of controls",
            "ratio of means",
            "g",
            "95 % interval",
            "p of permutation",
            "|g| told from 0",
        ),
        rows,
        "lrrrrrrr",
        (
            "secondary: in SD within strata, which differs between groups and models; not adjusted for what strata "
            "leave of |w|; told from 0: the smallest |g| with 80 % power at 5 %",
            *notes.notes(),
        ),
    )


def unmatched_table(results: Findings) -> Table:
    """The figures that other studies report, marked as confounded."""
    notes, rows = Footnotes(), []
    for effect in effects_of(results):
        rows.append(
            (
                clean(effect["metric"]),
                clean(effect["group"]),
                notes.number(effect["mean_members"], "value", wording.drift),
                notes.number(effect["mean_others"], "value", wording.drift),
                notes.number(effect["ratio_unmatched"], "value", wording.ratio),
                notes.number(effect["ratio_matched"], "value", wording.ratio),
                "–" if role_of(effect) == "random" else notes.number(effect["d_random"], "value", wording.effect),
            )
        )
    return table(
        "Unmatched figures, beside the matched ratio",
        (
            "metric",
            "group",
            "mean of members",
            "mean of all others*",
            "raw ratio*",
            "matched ratio",
            "Cohen's d vs random*",
        ),
        rows,
        "llrrrrr",
        (CONFOUNDED, *notes.notes()),
    )


def trajectory_tables(results: Findings) -> list[Table]:
    """Mean drift at a choice of steps, in the primary metric: one table per seed."""
    metric = primary_of(results)
    points = trajectories_of(results, metric)
    out = []
    order = group_order(results)
    for seed in dict.fromkeys(p["seed"] for p in points):
        chosen = [p for p in points if p["seed"] == seed]
        steps = _spread(sorted({p["step"] for p in chosen}), MOST_STEPS)
        names = sorted(dict.fromkeys(p["group"] for p in chosen), key=lambda g: (g == ALL, *order(g)))
        rows: list[tuple[str, ...]] = []
        notes = Footnotes()
        for name in names:
            own = [p for p in chosen if p["group"] == name]
            arms: dict[str, dict[int, Mean | None]] = {
                "members": {p["step"]: p["members"] for p in own},
                "controls": {p["step"]: p["controls"] for p in own},
            }
            for arm, at in arms.items():
                if any(at.values()):
                    rows.append(
                        (
                            clean(name) if name != ALL else "all neurons",
                            arm if name != ALL else "",
                            *(_mean(at.get(step), notes) for step in steps),
                        )
                    )
        out.append(
            table(
                f"Mean {metric_words(metric)}, seed {clean(seed)}",
                ("group", "", *(f"step {step}" for step in steps)),
                rows,
                "ll" + "r" * len(steps),
                notes.notes(),
            )
        )
    return out


def _mean(value: Mean | None, notes: Footnotes) -> str:
    return notes.number(value, "mean", wording.drift) if value else "–"


def _spread(steps: Sequence[int], most: int) -> list[int]:
    """At most `most` of the steps, evenly placed, with the first and the last."""
    if len(steps) <= most:
        return list(steps)
    return [steps[round(i * (len(steps) - 1) / (most - 1))] for i in range(most)]


def weight_table(results: Findings) -> Table | None:
    """Drift of single weights at the last step of each seed, or None where it was not recorded."""
    records = results.get("weights") or []
    if not records:
        return None
    notes, rows = Footnotes(), []
    older = is_older(results)
    for record in _at_last_step(results, records):
        for label, average, *fields in WEIGHT_QUANTITIES:
            if fields[0] not in record:
                continue
            forms = (wording.drift, wording.drift, wording.ratio, wording.drift)
            cells = [
                notes.number(record, field, form) if field in record else "–"
                for field, form in zip(fields, forms, strict=True)
            ]
            if older and average == "median":
                cells[2] = "–"  # older versions divided means of quotients with weights near 0
            elif limits := wording.interval(record.get(f"{fields[2]}_ci95"), wording.ratio):
                cells[2] += f" {limits}"
            rows.append(
                (
                    clean(record["group"]),
                    clean(record["seed"]),
                    f"{record.get('n') or 0:,}",
                    f"{average} {label}",
                    *cells,
                )
            )
    return table(
        "Single weights at the last step: members, matched controls, and random weights",
        (
            "group",
            "seed",
            "weights",
            "average",
            "members",
            "controls",
            "ratio [95 %]",
            "random*",
        ),
        rows,
        "lrrlrrrr",
        (CONFOUNDED, RELATIVE_IS_CONFOUNDED, SITES_VARY, *notes.notes()),
    )


def _at_last_step(results: Findings, records: Iterable[WeightRow]) -> list[WeightRow]:
    last: dict[tuple[str, int], WeightRow] = {}
    for record in records:
        key = record["group"], record["seed"]
        if key not in last or record["step"] >= last[key]["step"]:
            last[key] = record
    groups, order = list(dict.fromkeys(group for group, _ in last)), group_order(results)
    return sorted(last.values(), key=lambda r: (*order(r["group"]), groups.index(r["group"])))


def overlap_table(results: Findings) -> Table:
    """Neurons that groups share."""
    analysis = analysis_of(results)
    rows = [
        (
            clean(o["first"]),
            clean(o["second"]),
            f"{o['shared']:,}",
            wording.share(value) if (value := finite(o["jaccard"])) is not None else wording.NOT_RECORDED,
        )
        for o in (analysis["overlaps"] if analysis else [])
    ]
    return table(
        "Neurons that two groups share (Jaccard: shared / in either)",
        ("first", "second", "shared", "Jaccard"),
        rows,
        "llrr",
    )
