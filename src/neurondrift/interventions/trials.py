"""Interventions on a group and on matched random groups: which runs there are, and what each gives.

Owns the plan and the measurement of one run; the file of finished runs is `interventions.runs`.
Knows a model, prompts and groups; nothing of studies. The one statistic that it asks for is whether a null is settled.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
from torch import nn

from neurondrift.base.errors import ConfigError, GroupError
from neurondrift.base.files import sha256_of_value
from neurondrift.base.processes import in_shares, sharers
from neurondrift.base.roles import INTERVENTIONS, Intervention, Role
from neurondrift.groups.controls import Support, comparable_part, matched
from neurondrift.groups.doses import Importance, digest, dose_of
from neurondrift.groups.group import Group
from neurondrift.interventions.acting.contexts import Applied, PruneMode, prune, rewind, transplant
from neurondrift.interventions.acting.patching import patch, patch_back
from neurondrift.interventions.measures import Bench, Part, joined, lacking, margins_of, measure, primary_value
from neurondrift.interventions.runs import Rows, RunLog
from neurondrift.models.disk.initial import Weights
from neurondrift.models.sites import Sites
from neurondrift.statistics.null import is_settled

Cell = tuple[str, str, float]  # intervention, group, dose
Label = tuple[str, str, float, int | None]  # the same and the draw
StopEarly = Literal["freeze", "all", "none"]
Acted: TypeAlias = AbstractContextManager[tuple[nn.Module, Applied]]  # the model, and what was reached

FORMAT = 2  # raise it when a run's outcome is measured in another way: older runs are then made again


@dataclass(frozen=True, kw_only=True)
class Subject:
    """The model before and after fine-tuning; one PEFT model is both, with its adapter off and on.

    `train_frozen(group)` is a context that gives the model trained from `before` with the group held; None where the
    training cannot be repeated. `unaligned` gives each site's weight from before the alignment; None where that model
    is not known.
    """

    before: nn.Module
    after: nn.Module
    tokenizer: Any
    train_frozen: Callable[[Group], Acted] | None = None
    unaligned: Weights | None = None

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


class Trial(NamedTuple):
    """One run: an intervention on one group. `draw` is None for the group itself, else the number of the random group.

    `whole`: harmful prompts, ordinary prompts and held-out answers are measured; otherwise harmful prompts only.
    `group` is the part of it that has comparable neurons; `support` says what was left out (of the group itself only).
    """

    intervention: str
    name: str
    dose: float
    draw: int | None
    group: Group | None
    whole: bool
    support: Support | None = None

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
    apart: Mapping[str, Group] | None = None,
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
        Of `groups.matched`, whose exchangeable draws are taken: they may hold members of the part that is acted on.
        Members in sites without comparable neurons are in neither. At a dose, no control touches the rest of the group.
    importance
        Name -> importance of its members.
    apart
        Name -> others that no control of that group may touch, as they are unlike its members (`groups.unlike`).

    Raises
    ------
    ConfigError
        An unknown intervention; a number of draws below 1.
    GroupError
        A group, or a dose, that has comparable neurons in no site.
    """
    if unknown := [one for one in interventions if one not in INTERVENTIONS]:
        raise ConfigError("There is no such intervention", received=unknown[0], allowed=", ".join(INTERVENTIONS))
    if min(draws.whole, draws.dose, draws.freeze) < 1:
        raise ConfigError("A null needs at least one random group", received=str(draws), allowed="1 or more")
    trials = [Trial(reference, "", 1.0, None, None, True) for reference in REFERENCES]
    chosen: dict[tuple[str, float], tuple[Group, Support, list[Group]]] = {}
    for name, group in groups.items():
        for dose in sorted(set(doses), reverse=True):
            dosed = group if dose == 1 else dose_of(group, importance[name], dose)
            unlike = (apart[name],) if apart and name in apart else ()
            part, support = comparable_part(dosed, magnitudes, bins=bins, exclude=(group, *unlike))
            if not len(part):
                raise GroupError(
                    f"The group {name} has nothing to be compared with: in none of its sites are there as many other "
                    "neurons of the same range of |w|, balanced with its members",
                    received=f"{len(dosed)} members in {len(dosed.members)} sites",
                    fix=f"take a smaller group: a smaller fraction, or --doses without {dose:g}",
                )
            rest = group - part
            count = max(draws.whole, draws.freeze) if dose == 1 else draws.dose
            how: dict[str, Any] = {"seed": seed, "draws": count, "bins": bins, "exchangeable": True}
            controls = matched(part, magnitudes, exclude=(rest, *unlike), **how)
            chosen[name, dose] = part, support, controls
    for intervention in sorted(interventions, key=INTERVENTIONS.index):
        for (name, dose), (part, support, controls) in chosen.items():
            if intervention == "freeze" and dose != 1:
                continue
            count = draws.freeze if intervention == "freeze" else draws.whole if dose == 1 else draws.dose
            whole = dose == 1
            trials.append(Trial(intervention, name, dose, None, part, whole, support))
            trials += [Trial(intervention, name, dose, k, controls[k], whole) for k in range(count)]
    return trials


def planned_draws(trials: Sequence[Trial]) -> Counter[Cell]:
    """How many draws the plan has for each intervention, group and dose."""
    return Counter(trial.cell for trial in trials if trial.draw is not None)


class Facts(NamedTuple):
    """What is known of a cell before any run.

    `planned` draws; the group's `role` to a study; its `support`; `own`: the mean share of a draw's members that are
    the group's own, by which its effect is diluted.
    """

    planned: int
    role: Role | None
    support: Support
    own: float


