"""The tables of ratios: both comparisons of every group, contrasts, parts of the model, seeds, and balance."""

from __future__ import annotations

from typing import Literal

from neurondrift.report import wording
from neurondrift.report.blocks import Table, table
from neurondrift.report.findings.ratios import RatioEffect
from neurondrift.report.findings.statistical import Effect, Findings
from neurondrift.report.reading import analysis_of, comparisons_of, effects_of, judged, metrics_of, primary_of
from neurondrift.report.tables.answer import why
from neurondrift.report.wording import Footnotes, clean, finite, is_control

COMPARISONS = {"matched": "matched", "norm": "norm"}
OUTSIDE = "– outside the Holm family: controls, what is not comparable, and the comparison that does not judge"


def ratio_table(results: Findings, metric: str) -> Table:
    """Every comparison of every group in one metric: the figures that the verdicts rest on."""
    notes, rows = Footnotes(), []
    for effect in effects_of(results, metric):
        for found in comparisons_of(effect):
            rows.append(
                (
                    clean(effect["group"]),
                    COMPARISONS.get(found["comparison"], clean(found["comparison"])),
                    wording.verdict(found),
                    notes.ratio(found),
                    notes.interval(found, "ratio_ci90", wording.ratio),
                    notes.number(found, "p", wording.probability),
                    _holm(effect, found, notes),
                    notes.number(found, "p_equivalence", wording.probability),
                )
            )
    analysis = analysis_of(results)
    explained: tuple[str, ...] = ()
    if analysis and metric == metrics_of(results)[-1]:
        explained = (
            f"Holm family: {clean(analysis['family'])}; {analysis['family_size']} tests",
            "p: the ratio is 1; (equiv.): it lies outside a factor of "
            + wording.number(analysis, "band", wording.plain),
        )
    primary = " (primary metric)" if metric == primary_of(results) else ""
    return table(
        f"{wording.sentence_case(wording.metric_words(metric))}{primary}: ratio to comparable neurons",
        ("group", "by", "moved", "ratio [95 %]", "90 % interval", "p", "p (Holm)", "p (equiv.)"),
        rows,
        "lllrrrrr",
        (OUTSIDE, *explained, *notes.notes()),
    )


def _holm(effect: Effect, found: RatioEffect, notes: Footnotes) -> str:
    """The adjusted p; a dash where there is none by design."""
    by_design = is_control(effect) or not found["comparable"] or found is not judged(effect)
    if finite(found["p_holm"]) is None and by_design:
        return "–"
    return notes.number(found, "p_holm", wording.probability)


def contrast_table(results: Findings, metric: str) -> Table:
    """Groups against each other in one metric, each against its own controls, without the members they share."""
    notes, rows = Footnotes(), []
    analysis = analysis_of(results)
    for contrast in (c for c in (analysis["contrasts"] if analysis else []) if c["metric"] == metric):
        shared = contrast.get("shared")
        rows.append(
            (
                f"{clean(contrast['first'])} / {clean(contrast['second'])}",
                "–" if shared is None else f"{shared:,}",
                notes.ratio(contrast if "ratio" in contrast else None),
                notes.number(contrast, "p_holm", wording.probability),
                wording.verdict(contrast),
                notes.with_interval(contrast["difference"], wording.effect),
            )
        )
    return table(
        f"Ratio of the first group's ratio over the second's: {wording.metric_name(metric)}",
        ("groups", "shared, left out", "ratio [95 %]", "p (Holm)", "moved", "difference in g"),
        rows,
        "lrrrlr",
        notes.notes(),
    )


def subgroup_table(results: Findings, field: Literal["by_module", "by_layer_third"], title: str, header: str) -> Table:
    """Ratios within module types or layer thirds, in the primary metric."""
    notes, rows = Footnotes(), []
    for effect in effects_of(results, primary_of(results)):
        if is_control(effect):
            continue
        for part in effect[field]:
            g = part["g"]
            rows.append(
                (
                    clean(effect["group"]),
                    clean(part["name"]),
                    str(part.get("log_ratio", g)["n"]),
                    str(part.get("log_ratio", g)["sites"]),
                    notes.ratio(part if "ratio" in part else None),
                    notes.number(part, "p", wording.probability),
                    wording.VERDICTS.get(part["verdict"], clean(part["verdict"])),
                    notes.number(g, "value", wording.effect),
                )
            )
    return table(
        title,
        ("group", header, "neurons", "sites", "ratio [95 %]", "p", "moved", "g"),
        rows,
        "llrrrrlr",
        ("exploratory: p not adjusted for the number of comparisons; controls left out", *notes.notes()),
    )


def seed_table(results: Findings) -> Table:
    """The judging ratio of each training seed, in every metric."""
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
                found = judged(at) if at else None
                cells.append(notes.with_interval(found["per_seed"][index] if found else None, _log))
            rows.append((clean(effect["group"]), label, *cells))
    return table(
        "Log ratio of each training seed with its 95 % interval (over sites or layers only)",
        ("group", "seed", *(clean(metric) for metric in metrics)),
        rows,
        "lr" + "r" * len(metrics),
        ("natural logarithm: 0 is as far, 0.223 is a ratio of 1.25", *notes.notes()),
    )


def _log(value: float) -> str:
    return f"{value + 0.0:+.3f}"


def counts_table(results: Findings) -> Table:
    """Who is compared with whom, in the primary metric."""
    rows = []
    for effect in effects_of(results, primary_of(results)):
        for found in comparisons_of(effect):
            asked = found["n_compared"] + found["n_without_control"]
            trimmed = wording.share(found["n_without_control"] / asked) if asked else "–"
            rows.append(
                (
                    clean(effect["group"]),
                    COMPARISONS.get(found["comparison"], clean(found["comparison"])),
                    f"{found['n_members']:,}",
                    f"{found['n_compared']:,}",
                    f"{found['n_without_control']:,} ({trimmed})",
                    f"{found['n_undefined']:,}",
                    f"{found['sites']:,} ({found['sites_left_out']:,})",
                    _size(found["effective_controls"]),
                    "yes" if found["comparable"] else f"no: {why(found)}",
                )
            )
    return table(
        "Members and their controls",
        (
            "group",
            "by",
            "members",
            "compared",
            "no control (share)",
            "no drift",
            "sites (left out)",
            "effective controls",
            "comparable",
        ),
        rows,
        "llrrrrrrl",
        (
            "no verdict above 0.05 without a control, or above 0.1 SD of a covariate that the comparison balances; "
            "effective controls: Kish's size of their weights",
        ),
    )


def _size(value: object) -> str:
    number = finite(value)
    return "–" if number is None else f"{number:,.0f}"


def balance_table(results: Findings) -> Table:
    """Every covariate before and after, in SD of its logarithm within sites, in the primary metric."""
    notes, rows = Footnotes(), []
    for effect in effects_of(results, primary_of(results)):
        for found in comparisons_of(effect):
            for each in found["balance"]:
                rows.append(
                    (
                        clean(effect["group"]),
                        COMPARISONS.get(found["comparison"], clean(found["comparison"])),
                        wording.covariate(each["name"]),
                        notes.number(each, "before", wording.effect),
                        notes.number(each, "after", wording.effect),
                        "balanced" if each["gated"] else "not asked for",
                    )
                )
    return table(
        "Balance: standardised mean difference of each covariate, members minus controls",
        ("group", "by", "covariate", "before", "after", "by design"),
        rows,
        "lllrrl",
        notes.notes(),
    )
