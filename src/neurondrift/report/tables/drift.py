"""The tables about drift: effects, tests, contrasts, subgroups, seeds, balance, trajectories, weights, overlaps."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

from neurondrift.report import wording
from neurondrift.report.blocks import Table, table
from neurondrift.report.findings.statistical import Effect, Findings, Mean, WeightRow
from neurondrift.report.reading import analysis_of, effects_of, group_order, metrics_of, primary_of, trajectories_of
from neurondrift.report.wording import (
    ALL,
    Footnotes,
    clean,
    finite,
    is_negative_control,
    is_safety,
    metric_words,
    role_of,
)

CONFOUNDED = "* unmatched: confounded with |w| and with the sites that members come from; for comparison only"
RELATIVE_IS_CONFOUNDED = (
    "|Δw|/|w₀| has |w₀| below the line: a group of large weights moves less in it by construction. Beside random "
    "weights it says nothing about drift; beside controls it rests on how well their |w| match"
)
SITES_VARY = "ratio: members / controls, with its interval over sites, for this one run"
WEAK = "p (Holm) above 0.05: weak, the effect does not survive the correction for multiple tests"
OUTSIDE = "– outside the Holm family: random is a negative control"
#: Steps shown in a table of drift over training.
MOST_STEPS = 7
#: The two quantities of single weights: label, then the fields for members, controls, ratio and random group.
WEIGHT_QUANTITIES = (
    ("|Δw|", "mean_abs", "matched_mean_abs", "ratio_abs", "random_mean_abs"),
    ("|Δw|/|w₀|", "mean_relative", "matched_mean_relative", "ratio_relative", "random_mean_relative"),
)


def answer_table(results: Findings) -> Table:
    """Each group's answer in the primary metric."""
    notes, rows = Footnotes(), []
    for effect in effects_of(results, primary_of(results)):
        g = effect["g"]
        rows.append(
            (
                clean(effect["group"]),
                _meaning(effect),
                notes.number(g, "value", wording.effect),
                notes.interval(g, "ci95", wording.effect),
                _holm(effect, notes),
                notes.number(effect, "detectable", wording.ratio),
            )
        )
    sesoi = wording.number(analysis_of(results), "sesoi", wording.plain)
    weak = (
        [WEAK]
        if any(
            e["verdict"] in ("more", "protected") and (finite(e["p_holm"]) or 0) > 0.05
            for e in effects_of(results, primary_of(results))
        )
        else []
    )
    return table(
        f"In {metric_words(primary_of(results))}, against controls matched on site and |w|:",
        ("group", "answer", "g", "95 % interval", "p (Holm)", "detectable"),
        rows,
        "llrrrr",
        (
            f"g in SD; within ±{sesoi} counts as the same; detectable: smallest |g| found with 80 % power",
            *weak,
            *notes.notes(),
        ),
    )


def _meaning(effect: Effect) -> str:
    verdict = clean(effect["verdict"])
    if is_safety(effect):
        return f"{verdict.upper()} ({wording.VERDICTS.get(verdict, 'no hypothesis')})"
    return f"{verdict}, {'negative control' if is_negative_control(effect) else 'for comparison'}"


def _holm(effect: Effect, notes: Footnotes) -> str:
    """The adjusted p; a dash for the negative control, which has none by design."""
    if is_negative_control(effect) and finite(effect["p_holm"]) is None:
        return "–"
    return notes.number(effect, "p_holm", wording.probability)


