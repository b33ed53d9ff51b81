"""Files: written whole or not at all, described by manifests, never pickled.

Owns how bytes reach the disk (temporary name, then rename), checksums, the manifest that marks a stage as
done, and where scratch files live. Knows nothing of models, groups or statistics.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import json
import math
import os
import re
import shutil
import tomllib
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil

from neurondrift.base.errors import ArtifactError, ConfigError, ResourceError, UserError
from neurondrift.base.processes import from_first, in_step

if TYPE_CHECKING:
    import pyarrow as pa

SHARED_MEMORY = Path("/dev/shm")

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NOT_WRITABLE = (errno.EROFS, errno.EACCES, errno.EPERM)
#: What torch says of a file that it could not write; it names no reason.
TORCH_CANNOT_WRITE = ("PytorchStreamWriter failed", "unexpected pos", "iostream error", "cannot be opened.")


def storage_error(error: BaseException, path: Path | str | None = None) -> ResourceError | None:
    """What a disk's refusal is to the user; None for any other error.

    Knows the numbers of `OSError`, and the words of libraries that raise kinds of their own (safetensors, torch).
    """
    place = str(path or getattr(error, "filename", None) or "a file")
    number = error.errno if isinstance(error, OSError) else None
    if number is None and (match := re.search(r"\b(?:os error|errno:?) (\d+)", str(error))):
        number = int(match[1])
    if number in NO_SPACE or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in TORCH_CANNOT_WRITE)
    ):
        return ResourceError(
            f"No space is left while writing {place}",
            fix="free some space or choose another --output-dir, then run the command again: it resumes",
        )
    if number in NOT_WRITABLE:
        return ResourceError(
            f"{place} may not be written or read ({os.strerror(number)})",
            fix="give yourself the right to it or choose another --output-dir, then run the command again: it resumes",
        )
    if number in (errno.EMFILE, errno.ENFILE):
        return ResourceError(
            f"Too many files are open, at {place}",
            fix="raise the limit (ulimit -n 1024), then run the command again: it resumes",
        )
    if isinstance(error, RuntimeError) and "determine home directory" in str(error):
        return ResourceError("There is no home folder", fix="set HOME (and XDG_CACHE_HOME), or write paths without ~")
    if number == errno.EIO:
        return ResourceError(
            f"The disk does not read or write {place} (Input/output error)", fix="check the disk, or use another"
        )
    return None


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that becomes `path` only when the block ends without an exception.

    Works for a file and for a folder. What stood at `path` is replaced in one rename (a folder: removed
    just before it). A disk that refuses (full, read-only, over quota) raises `ResourceError`; nothing partial is left
    under either name.
    """
    path = Path(path)
    make_folder(path.parent)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        yield partial
        if partial.is_dir() and path.is_dir():
            shutil.rmtree(path)
        os.replace(partial, path)
    except Exception as error:
        if not isinstance(error, UserError):
            _raise_refusal(error, path)
        raise
    finally:
        _remove(partial)


def _raise_refusal(error: Exception, path: Path) -> None:
    """Raise what a disk's refusal is to the user. No name is left to it: its traceback would keep files open."""
    refused = storage_error(error, path)
    try:
        if refused is not None:
            raise refused from error
    finally:
        del refused, error


