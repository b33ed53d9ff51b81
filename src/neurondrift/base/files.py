"""Files: written whole or not at all, described by manifests, never pickled.

Owns how bytes reach the disk (temporary name, then rename), checksums, the manifest that marks a stage as
done, and where scratch files live. Knows nothing of models, groups or statistics.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from neurondrift.base.errors import ArtifactError, ResourceError

SHARED_MEMORY = Path("/dev/shm")


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that becomes `path` only when the block ends without an exception.

    Works for a file and for a folder. What stood at `path` is replaced in one rename (a folder: removed
    just before it). A full disk raises `ResourceError`; nothing partial is left under either name.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ArtifactError("A file stands where a folder is needed", received=str(path.parent)) from error
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        yield partial
        if partial.is_dir() and path.is_dir():
            shutil.rmtree(path)
        os.replace(partial, path)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceError(
                f"No space is left while writing {path}",
                fix="free some space or choose another --output-dir, then run the command again: it resumes",
            ) from error
        raise
    finally:
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        else:
            partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8 to `path`, whole or not at all."""
    with atomic_path(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON. NaN and infinities are refused: undefined is null with a reason."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file; a missing or truncated one is an `ArtifactError`."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ArtifactError("A file is missing", received=str(path)) from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{path} is no readable JSON ({error})", fix="delete it and make it again") from error


def sha256_of_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sha256_of_value(value: Any) -> str:
    """SHA-256 of a JSON-able value in canonical form (sorted keys)."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def files_below(paths: Sequence[Path]) -> list[Path]:
    """Every regular file among `paths` and below the folders among them, sorted."""
    found: list[Path] = []
    for path in paths:
        found += sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    return found


def write_manifest(
    path: Path, *, root: Path, stage: str, inputs: str, outputs: Sequence[Path], details: Mapping[str, Any]
) -> None:
    """Mark a stage as done: written last, with the checksum and size of everything that the stage made.

    `inputs` is the fingerprint of all that the stage depends on; paths are stored relative to `root`.
    """
    files = {
        str(file.relative_to(root)): {"sha256": sha256_of_file(file), "bytes": file.stat().st_size}
        for file in files_below(outputs)
    }
    write_json(path, {"format": 1, "stage": stage, "inputs": inputs, "details": dict(details), "files": files})


def manifest_stands(path: Path, *, root: Path, inputs: str) -> bool:
    """Whether the stage is done: its manifest is there, for the same inputs, and no file has changed."""
    return standing_inputs(path, root=root, only=inputs) is not None


def standing_inputs(path: Path, *, root: Path, only: str | None = None) -> str | None:
    """For which inputs a stage was done: those of its manifest; None where that is missing or a file has changed.

    With `only`, inputs other than these are None too, without a look at the files.
    """
    if not path.exists():
        return None
    try:
        manifest = read_json(path)
        inputs: str = manifest["inputs"]
        if only is not None and inputs != only:
            return None
        for name, entry in manifest["files"].items():
            file = root / name
            if not file.is_file() or file.stat().st_size != entry["bytes"]:
                return None
            if sha256_of_file(file) != entry["sha256"]:
                return None
    except (ArtifactError, KeyError, TypeError):
        return None
    return inputs


def free_bytes(path: Path) -> int:
    """Free space of the file system that holds `path` or its nearest existing parent."""
    path = Path(path).absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def require_space(path: Path, needed: int, *, purpose: str) -> None:
    """Raise `ResourceError` unless `needed` bytes are free where `path` lies."""
    free = free_bytes(path)
    if free < needed:
        raise ResourceError(
            f"Not enough disk space for {purpose} in {path}: {needed / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free",
            fix="free some space or choose another --output-dir",
        )


def _scratch_candidates(output_dir: Path) -> tuple[Path, Path]:
    """The two places where a study's scratch may lie: in shared memory, and beside the study."""
    tag = hashlib.sha256(str(Path(output_dir).resolve()).encode()).hexdigest()[:12]
    return SHARED_MEMORY / f"neurondrift-{tag}", Path(output_dir) / "scratch"


def find_scratch(output_dir: Path) -> Path | None:
    """The study's scratch folder, if there is one."""
    return next((folder for folder in _scratch_candidates(output_dir) if folder.is_dir()), None)


def scratch_directory(output_dir: Path, *, needed: int) -> Path:
    """The folder for a study's large temporary files; made where it does not exist yet.

    `/dev/shm` where twice `needed` bytes are free there, else a folder beside the study. Every command
    of one study finds the same folder again, since its name is derived from the study's path.
    """
    if (existing := find_scratch(output_dir)) is not None:
        return existing
    in_memory, beside = _scratch_candidates(output_dir)
    roomy = os.access(SHARED_MEMORY, os.W_OK) and free_bytes(SHARED_MEMORY) > 2 * needed
    chosen = in_memory if roomy else beside
    chosen.mkdir(mode=0o700, parents=True)
    return chosen


def remove_scratch(output_dir: Path) -> list[Path]:
    """Delete the study's scratch folders, whichever exist; returns what was deleted."""
    removed = [folder for folder in _scratch_candidates(output_dir) if folder.is_dir()]
    for folder in removed:
        shutil.rmtree(folder)
    return removed


def json_safe(value: Any) -> Any:
    """The same value with NaN and infinities as None, arrays and tuples as lists, numpy numbers as plain ones."""
    if isinstance(value, Mapping):
        return {str(key): json_safe(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [json_safe(entry) for entry in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    json.dumps(value)  # anything else must be plain already
    return value
