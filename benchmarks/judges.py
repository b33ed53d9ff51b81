"""Every judge against human labels: the XSTest completions of two models.

    python benchmarks/judges.py [--data DIR]

The labels (`final_label`) are full compliance, full refusal and partial refusal. Balanced accuracy is the mean of the
share of full refusals that a judge calls refused and the share of full compliances that it does not; partial refusals
are left out of it. Accuracy is that of the kind, over all three labels (the published judges know no "partial").
"Cut at 24 words" judges the first 24 words of each answer. "Decided" is for a judge that stops as early as it says it
may: the words that it then has read, of those in the whole answers, and how often the verdict is that on the whole.

Below stand the share of the builtin refusals that a judge finds, by split: the rules of `refusal` were widened with the
texts of "train" at hand, never with those of "eval"; and how many builtin ordinary and borderline answers it refuses.

The rules of `refusal` were written with the texts of gpt4 at hand. Those of llama2orig were never looked at; when
the rules were widened, its score and the roles of the clauses of one answer led to a regression, which was undone.
"""

import argparse
import csv
import json
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from neurondrift.behaviour.judges import JUDGES, decided, is_coherent, judge

DATA = Path(__file__).resolve().parents[2] / "shared/data/xstest"
BUILTIN = Path(__file__).resolve().parents[1] / "src/neurondrift/models/datasets"
MODELS = {"gpt4": "texts seen", "llama2orig": "held out"}
KINDS = {"1_full_compliance": "none", "2_full_refusal": "full", "3_partial_refusal": "partial"}
CUT = 24


class Answer(NamedTuple):
    prompt: str
    text: str
    label: str


def read(path: Path) -> list[Answer]:
    if not path.is_file():
        sys.exit(
            f"The labelled completions are not there: {path}\nGet xstest_v2_completions_*.csv from "
            "github.com/paul-rottger/xstest (CC BY 4.0) and name their folder with --data."
        )
    with path.open(newline="", encoding="utf-8") as file:
        return [Answer(row["prompt"], row["completion"], row["final_label"]) for row in csv.DictReader(file)]


def first_words(text: str, count: int) -> str:
    return " ".join(text.split(" ")[:count])


def rates(answers: list[Answer], refused: list[bool]) -> tuple[float, float, float]:
    """Share of full refusals found, share of full compliances left alone, and their mean."""
    found = [mark for answer, mark in zip(answers, refused, strict=True) if answer.label == "2_full_refusal"]
    left = [not mark for answer, mark in zip(answers, refused, strict=True) if answer.label == "1_full_compliance"]
    sensitivity, specificity = sum(found) / len(found), sum(left) / len(left)
    return sensitivity, specificity, (sensitivity + specificity) / 2


def read_until_decided(name: str, answer: Answer) -> str:
    """The shortest start, in steps of four words, on which the judge says that it is decided."""
    for count in range(4, len(answer.text.split(" ")), 4):
        if decided(name, answer.prompt, start := first_words(answer.text, count)):
            return start
    return answer.text


def measure(name: str, model: str, answers: list[Answer]) -> str:
    kinds = [judge(name, answer.prompt, answer.text).kind for answer in answers]
    refused = [kind == "full" for kind in kinds]
    accuracy = sum(KINDS[answer.label] == kind for answer, kind in zip(answers, kinds, strict=True)) / len(answers)
    cut = [judge(name, answer.prompt, first_words(answer.text, CUT)).refused for answer in answers]
    starts = [read_until_decided(name, answer) for answer in answers]
    early = [judge(name, answer.prompt, start).refused for answer, start in zip(answers, starts, strict=True)]
    same = sum(a == b for a, b in zip(early, refused, strict=True)) / len(answers)
    share = sum(len(start.split()) for start in starts) / sum(len(answer.text.split()) for answer in answers)
    sensitivity, specificity, balanced = rates(answers, refused)
    return (
        f"{name:9}{model:12}{accuracy:9.3f}{balanced:10.3f}{sensitivity:11.3f}{specificity:12.3f}"
        f"{rates(answers, cut)[2]:10.3f}{share:9.0%}{same:8.3f}"
    )


def confusion(name: str, answers: list[Answer]) -> list[str]:
    counts: Counter[tuple[str, str]] = Counter(
        (answer.label, judge(name, answer.prompt, answer.text).kind) for answer in answers
    )
    return [f"  {label:20}" + "".join(f"{counts[label, kind]:9}" for kind in KINDS.values()) for label in KINDS]


def builtin(name: str) -> str:
    """How often a judge says "refused" of the builtin answers: refusals by split, then those that comply."""
    marks: dict[str, list[bool]] = {}
    for kind in ("refusals", "ordinary", "borderline"):
        for line in (BUILTIN / f"{kind}.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            group = f"{kind} {row['split']}" if kind == "refusals" else kind
            marks.setdefault(group, []).append(judge(name, row["prompt"], row["response"]).refused)
    return f"{name:9}" + "".join(f"   {group}: {sum(m)}/{len(m)} ({sum(m) / len(m):.3f})" for group, m in marks.items())


def main() -> None:
    parser = argparse.ArgumentParser(description="Every judge against the human labels of XSTest.")
    parser.add_argument("--data", type=Path, default=DATA, help="folder of xstest_v2_completions_*.csv")
    folder = parser.parse_args().data
    sets = {model: read(folder / f"xstest_v2_completions_{model}.csv") for model in MODELS}
    print(f"{'':30}{'balanced':>10}{'refusals':>11}{'compliances':>12}{'cut at':>10}{'decided:':>9}{'same':>8}")
    print(f"{'judge':9}{'model':12}{'accuracy':>9}{'accuracy':>10}{'found':>11}{'left alone':>12}", end="")
    print(f"{f'{CUT} words':>10}{'read':>9}{'verdict':>8}")
    for name in JUDGES:
        for model, answers in {**sets, "both": [answer for group in sets.values() for answer in group]}.items():
            print(measure(name, model, answers))
    print("\nBuiltin answers that each judge calls refused")
    print("\n".join(builtin(name) for name in JUDGES))
    for model, answers in sets.items():
        readable = sum(is_coherent(answer.text) for answer in answers)
        print(f"\n{model} ({MODELS[model]}): {readable} of {len(answers)} answers pass the coherence gate")
        for name in JUDGES:
            print(f"  {name + ' says:':20}" + "".join(f"{kind:>9}" for kind in KINDS.values()))
            print("\n".join(confusion(name, answers)))


if __name__ == "__main__":
    main()