def _remove(path: Path) -> None:
    """Delete a file or folder as far as the disk lets us."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def remove_partial(path: Path) -> None:
    """Delete what writes that were killed have left under their temporary names: below a folder, and beside a file or
    folder what was to become it. The last part of the path may hold `*`."""
    path = Path(path)
    for left in [*path.parent.glob(f".{path.name}.*.partial"), *path.rglob(".*.partial")]:
        if re.fullmatch(r"\..+\.[0-9a-f]{8}\.partial", left.name):
            _remove(left)


def make_folder(folder: Path, mode: int = 0o777) -> None:
    """Make a folder and those above it where they are not there. `ArtifactError` where a file stands in the way."""
    try:
        folder.mkdir(mode=mode, parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ArtifactError("A file stands where a folder is needed", received=str(folder)) from error
    except OSError as error:
        if (refused := storage_error(error, folder)) is not None:
            raise refused from error
        raise


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
    except (ValueError, RecursionError, OSError) as error:  # no JSON, no UTF-8, nested without end, a folder
        raise ArtifactError(f"{path} is no readable JSON ({error})", fix="delete it and make it again") from error


def read_toml(path: Path) -> dict[str, Any]:
    """A configuration file as a plain nested dict. Raises `ConfigError` if it is missing or no TOML."""
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise ConfigError("The configuration file does not exist", received=str(path)) from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"The configuration file cannot be read ({error})", received=str(path)) from error
    except (ValueError, RecursionError) as error:  # also numbers of thousands of digits, tables nested without end
        raise ConfigError(f"{path} is no valid TOML ({error})") from error


def read_parquet(path: Path, **how: Any) -> pa.Table:
    """A Parquet file as an Arrow table, its pages checked against their checksums and every value against its kind.

    `how` goes to `pyarrow.parquet.read_table`. Raises `ArtifactError` where the file is missing, damaged or something
    else.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path, page_checksum_verification=True, **{"partitioning": None, **how})
        table.validate(full=True)
    except FileNotFoundError as error:
        raise ArtifactError("A file is missing", received=str(path)) from error
    except (pa.ArrowException, OSError, ValueError, OverflowError, MemoryError) as error:
        raise ArtifactError(
            f"{path} is damaged or no Parquet file ({type(error).__name__})", fix="make it again, or copy it again"
        ) from error
    return table


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
    path: Path,
    *,
    root: Path,
    stage: str,
    inputs: str,
    outputs: Sequence[Path],
    details: Mapping[str, Any],
    known: dict[tuple[str, int, int], str] | None = None,
) -> None:
    """Mark a stage as done: written last, with the checksum and size of everything that the stage made.

    `inputs` is the fingerprint of all that the stage depends on; paths are stored relative to `root`. `known` keeps
    checksums from one call to the next (of files that are written once: by name, size and time).
    """
    kept = {} if known is None else known
    files = {}
    for file in files_below(outputs):
        about = file.stat()
        of = (str(file), about.st_size, about.st_mtime_ns)
        if of not in kept:
            kept[of] = sha256_of_file(file)
        files[str(file.relative_to(root))] = {"sha256": kept[of], "bytes": about.st_size}
    write_json(path, {"format": 1, "stage": stage, "inputs": inputs, "details": dict(details), "files": files})


def manifest_stands(path: Path, *, root: Path, inputs: str) -> bool:
    """Whether the stage is done: its manifest is there, for the same inputs, and no file has changed."""
    return standing_inputs(path, root=root, only=inputs) is not None


def standing_inputs(path: Path, *, root: Path, only: str | None = None) -> str | None:
    """For which inputs a stage was done: those of its manifest; None where that is missing or a file has changed.

    With `only`, inputs other than these are None too, without a look at the files.
    """
    try:
        manifest = read_json(path)
        inputs: str = manifest["inputs"]
        if only is not None and inputs != only:
            return None
        return inputs if _first_change(manifest, root) is None else None
    except UNREADABLE_MANIFEST:
        return None


UNREADABLE_MANIFEST = (ArtifactError, KeyError, TypeError, AttributeError, OSError)


def changed_file(path: Path, *, root: Path, inputs: str) -> str | None:
    """The first file that is not as a manifest for these inputs says, or the manifest itself where it is damaged.

    None where all stands, there is no manifest, or it is for other inputs.
    """
    if not path.exists():
        return None
    try:
        manifest = read_json(path)
        return _first_change(manifest, root) if manifest["inputs"] == inputs else None
    except UNREADABLE_MANIFEST:
        return path.name


def _first_change(manifest: Mapping[str, Any], root: Path) -> str | None:
    for name, entry in manifest["files"].items():
        file = inside(root, name, links=False)
        if not file.is_file() or file.stat().st_size != entry["bytes"] or sha256_of_file(file) != entry["sha256"]:
            return str(name)
    return None


def inside(folder: Path, name: str, *, links: bool = True) -> Path:
    """The path of a file that an artifact names, within the artifact's folder.

    Raises `ArtifactError` for a name that leads out of it: absolute or with `..`; without `links` (which the hub's
    cache is made of) also a link to a file elsewhere. Folders that the user has linked elsewhere are followed.
    """
    path = Path(folder) / name
    out = not name or Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name
    if out or (not links and path.is_symlink() and not path.resolve().is_relative_to(path.parent.resolve())):
        raise ArtifactError(
            "An artifact names a file outside of its folder", received=name, allowed=f"files below {folder}"
        )
    return path


