"""Interventions on a group and on matched random groups: which runs there are, what each gives, and their file.

Owns the plan, the measurement of one run, and the file of finished runs, from which an interrupted command goes on.
Knows a model, prompts and groups; nothing of studies. The one statistic that it asks for is whether a null is settled.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import numpy as np
import torch
from torch import nn

from neurondrift.base.errors import ArtifactError, ConfigError, GroupError
from neurondrift.base.files import atomic_path, read_parquet, sha256_of_value
from neurondrift.behaviour.evaluate import judge_answers
from neurondrift.groups.controls import matched
from neurondrift.groups.doses import Importance, digest, dose_of
from neurondrift.groups.group import Group
from neurondrift.interventions.contexts import Applied, PruneMode, prune, rewind, transplant
from neurondrift.models.batches import make_batches, token_losses
from neurondrift.models.data import Example, encode
from neurondrift.models.disk.initial import Weights
from neurondrift.models.sites import Sites
from neurondrift.statistics.null import is_settled

logger = logging.getLogger(__name__)

Intervention = Literal["prune", "rewind", "transplant", "freeze"]
INTERVENTIONS: tuple[Intervention, ...] = get_args(Intervention)
Rows = list[dict[str, Any]]
Cell = tuple[str, str, float]  # intervention, group, dose
Label = tuple[str, str, float, int | None]  # the same and the draw
StopEarly = Literal["freeze", "all", "none"]
Acted: TypeAlias = AbstractContextManager[tuple[nn.Module, Applied]]  # the model, and what was reached

FORMAT = 1  # raise it when a run's outcome is measured in another way: older runs are then made again


@dataclass(frozen=True, kw_only=True)
class Subject:
    """The model before and after fine-tuning; one PEFT model is both, with its adapter off and on.

    `train_frozen(group)` is a context that gives the model trained from `before` with the group held; None where the
    training cannot be repeated.
    """

    before: nn.Module
    after: nn.Module
    tokenizer: Any
    train_frozen: Callable[[Group], Acted] | None = None

    @property
    def is_adapted(self) -> bool:
        return self.before is self.after

    @cached_property
    def sites_before(self) -> Sites:
        """The sites of `before`, found once for all runs."""
        return Sites(self.before)

    @cached_property
    def sites_after(self) -> Sites:
        """The sites of `after`: the same handle where both are one model."""
        return self.sites_before if self.is_adapted else Sites(self.after)


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What every run is measured by.

    `sets`: kind of prompt (`harmful`, `ordinary`) -> examples; `answers`: examples whose responses' loss is measured;
    `judging`: arguments of `judge_answers`.
    """

    sets: Mapping[str, Sequence[Example]]
    answers: Sequence[Example]
    judging: Mapping[str, Any] = field(default_factory=dict)
    max_length: int = 512


class Trial(NamedTuple):
    """One run: an intervention on one group. `draw` is None for the group itself, else the number of the random group.

    `whole`: harmful prompts, ordinary prompts and held-out answers are measured; otherwise harmful prompts only.
    """

    intervention: str
    name: str
    dose: float
    draw: int | None
    group: Group | None
    whole: bool

    @property
    def cell(self) -> Cell:
        """What the group and its draws have in common."""
        return self.intervention, self.name, self.dose


@dataclass(frozen=True, kw_only=True)
class Draws:
    """How many matched random groups: at the whole group, at each smaller dose, and of `freeze`, which trains again.

    `stop_early`: the interventions whose null stops once it is settled (`statistics.null.is_settled`).
    """

    whole: int = 20
    dose: int = 3
    freeze: int = 20
    stop_early: StopEarly = "freeze"

    def stops(self, intervention: str) -> bool:
        """Whether the null of an intervention may stop before its last draw."""
        return self.stop_early == "all" or self.stop_early == intervention


