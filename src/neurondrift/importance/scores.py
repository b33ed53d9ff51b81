"""`score`: from a model and encoded examples to importance scores, in memory or streamed to a file."""

from __future__ import annotations

import json
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from neurondrift.base.errors import ArtifactError, GroupError, ModelError
from neurondrift.base.processes import joined, lost_as_error, process_count
from neurondrift.importance.capture import run
from neurondrift.importance.cut import CutAccumulators, accumulate
from neurondrift.importance.methods import Method, Tokens, get_method
from neurondrift.models.batches import Batch, batches_without_padding, make_batches
from neurondrift.models.data import IGNORED, data_fingerprint
from neurondrift.models.disk.tensors import parse_header, write_tensors
from neurondrift.models.sites import Site, Sites, is_sharded, sites_of

logger = logging.getLogger(__name__)


def score(
    model: nn.Module,
    encoded: Sequence[Mapping[str, Any]],
    *,
    method: str = "snip",
    batch_size: int = 8,
    sites: Mapping[str, Site] | None = None,
    padding_side: str | None = None,
    seed: int = 0,
    accumulate_on: Literal["auto", "device", "cpu"] = "auto",
    checkpoint_activations: bool = False,
    on_batch: Callable[[Batch], None] = lambda batch: None,
) -> dict[str, torch.Tensor]:
    """The importance of every weight of every site.

    Parameters
    ----------
    model
        A causal language model of transformers, on any device (also spread by a `device_map`), in any dtype;
        left as it was.
    encoded
        Mappings with `input_ids` and `labels` (-100 where a token is no target), and optionally
        `attention_mask`; for example from `encode`, or the rows of a tokenised `datasets.Dataset`.
    method
        `snip`, `wanda`, `fisher`, `magnitude`, `random`, or (neurons only) `taylor`, `gradient`.
    batch_size
        Examples that pass through the model together; the result does not depend on it.
    sites
        Score these only; default: `linear_sites(model)`.
    padding_side
        None: nothing is computed for padding; `right` or `left`: the result does not depend on it.
    seed
        Of the method `random`.
    accumulate_on
        Where the float32 accumulators live: with the site (`device`), in main memory (`cpu`), or chosen from the
        free memory (`auto`); see `plan_passes`.
    checkpoint_activations
        Keep only the inputs of each decoder block and compute the rest again in the backward pass: less memory for
        about a third more time, the same scores. Also done where the model itself has gradient checkpointing enabled.
    on_batch
        Called after each batch, for progress.

    Returns
    -------
    dict
        Site name -> float32 tensor `[out, in]` (of neurons only: `[out]`) on the CPU. With L(x) the mean
        cross-entropy over the response tokens of example x, and the mean over examples:

        - snip: |W| · mean |∂L/∂W| (Lee et al., ICLR 2019; Wei et al. 2024, eq. 1: absolute value per example)
        - fisher: mean (∂L/∂W)²
        - wanda: |W| · √(mean over all response tokens of X²) (Sun et al., arXiv 2306.11695; Wei et al.'s mask)
        - taylor: mean |Σⱼ Wᵢⱼ ∂L/∂Wᵢⱼ| (Molchanov et al., arXiv 1906.10771, without the square)
        - gradient: √(mean Σⱼ (∂L/∂Wᵢⱼ)²), the root mean square length of the gradient of neuron i
        - magnitude: |W|; random: uniform in [0, 1)

    Raises
    ------
    DataError
        No examples, an example without response tokens, a loss that is not finite (the example is named).
    ModelError
        A model whose structure is not known, or whose weights are offloaded.
    ConfigError
        An unknown method.

    Notes
    -----
    Where `torch.distributed` is initialised (`accelerate launch`, `torchrun`), every process scores its share of the
    examples and all return the scores of all examples. Of a model that FSDP2 has cut each process also keeps the sums
    of some sites only (`cut`); its parameters must not have required gradients when it was first used.
    """
    return dict(
        iterate_scores(
            model,
            encoded,
            method=method,
            batch_size=batch_size,
            sites=sites,
            padding_side=padding_side,
            seed=seed,
            accumulate_on=accumulate_on,
            checkpoint_activations=checkpoint_activations,
            on_batch=on_batch,
        )
    )