def free_bytes(path: Path) -> int:
    """Free space of the file system that holds `path` or its nearest existing parent."""
    path = Path(path).absolute()
    while not path.exists():
        path = path.parent  # ends at the root, which is there
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


def _is_ours(folder: Path) -> bool:
    """Whether a folder is one that we made: in shared memory anybody can make one of that name, or a link."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    about = folder.stat()
    return not folder.is_relative_to(SHARED_MEMORY) or (about.st_uid == os.getuid() and not about.st_mode & 0o022)


def find_scratch(output_dir: Path) -> Path | None:
    """The study's scratch folder, if there is one."""
    return next((folder for folder in _scratch_candidates(output_dir) if _is_ours(folder)), None)


def room_in_shared_memory() -> int:
    """Bytes that may be written to `/dev/shm`: what is free there, but no more than the memory that is free.

    The size of a tmpfs is a limit, not a reserve: what lies in it is taken from what processes compute with.
    """
    if not os.access(SHARED_MEMORY, os.W_OK):
        return 0
    return min(free_bytes(SHARED_MEMORY), int(psutil.virtual_memory().available))


def scratch_directory(output_dir: Path, *, needed: int) -> Path:
    """The folder for a study's large temporary files; made where it does not exist yet.

    `/dev/shm` where twice `needed` bytes are free there and in memory, else a folder beside the study. Every command
    of one study finds the same folder again, since its name is derived from the study's path.
    """
    if (existing := find_scratch(output_dir)) is not None:
        return existing
    in_memory, beside = _scratch_candidates(output_dir)
    if room_in_shared_memory() > 2 * needed and not (in_memory.exists() or in_memory.is_symlink()):
        with contextlib.suppress(OSError):  # absent, foreign or without inodes: beside the study then
            in_memory.mkdir(mode=0o700)
            return in_memory
    make_folder(beside, mode=0o700)
    return beside


def remove_scratch(output_dir: Path) -> list[Path]:
    """Delete the study's scratch folders, whichever exist; returns what was deleted."""
    removed = [folder for folder in _scratch_candidates(output_dir) if _is_ours(folder)]
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


def without_none(value: Any) -> Any:
    """A nested structure without the keys whose value is None, for TOML, which has no null."""
    if isinstance(value, dict):
        return {key: without_none(item) for key, item in value.items() if item is not None}
    return [without_none(item) for item in value] if isinstance(value, list) else value


class Parts:
    """What is finished of work that may be killed: values by name, each in a file of its own that is written whole.

    Of processes that work together the first reads and writes, and all must ask for the same.

    Parameters
    ----------
    folder
        Where the files lie. It is made with the first of them.
    inputs
        Fingerprint of all that the values depend on: files that were made from others, or are damaged, are not there.
    prefix
        What all names begin with.
    """

    def __init__(self, folder: Path, inputs: str, prefix: str = "") -> None:
        self.folder, self.inputs, self.prefix = Path(folder), inputs, prefix

    def below(self, name: str) -> Parts:
        """The parts of a part."""
        return Parts(self.folder, self.inputs, f"{self.prefix}{name}.")

    def get(self, name: str) -> Any | None:
        """A value, as JSON has it (numbers that are not finite too); None where it is not there."""
        return from_first(lambda: self._read(name))

    def _read(self, name: str) -> Any | None:
        try:
            found = json.loads(self._file(name).read_text(encoding="utf-8"))
            whole = found["inputs"] == self.inputs and found["sha256"] == sha256_of_value(found["value"])
            return found["value"] if whole else None
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            return None

    def put(self, name: str, value: Any) -> None:
        """Keep a value."""
        kept = {"inputs": self.inputs, "sha256": sha256_of_value(value), "value": value}
        if in_step().number == 0:
            write_text(self._file(name), json.dumps(kept, ensure_ascii=False))

    def remove(self) -> None:
        """Delete all that is kept under the prefix, and the folder where nothing is left in it."""
        if in_step().number:
            return
        for file in self.folder.glob(f"{glob.escape(self.prefix)}*.json"):
            _remove(file)
        with contextlib.suppress(OSError):
            self.folder.rmdir()

    def _file(self, name: str) -> Path:
        return self.folder / f"{self.prefix}{name}.json"
