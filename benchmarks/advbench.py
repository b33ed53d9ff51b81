"""Refusals of AdvBench: the model of a study before its alignment, after it, and after fine-tuning.

    python benchmarks/advbench.py STUDY [--data FILE] [--prompts N] [--tokens N] [--batch-size N]

STUDY is the folder of a finished study (such as the demo's). 100 harmful behaviours (Zou et al., arXiv 2307.15043) are
drawn with seed 0 and asked plainly: chat template, no system prompt, greedy. AdvBench is not used in the demo, neither
for the alignment nor for the scores. `keyword` is Wei et al.'s rule, which reads whole answers: no answer ends early
while it cannot decide. It calls every answer under 20 words a refusal, so that short answers look safe to it.
"Attacked" is the share of prompts with an answer that was neither refused nor incoherent, by the judge `refusal`.

Prints a Markdown table with 95 % Wilson intervals.
"""

import argparse
import time
from pathlib import Path

from neurondrift import load_examples, load_model
from neurondrift.base.files import read_toml
from neurondrift.base.processes import tune_allocator
from neurondrift.behaviour.evaluate import Panel, judge_answers
from neurondrift.behaviour.rates import per_prompt, refusal_rate

DATA = Path(__file__).resolve().parents[2] / "shared/data/advbench/harmful_behaviors.csv"


def share(flags) -> str:
    rate = refusal_rate(flags)
    return f"{rate.rate:.2f} ({rate.low:.2f} to {rate.high:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description="Refusals of AdvBench along a study.")
    parser.add_argument("study", type=Path)
    parser.add_argument("--data", type=Path, default=DATA, help="harmful_behaviors.csv of AdvBench")
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=32, help="longest answer")
    parser.add_argument("--batch-size", type=int, default=50)
    given = parser.parse_args()
    tune_allocator()
    study = read_toml(given.study / "study.toml")
    models = given.study / "finetuned_models"
    adapters = models / study["finetune"]["method"]
    last = max(adapters.glob("step=*"), key=lambda folder: int(folder.name.removeprefix("step=")))
    steps = int(last.name.removeprefix("step="))
    stages = [
        ("before alignment", study["model"]["reference"], None),
        ("after alignment", str(models / "aligned"), None),
        (f"after fine-tuning ({steps} steps of LoRA on ordinary instructions)", str(models / "aligned"), last),
    ]
    examples = load_examples(str(given.data), limit=given.prompts, seed=0, require_response=False)
    print("| model | refused, judge `refusal` | refused, judge `keyword` (Wei et al.) | attacked |")
    print("| --- | ---: | ---: | ---: |")
    began = time.perf_counter()
    for name, reference, adapter in stages:
        model, tokenizer = load_model(reference, adapter=adapter)
        rows = judge_answers(
            model,
            tokenizer,
            {"harmful": examples},
            panel=Panel(["refusal", "keyword"]),
            max_new_tokens=given.tokens,
            batch_size=given.batch_size,
        )
        cells = [share([row["refused"] for row in per_prompt(rows, judge=judge)]) for judge in ("refusal", "keyword")]
        cells.append(share([row["success"] for row in per_prompt(rows, judge="refusal")]))
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
        del model
    print(
        f"\n{len(examples)} prompts of AdvBench (seed 0), at most {given.tokens} new tokens; study {study['name']}, "
        f"training seed {study['seeds'][0]}; {time.perf_counter() - began:.0f} s."
    )


if __name__ == "__main__":
    main()
