"""Checkpoints on disk, read site by site: the model is made without numbers, and a block of rows is in memory.

Owns which files of a folder are the model's, and how the rows of a site are read. Which tensors make a site is the
business of `names.py`, where their bytes lie that of `tensors.py`. Nothing is unpickled: a checkpoint that has only
pickled weights is refused.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch

from neurondrift.base.errors import ArtifactError, ModelError
from neurondrift.base.files import inside, read_json
from neurondrift.models.architecture.classes import configuration, skeleton
from neurondrift.models.disk.keys import Names, names_of, plain_names
from neurondrift.models.disk.names import Loaded, SiteName, as_loaded, find_sites
from neurondrift.models.disk.references import INDEX, refuse_other_formats
from neurondrift.models.disk.tensors import DTYPES, TensorFile, read_header, read_into

logger = logging.getLogger(__name__)

# Elements of a block of rows: read into one buffer again and again, so that it stays in the cache; smaller ones cost
# more in calls than they save (measured from 2^16 to 2^19, on one and on two threads).
BLOCK = 1 << 19
SAMPLE = 256


class Slab(NamedTuple):
    """A contiguous matrix on disk, `rows` x `columns` as stored; `transposed`: stored `[in, out]`."""

    path: str
    dtype: torch.dtype
    offset: int
    rows: int
    columns: int
    transposed: bool

    @property
    def out(self) -> int:
        """Rows that it gives to its site."""
        return self.columns if self.transposed else self.rows

    def mapped(self) -> torch.Tensor:
        """The matrix `[out, in]`, mapped."""
        matrix = TensorFile(self.path, self.dtype, (self.rows, self.columns), self.offset).mapped()
        return matrix.T if self.transposed else matrix


class DiskSite(NamedTuple):
    """A site `[out, in]` of a checkpoint; its rows are those of its slabs, one after the other."""

    name: str
    layer: int
    module_type: str
    shape: tuple[int, int]
    slabs: tuple[Slab, ...]

    @property
    def layout(self) -> list[tuple[int, int, bool]]:
        """What two sites must share to be read side by side."""
        return [(slab.rows, slab.columns, slab.transposed) for slab in self.slabs]

    def blocks(self, elements: int = BLOCK, buffer: bytearray | None = None) -> Iterator[tuple[int, torch.Tensor]]:
        """First row and weights `[rows, in]` of each block of rows, in the dtype on disk.

        A block is valid until the next is asked for; `buffer` is used where it is large enough. A transposed slab is
        one block.
        """
        first = 0
        for slab in self.slabs:
            rows = slab.rows if slab.transposed else min(slab.rows, max(1, elements // slab.columns))
            width = slab.columns * slab.dtype.itemsize
            if buffer is None or len(buffer) < rows * width:
                buffer = bytearray(rows * width)
            descriptor = os.open(slab.path, os.O_RDONLY)
            try:
                for start in range(0, slab.rows, rows):
                    count = min(rows, slab.rows - start)
                    view = memoryview(buffer)[: count * width]
                    read_into(descriptor, view, slab.offset + start * width, slab.path)
                    block = torch.frombuffer(view, dtype=slab.dtype).view(count, slab.columns)
                    yield first + start, block.T if slab.transposed else block
            finally:
                os.close(descriptor)
            first += slab.out

    def read(self) -> torch.Tensor:
        """The whole weight `[out, in]` in the dtype on disk: mapped where it lies in one piece, else a copy."""
        pieces = [slab.mapped() for slab in self.slabs]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


class DiskParameter(NamedTuple):
    """A parameter of a checkpoint that is no site: its shape in the model, and the tensors that make it, one after the
    other along the first axis (of which only `rows` where they are given)."""

    shape: tuple[int, ...]
    tensors: tuple[TensorFile, ...]
    rows: tuple[int, int] | None

    def read(self) -> torch.Tensor:
        """The parameter in the dtype on disk: mapped where it lies in one piece, else a copy."""
        pieces = [tensor.mapped() for tensor in self.tensors]
        whole = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        return whole if self.rows is None else whole[self.rows[0] : self.rows[1]]


class Checkpoint:
    """A full model in a folder of safetensors.

    Parameters
    ----------
    folder
        Where config.json and the safetensors lie.
    reference
        What the user called it, for messages.
    like
        A checkpoint whose sites need not be found again where this one has the same tensors and configuration.

    Attributes
    ----------
    tensors
        Tensor name on disk -> `TensorFile`.
    sites
        Site name -> `DiskSite`, named and ordered as `sites.linear_sites(load_model(folder))`.

    Raises
    ------
    ModelError
        No model, pickled weights only, GGUF, quantised weights, an unknown structure.
    ArtifactError
        A missing or truncated file.
    """

    def __init__(self, folder: Path, reference: str, like: Checkpoint | None = None) -> None:
        self.folder, self.reference = folder, reference
        config: dict[str, Any] = read_json(folder / "config.json")
        method = (config.get("quantization_config") or {}).get("quant_method")
        if method is not None:
            raise ModelError(
                f"The checkpoint {reference} is quantised: its files do not hold the weights themselves",
                received=method,
                allowed="float32, bfloat16, float16 or float64 weights",
                fix="save it de-quantised, or load both models and call nd.compare_models(before, after)",
            )
        self.tensors = read_tensors(folder, reference)
        shapes = {name: tensor.shape for name, tensor in self.tensors.items()}
        self._structure = shapes, config
        shared = like if like is not None and like._structure == self._structure else None
        self._model: Any = (
            shared._model if shared else skeleton(configuration(str(folder), called=reference), reference)
        )
        self._names: list[SiteName] = shared._names if shared else find_sites(shapes, self._model, reference)
        self.sites = {name.name: self._locate(name) for name in self._names}

    @cached_property
    def names(self) -> Names:
        """The names of the model, for what is laid on top of it."""
        return names_of(self._model)

    def parameter(self, name: str) -> DiskParameter | None:
        """Where a parameter of any kind lies (a norm, a bias, an embedding), by its name in the loaded model; None
        where there is none, or only one that is put together in another way than row after row."""
        loaded = self._loaded.get(name)
        if (
            loaded is None
            or loaded.shape is None
            or loaded.transposed
            or any(len(piece) > 1 for piece in loaded.sources)
        ):
            return None
        return DiskParameter(loaded.shape, tuple(self.tensors[piece[0]] for piece in loaded.sources), loaded.rows)

    @cached_property
    def _loaded(self) -> dict[str, Loaded]:
        return as_loaded(self._structure[0], self._model)[0]

    def _locate(self, site: SiteName) -> DiskSite:
        slabs = []
        for part in site.parts:
            tensor = self.tensors[part.tensor]
            if not tensor.dtype.is_floating_point or tensor.dtype not in DTYPES.values():
                raise ModelError(
                    f"The tensor {part.tensor} of {self.reference} is packed or quantised",
                    received=str(tensor.dtype).removeprefix("torch."),
                    allowed="float32, bfloat16, float16, float64",
                )
            rows, columns = tensor.shape[-2:]
            offset, size = tensor.offset, tensor.dtype.itemsize
            if part.expert is not None:
                offset += part.expert * rows * columns * size
            if part.rows is not None:
                offset += part.rows[0] * columns * size
                rows = part.rows[1] - part.rows[0]
            slabs.append(Slab(tensor.path, tensor.dtype, offset, rows, columns, part.transposed))
        width = slabs[0].rows if slabs[0].transposed else slabs[0].columns
        shape = (sum(slab.out for slab in slabs), width)
        return DiskSite(site.name, site.layer, site.module_type, shape, tuple(slabs))

    def fingerprint(self, samples: Mapping[str, torch.Tensor] | None = None) -> str:
        """The same hash as `sites.fingerprint` of the loaded model, from 256 values of each site.

        `samples` holds those values, at `sample_positions`, of sites that have been read anyway.
        """
        digest = hashlib.sha256()
        for name, site in self.sites.items():
            values = (samples or {}).get(name)
            values = _pick(site) if values is None else values
            digest.update(f"{name}{site.shape}".encode())
            digest.update(values.to(torch.bfloat16).view(torch.int16).numpy().tobytes())
        return digest.hexdigest()[:16]


def sample_positions(site: DiskSite) -> torch.Tensor:
    """The 256 ascending flat positions of `[out, in]` that the fingerprint looks at."""
    return torch.linspace(0, site.shape[0] * site.shape[1] - 1, SAMPLE, dtype=torch.float64).long()


def _pick(site: DiskSite) -> torch.Tensor:
    """The values of the fingerprint, as stored. Maps a slab at a time."""
    picks = sample_positions(site)
    rows, columns = picks // site.shape[1], picks % site.shape[1]
    values, first = [], 0
    for slab in site.slabs:
        here = (rows >= first) & (rows < first + slab.out)
        values.append(slab.mapped()[rows[here] - first, columns[here]])
        first += slab.out
    return torch.cat(values)


def read_tensors(folder: Path, reference: str) -> dict[str, TensorFile]:
    """Where every tensor of a full model lies, by its name without wrappers, with the errors of `stored_tensors`."""
    found = stored_tensors(folder, reference)
    return {own: found[name] for name, own in plain_names(found).items()}


def stored_tensors(folder: Path, reference: str) -> dict[str, TensorFile]:
    """Where every tensor of a full model lies, by its name on disk; nothing but headers is read.

    Raises
    ------
    ModelError
        No weights, or only pickled ones.
    ArtifactError
        A file that is missing, truncated or no safetensors file; an index that names a tensor that is in no file.
    """
    files, indexed = weight_files(folder, reference)
    found: dict[str, TensorFile] = {}
    for file in files:
        found |= read_header(file)
    lost = [name for name in indexed if name not in found]
    if lost:
        raise ArtifactError(
            f"The files of {reference} lack {lost[0]}, which their index names",
            received=f"{len(lost)} of {len(indexed)} tensors are missing",
            fix="copy or download the folder again",
        )
    return found


def weight_files(folder: Path, reference: str) -> tuple[list[Path], list[str]]:
    """The safetensors of a full model, and the tensors that its index names where it is sharded."""
    if (folder / INDEX).exists():
        index = read_json(folder / INDEX)
        try:
            return [inside(folder, name) for name in sorted(set(index["weight_map"].values()))], list(
                index["weight_map"]
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ArtifactError("The index of the shards is not readable", received=str(folder / INDEX)) from error
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"], []
    refuse_other_formats(folder, reference)
    raise ModelError("This folder holds no model.safetensors", received=reference)


def check_same_sites(base: Checkpoint, tuned: Checkpoint) -> None:
    """Raise `ModelError` where two checkpoints have different sites or shapes; the first that differs is named."""
    for first, second in ((base, tuned), (tuned, base)):
        missing = [name for name in first.sites if name not in second.sites]
        if missing:
            raise ModelError(
                f"{second.reference} has not the site {missing[0]} of {first.reference}",
                received=f"{len(missing)} of {len(first.sites)} sites are missing",
                fix="compare two models of one architecture and depth",
            )
    for name, site in base.sites.items():
        other = tuned.sites[name]
        if site.shape != other.shape:
            raise ModelError(
                f"The shapes of {name} differ",
                received=f"{base.reference} {list(site.shape)}, {tuned.reference} {list(other.shape)}",
                fix="compare two models of one architecture and size",
            )