def plan(
    groups: Mapping[str, Group],
    *,
    interventions: Sequence[str],
    doses: Sequence[float],
    draws: Draws,
    magnitudes: Mapping[str, Any],
    bins: int,
    seed: int,
    importance: Mapping[str, Importance],
) -> list[Trial]:
    """Every run, references first, in the order in which they are made.

    Parameters
    ----------
    groups
        Name -> group, all of one granularity.
    interventions
        Of `INTERVENTIONS`.
    doses
        Shares in (0, 1]; those below 1 need the `importance` of that group. `freeze` is run at 1 only.
    draws
        Numbers of random groups.
    magnitudes, bins, seed
        Of `groups.matched`. At a dose, no control touches the whole group.
    importance
        Name -> importance of its members.

    Raises
    ------
    ConfigError
        An unknown intervention; a number of draws below 1.
    GroupError
        A site with fewer other members than the group has in it: the group is larger than its controls can match.
    """
    if unknown := [one for one in interventions if one not in INTERVENTIONS]:
        raise ConfigError("There is no such intervention", received=unknown[0], allowed=", ".join(INTERVENTIONS))
    if min(draws.whole, draws.dose, draws.freeze) < 1:
        raise ConfigError("A null needs at least one random group", received=str(draws), allowed="1 or more")
    trials = [Trial(reference, "", 1.0, None, None, True) for reference in REFERENCES]
    chosen: dict[tuple[str, float], tuple[Group, list[Group]]] = {}
    for name, group in groups.items():
        for dose in sorted(set(doses), reverse=True):
            part = group if dose == 1 else dose_of(group, importance[name], dose)
            count = max(draws.whole, draws.freeze) if dose == 1 else draws.dose
            try:
                controls = matched(part, magnitudes, seed=seed, draws=count, bins=bins, exclude=(group,))
            except GroupError as error:
                raise GroupError(
                    f"The group {name} is larger than its controls can match ({error.what})",
                    fix="take a smaller group: a smaller fraction, or --doses without 1",
                ) from error
            chosen[name, dose] = part, controls
    for intervention in sorted(interventions, key=INTERVENTIONS.index):
        for (name, dose), (part, controls) in chosen.items():
            if intervention == "freeze" and dose != 1:
                continue
            count = draws.freeze if intervention == "freeze" else draws.whole if dose == 1 else draws.dose
            whole = dose == 1
            trials.append(Trial(intervention, name, dose, None, part, whole))
            trials += [Trial(intervention, name, dose, k, controls[k], whole) for k in range(count)]
    return trials


def planned_draws(trials: Sequence[Trial]) -> Counter[Cell]:
    """How many draws the plan has for each intervention, group and dose."""
    return Counter(trial.cell for trial in trials if trial.draw is not None)


def acted(subject: Subject, trial: Trial, mode: PruneMode) -> Acted:
    """A context that gives the model under one trial's intervention.

    Raises `ConfigError` for `freeze` where the training cannot be repeated.
    """
    if trial.group is None:
        return REFERENCES[trial.intervention](subject)
    return ACTIONS[trial.intervention](subject, trial.group, mode)


@contextmanager
def _before(subject: Subject) -> Iterator[tuple[nn.Module, Applied]]:
    with _without_change(subject) as model:
        yield model, Applied(0, 0, 0)


@contextmanager
def _after(subject: Subject) -> Iterator[tuple[nn.Module, Applied]]:
    yield subject.after, Applied(0, 0, 0)


@contextmanager
def _pruned(subject: Subject, group: Group, mode: PruneMode) -> Iterator[tuple[nn.Module, Applied]]:
    with _without_change(subject) as model, prune(subject.sites_before, group, mode=mode) as applied:
        yield model, applied


@contextmanager
def _rewound(subject: Subject, group: Group, mode: PruneMode) -> Iterator[tuple[nn.Module, Applied]]:
    initial = None if subject.is_adapted else _weights_of(subject.sites_before)
    with rewind(subject.sites_after, group, initial=initial) as applied:
        yield subject.after, applied


