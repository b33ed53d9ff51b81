"""How well scores find what was planted: from scores by place to one row of numbers for each of them.

Owns what a score may look like (a mapping, a file) and what it is compared with. Shapes: N = members of all places.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from neurondrift.base.errors import ArtifactError, GroupError
from neurondrift.base.files import read_parquet
from neurondrift.groups.group import Group
from neurondrift.importance.scores import ScoreFile
from neurondrift.models.parts import unit_scores
from neurondrift.models.sites import Sites
from neurondrift.statistics.descriptive import Mean
from neurondrift.statistics.known.ranking import found, percentiles
from neurondrift.study.plants.roles import GRANULARITY
from neurondrift.study.plants.settings import Unit

Values = dict[str, npt.NDArray[np.float64]]
UNDEFINED = "undefined for every member"
INDEX = "__index_level_"  # what pandas calls its row numbers in a file


@dataclass(frozen=True, eq=False)
class Answer:
    """Where everything is: for each unit of the model its place, and whether it was planted, is of the decoy, or moved
    as far as the planted (the decoy too). `strata`: what a rank is taken within; of heads the whole model."""

    unit: Unit
    places: dict[str, int]
    strata: npt.NDArray[np.int64]
    planted: npt.NDArray[np.bool_]
    decoy: npt.NDArray[np.bool_]
    as_far: npt.NDArray[np.bool_]

    @classmethod
    def of(cls, groups: Mapping[str, Group], unit: Unit) -> Answer:
        """From a plant's groups."""
        shapes = groups["planted"].shapes
        places = {name: size for name, (size, _) in shapes.items()}

        def mask(name: str) -> npt.NDArray[np.bool_]:
            group = groups.get(name)
            return np.concatenate([group.mask(p) if group else np.zeros(n, dtype=bool) for p, n in places.items()])

        codes = np.repeat(np.arange(len(places)), list(places.values()))
        return cls(
            unit=unit,
            places=places,
            strata=np.zeros_like(codes) if unit == "head" else codes,
            planted=mask("planted"),
            decoy=mask("decoy"),
            as_far=mask("decoy") | mask("as_far"),
        )

    @property
    def in_places(self) -> bool:
        """Whether every place has planted units, so that as many can be taken of each."""
        planted = np.bincount(self.strata, weights=self.planted, minlength=len(self.places))
        return self.unit != "head" and bool((planted > 0).all())

    def placed(self, index: npt.NDArray[np.int64]) -> dict[str, npt.NDArray[np.int64]]:
        """Places and rows of some of the N units, ascending."""
        starts = np.cumsum([0, *self.places.values()])
        return {
            place: index[(index >= start) & (index < end)] - start
            for place, start, end in zip(self.places, starts[:-1], starts[1:], strict=True)
        }

    def flat(self, values: Values) -> npt.NDArray[np.float64]:
        """Values of all places one after the other, `[N]`; NaN where a place has none."""
        return np.concatenate([values.get(place, np.full(size, np.nan)) for place, size in self.places.items()])


def values_of(scores: Mapping[str, Any], answer: Answer, sites: Sites, name: str) -> Values:
    """A score as one number for each unit: place -> float64 `[units]`.

    Parameters
    ----------
    scores
        Place -> one number for each unit (tensors or arrays); of rows and hidden units also site -> `[out, in]`, of
        which a row's, or a hidden unit's, is the sum.
    name
        What an error calls it.

    Raises
    ------
    GroupError
        A score of other places, or of another number of units.
    """
    arrays = {place: _array(values) for place, values in scores.items()}
    if answer.unit == "hidden_unit" and not any(place in answer.places for place in arrays):
        needed = {site for units in sites.units.values() for site in units.sites}
        if all(site in arrays and arrays[site].ndim == 2 for site in needed):
            arrays = {place: np.asarray(one) for place, one in unit_scores(arrays, sites.units).items()}
    known = {place: one for place, one in arrays.items() if place in answer.places}
    if not known:
        raise GroupError(
            f"The score {name} is of no place that this plant has",
            received=", ".join(list(arrays)[:3]) or "nothing",
            allowed=f"{GRANULARITY[answer.unit]}s of {', '.join(list(answer.places)[:3])} and so on",
        )
    result = {}
    for place, one in known.items():
        flat = one.sum(axis=1) if one.ndim == 2 and answer.unit == "row" else one
        if flat.shape != (answer.places[place],):
            raise GroupError(
                f"The score {name} is of another shape in {place}",
                received=tuple(one.shape),
                allowed=f"({answer.places[place]},)",
            )
        result[place] = flat.astype(np.float64)
    return result


def _array(values: Any) -> npt.NDArray[Any]:
    if hasattr(values, "detach"):
        values = values.detach().float().cpu().numpy()
    return np.asarray(values)


