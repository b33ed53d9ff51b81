"""The sweep file: a base configuration, what varies, where it runs; and the points that follow from it.

Imports no torch, so that mistakes are told at once.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import Field

from neurondrift.base.errors import ConfigError
from neurondrift.base.files import read_toml, without_none
from neurondrift.study.settings import Count, Positive, Section, Study, load_preset, merge, nested, validated
from neurondrift.study.sweep.naming import point_names

#: Tables and keys of a sweep file.
KEYS = ("name", "preset", "config", "settings", "grid", "points", "engine")


class EngineSection(Section):
    """Where the points run."""

    kind: Literal["local", "ray"] = "local"
    address: str | None = Field(None, description="of a Ray cluster, host:port or auto; default: this machine")
    workers: Count | None = Field(None, description="points at once; default: as many as there is room for (ray)")
    num_cpus: Positive | None = Field(
        None, description="CPUs of each point, and its threads; default: all of this machine (local), 1 (ray)"
    )
    num_gpus: Annotated[float, Field(ge=0)] | None = Field(
        None, description="GPUs that each point asks Ray for; default: 1 where there are any and the model may use one"
    )
    tries: Count = Field(3, description="how often a point is begun whose process dies")


class SweepSection(Section):
    """A sweep file as it is written."""

    name: Annotated[str, Field(min_length=1, max_length=80, pattern=r"^[\w.-]+$")]
    preset: str | None = None
    config: Path | None = Field(None, description="a study's configuration, below the settings; beside the sweep file")
    settings: dict[str, Any] = Field({}, description="settings of every point")
    grid: dict[str, Any] = Field({}, description="setting = [values]: every combination is a point")
    points: list[dict[str, Any]] = Field([], description="tables of overrides, each a point, with an optional name")
    engine: EngineSection = EngineSection()


@dataclass(frozen=True, kw_only=True)
class Point:
    """One study of a sweep: its place, its name (of its folder and of the study), what it overrides, and the study."""

    index: int
    name: str
    overrides: Mapping[str, Any]
    study: Study


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """A sweep whose points are valid studies, no two of them the same."""

    name: str
    section: SweepSection
    points: tuple[Point, ...]

    @property
    def engine(self) -> EngineSection:
        return self.section.engine

    def point(self, wanted: str) -> Point:
        """By index or name; `ConfigError` where there is none."""
        for point in self.points:
            if wanted in (str(point.index), point.name):
                return point
        shown = ", ".join(f"{point.index} ({point.name})" for point in self.points[:6])
        raise ConfigError(
            "The sweep has no such point", received=wanted, allowed=shown + ", …" * (len(self.points) > 6)
        )

    def to_toml(self) -> str:
        """The sweep with its whole base configuration in `settings`: what its folder keeps, and goes on from."""
        return tomli_w.dumps(without_none(self.section.model_dump(mode="json")))


def read_sweep(file: Path) -> Sweep:
    """The sweep that a file describes.

    Raises
    ------
    ConfigError
        No file or no TOML; no sweep; an unknown setting, or a value that does not fit, with the point that has it; two
        points that are the same study.
    """
    content = read_toml(file)
    if not content.keys() & {"grid", "points"}:
        is_study = content.keys() & set(Study.model_fields) - {"name"}
        raise ConfigError(
            f"{file} describes no sweep: it has neither [grid] nor [[points]]",
            received=", ".join(content) or "an empty file",
            allowed=", ".join(KEYS),
            fix=(
                "put the study's settings under [settings], and what varies under [grid]; one study is neurondrift run"
                if is_study
                else "name what varies, such as finetune.lora_r = [4, 8], under [grid]"
            ),
        )
    section = validated(SweepSection, {"name": Path(file).stem} | content)
    listed = list(_listed(section.points))
    given = _given(section.points)
    named = [({} if name is None else {"name": name}) | own for name, own in zip(given, listed, strict=True)]
    section = section.model_copy(
        update={
            "settings": _base(section, Path(file)),
            "preset": None,
            "config": None,
            "grid": _in_order(dict(_axes(section.grid))),
            "points": named,
        }
    )
    combined = list(_grid(section.grid))
    overrides = [*combined, *listed]
    if not overrides:
        raise ConfigError(
            f"{file} names no points",
            allowed="finetune.lora_r = [4, 8] under [grid], or tables of overrides: [[points]]",
        )
    names = point_names(overrides, given=[*[None] * len(combined), *given])
    points = tuple(
        Point(index=index, name=name, overrides=own, study=_study(section, own, name))
        for index, (name, own) in enumerate(zip(names, overrides, strict=True))
    )
    _check_unlike(points)
    _check_one_rule(points)
    return Sweep(name=section.name, section=section, points=points)


def _base(section: SweepSection, file: Path) -> dict[str, Any]:
    """What all points have in common, as plain nested tables: preset, configuration file and settings, each over the
    one before."""
    over: dict[str, Any] = {}
    if section.config is not None:
        over = read_toml(file.parent / section.config.expanduser())
        over.pop("record", None)
    over = merge(over, section.settings)
    over.pop("name", None)
    named = over.pop("preset", None)
    if named is not None and not isinstance(named, str):
        raise ConfigError("The key preset names a built-in preset", received=named)
    preset = section.preset or named
    base = {} if "model" in over and preset is None else load_preset(preset or "demo")
    return {key: value for key, value in merge(base, over).items() if key != "name"}


def _grid(grid: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Every combination of an axis' values, the last axis fastest; nothing where there is no axis."""
    axes = list(_axes(grid))
    if not axes:
        return
    for values in itertools.product(*(values for _, values in axes)):
        yield {path: _value(path, value) for (path, _), value in zip(axes, values, strict=True)}


