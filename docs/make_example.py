"""Copy a finished demo's results to docs/example, write its page there, and its table into README.md.

    python docs/make_example.py STUDY_FOLDER
    python docs/make_example.py                 # page and table again, from what docs/example holds

Every figure of both comes from a file in docs/example (`tests/docs` makes them again and compares).
"""

import json
import re
import shutil
import sys
from pathlib import Path

import pyarrow.parquet as pq

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "docs" / "example"
FILES = (
    "statistical_results.json",
    "drift_analysis_report.txt",
    "interventions.json",
    "interventions.parquet",
    "dose_response.json",
    "subspaces.json",
    "stability.json",
)
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


def rate(behaviour: dict, kind: str, step: int | None) -> str:
    """`0.92 (0.83 to 0.96), n = 72`: share refused with its Wilson interval; where seeds differ, of each in turn."""
    rows = behaviour["before_alignment"] if step is None else behaviour["rates"]
    chosen = [r for r in rows if r["kind"] == kind and r["step"] == step]
    texts = [f"{row['rate']:.2f} ({row['low']:.2f} to {row['high']:.2f})" for row in chosen]
    if len(set(texts)) == 1:
        return f"{texts[0]}, n = {chosen[0]['n']}"
    rates = " / ".join(f"{row['rate']:.2f}" for row in chosen)
    return f"{rates} in the seeds (the first: {texts[0].partition(' ')[2][1:-1]}), n = {chosen[0]['n']}"


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


def causes(folder: Path) -> str:
    """The README's section on interventions, from `results/interventions.json`; empty where there are none."""
    file = folder / "interventions.json"
    if not file.exists():
        return ""
    found = json.loads(file.read_text())
    runs = pq.read_table(file.with_suffix(".parquet"), columns=["key", "seconds"]).to_pylist()
    minutes = sum({run["key"]: run["seconds"] for run in runs}.values()) / 60
    before, after = (found["references"][name] for name in ("before", "after"))
    if found.get("outcome") == "margin":
        return _by_margin(found, minutes)
    lines = [
        f"`neurondrift intervene` on the demo (seed {found['training_seed']}, {before['harmful']['n']} harmful prompts: "
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
            f"| {NAMES.get(effect['group'], effect['group'])} | {effect['intervention']} | {_number(harmful['value'])} | "
            f"{_against(effect, harmful)} | "
            f"{_number(ordinary['value'])} | {_number(answers['perplexity'], ',.1f')} "
            f"({_number(answers['null_perplexity'], ',.1f')}) |"
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
        f"`neurondrift intervene` on the demo (seed {found['training_seed']}, {before['margin']['n']} harmful prompts: "
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
            f"{_number(margin['value'], '+.2f')} | {_against(effect, margin, '+.2f')} | {_number(share['group'], '+.2f')} "
            f"({_number(share['null'], '+.2f')}) | {_number(harmful.get('value'))} ({_number(harmful.get('null_mean'))}) | "
            f"{_number(answers.get('perplexity'), ',.1f')} ({_number(answers.get('null_perplexity'), ',.1f')}) |"
        )
    return "\n".join([*lines, "", found["conclusion"]])


def _number(value: float | None, form: str = ".2f") -> str:
    return "–" if value is None else format(value + 0.0, form)


def _against(effect: dict, harmful: dict, form: str = ".2f") -> str:
    """Random groups, effect and p-value; of a null that was stopped only that p is above 0.1."""
    planned = effect.get("draws_planned", effect["draws"])
    if effect["draws"] < planned:
        return f"stopped after {effect['draws']} of {planned} | – | p > 0.1"
    low, high = harmful["ci95"] or (None, None)
    interval = "undefined" if None in (low, high) else f"{low:+.2f} to {high:+.2f}"
    p = f"{_number(harmful['p'])} ({_number(harmful.get('p_holm'))})"
    mean, lowest, highest = (_number(harmful[field], form) for field in ("null_mean", "null_low", "null_high"))
    null = f"{mean} ({lowest} to {highest}), K = {planned}"
    return f"{null} | {_number(harmful['effect'], '+.2f')} ({interval}) | {p}"


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


def example(results: dict) -> str:
    """The README's section, from the findings."""
    analysis, behaviour = results["analysis"], results["behaviour"]
    steps = sorted({row["step"] for row in behaviour["rates"]})
    lines = [
        f"{command(results)}; {analysis['n_neurons']:,} neurons in {analysis['n_sites']} sites, "
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
            f"{_number(found['smallest_more'])} | **{moved(found)}** |"
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
        f"Refusals of held-out harmful requests: {rate(behaviour, 'harmful', None)} before the alignment; "
        f"{rate(behaviour, 'harmful', steps[0])} after it; {rate(behaviour, 'harmful', steps[-1])} after fine-tuning on "
        f"ordinary instructions. Ordinary prompts refused: {rate(behaviour, 'ordinary', steps[0])} after the alignment, "
        f"{rate(behaviour, 'ordinary', steps[-1])} at the end. What weakens this: {'; '.join(analysis['weaknesses'])}.",
        *weights(results),
    ]
    return "\n".join(lines)


