"""Steps of alignment and fine-tuning, padded as they were and without padding, side by side in one run.

    python benchmarks/packing.py [--steps 6] [--preset demo]

Takes the first batches of each stage of the preset. Each is gone through padded (to a multiple of 16 tokens, all rows
together) and as the stages do, in turn, forward and back without the optimizer's step. Prints, for each stage, the
tokens that are computed, the median seconds and CPU seconds of a batch, and the largest difference of a loss and of a
parameter's gradient (of all gradients together: ‖one − other‖ / ‖other‖).
"""

import argparse
import random
import time
from collections.abc import Sequence
from typing import Any

import torch

from neurondrift.base.processes import tune_allocator
from neurondrift.models.batches import Batch, batches_without_padding, make_batches, token_losses
from neurondrift.models.data import encode, load_examples
from neurondrift.study.base_model import load_named
from neurondrift.study.settings import Study, resolve
from neurondrift.study.stages.alignment import alignment_examples
from neurondrift.study.training import _with_lora


def gone_through(model: Any, batches: Sequence[Batch]) -> tuple[float, list[torch.Tensor], float, float]:
    """Loss, gradients, seconds and CPU seconds of a batch, in one part or several."""
    model.zero_grad()
    began, worked = time.perf_counter(), time.process_time()
    losses = torch.cat([token_losses(model, batch.to(model.device)).losses for batch in batches])
    losses.mean().backward()
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    seconds, cpu = time.perf_counter() - began, time.process_time() - worked
    return (
        float(losses.detach().mean()),
        [p.grad.clone() for p in model.parameters() if p.grad is not None],
        seconds,
        cpu,
    )


def middle(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]


def side_by_side(name: str, model: Any, rows: Sequence[Any], size: int, steps: int) -> str:
    order = random.Random(0).sample(range(len(rows)), len(rows))
    chosen = [[rows[at] for at in order[step * size : (step + 1) * size]] for step in range(steps + 1)]
    tokens, seconds, cpu = ([0, 0], [[], []], [[], []])
    loss_apart = gradient_apart = 0.0
    for count, part in enumerate(chosen):
        ways = (
            make_batches(part, model=model, batch_size=size, pad_token_id=0, multiple=16),
            batches_without_padding(model, part, batch_size=size, pad_token_id=0),
        )
        found = [gone_through(model, batches) for batches in ways]
        if not count:  # kernels are prepared once for each shape
            continue
        for way, batches in enumerate(ways):
            tokens[way] += sum(batch.input_ids.numel() for batch in batches)
            seconds[way].append(found[way][2])
            cpu[way].append(found[way][3])
        apart = sum(
            float((one - two).double().square().sum()) for one, two in zip(found[0][1], found[1][1], strict=True)
        )
        whole = sum(float(one.double().square().sum()) for one in found[0][1])
        loss_apart = max(loss_apart, abs(found[0][0] - found[1][0]) / found[0][0])
        gradient_apart = max(gradient_apart, (apart / whole) ** 0.5)
    one, two = (f"{tokens[way]} | {middle(seconds[way]):.2f} | {middle(cpu[way]):.2f}" for way in (0, 1))
    ratio = middle(cpu[0]) / middle(cpu[1])
    return f"| {name} | {one} | {two} | {ratio:.2f} | {loss_apart:.0e} | {gradient_apart:.0e} |"


def stages(study: Study, steps: int) -> None:
    model, tokenizer = load_named(study, dtype="float32")
    aligned = encode(alignment_examples(study), tokenizer, max_length=study.align.max_length)
    tuned = encode(load_examples(study.finetune.data), tokenizer, max_length=study.finetune.max_length)
    print(f"{model.device}, {torch.get_num_threads()} threads, {steps} batches each\n")
    print("| stage | padded: tokens | s | CPU s | without: tokens | s | CPU s | CPU ratio | loss | gradient |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    print(side_by_side("align, all weights", model, aligned, study.align.batch_size, steps), flush=True)
    wrapped = _with_lora(model, study.finetune)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:  # zero at first, and then nothing would reach A
            torch.nn.init.normal_(parameter, std=0.01)
    print(side_by_side("align, LoRA", wrapped, aligned, study.align.batch_size, steps), flush=True)
    print(side_by_side("finetune, LoRA", wrapped, tuned, study.finetune.batch_size, steps), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--preset", default="demo")
    options = parser.parse_args()
    tune_allocator()
    stages(resolve(preset=options.preset), options.steps)


if __name__ == "__main__":
    main()
