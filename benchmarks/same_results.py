"""Whether two folders hold the same study: groups, drift, behaviour, models and statistics, bit for bit.

    git worktree add /tmp/before 026eeef
    PYTHONPATH=/tmp/before/src python -m neurondrift.cli run --preset smoke --output-dir /tmp/first
    python -m neurondrift.cli run --preset smoke --output-dir /tmp/second
    python benchmarks/same_results.py /tmp/first /tmp/second

Prints each difference and ends with 1 where there is one. Keys and columns that only the second has are counted, not
held against it; so are the time and the commit at which a study was made.
"""

import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

OF_THE_RUN = {"/study/created", "/study/commit", "/study/versions"}


def differences(first: Any, second: Any, path: str, added: Counter[str]) -> Iterator[str]:
    if path in OF_THE_RUN:
        return
    if isinstance(first, dict) and isinstance(second, dict):
        added.update(key for key in second if key not in first)
        for key, value in first.items():
            if key in second:
                yield from differences(value, second[key], f"{path}/{key}", added)
            else:
                yield f"{path}/{key} is gone"
    elif isinstance(first, list) and isinstance(second, list) and len(first) == len(second):
        for number, (one, other) in enumerate(zip(first, second, strict=True)):
            yield from differences(one, other, f"{path}/{number}", added)
    elif first != second:
        yield f"{path}: {first!r} is {second!r}"


def of_file(first: Path, second: Path, added: Counter[str]) -> Iterator[str]:
    if first.suffix == ".parquet":
        one, other = pq.read_table(first), pq.read_table(second)
        added.update(f"column {name}" for name in other.column_names if name not in one.column_names)
        if not set(one.column_names) <= set(other.column_names) or not one.equals(other.select(one.column_names)):
            yield "the tables differ"
        for key, value in (one.schema.metadata or {}).items():
            described = (other.schema.metadata or {}).get(key, b"null")
            if value != described:
                yield from differences(json.loads(value), json.loads(described), "", added)
    elif first.suffix == ".json":
        yield from differences(json.loads(first.read_text()), json.loads(second.read_text()), "", added)
    elif first.read_bytes() != second.read_bytes():
        yield "the bytes differ"


def main(first: Path, second: Path) -> int:
    kinds = ("*.parquet", "*.safetensors", "neuron_groups/*.json", "results/statistical_results.json")
    files = sorted({file.relative_to(first) for kind in kinds for file in first.rglob(kind)})
    added: Counter[str] = Counter()
    count = 0
    for file in files:
        lines = list(of_file(first / file, second / file, added)) if (second / file).exists() else ["is gone"]
        count += len(lines)
        for line in lines[:5]:
            print(f"{file}: {line}")
    print(f"{len(files)} files compared, {count} differences; added keys: {dict(added) or 'none'}")
    return int(count > 0)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