def facts_of(trials: Sequence[Trial]) -> dict[Cell, Facts]:
    """The facts of every intervention, group and dose of a plan."""
    groups = {trial.cell: trial for trial in trials if trial.draw is None and trial.group is not None}
    shared: dict[Cell, list[float]] = {}
    known: dict[tuple[int, int], float] = {}  # the same draws serve several interventions
    for trial in trials:
        if trial.draw is None or trial.group is None:
            continue
        own = groups[trial.cell].group
        assert own is not None
        pair = id(own), id(trial.group)
        if pair not in known:
            known[pair] = len(own & trial.group) / len(own)
        shared.setdefault(trial.cell, []).append(known[pair])
    facts = {}
    for cell, trial in groups.items():
        assert trial.group is not None and trial.support is not None
        own_shares = shared[cell]
        facts[cell] = Facts(len(own_shares), trial.group.role, trial.support, float(np.mean(own_shares)))
    return facts


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
def _unaligned(subject: Subject, group: Group, mode: PruneMode) -> Iterator[tuple[nn.Module, Applied]]:
    if subject.unaligned is None:
        why = "Undoing the alignment of a group needs the model from before it, which is not known"
        raise _cannot("unalign", why, fix="name it: [model] base")
    with _without_change(subject) as model, rewind(subject.sites_before, group, initial=subject.unaligned) as applied:
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


@contextmanager
def _patched(subject: Subject, group: Group, mode: PruneMode) -> Iterator[tuple[nn.Module, Applied]]:
    with patch(subject.sites_after, group, donor=None if subject.is_adapted else subject.before) as applied:
        yield subject.after, applied


@contextmanager
def _patched_back(subject: Subject, group: Group, mode: PruneMode) -> Iterator[tuple[nn.Module, Applied]]:
    with patch_back(subject.sites_before, group, donor=None if subject.is_adapted else subject.after) as applied:
        yield subject.before, applied


def _frozen(subject: Subject, group: Group, mode: PruneMode) -> Acted:
    if subject.train_frozen is None:
        why = "Freezing trains again, and how this adapter was trained is not known"
        raise _cannot("freeze", why, fix="run it in the study's folder")
    return subject.train_frozen(group)


def _cannot(what: Intervention, why: str, *, fix: str) -> ConfigError:
    return ConfigError(why, received=what, allowed=", ".join(one for one in INTERVENTIONS if one != what), fix=fix)


#: The models that every effect lies between.
REFERENCES: dict[str, Callable[[Subject], Acted]] = {"before": _before, "after": _after}
ACTIONS: dict[str, Callable[[Subject, Group, PruneMode], Acted]] = {
    "prune": _pruned,
    "unalign": _unaligned,
    "rewind": _rewound,
    "transplant": _transplanted,
    "patch": _patched,
    "patch_back": _patched_back,
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

    Of a run that is there, what it was not measured by is measured now (the margin of runs of refusals). Two trials
    with the same members are one run. Where `stops(intervention)`, the draws after the one that settles a null of the
    primary outcome are left out, also those that `log` holds: what is found depends on the settings, not on what was
    run before. `log` keeps them, for settings that ask for them. `done` is told of each trial: its rows, None where it
    was left out, and whether it was made (or measured further) now.

    Processes that share work make a run each at a time; where a null then turns out to be settled, `log` keeps some
    runs more.
    """
    keys = [key_of(trial, inputs, mode) for trial in trials]
    log.keep_only(keys)
    margins = margins_of(subject.after, subject.tokenizer, bench)
    results: dict[Label, Rows] = {}
    planned = planned_draws(trials)
    outcomes: dict[Cell, list[float]] = {}  # of the group, then of its draws
    fresh: set[str] = set()

    def lacks(at: int) -> list[Part]:
        trial = trials[at]
        return lacking(log.runs.get(keys[at], []), bench, whole=trial.whole, is_draw=trial.draw is not None)

    def make(places: Sequence[int]) -> list[Rows]:
        return [made(at) for at in places]

    def made(at: int) -> Rows:
        trial, stood = trials[at], log.runs.get(keys[at], [])
        began = time.perf_counter()
        with acted(subject, trial, mode) as (model, applied):
            rows = measure(model, subject.tokenizer, bench, whole=trial.whole, margins=margins, parts=lacks(at))
        seconds = time.perf_counter() - began + (stood[0]["seconds"] if stood else 0.0)
        about = {
            "key": keys[at],
            "intervention": trial.intervention,
            "group": trial.name,
            "granularity": trial.group.granularity if trial.group is not None else "",
            "dose": trial.dose,
            "draw": trial.draw,
            **applied._asdict(),
            "seconds": round(seconds, 2),
        }
        return [row | about for row in joined(stood, rows)]

    for at, (trial, key) in enumerate(zip(trials, keys, strict=True)):
        known = outcomes.setdefault(trial.cell, [])
        if stops(trial.intervention) and known and is_settled(known[0], known[1:], planned=planned[trial.cell]):
            done(trial, None, False)
            continue
        if lacks(at):
            together = _next(at, trials, keys, lacks)
            for place, rows in zip(together, in_shares(together, make), strict=True):
                fresh.add(keys[place])
                log.add(keys[place], rows)
        results[*trial.cell, trial.draw] = log.runs[key]
        known.append(primary_value(log.runs[key], bench))
        done(trial, log.runs[key], key in fresh)
        fresh.discard(key)
    return results


def _next(at: int, trials: Sequence[Trial], keys: Sequence[str], lacks: Callable[[int], list[Part]]) -> list[int]:
    """The places of the next runs of one intervention that are to be made, one for each process that shares work."""
    found: dict[str, int] = {}
    for place in range(at, len(trials)):
        if len(found) == sharers().total or trials[place].intervention != trials[at].intervention:
            break
        if keys[place] not in found and lacks(place):
            found[keys[place]] = place
    return list(found.values())
