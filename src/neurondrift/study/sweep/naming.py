"""The names of points: readable, unique, fit for folders, and the same however many points there are."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from neurondrift.base.errors import ConfigError
from neurondrift.base.files import sha256_of_value

LONGEST = 100
#: Files of data, whose kind says nothing.
SUFFIX = re.compile(r"\.(csv|tsv|jsonl?|parquet|txt|toml)(\.\w+)?$", re.IGNORECASE)
#: The names of settings that say less than their table's.
AXES = {"model.reference": "model", "seeds": "seed"}


def point_names(overrides: Sequence[Mapping[str, Any]], given: Sequence[str | None]) -> list[str]:
    """A name for each point: the one it was given, or what it overrides, such as `data-alpaca__lora_r-8__seed-0`.

    Those that would be the same, or too long, end in a checksum of the overrides. Raises `ConfigError` for a given
    name that is none.
    """
    for name in given:
        if name is not None and not re.fullmatch(r"[\w][\w.-]{0,99}", name):
            raise ConfigError(
                "A point's name names its folder",
                received=name,
                allowed="letters, digits, _ . and -, at most 100 of them, a letter or digit first",
            )
    made = [own or _described(each) for each, own in zip(overrides, given, strict=True)]
    often = Counter(made)
    return [
        name if own or (often[name] == 1 and len(name) <= LONGEST) else f"{name[:LONGEST]}-{_checksum(each)}"
        for name, own, each in zip(made, given, overrides, strict=True)
    ]


def _described(overrides: Mapping[str, Any]) -> str:
    last = Counter(path.rpartition(".")[2] for path in overrides)
    parts = []
    for path, value in overrides.items():
        short = path.rpartition(".")[2]
        name = AXES.get(path) or (short if last[short] == 1 else path)
        parts.append(f"{name}-{label(value)}")
    return "__".join(parts) or "base"


def label(value: Any) -> str:
    """A value in a few letters that are safe in a file's name."""
    if isinstance(value, bool):
        text = str(value).lower()
    elif isinstance(value, Mapping):
        text = _of_table(value)
    elif isinstance(value, list):
        text = "-".join(map(label, value))
    elif isinstance(value, str):
        text = SUFFIX.sub("", re.split(r"[:/\\]", value.rstrip("/\\"))[-1])
    else:
        text = str(value)
    return re.sub(r"[^\w.-]+", "-", text).strip("-.") or "empty"


def _of_table(value: Mapping[str, Any]) -> str:
    if "source" not in value:
        return "-".join(f"{key}-{label(each)}" for key, each in value.items())
    parts = [label(value["source"]), *(str(value[key]) for key in ("limit", "split", "subset") if key in value)]
    if "mix" in value:
        parts.append(f"with-{value.get('share')}-{label(value['mix'])}")
    return "-".join(parts)


def _checksum(overrides: Mapping[str, Any]) -> str:
    return sha256_of_value(dict(overrides))[:6]
