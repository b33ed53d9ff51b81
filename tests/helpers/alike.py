"""Whether two studies hold the same: every table, tensor and finding, numbers up to rounding."""

import math
from pathlib import Path

import numpy as np
import pandas as pd
from safetensors.numpy import load_file

from neurondrift.base.files import read_json

#: What is not of the result: how long it took and on what; digests of files, and paths; and what rounding moves from one
#: bin of a histogram to the next.
NOT_COMPARED = {"seconds", "versions", "created", "commit", "study", "base_model_name_or_path", "adapter", "key"}
NOT_COMPARED |= {"bins", "first_bin", "distributions"}
SUFFIXES = (".parquet", ".json", ".safetensors")


def differences(first: Path, second: Path, *, tolerance: float) -> list[str]:
    """What differs: file, place in it, and how much; absolutely and as a share of the largest value beside it."""
    names = [
        {
            str(file.relative_to(folder))
            for file in folder.rglob("*")
            if file.suffix in SUFFIXES and not file.relative_to(folder).parts[0].startswith(".")
        }
        for folder in (first, second)
    ]
    found = [f"{name}: not in both" for name in sorted(names[0] ^ names[1])]
    for name in sorted(names[0] & names[1]):
        if Path(name).name in (
            "tokenizer.json",
            "tokenizer_config.json",
            "threads.json",
            "neurondrift.json",
            "in_progress.json",
        ):
            continue
        one, two = (_read(folder / name) for folder in (first, second))
        found += [f"{name}: {text}" for text in _differ(one, two, tolerance, "")]
    return found


def _read(path: Path):
    if path.suffix == ".json":
        return read_json(path)
    if path.suffix == ".safetensors":
        return load_file(path)
    return {name: column.to_numpy() for name, column in pd.read_parquet(path).items()}


def _differ(one, two, tolerance, place):
    if isinstance(one, dict) and isinstance(two, dict):
        if one.keys() != two.keys():
            yield f"{place} has other keys: {sorted(one.keys() ^ two.keys())[:3]}"
        for key in one.keys() & two.keys() - NOT_COMPARED:
            yield from _differ(one[key], two[key], tolerance, f"{place}/{key}")
    elif isinstance(one, list) and isinstance(two, list):
        if all(isinstance(each, str) for each in one + two):  # PEFT writes sets
            one, two = sorted(one), sorted(two)
        if len(one) != len(two):
            yield f"{place}: {len(one)} and {len(two)} entries"
        for at, pair in enumerate(zip(one, two, strict=False)):
            yield from _differ(*pair, tolerance, f"{place}/{at}")
    elif isinstance(one, np.ndarray) and one.dtype.kind in "fiub" and getattr(two, "dtype", one.dtype).kind in "fiub":
        if one.shape != two.shape:
            yield f"{place}: {one.shape} and {two.shape}"
        elif one.size and not np.array_equal(one, two, equal_nan=one.dtype.kind == "f"):
            known = one[np.isfinite(one)] if one.dtype.kind == "f" else one
            scale = max(1.0, float(np.abs(known.astype(float)).max())) if known.size else 1.0
            off = np.abs(one.astype(float) - two.astype(float))
            if not np.array_equal(np.isnan(one.astype(float)), np.isnan(two.astype(float))):
                yield f"{place}: NaN in other places"
            elif (worst := float(np.nanmax(off))) > tolerance * scale:
                yield f"{place}: {worst:.3g} apart, of {scale:.3g}"
    elif isinstance(one, np.ndarray):
        if not all(_same(a, b, tolerance) for a, b in zip(one, two, strict=True)):
            at = next(at for at, pair in enumerate(zip(one, two, strict=True)) if not _same(*pair, tolerance))
            yield f"{place} row {at}: {one[at]!r} and {two[at]!r}"[:300]
    elif not _same(one, two, tolerance):
        yield f"{place}: {one!r} and {two!r}"[:300]


def _same(one, two, tolerance):
    if isinstance(one, np.ndarray | list):
        return len(one) == len(two) and all(_same(a, b, tolerance) for a, b in zip(one, two, strict=True))
    if isinstance(one, float | int) and isinstance(two, float | int):
        if math.isnan(one) or math.isnan(two):
            return math.isnan(one) and math.isnan(two)
        return abs(one - two) <= tolerance * max(1.0, abs(one))
    return bool(one == two)
