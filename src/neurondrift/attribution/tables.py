"""`neurondrift attribute`: all measures of a change between models on disk, into two Parquet tables and a summary.

Owns which measures are taken, the columns of the tables and what the summary says. Computes nothing itself.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from neurondrift.attribution.changes import Change, open_change
from neurondrift.attribution.margin import Margin
from neurondrift.attribution.openings import Openings
from neurondrift.attribution.outputs import SHARED, functional_drift
from neurondrift.attribution.paths import (
    MOST_POINTS,
    TOLERANCE,
    Attribution,
    Incomplete,
    budget,
    path_attribution,
)
from neurondrift.attribution.provenance import provenance
from neurondrift.attribution.states import Vessel
from neurondrift.base.errors import ConfigError
from neurondrift.base.files import atomic_path, json_safe, make_folder, read_json, write_json
from neurondrift.base.processes import from_first, release_memory
from neurondrift.models.data import Example, data_fingerprint, encode

NEURONS, UNITS, SUMMARY = "neurons.parquet", "units.parquet", "attribution.json"
LARGEST = 10  # parameters that are no sites, in the summary


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
    """What is measured: sets of examples with responses (safety, utility) and of prompts (harmful, harmless)."""

    safety: Sequence[Example]
    utility: Sequence[Example]
    harmful: Sequence[Example]
    harmless: Sequence[Example]
    openings: Openings | str | None = None
    points: int = 3
    shared: int = SHARED
    tolerance: float | None = TOLERANCE
    batch_size: int = 8
    max_length: int = 512
    dtype: str = "auto"
    device: str = "auto"
    #: A system prompt before the prompts of the margin, and whether the harmful ones go through the chat template.
    system: str | None = None
    chat_template: bool = True
    most_points: int = MOST_POINTS
    incomplete: Incomplete = "raise"


class Written(NamedTuple):
    """The summary, and the files."""

    summary: dict[str, Any]
    files: tuple[Path, Path, Path]


def attribute(
    base: str | Path,
    tuned: Sequence[str | Path],
    asked: Asked,
    directory: str | Path,
    *,
    say: Callable[[str], None] = lambda text: None,
) -> Written:
    """Take all measures of the change from a base to other models, and write them.

    Parameters
    ----------
    base, tuned
        As in `open_change`: full models, adapters, or a folder with `checkpoint-N` folders. Of several, the last is W;
        with more than one the budget along them is taken too.
    asked
        What is measured on what.
    directory
        Where `neurons.parquet`, `units.parquet` and `attribution.json` go, the last of them last.
    say
        Told what is being done.

    Raises
    ------
    As `open_change`, `path_attribution`, `functional_drift` and `provenance`.
    """
    change, tokenizer = open_change(base, tuned, dtype=asked.dtype, device=asked.device)
    return measure(change, tokenizer, asked, directory, say=say)


def measure(
    change: Change,
    tokenizer: Any,
    asked: Asked,
    directory: str | Path,
    *,
    say: Callable[[str], None] = lambda text: None,
) -> Written:
    """`attribute` of a change that is open, with the tokenizer of its base; what it `asked` of dtype and device does
    not count."""
    folder, model = Path(directory), change.sites.model
    safety, utility = (encode(part, tokenizer, max_length=asked.max_length) for part in (asked.safety, asked.utility))
    functions = {
        "harmful": Margin(model, tokenizer, asked.harmful, asked.openings, asked.chat_template, asked.system),
        "harmless": Margin(model, tokenizer, asked.harmless, asked.openings, system=asked.system),
    }
    how: dict[str, Any] = {"batch_size": asked.batch_size}
    along = {name: getattr(asked, name) for name in ("batch_size", "tolerance", "most_points", "incomplete")}
    chosen = functions["harmful"].openings
    assert isinstance(chosen, Openings)
    say("margin along the way from W0 to W")
    taken = {"": path_attribution(change, functions, points=asked.points, **along)}
    if len(change.states) > 2:
        say(f"margin along {len(change.states) - 1} snapshots")
        taken["budget_"] = budget(change, functions, **along)
    release_memory()  # what follows plans with what is free
    say("functional drift")
    outputs = functional_drift(change, safety, utility, shared=asked.shared, **how)
    release_memory()
    say("provenance")
    origins = provenance(change, safety, utility, **how)
    columns: dict[str, dict[str, Mapping[str, torch.Tensor]]] = {"rows": {}, "units": {}}
    for kind, table in columns.items():
        for prefix, attributions in taken.items():
            for name, attribution in attributions.items():
                table[f"{prefix}margin_{name}"] = getattr(attribution, kind)
        for name in ("safety", "utility", "log_ratio", "shrunk", "floor"):
            table[f"drift_{name}"] = {one: getattr(m, name) for one, m in getattr(outputs, kind).items()}
        for name in ("safety", "utility", "difference", "directional"):
            table[f"provenance_{name}"] = {one: getattr(m, name) for one, m in getattr(origins, kind).items()}
    files = folder / NEURONS, folder / UNITS, folder / SUMMARY
    summary = {
        "format": 1,
        "base": change.references[0],
        "tuned": [
            {"reference": reference, "step": step if step >= 0 else None}
            for reference, step in zip(change.references[1:], change.steps[1:], strict=True)
        ],
        "base_fingerprint": change.sites.fingerprint,
        "asked": {
            "safety": {"examples": len(safety), "fingerprint": data_fingerprint(safety)},
            "utility": {"examples": len(utility), "fingerprint": data_fingerprint(utility)},
            "prompts": {name: function.count for name, function in functions.items()},
            "openings": dataclasses.asdict(chosen),
            **{name: getattr(asked, name) for name in ("points", "shared", "tolerance", "max_length")},
        },
        "margin": {
            f"{prefix}{name}": _margin_summary(attribution, change.vessel, asked.tolerance)
            for prefix, attributions in taken.items()
            for name, attribution in attributions.items()
        },
        "functional_drift": {kind: _drift_summary(getattr(outputs, kind)) for kind in ("rows", "units")},
        "provenance": {kind: _provenance_summary(getattr(origins, kind)) for kind in ("rows", "units")},
        "not_read": list(change.unknown),
        "unmoved_sites": len(change.sites) - len(change.moved()),
    }

    def write() -> None:
        make_folder(folder)
        _write(files[0], columns["rows"], "site", "row")
        _write(files[1], columns["units"], "mlp", "unit")
        write_json(files[2], json_safe(summary))

    from_first(write)
    return Written(summary, files)


def _write(file: Path, columns: Mapping[str, Mapping[str, torch.Tensor]], name: str, member: str) -> None:
    """A row for each member of each site (MLP), in the model's order; what is not measured there is NaN."""
    sizes = {one: len(values) for found in columns.values() for one, values in found.items()}
    order = list(sizes)
    counts = [sizes[one] for one in order]
    index = np.concatenate([np.arange(count, dtype=np.int32) for count in counts] or [np.empty(0, np.int32)])
    codes = pa.array(np.repeat(np.arange(len(order), dtype=np.int32), counts))
    table: dict[str, Any] = {name: pa.DictionaryArray.from_arrays(codes, pa.array(order, pa.string())), member: index}
    for column, found in columns.items():
        parts = [found[one].numpy() if one in found else np.full(sizes[one], np.nan, dtype=np.float32) for one in order]
        table[column] = np.concatenate(parts or [np.empty(0)]).astype(np.float32)
    with atomic_path(file) as partial:
        pq.write_table(pa.table(table), partial, compression="zstd", write_page_checksum=True)


