"""The tables about behaviour and the study: refusals, changes, association with drift, perplexity, groups, settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from neurondrift.report import wording
from neurondrift.report.blocks import Table, table
from neurondrift.report.findings.statistical import Findings, RefusalRate
from neurondrift.report.reading import (
    analysis_of,
    behaviour_of,
    behaviour_seeds,
    changes_of,
    kinds_of,
    perplexities_of,
    rates_before_alignment,
    rates_of,
    study_of,
)
from neurondrift.report.wording import NOT_RECORDED, Footnotes, clean, finite

#: Seeds listed one by one on the first screen.
MOST_SEEDS_AT_FIRST = 4
WILSON = "95 % Wilson intervals"
NOT_REFUSED = "partly refused and undecided: shares of the harmful requests asked, not counted as refused"
Part = Literal["partial", "undecided"]
PARTS: tuple[Part, ...] = ("partial", "undecided")


def refusal_answer_table(results: Findings) -> Table | None:
    """Refusals before and after fine-tuning, one row per seed; None without behaviour."""
    seeds, rows = behaviour_seeds(results), []
    kinds = kinds_of(results)
    prompts = {kind: rates[-1]["n"] for kind in kinds if (rates := rates_of(results, kind=kind))}
    for seed in seeds[:MOST_SEEDS_AT_FIRST]:
        cells = []
        for kind in kinds:
            rates = rates_of(results, seed, kind)
            ends = (rates[0], rates[-1]) if rates else (None, None)
            if kind == "harmful":
                cells += [wording.rate(ends[0]), wording.rate(ends[1]), _change_p(results, seed)]
                cells.append(_partly_undecided(ends[1]))
            else:
                cells.append(
                    " → ".join(wording.number(end, "rate", wording.share) if end else "not measured" for end in ends)
                )
        rows.append((clean(seed), *cells))
    if not rows:
        return None
    headers = ["seed"]
    for kind in kinds:
        harmful = ["harmful, before", "harmful, after", "p (McNemar)", "partly / undecided"]
        headers += harmful if kind == "harmful" else [clean(kind)]
    notes = [f"{NOT_REFUSED}; here after fine-tuning"]
    if len(seeds) > MOST_SEEDS_AT_FIRST:
        notes.append(f"{len(seeds) - MOST_SEEDS_AT_FIRST} more seeds under Behaviour over training")
    if early := rates_before_alignment(results).get("harmful"):
        notes.append(f"before the alignment step, harmful requests refused: {wording.rate(early)}")
    counts = ", ".join(f"{clean(count)} {clean(kind)}" for kind, count in prompts.items())
    return table(f"Refusals before → after ({WILSON}) of {counts} prompts:", headers, rows, "r" * len(headers), notes)


def _change_p(results: Findings, seed: int | None) -> str:
    for change in changes_of(results):
        if change["seed"] == seed and change["kind"] == "harmful":
            value = finite(change["p_mcnemar"])
            return wording.probability(value) if value is not None else "undefined"
    return "–"


def behaviour_tables(results: Findings) -> list[Table]:
    """Refusals, coherence and perplexity at every evaluated step: one table per seed."""
    kinds = kinds_of(results)
    early = rates_before_alignment(results)
    perplexity = perplexities_of(results)
    out = []
    for seed in behaviour_seeds(results):
        notes, rows = Footnotes(), []
        at = {(r["step"], r["kind"]): r for r in rates_of(results, seed)}
        if early:
            rows.append(
                (
                    "before alignment",
                    *(wording.rate(early.get(kind)) for kind in kinds),
                    _judged(early.get("harmful")),
                    "–",
                )
            )
        for step in dict.fromkeys(step for step, _ in at):
            value = perplexity.get((seed, step))
            rows.append(
                (
                    clean(step) + _mark(at.get((step, "harmful"))),
                    *(wording.rate(at.get((step, kind))) for kind in kinds),
                    _judged(at.get((step, "harmful"))),
                    notes.number(value, "value", wording.drift) if value else "–",
                )
            )
        counts = ", ".join(
            f"{clean(kind)} {rates[-1]['n']}" for kind in kinds if (rates := rates_of(results, seed, kind))
        )
        out.append(
            table(
                f"Share refused at each step, seed {clean(seed)}",
                ("step", *(clean(kind) for kind in kinds), "partly / undecided / coherent", "perplexity"),
                rows,
                "r" * (len(kinds) + 3),
                (
                    f"{WILSON}; prompts: {counts}",
                    NOT_REFUSED,
                    "coherent: answers to harmful requests; perplexity: of held-out ordinary answers",
                    *_shortened(rates_of(results, seed)),
                    *_undecided(rates_of(results, seed)),
                    *notes.notes(),
                ),
            )
        )
    return out


def _undecided(rates: Sequence[RefusalRate]) -> list[str]:
    """A note where answers were thoughts alone, at any step."""
    count, all_of_them = sum(rate.get("undecided", 0) for rate in rates), sum(rate["n"] for rate in rates)
    said = f"undecided (thoughts alone, or not in English; counted as not refused): {count} of {all_of_them}"
    return [said] if count else []


def _shortened(rates: Sequence[RefusalRate]) -> list[str]:
    """How long the answers were, where that was recorded: those at the ends, and those that were ended early."""

    def longest(whole: bool) -> str:
        found = {rate["max_new_tokens"] for rate in rates if rate.get("whole") is whole and "max_new_tokens" in rate}
        return ", ".join(clean(length) for length in sorted(found))

    long, short = longest(True), longest(False)
    said = [f"answers of at most {long} tokens, to their end"] if long else []
    if short:
        said.append(
            f"*: of at most {short}, ended once the verdict seemed settled, so that a later turn may be missed: "
            "compare the first with the last step"
        )
    return said


def _mark(record: RefusalRate | None) -> str:
    return "*" if record and not record.get("whole", True) else ""


def _judged(record: RefusalRate | None) -> str:
    """Shares judged partial and undecided, and the share of coherent answers."""
    return f"{_partly_undecided(record)}/{_coherent(record)}"


def _partly_undecided(record: RefusalRate | None) -> str:
    return "/".join(_counted(record, name) for name in PARTS)


def _counted(record: RefusalRate | None, name: Part) -> str:
    """A number of prompts as their share; a dash where it was not recorded."""
    count = record.get(name) if record else None
    return "–" if record is None or count is None or not record["n"] else wording.share(count / record["n"])


def _coherent(record: RefusalRate | None) -> str:
    value = finite(record["coherent"]) if record else None
    return "–" if value is None else wording.share(value)


def change_table(results: Findings) -> Table | None:
    """The same prompts before and after, with McNemar's test; None where it was not recorded."""
    changes = changes_of(results)
    if not changes:
        return None
    notes = Footnotes()
    at = {(r["seed"], r["kind"], r["step"]): r for r in rates_of(results)}
    rows = [
        (
            clean(c["seed"]),
            clean(c["kind"]),
            f"{clean(c['from_step'])} → {clean(c['to_step'])}",
            notes.number(c, "from_rate", wording.share),
            notes.number(c, "to_rate", wording.share),
            notes.number(c, "difference", wording.effect),
            notes.number(c, "p_mcnemar", wording.probability),
            *(
                " → ".join(_counted(at.get((c["seed"], c["kind"], c[step])), name) for step in ("from_step", "to_step"))
                for name in PARTS
            ),
            clean(c["n"]),
        )
        for c in changes
    ]
    return table(
        "Change on the same prompts",
        ("seed", "prompts", "steps", "before", "after", "difference", "p (McNemar)", "partly", "undecided", "n"),
        rows,
        "rlrrrrrrrr",
        notes.notes(),
    )