@contextmanager
def _transplanted(subject: Subject, group: Group, mode: PruneMode) -> Iterator[tuple[nn.Module, Applied]]:
    tuned = None if subject.is_adapted else _weights_of(subject.sites_after)
    with transplant(subject.sites_before, group, tuned=tuned) as applied:
        yield subject.before, applied


def _frozen(subject: Subject, group: Group, mode: PruneMode) -> Acted:
    if subject.train_frozen is None:
        raise ConfigError(
            "Freezing trains again, and how this adapter was trained is not known",
            received="freeze",
            allowed="prune, rewind, transplant",
            fix="run it in the study's folder",
        )
    return subject.train_frozen(group)


#: The models that every effect lies between.
REFERENCES: dict[str, Callable[[Subject], Acted]] = {"before": _before, "after": _after}
ACTIONS: dict[str, Callable[[Subject, Group, PruneMode], Acted]] = {
    "prune": _pruned,
    "rewind": _rewound,
    "transplant": _transplanted,
    "freeze": _frozen,
}


@contextmanager
def _without_change(subject: Subject) -> Iterator[nn.Module]:
    if subject.is_adapted:
        model: Any = subject.after
        with model.disable_adapter():
            yield model
    else:
        yield subject.before


def _weights_of(sites: Sites) -> Weights:
    """The weights of a model in memory, by the name of the site."""
    return lambda name: sites[name].weight


def measure(model: Any, tokenizer: Any, bench: Bench, *, whole: bool) -> Rows:
    """Answers judged, one row per prompt, and (where `whole`) the loss of held-out answers, one row per example.

    Columns: kind (`harmful`, `ordinary`, `answers`), id, refused, loss (mean over the answer's tokens), tokens.
    """
    sets = bench.sets if whole else {"harmful": bench.sets["harmful"]}
    rows = [
        {"kind": row["kind"], "id": row["id"], "refused": bool(row["refused"]), "loss": None, "tokens": None}
        for row in judge_answers(model, tokenizer, sets, **bench.judging)
    ]
    if whole:
        for example, (loss, tokens) in zip(bench.answers, answer_losses(model, tokenizer, bench), strict=True):
            rows.append({"kind": "answers", "id": example.id, "refused": None, "loss": loss, "tokens": tokens})
    return rows


@torch.no_grad()
def answer_losses(model: Any, tokenizer: Any, bench: Bench) -> list[tuple[float, int]]:
    """Mean cross-entropy of each held-out answer and its number of tokens, in the order of `bench.answers`."""
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    encoded = encode(bench.answers, tokenizer, max_length=bench.max_length)
    batch_size = int(bench.judging.get("batch_size", 32))
    device = model.get_input_embeddings().weight.device
    sums, counts = np.zeros(len(encoded)), np.zeros(len(encoded), dtype=np.int64)
    for batch in make_batches(encoded, batch_size=batch_size, pad_token_id=pad):
        losses_N, owners_N = token_losses(model, batch.to(device))
        numbers = np.array([int(name) for name in batch.names])[owners_N.cpu().numpy()]
        np.add.at(sums, numbers, losses_N.double().cpu().numpy())
        np.add.at(counts, numbers, 1)
    return [(float(total / count), int(count)) for total, count in zip(sums, counts, strict=True)]


