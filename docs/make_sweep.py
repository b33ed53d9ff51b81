"""Copy the results of a finished sweep to docs/example/sweep, and write its page there.

    python docs/make_sweep.py SWEEP_FOLDER
    python docs/make_sweep.py                   # the page again, from what docs/example/sweep holds

Every figure of the page comes from `sweep_results.json` (`tests/docs` makes it again and compares).
"""

import json
import shutil
import sys
from pathlib import Path

from study_page import NAMES, moved, ratio

ROOT = Path(__file__).parents[1]
SWEEP = ROOT / "docs" / "example" / "sweep"
FILES = ("sweep_results.json", "sweep.parquet", "sweep_report.txt", "sweep_report.html")


def in_study(effect: dict) -> str:
    """How far a group moved in a study: its ratio with the 95 % interval, or why there is none."""
    return ratio(effect) if effect["comparable"] else "not comparable"


def studies(found: dict) -> list[str]:
    """A table: what each study was, its refusals, and how far each group that judges moved."""
    groups = list(dict.fromkeys(e["group"] for study in found["studies"] for e in study["effects"] if e["judging"]))
    lines = [
        f"| fine-tuning data | rank | refused before | after | {' | '.join(NAMES[group] for group in groups)} |",
        f"| --- | ---: | ---: | ---: | {' | '.join(['---:'] * len(groups))} |",
    ]
    for study in found["studies"]:
        effects = {effect["group"]: effect for effect in study["effects"]}
        cells = [
            study["data"],
            str(study["settings"]["finetune.lora_r"]),
            *(f"{study[name]:.2f}" for name in ("harmful_before", "harmful_after")),
            *(in_study(effects[group]) for group in groups),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def pooled(found: dict) -> list[str]:
    """A table: each group over the studies, in the primary metric."""
    lines = ["| group | studies | ratio over them | a further study | moved |", "| --- | ---: | ---: | ---: | --- |"]
    for effect in found["pooled"]:
        if effect["metric"] != found["sweep"]["primary_metric"]:
            continue
        limits = effect["ratio_prediction95"]
        further = "–" if None in limits else f"{limits[0]:.2f} to {limits[1]:.2f}"
        verdict = moved({**effect, "comparable": effect["k"] > 0})
        name = NAMES[effect["group"]] + ("*" if effect["judging"] else "")
        lines.append(f"| {name} | {effect['points']} | {ratio(effect)} | {further} | {verdict} |")
    return lines


def page(found: dict) -> str:
    """`docs/example/sweep/README.md`, whole."""
    about = found["sweep"]
    return (
        "\n\n".join(
            [
                "<!-- made by docs/make_sweep.py: do not edit -->",
                "# A real sweep, as committed",
                " ".join(found["sentences"][:2]),
                f"`neurondrift sweep benchmarks/sweep_smollm2.toml`, commit {about['commit']}: {len(found['studies'])} studies of "
                "one model after one alignment, one training seed each. [The report](sweep_report.txt), the page "
                "(`sweep_report.html`), [a row for each point, group and metric](../../results.md#sweeps) (`sweep.parquet`).",
                "![Groups over the studies](figures/sweep_forest.png)",
                "Ratio of relative drift to comparable neurons with 95 % intervals, in each study:",
                "\n".join(studies(found)),
                "Over the studies (* judges):",
                "\n".join(pooled(found)),
                "In words:",
                "\n".join(f"- {each}" for each in found["sentences"][2:] if not each.startswith("What weakens this")),
                "What weakens this:",
                "\n".join(f"- {each}" for each in found["weaknesses"]),
            ]
        )
        + "\n"
    )


def main(sweep: Path | None = None) -> None:
    if sweep is not None:
        shutil.rmtree(SWEEP, ignore_errors=True)
        (SWEEP / "figures").mkdir(parents=True)
        for name in FILES:
            shutil.copy(sweep / "results" / name, SWEEP / name)
        for figure in sorted((sweep / "results" / "figures").iterdir()):
            shutil.copy(figure, SWEEP / "figures" / figure.name)
    found = json.loads((SWEEP / "sweep_results.json").read_text())
    (SWEEP / "README.md").write_text(page(found))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
