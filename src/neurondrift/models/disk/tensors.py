"""Safetensors files: the header read, a tensor or some rows of it by its offset, and a file written tensor by tensor.

Owns the format: eight bytes that say how long the header is, the header as JSON, the numbers one tensor after the
other. Knows nothing of models.
"""

from __future__ import annotations

import json
import math
import mmap
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from neurondrift.base.errors import ArtifactError
from neurondrift.base.files import atomic_path

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Longer headers are a fault of the file: the largest models have some 100 kB.
MAX_HEADER = 100_000_000
POINTER = b"version https://git-lfs"


class TensorFile(NamedTuple):
    """Where a tensor's bytes are: file, dtype, shape and the offset of the first byte."""

    path: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    def mapped(self) -> torch.Tensor:
        """The tensor, its bytes read from the disk when they are looked at; what is written to it stays in memory.

        Raises `ArtifactError` where the file has become shorter.
        """
        count = math.prod(self.shape)
        if not count:
            return torch.empty(self.shape, dtype=self.dtype)
        start = self.offset - self.offset % mmap.ALLOCATIONGRANULARITY
        length = self.offset + count * self.dtype.itemsize - start
        try:
            with open(self.path, "rb") as stream:
                pages = mmap.mmap(stream.fileno(), length, offset=start, access=mmap.ACCESS_COPY)
        except ValueError as error:
            raise _shorter(self.path) from error
        flat = torch.frombuffer(pages, dtype=self.dtype, count=count, offset=self.offset - start)
        return flat.view(self.shape)


class Header(NamedTuple):
    """What a file says of itself, and where each of its tensors lies, by name."""

    metadata: dict[str, Any]
    tensors: dict[str, TensorFile]


def parse_header(path: Path) -> Header:
    """The header of a safetensors file.

    Raises `OSError` where it cannot be read, `ValueError` where it is truncated or no safetensors file.
    """
    size = path.stat().st_size
    with open(path, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 2 <= length <= min(MAX_HEADER, max(size - 8, 0)):
            raise ValueError("its header is longer than the file")
        header = json.loads(stream.read(length))
    try:
        metadata = header.pop("__metadata__", {})
        tensors = {name: _placed(path, name, header[name], 8 + length, size) for name in header}
        end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"its header is not as it should be: {error}") from error
    if end != size:  # safetensors' own reader refuses it too
        raise ValueError("it goes on after its last tensor")
    return Header(metadata, tensors)


def _placed(path: Path, name: str, entry: Mapping[str, Any], start: int, size: int) -> TensorFile:
    begin, end = entry["data_offsets"]
    if start + end > size:
        raise ValueError(f"it is truncated: {name} ends after the end of the file")
    # An unknown dtype (packed, 8 bits) is told apart where a site needs it.
    dtype = DTYPES.get(entry["dtype"], torch.uint8)
    if entry["dtype"] in DTYPES and end - begin != math.prod(entry["shape"]) * dtype.itemsize:
        raise ValueError(f"{name} has not the bytes of its shape")
    return TensorFile(str(path), dtype, tuple(entry["shape"]), start + begin)


def read_header(path: Path) -> dict[str, TensorFile]:
    """Name -> place of every tensor of a checkpoint's file.

    Raises `ArtifactError` where the file is missing, truncated or no safetensors file.
    """
    try:
        return parse_header(path).tensors
    except FileNotFoundError as error:
        raise ArtifactError("A checkpoint's file is missing", received=str(path)) from error
    except (OSError, ValueError) as error:
        raise ArtifactError(
            f"{path} is truncated or no safetensors file ({str(error)[:100]})",
            fix="it is a Git LFS pointer: fetch the file itself with git lfs pull, or download it again"
            if _is_pointer(path)
            else "copy or download it again",
        ) from error


def _is_pointer(path: Path) -> bool:
    """Whether a file is what git keeps in the place of a large file."""
    try:
        with open(path, "rb") as stream:
            return stream.read(len(POINTER)) == POINTER
    except OSError:
        return False


def read_into(descriptor: int, view: memoryview, offset: int, path: str) -> None:
    """Fill `view` with the bytes of an open file from `offset` on.

    Raises `ArtifactError` where the file ends before.
    """
    done = 0
    while done < len(view):
        count = os.preadv(descriptor, [view[done:]], offset + done)
        if count == 0:
            raise _shorter(path)
        done += count


def _shorter(path: str) -> ArtifactError:
    return ArtifactError("A checkpoint's file became shorter while it was read", received=path)


def write_tensors(
    path: Path,
    tensors: Iterable[tuple[str, torch.Tensor]],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    metadata: Mapping[str, str],
) -> None:
    """Write tensors in float32, whole or not at all; only one at a time is asked for.

    Parameters
    ----------
    path
        The file.
    tensors
        Pairs of a name and a tensor, in the order of `shapes`.
    shapes
        Name -> shape of every tensor: the header stands before the numbers.
    metadata
        What the file says of itself.
    """
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, shape in shapes.items():
        size = 4 * math.prod(shape)
        entries[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    names = iter(shapes)
    with atomic_path(Path(path)) as partial, open(partial, "wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in tensors:
            assert name == next(names), "tensors come in the order of their shapes"
            assert tuple(tensor.shape) == tuple(shapes[name]), f"{name} has another shape than was said"
            stream.write(tensor.detach().to(torch.float32).contiguous().cpu().numpy().data)
        assert next(names, None) is None, "a tensor that was announced did not come"