def command(results: dict) -> str:
    """What made the study, and at which commit."""
    study = results["study"]
    seeds = ",".join(map(str, study["seeds"]))
    commit = (study.get("commit") or "unknown")[:7]
    return f"`neurondrift run --preset demo --seeds {seeds}`, commit {commit}"


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value + 0.0:.1f} %"


def row_of(effect: dict, found: dict | None) -> str:
    """A group in the README's table: how far it moved, how far its outputs did, and what it carries."""
    name = f"{NAMES.get(effect['group'], effect['group'])}{'*' * effect['judging']}"
    matched = effect["effect_matched"]
    weights = ratio(matched) if matched and matched["comparable"] else "not comparable"
    if found is None:
        return f"| {name} | {weights} | – | – | – | – |"
    harmful = found["outputs"]["harmful"]
    outputs = ratio(harmful) if harmful["comparable"] else "not comparable"
    shares = found["shares"].get("budget") or found["shares"]["path"]
    if not shares["comparable"]:
        return f"| {name} | {weights} | {outputs} | – | – | not comparable |"
    return (
        f"| {name} | {weights} | {outputs} | {percent(shares['share_of_neurons'])} | "
        f"**{percent(shares['share'])}** | {percent(shares['expected'])} |"
    )


def shown(behaviour: dict, kind: str) -> str:
    """`.25 → .97 → .65`: the rates before alignment (where there are any), after it, and at the end; mean over seeds."""
    steps = sorted({row["step"] for row in behaviour["rates"]})
    points = [[r["rate"] for r in behaviour["before_alignment"] if r["kind"] == kind]]
    points += [
        [r["rate"] for r in behaviour["rates"] if r["kind"] == kind and r["step"] == s] for s in (steps[0], steps[-1])
    ]
    return " → ".join(f"{sum(point) / len(point):.2f}" for point in points if point)


def in_readme(results: dict) -> str:
    """One figure and one table, for the README."""
    effects = effects_of(results["analysis"])
    does = {found["group"]: found for found in results.get("attribution", {}).get("groups", [])}
    seeds = len(results["study"]["seeds"])
    conclusion = results["analysis"]["sentences"][0].partition(" By groups")[0]
    return "\n".join(
        [
            "![Refusals and drift over fine-tuning](docs/example/figures/refusals_over_training.png)",
            "",
            f"*The demo: {command(results)}. SmolLM2-135M-Instruct, taught to refuse minutes before, then fine-tuned on "
            f"ordinary instructions; {seeds} seed{'s' * (seeds > 1)}. [All of it](docs/example/README.md).*",
            "",
            "| group | weights moved | outputs moved | of neurons | of the lost margin | comparable neurons |",
            "| --- | ---: | ---: | ---: | ---: | ---: |",
            *(row_of(effects[group], does.get(group)) for group in README_GROUPS if group in effects),
            "",
            "Moved: ratio to comparable neurons with its 95 % interval, outputs on harmful requests. Of the lost margin: "
            "which share of the lost refusal margin the group carries, beside what comparable neurons do. * judges. "
            f"Refusals of harmful requests {shown(results['behaviour'], 'harmful')} (before alignment, after it, after "
            f"fine-tuning), of ordinary ones {shown(results['behaviour'], 'ordinary')} (the last two).",
            "",
            f"**{conclusion} {hypothesis()}**{out_of_sample()}",
        ]
    )


#: The README's rows of the table of localisation: name, and what it needs.
SCORES = {
    "functional_drift_ratio": ("functional drift ratio", "the model from before, forward"),
    "provenance": ("provenance", "the model from before, backward"),
    "path_attribution": ("path attribution", "the model from before, backward"),
    "taylor": ("Taylor", "backward"),
    "snip": ("SNIP (Wei et al.)", "backward"),
}
PLANTS = {"rows": "rows", "mixed": "rows, mixed", "hidden_units": "hidden units"}