def iterate_scores(
    model: nn.Module,
    encoded: Sequence[Mapping[str, Any]],
    *,
    method: str = "snip",
    batch_size: int = 8,
    sites: Mapping[str, Site] | None = None,
    padding_side: str | None = None,
    seed: int = 0,
    accumulate_on: Literal["auto", "device", "cpu"] = "auto",
    checkpoint_activations: bool = False,
    on_batch: Callable[[Batch], None] = lambda batch: None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """As `score`, site by site: what has been handed out need not stay in memory."""
    chosen = get_method(method)
    sites = Sites(model) if sites is None else sites
    check_loaded(sites)
    generator = torch.Generator().manual_seed(seed)
    if chosen.needs == "nothing":
        for name, site in sites.items():
            yield name, chosen.finish(torch.zeros(0), site.weight, 0, 0, generator).cpu()
        return
    pad = pad_token_id_of(model)
    batches = (
        batches_without_padding(model, encoded, batch_size=batch_size, pad_token_id=pad, share=False)
        if padding_side is None
        else make_batches(encoded, model=model, batch_size=batch_size, pad_token_id=pad, padding_side=padding_side)
    )
    response_tokens = sum(int((batch.labels != IGNORED).sum()) for batch in batches)
    if any(is_sharded(site.tensor) for site in sites.values()):
        cut = CutAccumulators(
            chosen,
            sites,
            lambda site: _accumulator(chosen, site, site.tensor.device),
            {name: _accumulator_bytes(chosen, site) for name, site in sites.items()},
            0 if accumulate_on == "cpu" else free_memory(next(iter(sites.values())).tensor.device) * (1 - RESERVE),
        )
        how: dict[str, Any] = {"checkpoint_activations": checkpoint_activations, "on_batch": on_batch}
        accumulate(model, cut, batches, backward=chosen.needs == "backward", **how)
        yield from cut.finished(len(encoded), response_tokens, generator)
        return
    plan = plan_passes(chosen, sites, accumulate_on=accumulate_on)
    for names in plan.passes:
        part = {name: sites[name] for name in names}
        accumulators = {
            name: _accumulator(chosen, site, site.tensor.device if plan.on_device else torch.device("cpu"))
            for name, site in part.items()
        }

        def record(site: Site, tokens: Tokens, accumulators: dict[str, torch.Tensor] = accumulators) -> None:
            chosen.update(accumulators[site.name], tokens)

        run(
            model,
            part,
            _own_share(batches),
            record,
            backward=chosen.needs == "backward",
            checkpoint_activations=checkpoint_activations,
            on_batch=on_batch,
        )
        for name, site in part.items():
            total = _summed(accumulators.pop(name))
            with torch.no_grad():
                result = chosen.finish(total, site.weight, len(encoded), response_tokens, generator)
            yield name, result.cpu()


def check_loaded(sites: Mapping[str, Site]) -> None:
    """Raise `ModelError` where a site's weight is offloaded."""
    for name, site in sites.items():
        if site.tensor.is_meta:
            raise ModelError(f"The weight of {name} is offloaded", fix="load the model with a device_map that fits")


class Plan(NamedTuple):
    """How the accumulators fit: the sites of each pass over the data, and whether they stay with the sites."""

    passes: list[list[str]]
    on_device: bool


MOST_PASSES = 8
RESERVE = 0.25  # share of the free memory that is left to activations


def plan_passes(
    method: Method,
    sites: Mapping[str, Site],
    *,
    accumulate_on: Literal["auto", "device", "cpu"] = "auto",
    free: Mapping[torch.device, int] | None = None,
) -> Plan:
    """One pass with everything on the device where it fits; else up to 8 passes over subsets of the sites, which cost
    arithmetic but no transfer; else one pass with the accumulators in main memory. `free` is the free memory of each
    device in bytes; default: asked of the device."""
    sizes = {name: _accumulator_bytes(method, site) for name, site in sites.items()}
    if accumulate_on == "cpu":
        return Plan([list(sites)], False)
    if accumulate_on == "device":
        return Plan([list(sites)], True)
    devices = {name: site.tensor.device for name, site in sites.items()}
    passes = split_into_passes(sizes, devices, free=free)
    plan = Plan(passes, True) if len(passes) <= MOST_PASSES else Plan([list(sites)], False)
    where = "with the model" if plan.on_device else "in main memory"
    logger.info(
        "scores: %.1f GB of accumulators %s, %d pass(es) over the data",
        sum(sizes.values()) / 1e9,
        where,
        len(plan.passes),
    )
    return plan


def split_into_passes(
    sizes: Mapping[str, int], devices: Mapping[str, torch.device], *, free: Mapping[torch.device, int] | None = None
) -> list[list[str]]:
    """Sites in their order, cut into passes so that what each pass keeps (bytes and device of each site) fits in 75 %
    of the free memory of every device; a site that fits nowhere is a pass of its own."""
    free = {device: free_memory(device) for device in set(devices.values())} if free is None else free
    passes: list[list[str]] = [[]]
    used: Counter[torch.device] = Counter()
    for name, size in sizes.items():
        device = devices[name]
        if used[device] + size > free[device] * (1 - RESERVE) and passes[-1]:
            passes.append([])
            used.clear()
        passes[-1].append(name)
        used[device] += size
    return passes


def _accumulator_shape(method: Method, site: Site) -> tuple[int, ...]:
    rows, columns = site.shape
    return {"weight": (rows, columns), "input": (columns,), "output": (rows,), "none": (0,)}[method.accumulator]


def _accumulator_bytes(method: Method, site: Site) -> int:
    return 4 * math.prod(_accumulator_shape(method, site))


def _accumulator(method: Method, site: Site, device: torch.device) -> torch.Tensor:
    return torch.zeros(_accumulator_shape(method, site), dtype=torch.float32, device=device)


def free_memory(device: torch.device) -> int:
    """Free bytes of a device; of several processes the least, so that all of them make the same plan."""
    if device.type == "cuda":
        free = int(torch.cuda.mem_get_info(device)[0])
    else:
        import psutil

        free = int(psutil.virtual_memory().available) // process_count()
    if joined().total > 1:
        least = torch.tensor(free, device=device)
        dist.all_reduce(least, op=dist.ReduceOp.MIN)
        free = int(least)
    return free


def _own_share(batches: Sequence[Batch]) -> Sequence[Batch]:
    """The batches of this process; all where there is one."""
    number, count = joined()
    return batches[number::count]


def _summed(accumulator: torch.Tensor) -> torch.Tensor:
    """The sum over all processes."""
    if joined().total > 1:
        with lost_as_error():
            dist.all_reduce(accumulator)
    return accumulator


def pad_token_id_of(model: nn.Module) -> int:
    config: Any = model.config
    pad = getattr(config, "pad_token_id", None)
    return int(pad) if pad is not None else 0


def write_scores(
    path: Path,
    scores: Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]],
    *,
    header: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> None:
    """Write scores as safetensors, site by site, whole or not at all.

    Parameters
    ----------
    path
        The file.
    scores
        A mapping, or pairs such as `iterate_scores` yields: then one site at a time is in memory.
    header
        Model and data fingerprint, method, settings: goes into the file's metadata as JSON.
    shapes
        Needed for pairs: site name -> shape, in the order of the pairs.
    """
    pairs = scores.items() if isinstance(scores, Mapping) else scores
    if shapes is None:
        assert isinstance(scores, Mapping), "pairs need their shapes"
        shapes = {name: tuple(tensor.shape) for name, tensor in scores.items()}
    write_tensors(Path(path), pairs, shapes, metadata={"neurondrift": json.dumps(dict(header))})