def _axes(grid: Mapping[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[str, Sequence[Any]]]:
    for key, value in grid.items():
        path = (*above, *key.split("."))
        if isinstance(value, Mapping):
            yield from _axes(value, path)
        elif isinstance(value, list) and value:
            yield ".".join(path), value
        else:
            raise ConfigError(
                f"The grid's {'.'.join(path)} is no list of values",
                received=value,
                allowed=f"{'.'.join(path)} = [value, value]; what is the same for all stands under [settings]",
            )


def _in_order(by_path: Mapping[str, Any]) -> dict[str, Any]:
    """By dotted names, whose order TOML keeps: as given, then the tables and lists of tables by their names.

    TOML has those last, and names and numbers of points follow the order: so a sweep has the same ones in its folder.
    """

    tables = {
        path: value
        for path, value in by_path.items()
        if isinstance(value, Mapping)
        or (isinstance(value, list) and value and all(isinstance(one, Mapping) for one in value))
    }
    return {path: value for path, value in by_path.items() if path not in tables} | dict(sorted(tables.items()))


def _listed(points: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    for own in points:
        yield _in_order(dict(_leaves({key: value for key, value in own.items() if key != "name"})))


def _given(points: Sequence[Mapping[str, Any]]) -> list[str | None]:
    """The names that points have been given."""
    return [None if own.get("name") is None else str(own["name"]) for own in points]


def _leaves(table: Mapping[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Settings by their dotted names; a table with a `source` is one value, and what is two tables down too."""
    for key, value in table.items():
        path = (*above, *key.split("."))
        if isinstance(value, Mapping) and len(path) == 1:
            yield from _leaves(value, path)
        else:
            yield ".".join(path), _value(".".join(path), value)


def _value(path: str, value: Any) -> Any:
    """One seed stands for a study of that seed."""
    return [value] if path == "seeds" and isinstance(value, int) else value


def _study(section: SweepSection, overrides: Mapping[str, Any], name: str) -> Study:
    try:
        return validated(Study, merge(section.settings, nested(overrides)) | {"name": name})
    except ConfigError as error:
        raise ConfigError(f"The point {name} is no study: {str(error).removesuffix('.')}") from error


def _check_one_rule(points: Sequence[Point]) -> None:
    """Refuse points that judge by other rules than the first: what they say together would have none."""
    first = points[0].study.analyze
    for point in points:
        for name in ("primary_metric", "band"):
            own, wanted = getattr(point.study.analyze, name), getattr(first, name)
            if own != wanted:
                raise ConfigError(
                    f"All points must judge by one rule: analyze.{name} differs",
                    received=f"{own} in {point.name}, {wanted} in {points[0].name}",
                    fix=f"set analyze.{name} once, under [settings]",
                )


def _check_unlike(points: Sequence[Point]) -> None:
    """Refuse two points of one name, or that are the same study under two names."""
    names: dict[str, Point] = {}
    known: dict[str, Point] = {}
    for point in points:
        content = point.study.model_dump_json(exclude={"name"})
        if (other := known.setdefault(content, point)) is not point:
            raise ConfigError(
                f"The points {other.index} and {point.index} are the same study",
                received=f"{other.name}, {point.name}",
                fix="take one out, or let it differ in a setting that changes the study",
            )
        if (other := names.setdefault(point.name, point)) is not point:
            raise ConfigError(
                f"The points {other.index} and {point.index} have the same name", received=point.name, fix="rename one"
            )