def read_scores(path: str | Path, sites: Sites) -> dict[str, Mapping[str, Any]]:
    """The scores in a file of the user's: name -> place -> values.

    Parameters
    ----------
    path
        safetensors that `neurondrift score` or `write_scores` wrote (one score), or Parquet with the columns `site` (or
        `mlp`) and `row` (or `unit`) and one column of numbers for each score, such as `neurondrift attribute` writes.
    sites
        The plant's model.

    Raises
    ------
    ArtifactError
        A file that is missing, no such file, or was made from another model.
    """
    path = Path(path)
    if path.suffix != ".parquet":
        file = ScoreFile(path)
        made_of = file.header.get("model")
        if made_of is not None and made_of != sites.fingerprint:
            raise ArtifactError(
                f"The scores in {path} are of another model than the plant's",
                received=made_of,
                allowed=sites.fingerprint,
                fix="score the folder model of the plant",
            )
        return {path.stem: file}
    return _of_table(read_parquet(path), path)


def _of_table(table: Any, path: Path) -> dict[str, Mapping[str, Any]]:
    place = next((name for name in ("site", "mlp") if name in table.column_names), None)
    member = next((name for name in ("row", "unit", "head") if name in table.column_names), None)
    others = [name for name in table.column_names if name not in (place, member) and not name.startswith(INDEX)]
    columns = [name for name in others if _is_number(table, name)]
    if place is None or member is None or not columns:
        raise ArtifactError(
            f"{path} holds no scores",
            received=", ".join(table.column_names),
            allowed="columns site (or mlp), row (or unit), and one column of numbers for each score",
        )
    places = np.array(table[place].to_pylist(), dtype=object)
    members = table[member].to_numpy()
    result: dict[str, Mapping[str, Any]] = {}
    for column in columns:
        values = table[column].to_numpy(zero_copy_only=False)
        result[f"{path.stem}: {column}" if len(columns) > 1 else column] = {
            str(one): _placed(values[places == one], members[places == one]) for one in dict.fromkeys(places)
        }
    return result


def _is_number(table: Any, name: str) -> bool:
    import pyarrow as pa

    kind = table.schema.field(name).type
    return bool(pa.types.is_floating(kind) or pa.types.is_integer(kind))


def _placed(values: npt.NDArray[Any], members: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    result = np.full(int(members.max()) + 1, np.nan)
    result[members] = values
    return result


def row_of(name: str, values: Values, answer: Answer) -> dict[str, Any]:
    """One score's row of the scoreboard; None where it is undefined, with a reason."""
    flat_N = answer.flat(values)
    if np.isnan(flat_N).all():
        empty = dict.fromkeys(("auroc", "as_far", "decoy"), Mean(math.nan, math.nan, math.nan))
        rest = dict.fromkeys(("pooled", "average_precision", "precision"), math.nan)
        numbers: dict[str, Any] = {**empty, **rest, "strata": 0, "undefined": len(flat_N), "reason": UNDEFINED}
    else:
        numbers = {
            **found(flat_N, answer.strata, answer.planted, answer.decoy, answer.as_far)._asdict(),
            "reason": "",
        }
    row: dict[str, Any] = {"score": name}
    for key, value in numbers.items():
        if isinstance(value, Mean):
            row |= {key: value.mean, f"{key}_low": value.low, f"{key}_high": value.high}
        else:
            row[key] = value
    return {**row, "base_rate": float(answer.planted.mean()), "members": len(flat_N)}


def top(values: Values, dose: float, answer: Answer, like: Group) -> Group:
    """The units that rank first, `dose` times as many in each place as were planted there; fewer where fewer are
    defined. Where some places have no planted unit (heads), so many of the whole model."""
    members: dict[str, npt.NDArray[np.int64]] = {}
    if answer.in_places:
        for place, count in counts_of(dose, answer, like).items():
            if place in values:
                members[place] = _first(values[place], count)
    else:
        flat_N = answer.flat(values)
        rank_N = np.where(np.isnan(flat_N), np.nan, percentiles(flat_N, answer.strata))
        members = answer.placed(_first(rank_N, max(1, round(dose * len(like)))))
    return like.with_members({place: rows for place, rows in members.items() if len(rows)}, {"rule": "top"})


def counts_of(dose: float, answer: Answer, like: Group) -> dict[str, int]:
    """How many units of each place a multiple of the planted is."""
    return {place: min(answer.places[place], max(1, round(dose * len(rows)))) for place, rows in like.members.items()}


def _first(score: npt.NDArray[np.float64], count: int) -> npt.NDArray[np.int64]:
    order = np.argsort(-np.where(np.isnan(score), -np.inf, score), kind="stable")[:count]
    return np.sort(order[~np.isnan(score[order])]).astype(np.int64)
