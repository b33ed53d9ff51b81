"""`neurondrift locate`: which scores find what was planted, and what rewinding or holding what they find does."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from neurondrift.attribution.measures.material import Material
from neurondrift.attribution.measures.registry import MEASURES, measures
from neurondrift.base.errors import ConfigError
from neurondrift.base.files import atomic_path, json_safe, make_folder, write_json, write_text
from neurondrift.base.processes import tune_allocator
from neurondrift.models.loading import load_model
from neurondrift.models.sites import Sites
from neurondrift.report.plants.figure import draw_localisation
from neurondrift.report.plants.section import localisation_section
from neurondrift.report.plants.tables import board_text
from neurondrift.report.text import render_section
from neurondrift.study.folder import record
from neurondrift.study.localisation.board import Answer, Values, read_scores, row_of, values_of
from neurondrift.study.localisation.curves import Curves
from neurondrift.study.localisation.holding import mean_inputs
from neurondrift.study.plants.outcomes import Looks, initial_weights
from neurondrift.study.plants.plant import Plant
from neurondrift.study.plants.planting import checked
from neurondrift.study.plants.sets import encoded_short

Say = Callable[[str], None]
Scores = Mapping[str, Any]
FORMAT = 1
BOARD, CURVES, SUMMARY, TABLE, SECTION, FIGURE = (
    "localisation.parquet",
    "curves.parquet",
    "localisation.json",
    "localisation.md",
    "localisation.txt",
    "localisation",
)


@dataclass(frozen=True, eq=False)
class Located:
    """How well scores find what was planted.

    Attributes
    ----------
    board
        A row for each score, the best first: `score`, `auroc` (mean within site, with `_low` and `_high` over sites),
        `as_far` and `decoy` (the same against the units that moved as far, and of the decoy against all others),
        `pooled`, `average_precision`, `precision` (among as many as were planted), `base_rate`, `undefined`, `reason`.
    curves
        What the model does with the units that rank first put back or held, beside random ones; empty unless asked for.
    about
        The plant, what each score needs, and on what it was measured.
    """

    board: Sequence[Mapping[str, Any]]
    curves: Sequence[Mapping[str, Any]] = ()
    about: Mapping[str, Any] = field(default_factory=dict)

    def __getitem__(self, score: str) -> Mapping[str, Any]:
        """One score's row."""
        return next(row for row in self.board if row["score"] == score)

    def __str__(self) -> str:
        return board_text(self.board)

    @property
    def summary(self) -> dict[str, Any]:
        """All of it, as it is written to `localisation.json`."""
        both = {"board": [dict(row) for row in self.board], "curves": [dict(row) for row in self.curves]}
        safe: dict[str, Any] = json_safe({"format": FORMAT, "about": dict(self.about), **both})
        return safe

    def write(self, folder: str | Path) -> list[Path]:
        """Write Parquet, Markdown, the section of a report, the figure, and `localisation.json` last."""
        folder = Path(folder)
        make_folder(folder)
        written = [folder / name for name in (BOARD, CURVES, TABLE, SECTION)]
        _write_rows(written[0], self.board)
        if self.curves:
            _write_rows(written[1], self.curves)
        else:
            written.remove(folder / CURVES)
            (folder / CURVES).unlink(missing_ok=True)
        write_text(folder / TABLE, str(self) + "\n")
        section = localisation_section(self.summary)
        write_text(folder / SECTION, "\n".join([section.title, "", *render_section(section)]) + "\n")
        written += draw_localisation(self.summary, folder, FIGURE)
        write_json(folder / SUMMARY, self.summary)
        return [*written, folder / SUMMARY]


def _write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    table = pa.table({key: pa.array([row.get(key) for row in rows]) for key in columns})
    with atomic_path(path) as partial:
        pq.write_table(table, partial, compression="zstd", write_page_checksum=True)


@dataclass(eq=False)
class Bench:
    """A plant with its model loaded, ready to have scores asked of it."""

    plant: Plant
    device: str = "auto"

    def __post_init__(self) -> None:
        checked(self.plant)
        tune_allocator()
        model, self.tokenizer = load_model(self.plant.model, dtype="float32", device=self.device)
        self.sites = Sites(model)
        self.answer = Answer.of(self.plant.groups, self.plant.settings.unit)

    def encoded(self, name: str) -> list[Any]:
        """A set of the plant's that was kept for scores, as it was trained on: the beginnings of the answers."""
        return encoded_short(self.plant.examples(name), self.tokenizer, self.plant.settings.answer_tokens)

    def values(self, name: str, scores: Scores) -> Values:
        """A score as one number for each unit."""
        return values_of(scores, self.answer, self.sites, name)

    @cached_property
    def curves(self) -> Curves:
        """What the causal curves of all scores have in common."""
        settings = self.plant.settings
        looks = Looks(
            self.sites, self.tokenizer, self.plant.examples("harmful"), self.plant.examples("harmless"), settings
        )
        return Curves(
            self.sites,
            self.answer,
            self.plant.groups,
            looks,
            initial=initial_weights(self.plant.base, self.sites),
            means=mean_inputs(self.sites, self.encoded("utility"), batch_size=settings.batch_size),
            seed=settings.seed,
            answers=settings.answers,
        )