def matched_table(results: Findings, metric: str) -> Table:
    """Members against matched controls in one metric: the figures that the verdict rests on."""
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
                _holm(effect, notes),
                clean(effect["verdict"]),
            )
        )
    primary = " (primary metric)" if metric == primary_of(results) else ""
    return table(
        f"{wording.sentence_case(metric_words(metric))}{primary}: members and their matched controls",
        ("group", "mean of members", "mean of controls", "ratio", "g", "95 % interval", "p (Holm)", "verdict"),
        rows,
        "lrrrrrrl",
        (OUTSIDE, *notes.notes()),
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


def inference_table(results: Findings, metric: str) -> Table:
    """Every test behind the verdicts in one metric."""
    notes, rows = Footnotes(), []
    for effect in effects_of(results, metric):
        g = effect["g"]
        rows.append(
            (
                clean(effect["group"]),
                notes.interval(g, "ci90", wording.effect),
                notes.number(effect, "p", wording.probability),
                _holm(effect, notes),
                notes.number(effect, "p_equivalence", wording.probability),
                notes.number(effect, "p_permutation", wording.probability),
                notes.number(effect, "detectable", wording.ratio),
            )
        )
    analysis = analysis_of(results)
    explained = (
        ()
        if analysis is None or metric != metrics_of(results)[-1]
        else (
            f"Holm family: {clean(analysis['family'])}; {analysis['family_size']} tests",
            "p: the mean effect over sites is 0; of equivalence: |g| reaches the smallest effect of interest; "
            "of permutation: membership changes no neuron's drift",
            "detectable: smallest |g| found with 80 % power at two-sided 5 %",
        )
    )
    return table(
        f"Tests behind the verdicts: {wording.metric_name(metric)}",
        ("group", "90 % interval of g", "p", "p (Holm)", "p of equivalence", "p of permutation", "detectable |g|"),
        rows,
        "lrrrrrr",
        (*explained, *notes.notes()),
    )


def contrast_table(results: Findings, metric: str) -> Table:
    """Groups against each other in one metric, each against its own controls."""
    notes, rows = Footnotes(), []
    analysis = analysis_of(results)
    for contrast in (c for c in (analysis["contrasts"] if analysis else []) if c["metric"] == metric):
        difference = contrast["difference"]
        rows.append(
            (
                f"{clean(contrast['first'])} − {clean(contrast['second'])}",
                notes.number(difference, "value", wording.effect),
                notes.interval(difference, "ci95", wording.effect),
                notes.number(contrast, "p_holm", wording.probability),
                notes.number(contrast, "p_equivalence", wording.probability),
                clean(contrast["verdict"]),
            )
        )
    return table(
        f"Difference in g, each group against its own matched controls: {wording.metric_name(metric)}",
        ("groups", "difference", "95 % interval", "p (Holm)", "p of equivalence", "verdict"),
        rows,
        "lrrrrl",
        notes.notes(),
    )


def subgroup_table(results: Findings, field: Literal["by_module", "by_layer_third"], title: str, header: str) -> Table:
    """g within module types or layer thirds, in the primary metric."""
    notes, rows = Footnotes(), []
    for effect in effects_of(results, primary_of(results)):
        for part in effect[field]:
            g = part["g"]
            rows.append(
                (
                    clean(effect["group"]),
                    clean(part["name"]),
                    str(g["n"]),
                    str(g["sites"]),
                    notes.number(g, "value", wording.effect),
                    notes.interval(g, "ci95", wording.effect),
                    notes.number(part, "p", wording.probability),
                    clean(part["verdict"]),
                )
            )
    return table(
        title,
        ("group", header, "neurons", "sites", "g", "95 % interval", "p", "verdict"),
        rows,
        "llrrrrrl",
        ("exploratory: p not adjusted for the number of comparisons", *notes.notes()),
    )


def seed_table(results: Findings) -> Table:
    """g of each training seed, in every metric."""
    notes, rows = Footnotes(), []
    analysis = analysis_of(results)
    labels = [clean(label) for label in (analysis["seed_labels"] if analysis else [])]
    metrics = metrics_of(results)
    by_key = {(e["group"], e["metric"]): e for e in effects_of(results)}
    for effect in effects_of(results, primary_of(results)):
        for index, label in enumerate(labels):
            cells = []
            for metric in metrics:
                at = by_key.get((effect["group"], metric))
                cells.append(notes.with_interval(at["per_seed"][index] if at else None, wording.effect))
            rows.append((clean(effect["group"]), label, *cells))
    return table(
        "g of each training seed with its 95 % interval (over sites only)",
        ("group", "seed", *(clean(metric) for metric in metrics)),
        rows,
        "lr" + "r" * len(metrics),
        notes.notes(),
    )


def balance_table(results: Findings) -> Table:
    """How many members found controls, and how well |w| balances, in the primary metric."""
    notes, rows = Footnotes(), []
    for effect in effects_of(results, primary_of(results)):
        balance = effect["balance"]
        rows.append(
            (
                clean(effect["group"]),
                str(effect["n_members"]),
                str(effect["n_undefined"]),
                str(effect["n_unmatched"]),
                str(effect["n_controls"]),
                f"{effect['strata']} ({effect['strata_unmatched']})",
                notes.number(balance, "before", wording.effect),
                notes.number(balance, "after", wording.effect),
            )
        )
    return table(
        "Members, controls, and the balance of |w| (in SD of |w|)",
        (
            "group",
            "members",
            "without drift",
            "without control",
            "controls",
            "strata (unmatched)",
            "|w| before matching",
            "|w| after matching",
        ),
        rows,
        "lrrrrrrr",
        ("an imbalance of |w| within ±0.10 SD counts as balanced (Stuart 2010)", *notes.notes()),
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
    for record in _at_last_step(results, records):
        for label, *fields in WEIGHT_QUANTITIES:
            if fields[0] not in record:
                continue
            forms = (wording.drift, wording.drift, wording.ratio, wording.drift)
            cells = [
                notes.number(record, field, form) if field in record else "–"
                for field, form in zip(fields, forms, strict=True)
            ]
            if limits := wording.interval(record.get(f"{fields[2]}_ci95"), wording.ratio):
                cells[2] += f" {limits}"
            rows.append((clean(record["group"]), clean(record["seed"]), f"{record.get('n') or 0:,}", label, *cells))
    return table(
        "Single weights at the last step: members, matched controls, and random weights",
        (
            "group",
            "seed",
            "weights",
            "mean",
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
