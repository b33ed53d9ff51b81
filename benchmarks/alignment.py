"""How alignments of the demo's model refuse: what docs/demo.md tells of them comes from here.

    python benchmarks/alignment.py [--try "KEY=VALUE ..."] ... [--preset demo] [--device auto]

Each `--try` (none: the preset alone) is the section `[align]` of the preset with these settings changed, such as
`method=lora learning_rate=1e-3 max_steps=48 refusals=104`. It aligns the model and asks it the held-out prompts of
`[evaluate]`, judged as a study judges them at step 0, with answers that end once their verdict is settled. Prints a
table in Markdown. Nothing about drift is computed.
"""

import argparse
import tempfile
import time
from pathlib import Path

from neurondrift.base.processes import tune_allocator
from neurondrift.behaviour.evaluate import judge_answers
from neurondrift.models.data import encode, load_examples
from neurondrift.study.base_model import load_named
from neurondrift.study.settings import Study, resolve
from neurondrift.study.stages.alignment import alignment_examples
from neurondrift.study.training import align

KINDS = ("harmful", "ordinary", "borderline")


def changed(text: str) -> dict[str, object]:
    """`learning_rate=1e-3 refusals=104` as settings of `[align]`; `refusals` is how many of the built-in ones."""
    settings: dict[str, object] = {}
    for part in text.split():
        key, _, value = part.partition("=")
        settings[f"align.{key}"] = {"source": "builtin:refusals", "limit": int(value)} if key == "refusals" else value
    return settings


def refused(study: Study) -> str:
    """The line of one alignment: what was trained, what is refused, and what it took."""
    model, tokenizer = load_named(study, dtype="float32")
    examples = alignment_examples(study)
    began, worked = time.perf_counter(), time.process_time()
    with tempfile.TemporaryDirectory() as scratch:
        encoded = encode(examples, tokenizer, max_length=study.align.max_length)
        log = align(model, encoded, study.align, seed=study.seed, scratch=Path(scratch))
    seconds, cpu = time.perf_counter() - began, time.process_time() - worked
    sets = {kind: load_examples(getattr(study.evaluate, kind), require_response=False, kind=kind) for kind in KINDS}
    rows = judge_answers(
        model,
        tokenizer,
        sets,
        max_new_tokens=study.evaluate.final_max_new_tokens,
        batch_size=study.evaluate.batch_size,
        max_length=study.evaluate.max_length,
    )
    rates = []
    for kind in KINDS:
        answers = [row["refused"] for row in rows if row["kind"] == kind]
        rates.append(f"{sum(map(bool, answers)) / len(answers):.2f}")
    a = study.align
    how = f"LoRA, r = {a.lora_r}, α = {a.lora_alpha:g}" if a.method == "lora" else "all weights"
    mix = f"{a.refusals.limit or 'all'} of {len(examples)}"
    spent = f"{seconds:.0f} | {cpu:.0f} | {log[-1]['loss']:.2f}"
    return f"| {how} | {a.learning_rate:g} | {a.max_steps} of {a.batch_size} | {mix} | {' | '.join(rates)} | {spent} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--try", dest="tries", action="append", default=[])
    parser.add_argument("--preset", default="demo")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    tune_allocator()
    print("| trained | learning rate | steps | refusals in the mix | harmful | ordinary | borderline |", end="")
    print(
        " seconds | CPU seconds | last loss |\n| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
    )
    for text in options.tries or [""]:
        flags = changed(text) | {"model.device": options.device, "seeds": [options.seed]}
        print(refused(resolve(preset=options.preset, flags=flags)), flush=True)


if __name__ == "__main__":
    main()