def locate(
    plant: Plant | str | Path,
    scores: Mapping[str, Any],
    *,
    curves: bool = False,
    device: str = "auto",
    say: Say = lambda text: None,
) -> Located:
    """How well scores find the units of a plant into which refusals were trained.

    Parameters
    ----------
    plant
        A plant, or its folder.
    scores
        Name -> score, or one score alone. A score is a mapping of place (a site; an MLP; an attention) to one number
        for each unit, the higher the more it is taken for planted (`[out]`; `[out, in]` is summed); NaN is undefined
        and ranks last.
    curves
        Whether the causal curve of each is taken too: some minutes a score on a CPU.
    device
        `auto`, or a torch device.
    say
        Told what is being done.

    Returns
    -------
    `Located`; printed, it is a table.

    Raises
    ------
    ArtifactError
        No finished plant, or one of which a file has changed.
    CausalityError
        (a `ModelError`) A plant that is no known answer.
    GroupError
        A score of other places, or of another number of units.
    """
    bench = Bench(plant if isinstance(plant, Plant) else Plant.at(plant), device)
    if scores and not isinstance(next(iter(scores.values())), Mapping):
        scores = {"score": scores}
    return located(bench, ((name, one, {}) for name, one in scores.items()), curves=curves, say=say)


def located(
    bench: Bench, scores: Iterable[tuple[str, Scores, Mapping[str, Any]]], *, curves: bool, say: Say
) -> Located:
    """As `locate`, of scores as they come: name, values, and what there is to say of each."""
    rows: list[dict[str, Any]] = []
    points: list[dict[str, Any]] = []
    if curves:
        say("outcomes with random units put back and held")
        points += bench.curves.references()
    for name, score, about in scores:
        values = bench.values(name, score)
        rows.append({**row_of(name, values, bench.answer), **about})
        if curves:
            points += bench.curves.of(name, values)
        say(f"{name}: AUROC {rows[-1]['auroc']:.3f}, decoy {rows[-1]['decoy']:.2f}")
    if not rows:
        raise ConfigError("There is no score to look at", fix="name methods, or a file of scores")
    rows.sort(key=lambda row: -row["auroc"] if row["auroc"] == row["auroc"] else 2.0)
    plant = bench.plant
    about_plant = {
        "plant": plant.name,
        "model": plant.asked.model.reference,
        "settings": plant.settings.model_dump(mode="json"),
        "units": {name: len(group) for name, group in plant.groups.items()},
        "of": len(bench.answer.planted),
        "places": len(bench.answer.places),
        "fingerprint": bench.sites.fingerprint,
        "causality": plant.causality,
        "device": str(next(iter(bench.sites.values())).tensor.device),
        "record": record(),
    }
    return Located(rows, points, about_plant)


def of_registry(bench: Bench, names: Sequence[str] | None, say: Say) -> Iterator[tuple[str, Scores, Mapping[str, Any]]]:
    """The scores of the registry on what was kept for them: by default all that there are. Errors as of `measures`."""
    plant = bench.plant
    material = Material(
        model=bench.sites,
        tokenizer=bench.tokenizer,
        safety=bench.encoded("safety"),
        utility=bench.encoded("utility"),
        harmful=plant.examples("safety"),
        harmless=plant.examples("utility"),
        base=plant.base,
        batch_size=plant.settings.batch_size,
    )
    say("scores")
    for name, values in measures(material, names, plant.settings.unit):
        known = MEASURES[name]
        reasons = "; ".join(f"{reason}: {count}" for reason, count in values.reasons.items())
        yield (
            name,
            values,
            {"question": known.question, "needs": known.needs, "base": known.base, "undefined_as": reasons},
        )


def locate_all(
    plant: Plant,
    *,
    methods: Sequence[str] | None = None,
    files: Sequence[Path] = (),
    curves: bool = True,
    device: str = "auto",
    say: Say = lambda text: None,
) -> Located:
    """Every score of the registry (or those that are named), and every score in files of the user's, on a plant."""
    bench = Bench(plant, device)
    own = read_all(files, bench)  # what is wrong with a file is told before anything is computed
    for name, score, _ in own:
        bench.values(name, score)
    scores = itertools.chain(own, of_registry(bench, methods, say) if methods is None or methods else ())
    return located(bench, scores, curves=curves, say=say)


def read_all(files: Sequence[Path], bench: Bench) -> list[tuple[str, Scores, dict[str, Any]]]:
    """The scores in the user's files."""
    found = [
        (name, one, {"question": "", "needs": "file", "base": False, "undefined_as": ""})
        for path in files
        for name, one in read_scores(path, bench.sites).items()
    ]
    names = [name for name, _, _ in found]
    names += list(MEASURES)
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError("Two scores have one name", received=", ".join(twice), fix="rename a file or a column")
    return found