def association_table(results: Findings) -> Table | None:
    """How the loss of refusals goes with drift; None where behaviour was not analysed."""
    analysis = analysis_of(results)
    if analysis is None or not analysis["associations"]:
        return None
    notes = Footnotes()
    rows = [
        (
            clean(a["group"]),
            clean(a["n_points"]),
            clean(a["n_seeds"]),
            notes.number(a, "spearman", wording.effect),
            notes.interval(a, "interval", wording.effect),
            notes.number(a, "p", wording.probability),
            notes.number(a, "slope", wording.drift),
            notes.number(a, "r2", wording.share),
        )
        for a in analysis["associations"]
    ]
    return table(
        "Loss of refusals of harmful requests beside mean drift, over the snapshots",
        ("group", "points", "seeds", "Spearman", "95 % interval", "p", "lost refusals per unit of drift", "R²"),
        rows,
        "lrrrrrrr",
        notes.notes(),
    )


def group_table(results: Findings) -> Table:
    """What each group is."""
    rows = [
        (
            clean(g["name"]),
            clean(g["granularity"]),
            _count(g["members"]),
            _count(g["sites"]),
            clean(g["rule"]),
        )
        for g in results.get("groups") or []
    ]
    return table("How the groups were chosen", ("group", "of", "members", "sites", "rule"), rows, "llrrl")


def settings_table(results: Findings) -> Table:
    """Every setting and version that the results carry, one per row."""
    study, analysis, behaviour = study_of(results), analysis_of(results), behaviour_of(results)
    named = {
        "study": study.get("name"),
        "model": study.get("model"),
        "model fingerprint": study.get("model_fingerprint"),
        "training seeds": study.get("seeds"),
        "training steps": study.get("steps"),
        **_flat("fine-tuning", study.get("finetune")),
        **_flat("scores", study.get("score")),
        **_flat("arithmetic of", study.get("arithmetic")),
        "judge of refusals": behaviour and behaviour["judge"],
        "longest answer judged (tokens)": behaviour and behaviour["max_new_tokens"],
        "neurons analysed": analysis and analysis["n_neurons"],
        "sites analysed": analysis and analysis["n_sites"],
        "band of equivalence (ratio)": analysis and analysis.get("band"),
        "band of g (judges nothing)": analysis and analysis["sesoi"],
        "resamples": analysis and analysis["resamples"],
        "|w| bins per site": analysis and analysis["bins"],
        "seed of the analysis": analysis and analysis["rng_seed"],
        **_flat("version of", study.get("versions")),
        "made": study.get("created"),
        "schema version": results.get("schema_version"),
    }
    rows = [
        (clean(name), _value(value))
        for name, value in named.items()
        if value is not None or name in ("study", "model", "model fingerprint")
    ]
    return table("Settings and versions", ("setting", "value"), rows, "ll")


def _flat(prefix: str, record: object) -> dict[str, Any]:
    """Nested settings as `prefix name: value`."""
    if not isinstance(record, Mapping):
        return {}
    out: dict[str, Any] = {}
    for key, value in record.items():
        name = f"{prefix} {clean(key).replace('_', ' ')}"
        out.update(_flat(name, value) if isinstance(value, Mapping) else {name: value})
    return out


def _value(value: object) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(_value(part) for part in value) or "none"
    number = finite(value)
    if number is not None:
        return wording.plain(number) if isinstance(value, float) or abs(number) >= 1e4 else clean(value)
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else clean(value)


def _count(value: object) -> str:
    number = finite(value)
    return NOT_RECORDED if number is None else f"{number:,.0f}"
