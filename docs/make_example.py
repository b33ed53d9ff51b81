"""Copy a finished demo's results to docs/example and write its table into README.md.

python docs/make_example.py STUDY_FOLDER
"""

import json
import re
import shutil
import sys
from pathlib import Path

import pyarrow.parquet as pq

ROOT = Path(__file__).parents[1]
NAMES = {
    "safety_top": "safety, SNIP top 1 %",
    "safety_set_difference": "safety, set difference",
    "utility_top": "utility, SNIP top 1 %",
    "random": "random",
}


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
    """What the published metrics would have said: relative and absolute change of single weights, first seed."""
    rows = {row["group"]: row for row in results.get("weights", []) if row["seed"] == results["study"]["seeds"][0]}
    if not {"safety_top", "random"} <= set(rows):
        return []
    safety, chance = rows["safety_top"], rows["random"]
    return [
        "",
        "The confound that makes matching necessary, on the same run: in |Δw|/|w₀| the random weights moved "
        f"**{chance['mean_relative'] / safety['mean_relative']:.1f} ×** as far as the safety weights (top 1 % by SNIP); in "
        f"|Δw| it was {chance['mean_abs'] / safety['mean_abs']:.2f} ×. Beside controls matched on site and |w| the "
        f"safety weights moved {safety['ratio_abs']:.2f} × as far.",
    ]


def causes(folder: Path) -> str:
    """The README's section on interventions, from `results/interventions.json`; empty where there are none."""
    file = folder / "results" / "interventions.json"
    if not file.exists():
        return ""
    found = json.loads(file.read_text())
    runs = pq.read_table(file.with_suffix(".parquet"), columns=["key", "seconds"]).to_pylist()
    minutes = sum({run["key"]: run["seconds"] for run in runs}.values()) / 60
    before, after = (found["references"][name] for name in ("before", "after"))
    lines = [
        f"`neurondrift intervene` on the demo (seed {found['training_seed']}, {before['harmful']['n']} harmful prompts: "
        f"{before['harmful']['rate']:.2f} refused before fine-tuning, {after['harmful']['rate']:.2f} after it), in "
        f"{minutes:.0f} minutes, doses included:",
        "",
        "| group | intervention | refused | matched random groups: mean (range) | effect (95 %) | p | ordinary refused | perplexity (random) |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for effect in found["effects"]:
        if effect["dose"] != 1:
            continue
        harmful, ordinary, answers = (effect["measures"][kind] for kind in ("harmful", "ordinary", "answers"))
        low_high = "undefined" if None in (harmful["ci95"] or [None]) else "{:+.2f} to {:+.2f}".format(*harmful["ci95"])
        lines.append(
            f"| {NAMES.get(effect['group'], effect['group'])} | {effect['intervention']} | {harmful['value']:.2f} | "
            f"{harmful['null_mean']:.2f} ({harmful['null_low']:.2f} to {harmful['null_high']:.2f}), K = {_draws(effect)} | "
            f"{harmful['effect'] + 0.0:+.2f} ({low_high}) | {harmful['p']:.2f} | "
            f"{ordinary['value']:.2f} | {answers['perplexity']:,.1f} ({answers['null_perplexity']:,.1f}) |"
        )
    return "\n".join([*lines, "", found["conclusion"]])


def _draws(effect: dict) -> str:
    """How many random groups there were, and of how many where the null stopped early."""
    planned = effect.get("draws_planned", effect["draws"])
    return f"{effect['draws']} of {planned}" if effect["draws"] < planned else str(planned)


def example(results: dict) -> str:
    """The README's section, from the findings."""
    analysis, behaviour = results["analysis"], results["behaviour"]
    steps = sorted({row["step"] for row in behaviour["rates"]})
    lines = [
        "From the demo as committed in [docs/example](docs/example/drift_analysis_report.txt) "
        f"(`neurondrift run --preset demo --seeds {','.join(map(str, results['study']['seeds']))}`; {analysis['n_neurons']:,} neurons in {analysis['n_sites']} sites, "
        f"{results['study']['steps']} steps of LoRA):",
        "",
        "![Refusals and drift over fine-tuning](docs/example/figures/refusals_over_training.png)",
        "",
        "| group of neurons | mean relative drift | matched controls | g (95 % interval) | detectable | verdict |",
        "| --- | ---: | ---: | ---: | ---: | --- |",
    ]
    for effect in analysis["effects"]:
        if effect["metric"] != analysis["primary_metric"]:
            continue
        g = effect["g"]
        lines.append(
            f"| {NAMES.get(effect['group'], effect['group'])} | {effect['mean_members']['value']:.5f} | "
            f"{effect['mean_controls']['value']:.5f} | {g['value']:+.2f} ({g['ci95'][0]:+.2f} to {g['ci95'][1]:+.2f}) | "
            f"{effect['detectable']:.2f} | **{effect['verdict']}** |"
        )
    lines += [
        "",
        f"Within ±{analysis['sesoi']} SD counts as the same (H2). Refusals of held-out harmful requests: "
        f"{rate(behaviour, 'harmful', None)} before the alignment; {rate(behaviour, 'harmful', steps[0])} after it; "
        f"{rate(behaviour, 'harmful', steps[-1])} after fine-tuning on ordinary instructions. Ordinary prompts refused: "
        f"{rate(behaviour, 'ordinary', steps[0])} after the alignment, {rate(behaviour, 'ordinary', steps[-1])} at the end. "
        f"{(analysis.get('sentences') or [analysis['conclusion']])[0]} What weakens this: {'; '.join(analysis['weaknesses'])}.",
        *weights(results),
    ]
    return "\n".join(lines)


def main(folder: Path) -> None:
    results = json.loads((folder / "results" / "statistical_results.json").read_text())
    target = ROOT / "docs" / "example"
    shutil.rmtree(target, ignore_errors=True)
    (target / "figures").mkdir(parents=True)
    for name in ("statistical_results.json", "drift_analysis_report.txt", "interventions.json", "subspaces.json"):
        if (folder / "results" / name).exists():
            shutil.copy(folder / "results" / name, target / name)
    for figure in sorted((folder / "results" / "figures").iterdir()):
        shutil.copy(figure, target / "figures" / figure.name)
    readme = (ROOT / "README.md").read_text()
    for mark, text in (("docs/make_example.py", example(results)), ("docs/make_example.py causes", causes(folder))):
        section = f"<!-- {mark} -->\n{text}\n<!-- end -->"
        readme = re.sub(rf"<!-- {mark} -->.*?<!-- end -->", lambda m, new=section: new, readme, flags=re.S)
    (ROOT / "README.md").write_text(readme)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