def localisation(folder: Path) -> str:
    """AUROC within site of some scores on each kind of plant, the mean over its seeds; in brackets on the decoy where
    that is no chance."""
    boards: dict[str, list[dict]] = {kind: [] for kind in PLANTS}
    for file in sorted(folder.glob("*/localisation.json")):
        board = json.loads(file.read_text())["board"]
        boards[file.parent.name.rpartition("-")[0]].append({row["score"]: row for row in board})
    seeds = {kind: len(found) for kind, found in boards.items()}
    lines = [
        f"| score | needs | {' | '.join(PLANTS.values())} |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for score, (name, needs) in SCORES.items():
        cells = []
        for kind in PLANTS:
            auroc, decoy = (
                sum(board[score][column] for board in boards[kind]) / seeds[kind] for column in ("auroc", "decoy")
            )
            cells.append(f"{auroc:.2f}" + (f" ({decoy:.2f})" if abs(decoy - 0.5) > 0.1 else ""))
        lines.append(f"| {name} | {needs} | {' | '.join(cells)} |")
    counted = ", ".join(f"{PLANTS[kind]} {count}" for kind, count in seeds.items())
    lines += ["", f"Seeds: {counted}. In brackets the AUROC on a decoy habit, where it is further than .1 from chance."]
    return "\n".join(lines)


def hypothesis() -> str:
    """H1, H2 or undecided, and why: as the report says it."""
    report = (EXAMPLE / "drift_analysis_report.txt").read_text()
    found = re.search(r"^H1 or H2: (.+?)\n\n", report, flags=re.S | re.M)
    return " ".join(found.group(1).split()) if found else ""


README_GROUPS = (
    "safety_acquired",
    "safety_paying",
    "safety_set_difference",
    "safety_residual",
    "random",
    "gradient_top",
)


ARMS = {"budget": "by the budget", "norm": "by the norm of the change", "safety_score": "by the safety score (SNIP)"}


def rewound(found: dict) -> dict[tuple[str, float], dict]:
    """(ranking, dose) -> what came back when the change of the neurons that rank first was undone."""
    return {(e["arm"], e["dose"]): e for e in found["effects"] if e["intervention"] == "rewind"}


def of_doses(found: dict) -> str:
    """A table: share of the lost margin that comes back on the other half of the prompts, by ranking and dose."""
    effects = rewound(found)
    lines = [
        f"| undone, of each site | {' | '.join(ARMS.values())} | random, same site and norm | p |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for dose in sorted({dose for _, dose in effects}):
        shares = " | ".join(_number(effects[arm, dose]["share"]) for arm in ARMS)
        null = effects["budget", dose]["random"]["matched"]
        span = f"{_number(null['share_low'])} to {_number(null['share_high'])}"
        lines.append(f"| {100 * dose:g} % | {shares} | {span} | {_number(null['p'], '.3f')} |")
    return "\n".join(lines)


def out_of_sample() -> str:
    """One sentence on the doses, for the README; empty where there are none."""
    file = EXAMPLE / "dose_response.json"
    if not file.exists():
        return ""
    effects = rewound(json.loads(file.read_text()))
    said = "; ".join(
        f"{words} {_number(effects[arm, 0.01]['share'])} and {_number(effects[arm, 0.05]['share'])}"
        for arm, words in ARMS.items()
    )
    return f" Undoing the change of the first 1 % and 5 % of neurons, ranked on half of the prompts, brings back of the margin lost on the other half: {said}."


def page(folder: Path, results: dict) -> str:
    """`docs/example/README.md`, whole."""
    acted = causes(folder)
    parts = ["<!-- made by docs/make_example.py: do not edit -->", "# The demo, as committed", example(results)]
    if (folder / "dose_response.json").exists():
        doses = json.loads((folder / "dose_response.json").read_text())
        parts += ["## Out of sample", "![Dose-response of the refusal margin](figures/out_of_sample_doses.png)"]
        parts += [of_doses(doses), " ".join(doses["sentences"])]
    return "\n\n".join([*parts, *(["## Is it the cause?", acted] if acted else [])]) + "\n"


def copied(study: Path) -> None:
    """The results of a study, in docs/example instead of those that are there."""
    for old in (*(EXAMPLE / name for name in FILES), *EXAMPLE.glob("figures/*")):
        old.unlink(missing_ok=True)
    (EXAMPLE / "figures").mkdir(parents=True, exist_ok=True)
    for name in FILES:
        if (study / "results" / name).exists():
            shutil.copy(study / "results" / name, EXAMPLE / name)
    for figure in sorted((study / "results" / "figures").iterdir()):
        shutil.copy(figure, EXAMPLE / "figures" / figure.name)


def documents() -> dict[Path, str]:
    """Document -> its text, from what docs/example holds."""
    results = json.loads((EXAMPLE / "statistical_results.json").read_text())
    readme = (ROOT / "README.md").read_text()
    made = {"": in_readme(results), " localisation": localisation(ROOT / "docs" / "localisation")}
    for name, text in made.items():
        mark, section = (
            f"<!-- docs/make_example.py{name} -->",
            f"<!-- docs/make_example.py{name} -->\n{text}\n<!-- end -->",
        )
        readme = re.sub(rf"{mark}.*?<!-- end -->", lambda m, new=section: new, readme, flags=re.S)
    return {ROOT / "README.md": readme, EXAMPLE / "README.md": page(EXAMPLE, results)}


def main(study: Path | None = None) -> None:
    if study is not None:
        copied(study)
    for document, text in documents().items():
        document.write_text(text)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
