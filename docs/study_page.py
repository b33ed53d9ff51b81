"""The page of a study whose results are committed, and how its figures are told: made from the files beside it."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pyarrow.parquet as pq
from costs import table


@dataclass(frozen=True)
class Committed:
    """A study whose results are in the repository: where, what its page is called, what made it, of which model, and
    what a reader should know first."""

    folder: Path
    title: str
    command: str
    model: str
    about: str = ""

    @cached_property
    def results(self) -> dict:
        """The findings, which are large."""
        return self.read("statistical_results.json")

    def read(self, name: str) -> dict:
        return json.loads((self.folder / name).read_text())

    def has(self, name: str) -> bool:
        return (self.folder / name).exists()


NAMES = {
    "safety_acquired": "safety, acquired in alignment",
    "safety_paying": "safety, paying for refusals",
    "safety_top": "safety, SNIP top 1 %",
    "safety_set_difference": "safety, set difference",
    "safety_residual": "safety, residual",
    "utility_top": "utility, SNIP top 1 %",
    "utility_set_difference": "utility minus safety (mirror)",
    "style_set_difference": "style minus utility (placebo)",
    "gradient_top": "fine-tuning gradient, top 1 %",
    "random": "random",
}
#: How far a group moved, as the report says it.
VERDICTS = {"more": "further", "similar": "as far", "protected": "less far", "inconclusive": "inconclusive"}
EXPECTED = {"similar": "as far", "more": "further"}
PASSED = {True: "passed", False: "**failed**", None: "open"}
ARMS = {"budget": "by the budget", "norm": "by the norm of the change", "safety_score": "by the safety score (SNIP)"}


def number(value: float | None, form: str = ".2f") -> str:
    return "–" if value is None else format(value + 0.0, form)


def rate(behaviour: dict, kind: str, step: int | None) -> str:
    """`0.92 (0.83 to 0.96), n = 72`: share refused with its Wilson interval; where seeds differ, of each in turn."""
    rows = behaviour["before_alignment"] if step is None else behaviour["rates"]
    chosen = [r for r in rows if r["kind"] == kind and r["step"] == step]
    texts = [f"{row['rate']:.2f} ({row['low']:.2f} to {row['high']:.2f})" for row in chosen]
    if len(set(texts)) == 1:
        return f"{texts[0]}, n = {chosen[0]['n']}"
    rates = " / ".join(f"{row['rate']:.2f}" for row in chosen)
    return f"{rates} in the seeds (the first: {texts[0].partition(' ')[2][1:-1]}), n = {chosen[0]['n']}"


def ratio(found: dict | None) -> str:
    """`1.02 (1.00 to 1.04)`; a dash where there is none."""
    if found is None or found["ratio"] is None or None in found["ratio_ci95"]:
        return "–"
    return f"{found['ratio']:.2f} ({found['ratio_ci95'][0]:.2f} to {found['ratio_ci95'][1]:.2f})"


def moved(found: dict) -> str:
    """How far a group moved, in the words of the report."""
    if not found["comparable"]:
        return "not comparable"
    words = VERDICTS[found["verdict"]]
    if found["below_band"] and words == "as far":
        return f"{'further' if found['ratio'] > 1 else 'less far'}, by less than the band"
    return words


def effects_of(analysis: dict) -> dict[str, dict]:
    """Group -> its effect in the primary metric."""
    return {e["group"]: e for e in analysis["effects"] if e["metric"] == analysis["primary_metric"]}


def rewound(found: dict) -> dict[tuple[str, float], dict]:
    """(ranking, dose) -> what came back when the change of the neurons that rank first was undone."""
    return {(e["arm"], e["dose"]): e for e in found["effects"] if e["intervention"] == "rewind"}


def command(committed: Committed) -> str:
    """What made the study, and at which commit."""
    study = committed.results["study"]
    seeds = ",".join(map(str, study["seeds"]))
    commit = (study.get("commit") or "unknown")[:7]
    return f"`{committed.command} --seeds {seeds}`, commit {commit}"


def refusals(behaviour: dict) -> str:
    """What was refused at each point, with intervals, in words."""
    first, *_, last = sorted({row["step"] for row in behaviour["rates"]})
    before = "before fine-tuning"
    told = "Refusals of held-out harmful requests: "
    if behaviour["before_alignment"]:
        before = "after the alignment"
        told += f"{rate(behaviour, 'harmful', None)} before the alignment; "
    return (
        f"{told}{rate(behaviour, 'harmful', first)} {before}; {rate(behaviour, 'harmful', last)} after fine-tuning on "
        f"ordinary instructions. Ordinary prompts refused: {rate(behaviour, 'ordinary', first)} {before}, "
        f"{rate(behaviour, 'ordinary', last)} at the end."
    )


def weights(results: dict) -> list[str]:
    """What the published metrics say of single weights: medians of |Δw|/|w₀|, which is confounded, and of |Δw|; of the
    first seed."""
    rows = {}
    for row in results.get("weights", []):  # the last step comes last
        if row["seed"] == results["study"]["seeds"][0]:
            rows[row["group"]] = row
    if not {"safety_top", "random"} <= set(rows):
        return []
    safety, chance = rows["safety_top"], rows["random"]
    return [
        "",
        "The confound that makes matching necessary, on the same run: by medians, the random weights moved "
        f"{chance['median_relative'] / safety['median_relative']:.1f} × as far as the safety weights (top 1 % by SNIP) in "
        f"|Δw|/|w₀|, and {chance['median_abs'] / safety['median_abs']:.2f} × in |Δw|. Beside controls matched on site "
        f"and |w|, the mean |Δw| of the safety weights is {safety['ratio_abs']:.2f} ×.",
    ]


def example(committed: Committed) -> str:
    """What the study was, how far its groups moved, its controls and its refusals, from the findings."""
    results = committed.results
    analysis, behaviour = results["analysis"], results["behaviour"]
    lines = [
        f"{command(committed)}; {analysis['n_neurons']:,} neurons in {analysis['n_sites']} sites, "
        f"{results['study']['steps']} steps of LoRA. The whole report: [drift_analysis_report.txt](drift_analysis_report.txt).",
        "",
        "![Refusals and drift over fine-tuning](figures/refusals_over_training.png)",
        "",
        "Ratio of relative drift to comparable neurons, with 95 % intervals; * judges:",
        "",
        "| group of neurons | matched on site, norm, utility score, gradient scale | on site and norm only | compared / without control | called further from, 80 % power | moved |",
        "| --- | ---: | ---: | ---: | ---: | --- |",
    ]
    effects = effects_of(analysis)
    for effect in effects.values():
        found = effect["effect_matched"] or effect["effect_norm"]
        lines.append(
            f"| {NAMES.get(effect['group'], effect['group'])}{'*' * effect['judging']} | {ratio(effect['effect_matched'])} | "
            f"{ratio(effect['effect_norm'])} | {found['n_compared']:,} / {found['n_without_control']:,} | "
            f"{number(found['smallest_more'])} | **{moved(found)}** |"
        )
    checks = [
        f"{NAMES.get(c['group'], c['group'])}, expected {EXPECTED[c['expected']]}: {PASSED[c['passed']]}"
        for c in analysis["controls"]
    ]
    checks += [
        f"drift of {NAMES.get(e['group'], e['group'])} × {e['injected']['factor']:g}, to be found: "
        f"{PASSED[e['injected']['found']]}"
        for e in effects.values()
        if e["judging"]
    ]
    lines += [
        "",
        f"Controls of known answer: {'; '.join(checks)}.",
        "",
        f"As far: the 90 % interval lies within a factor of {analysis['band']:g}. {' '.join(analysis['sentences'][:2])} "
        f"{refusals(behaviour)} What weakens this: {'; '.join(analysis['weaknesses'])}.",
        *weights(results),
    ]
    return "\n".join(lines)


def of_doses(found: dict) -> str:
    """A table: share of the lost margin that comes back on the other half of the prompts, by ranking and dose."""
    effects = rewound(found)
    lines = [
        f"| undone, of each site | {' | '.join(ARMS.values())} | random, same site and norm | p |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for dose in sorted({dose for _, dose in effects}):
        shares = " | ".join(number(effects[arm, dose]["share"]) for arm in ARMS)
        null = effects["budget", dose]["random"]["matched"]
        span = f"{number(null['share_low'])} to {number(null['share_high'])}"
        lines.append(f"| {100 * dose:g} % | {shares} | {span} | {number(null['p'], '.3f')} |")
    return "\n".join(lines)


def causes(committed: Committed) -> str:
    """The section on interventions, from `interventions.json`; empty where there are none."""
    if not committed.has("interventions.json"):
        return ""
    found = committed.read("interventions.json")
    runs = pq.read_table(committed.folder / "interventions.parquet", columns=["key", "seconds"]).to_pylist()
    minutes = sum({run["key"]: run["seconds"] for run in runs}.values()) / 60
    before, after = (found["references"][name] for name in ("before", "after"))
    if found.get("outcome") == "margin":
        return _by_margin(found, minutes)
    lines = [
        f"`neurondrift intervene` (seed {found['training_seed']}, {before['harmful']['n']} harmful prompts: "
        f"{before['harmful']['rate']:.2f} refused before fine-tuning, {after['harmful']['rate']:.2f} after it), in "
        f"{minutes:.0f} minutes{_doses(found)}:",
        "",
        "| group | intervention | refused | matched random groups: mean (range) | effect (95 %) | p (Holm) | ordinary refused | perplexity (random) |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for effect in found["effects"]:
        if effect["dose"] != 1:
            continue
        harmful, ordinary, answers = (effect["measures"][kind] for kind in ("harmful", "ordinary", "answers"))
        lines.append(
            f"| {NAMES.get(effect['group'], effect['group'])} | {effect['intervention']} | {number(harmful['value'])} | "
            f"{_against(effect, harmful)} | "
            f"{number(ordinary['value'])} | {number(answers['perplexity'], ',.1f')} "
            f"({number(answers['null_perplexity'], ',.1f')}) |"
        )
    return "\n".join([*lines, "", found["conclusion"]])


def _doses(found: dict) -> str:
    return ", doses included" if any(effect["dose"] < 1 for effect in found["effects"]) else ""


def _by_margin(found: dict, minutes: float) -> str:
    """The same where the refusal margin is the primary outcome."""
    before, after = (found["references"][name] for name in ("before", "after"))
    refusals = ""
    if "harmful" in before:
        refusals = f"; refusals {before['harmful']['rate']:.2f} → {after['harmful']['rate']:.2f}"
    lines = [
        f"`neurondrift intervene` (seed {found['training_seed']}, {before['margin']['n']} harmful prompts: "
        f"margin {before['margin']['harmful']:+.2f} nats before fine-tuning, {after['margin']['harmful']:+.2f} after "
        f"it{refusals}), in {minutes:.0f} minutes{_doses(found)}:",
        "",
        "| group | intervention | margin | matched random groups: mean (range) | effect (95 %) | p (Holm) | share of the "
        "lost margin (random) | refused (random) | perplexity (random) |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for effect in found["effects"]:
        if effect["dose"] != 1:
            continue
        margin, harmful, answers = (
            effect["measures"].get(kind, {}) for kind in ("margin_harmful", "harmful", "answers")
        )
        share = effect["margin_share"]
        lines.append(
            f"| {NAMES.get(effect['group'], effect['group'])} | {effect['intervention']} | "
            f"{number(margin['value'], '+.2f')} | {_against(effect, margin, '+.2f')} | {number(share['group'], '+.2f')} "
            f"({number(share['null'], '+.2f')}) | {number(harmful.get('value'))} ({number(harmful.get('null_mean'))}) | "
            f"{number(answers.get('perplexity'), ',.1f')} ({number(answers.get('null_perplexity'), ',.1f')}) |"
        )
    return "\n".join([*lines, "", found["conclusion"]])


def _against(effect: dict, harmful: dict, form: str = ".2f") -> str:
    """Random groups, effect and p-value; of a null that was stopped only that p is above 0.1."""
    planned = effect.get("draws_planned", effect["draws"])
    if effect["draws"] < planned:
        return f"stopped after {effect['draws']} of {planned} | – | p > 0.1"
    low, high = harmful["ci95"] or (None, None)
    interval = "undefined" if None in (low, high) else f"{low:+.2f} to {high:+.2f}"
    p = f"{number(harmful['p'])} ({number(harmful.get('p_holm'))})"
    mean, lowest, highest = (number(harmful[field], form) for field in ("null_mean", "null_low", "null_high"))
    null = f"{mean} ({lowest} to {highest}), K = {planned}"
    return f"{null} | {number(harmful['effect'], '+.2f')} ({interval}) | {p}"


def took(costs: dict) -> str:
    """Time and memory of each stage, beside what `neurondrift verify` foretold."""
    machine = costs["machine"]
    about = f"{machine['cores']} cores, {machine['processor']}. Foretold by `neurondrift verify`: {costs['foretold']}"
    return "\n".join([about, "", *table(costs)])


def page(committed: Committed) -> str:
    """A study's `README.md`, whole."""
    acted = causes(committed)
    parts = ["<!-- made by docs/make_example.py: do not edit -->", f"# {committed.title}"]
    parts += [committed.about] if committed.about else []
    parts.append(example(committed))
    if committed.has("dose_response.json"):
        doses = committed.read("dose_response.json")
        parts += ["## Out of sample", "![Dose-response of the refusal margin](figures/out_of_sample_doses.png)"]
        parts += [of_doses(doses), " ".join(doses["sentences"])]
    parts += ["## Is it the cause?", acted] if acted else []
    parts += ["## What it took", took(committed.read("costs.json"))] if committed.has("costs.json") else []
    return "\n\n".join(parts) + "\n"