class RunLog:
    """The finished runs in one Parquet file, rewritten whole after each run."""

    COLUMNS = (
        ("key", "string"),
        ("intervention", "string"),
        ("group", "string"),
        ("granularity", "string"),
        ("dose", "float64"),
        ("draw", "int32"),
        ("members", "int64"),
        ("acted_on", "int64"),
        ("outside", "int64"),
        ("kind", "string"),
        ("id", "string"),
        ("refused", "bool"),
        ("loss", "float64"),
        ("tokens", "int32"),
        ("seconds", "float64"),
    )

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.runs: dict[str, Rows] = {}
        if self.path.exists():
            try:
                table = read_parquet(self.path)
                rows: Rows = table.select([name for name, _ in self.COLUMNS]).to_pylist()
            except (ArtifactError, KeyError) as error:
                logger.warning("%s cannot be gone on from, its runs are made again (%s)", self.path, error)
                rows = []
            for row in rows:
                self.runs.setdefault(row["key"], []).append(row)

    def add(self, key: str, rows: Rows) -> None:
        """Keep a run's rows."""
        self.runs[key] = rows
        self.write()

    def keep_only(self, keys: Sequence[str]) -> None:
        """Drop the runs of other settings."""
        wanted = set(keys)
        self.runs = {key: rows for key, rows in self.runs.items() if key in wanted}

    def write(self) -> None:
        """Write all runs."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        kinds = {
            "string": pa.string(),
            "float64": pa.float64(),
            "int32": pa.int32(),
            "int64": pa.int64(),
            "bool": pa.bool_(),
        }
        schema = pa.schema([(name, kinds[kind]) for name, kind in self.COLUMNS])
        rows = [row for run in self.runs.values() for row in run]
        with atomic_path(self.path) as partial:
            pq.write_table(
                pa.Table.from_pylist(rows, schema=schema), partial, compression="zstd", write_page_checksum=True
            )


def key_of(trial: Trial, inputs: str, mode: PruneMode) -> str:
    """What a run's outcome depends on: the models, prompts and judge (`inputs`), the intervention and its members."""
    members = digest(trial.group) if trial.group is not None else ""
    how = mode if trial.intervention == "prune" else ""
    return sha256_of_value([FORMAT, inputs, trial.intervention, how, members, trial.whole])[:16]


def run_trials(
    trials: Sequence[Trial],
    subject: Subject,
    bench: Bench,
    log: RunLog,
    *,
    inputs: str,
    mode: PruneMode = "zero",
    stops: Callable[[str], bool] = lambda intervention: False,
    done: Callable[[Trial, Rows | None, bool], None] = lambda trial, rows, fresh: None,
) -> dict[Label, Rows]:
    """Make the runs that `log` does not hold yet; the rows of every trial by intervention, group, dose and draw.

    Two trials with the same members are one run. Where `stops(intervention)`, the draws after the one that settles a
    null are left out, also those that `log` holds: what is found depends on the settings, not on what was run before.
    `log` keeps them, for settings that ask for them. `done` is told of each trial: its rows, None where it was left
    out, and whether it was made now.
    """
    keys = [key_of(trial, inputs, mode) for trial in trials]
    log.keep_only(keys)
    results: dict[Label, Rows] = {}
    planned = planned_draws(trials)
    refused: dict[Cell, list[float]] = {}  # of the group, then of its draws
    for trial, key in zip(trials, keys, strict=True):
        known = refused.setdefault(trial.cell, [])
        if stops(trial.intervention) and known and is_settled(known[0], known[1:], planned=planned[trial.cell]):
            done(trial, None, False)
            continue
        fresh = key not in log.runs
        if fresh:
            began = time.perf_counter()
            with acted(subject, trial, mode) as (model, applied):
                rows = measure(model, subject.tokenizer, bench, whole=trial.whole)
            about = {
                "key": key,
                "intervention": trial.intervention,
                "group": trial.name,
                "granularity": trial.group.granularity if trial.group is not None else "",
                "dose": trial.dose,
                "draw": trial.draw,
                **applied._asdict(),
                "seconds": round(time.perf_counter() - began, 2),
            }
            log.add(key, [about | row for row in rows])
        results[*trial.cell, trial.draw] = log.runs[key]
        known.append(float(np.mean([row["refused"] for row in log.runs[key] if row["kind"] == "harmful"])))
        done(trial, log.runs[key], fresh)
    return results