class ScoreFile(Mapping[str, np.ndarray]):
    """Scores in a file, read site by site: a mapping of site name -> float32 array, memory-mapped.

    Raises `ArtifactError` where the file is missing, truncated, or was not written by `write_scores`.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        try:
            metadata, self._tensors = parse_header(self.path)
            self.header: dict[str, Any] = json.loads(metadata["neurondrift"])
        except FileNotFoundError as error:
            raise ArtifactError("The score file is missing", received=str(path), fix="run neurondrift score") from error
        except (ValueError, KeyError, TypeError) as error:
            raise ArtifactError(
                f"{path} is no score file of neurondrift ({error})", fix="run neurondrift score"
            ) from error

    def __getitem__(self, name: str) -> np.ndarray:
        return self._tensors[name].mapped().numpy()

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def score_header(
    model: nn.Module | Sites, encoded: Sequence[Mapping[str, Any]], *, method: str, **settings: Any
) -> dict[str, Any]:
    """What a score file says of itself."""
    return {
        "format": 1,
        "model": sites_of(model).fingerprint,
        "data": data_fingerprint(encoded),
        "examples": len(encoded),
        "method": method,
        "settings": settings,
    }


def check_compatible(first: ScoreFile, second: ScoreFile) -> None:
    """Raise `GroupError` unless two score files are of the same model and the same sites."""
    if first.header["model"] != second.header["model"]:
        raise GroupError("The two score files are of different models", received=f"{first.path}, {second.path}")
    if list(first) != list(second):
        raise GroupError("The two score files hold different sites", received=f"{first.path}, {second.path}")