def _margin_summary(found: Attribution, vessel: Vessel, tolerance: float | None) -> dict[str, Any]:
    by_kind: dict[str, float] = {}
    for name, value in found.elsewhere.items():
        kind = vessel.kind_elsewhere(name)
        by_kind[kind] = by_kind.get(kind, 0.0) + value
    elsewhere = sorted(found.elsewhere.items(), key=lambda item: -abs(item[1]))
    return {
        "values": list(found.values),
        "change": found.change,
        "attributed": found.attributed,
        "missed": found.missed,
        "adds_up": None if tolerance is None else found.adds_up(tolerance),
        "points": list(found.points),
        "steps": list(found.steps),
        "sites": math.fsum(float(rows.sum()) for rows in found.rows.values()),
        "elsewhere": math.fsum(found.elsewhere.values()),
        "elsewhere_by_kind": by_kind,
        "largest_elsewhere": dict(elsewhere[:LARGEST]),
        "by_module_type": _by_kind({name: float(rows.sum()) for name, rows in found.rows.items()}),
    }


def _by_kind(values: Mapping[str, float]) -> dict[str, float]:
    """Sums over the sites of a kind."""
    result: dict[str, float] = {}
    for name, value in values.items():
        parts = name.split(".")
        kind = parts[-2] if parts[-1].isdigit() else parts[-1]
        result[kind] = result.get(kind, 0.0) + value
    return result


def _drift_summary(found: Mapping[str, Any]) -> dict[str, Any]:
    ratios, floors = (
        torch.cat([getattr(measure, name) for measure in found.values()] or [torch.empty(0)]).double().numpy()
        for name in ("log_ratio", "floor")
    )
    reasons: dict[str, int] = {}
    for measure in found.values():
        for reason, count in measure.reasons.items():
            reasons[reason] = reasons.get(reason, 0) + count
    return {
        "members": len(ratios),
        "log_ratio": _quantiles(ratios),
        "floor": _quantiles(floors),
        "undefined": reasons,
    }


def _provenance_summary(found: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: _quantiles(
            torch.cat([getattr(measure, name) for measure in found.values()] or [torch.empty(0)]).double().numpy()
        )
        for name in ("difference", "directional")
    }


def _quantiles(values: Any) -> dict[str, Any]:
    """Quantiles of what is defined; None where nothing is."""
    defined = values[np.isfinite(values)]
    wanted = (0.05, 0.25, 0.5, 0.75, 0.95)
    found = np.quantile(defined, wanted) if len(defined) else [None] * len(wanted)
    return {"defined": len(defined), **{f"{share:g}": q for share, q in zip(wanted, found, strict=True)}}


def read_openings(reference: str | None) -> Openings | str | None:
    """A language, or a JSON file with lists `refusal` and `compliance`. Raises `ConfigError` for what is neither."""
    if reference is None or not (Path(reference).suffix or Path(reference).exists()):
        return reference
    try:
        found = read_json(Path(reference))
        return Openings(refusal=tuple(found["refusal"]), compliance=tuple(found["compliance"]))
    except (KeyError, TypeError, OSError) as error:
        raise ConfigError(
            "The file of openings cannot be read",
            received=reference,
            allowed='JSON with "refusal" and "compliance", two lists of texts',
        ) from error
