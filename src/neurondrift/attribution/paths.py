"""What the change of a number comes from: its gradient along the way of the weights, times how far each of them went.

Owns the way along the states of a change, the points at which gradients are taken, and the sums over rows and hidden
units. Sources: integrated gradients (Sundararajan et al., arXiv 1703.01365), of weights instead of inputs; loss change
allocation along a training (Lan et al., arXiv 1909.01440). Shapes: O = out, I = in, R = rank, T = tokens.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import nn

from neurondrift.attribution.changes import Change, change_along, change_from
from neurondrift.attribution.margin import Function, values_of
from neurondrift.attribution.states import Delta, State, Vessel
from neurondrift.base.errors import ConfigError, ModelError
from neurondrift.base.processes import add_up, from_all, sharers
from neurondrift.importance.capture import run
from neurondrift.importance.methods import Tokens
from neurondrift.importance.scores import check_loaded
from neurondrift.models.adapters import LowRank
from neurondrift.models.disk.initial import Weights
from neurondrift.models.parts import Compound, Unit, compounds
from neurondrift.models.sites import Site, Sites

Incomplete = Literal["raise", "keep"]
TOLERANCE = 0.02
MOST_POINTS = 27
REFINEMENT = 3  # (j - 1/2)/m are among the midpoints of 3 m: what has been computed stays of use
ROUNDING = 1e-5  # of the number itself, below which a difference of two of them is not known


@dataclass(frozen=True, kw_only=True, eq=False)
class Attribution:
    """The change of one number, by what it comes from.

    Attributes
    ----------
    rows
        Site -> float32 `[out]`: what each neuron's change contributed, in units of the number (nats for a margin).
    units
        MLP -> float32 `[units]`: the same of each hidden unit, its rows of gate and up and its column of down. Empty
        where the model's MLPs are not known. Rows of the down projection count in `rows`, its columns in `units`: two
        ways of cutting up one sum.
    heads
        Attention -> float32 `[heads]`: the same of each head, its query rows (and its own key and value rows) and its
        columns of the output projection.
    elsewhere
        Parameter that is no site -> what its change contributed.
    values
        The number at each state, W₀ first.
    steps
        What all changes between each two states contributed; they sum to `attributed`.
    points
        At how many points between each two states the gradient was taken.
    """

    rows: Mapping[str, torch.Tensor]
    units: Mapping[str, torch.Tensor]
    elsewhere: Mapping[str, float]
    values: tuple[float, ...]
    steps: tuple[float, ...]
    points: tuple[int, ...]
    heads: Mapping[str, torch.Tensor] = field(default_factory=dict)

    @property
    def change(self) -> float:
        """The number at W minus that at W₀."""
        return self.values[-1] - self.values[0]

    @property
    def attributed(self) -> float:
        """The sum over all neurons and all that is no site: `change`, if it is complete."""
        return math.fsum(self.steps)

    @property
    def missed(self) -> float:
        """|attributed - change| / |change|; NaN where nothing changed."""
        return abs(self.attributed - self.change) / abs(self.change) if self.change else float("nan")

    def adds_up(self, tolerance: float) -> bool:
        """Whether the parts are the change, up to a share of it and to rounding."""
        return abs(self.attributed - self.change) <= _allowed(self.values, tolerance)


def _allowed(values: Sequence[float], tolerance: float) -> float:
    return tolerance * abs(values[-1] - values[0]) + ROUNDING * max(map(abs, values))


def path_attribution(
    model: nn.Module | Sites | Change,
    functions: Mapping[str, Function],
    *,
    initial: Weights | str | Path | None = None,
    points: int = 3,
    batch_size: int = 8,
    tolerance: float | None = TOLERANCE,
    most_points: int = MOST_POINTS,
    incomplete: Incomplete = "raise",
) -> dict[str, Attribution]:
    """What each neuron's and hidden unit's change contributed to the change of a number, such as a refusal margin.

    Parameters
    ----------
    model, initial
        The change: see `change_from`.
    functions
        Name -> what is attributed, the mean over its items: `Margin` of harmful and of harmless prompts as two
        entries (they are never subtracted from one another), `ResponseLoss`, or a function of your own.
    points
        Midpoints between W₀ and W at which gradients are taken.
    batch_size
        Rows that pass through the model together; the result does not depend on it.
    tolerance
        How far the sum may be from the true change, as a share of it. Where it is further, three times as many points
        are taken, up to `most_points`. None: the sum is returned as it is.
    incomplete
        What becomes of a sum that is still further: an error, or (`keep`) it is returned, and its `missed` tells.

    Returns
    -------
    Name -> `Attribution`. With m midpoints aⱼ = (j - ½)/m on W₀ + a D, neuron i of a site has

        Aᵢ = 1/m Σⱼ mean over items of Σₜ δₜᵢ (Dᵢ·xₜ)

    where x are the site's inputs and δ the gradients with respect to its outputs at that point; a hidden unit the sum
    over its rows, and Σₜ (δₜD)ᵤ xₜᵤ of its column. D = B A of a LoRA adapter is never formed.

    Raises
    ------
    ModelError
        As `change_from`; a sum that misses the change by more than `tolerance`, unless it is to be kept.
    DataError
        A value that is not finite.
    ConfigError
        No functions, or fewer than one point.

    Notes
    -----
    The gradient of a path that turns sharply (another expert is chosen on the way, a ReLU opens) is not that of its
    midpoints; `missed` says so. Gradients are sums in float32; a model in 16 bits computes as it does for `score`.
    """
    change = change_from(model, initial)
    ends = Change(change.vessel, (change.states[0], change.states[-1]), unknown=change.unknown, kept=change.kept)
    return _attributed(ends, functions, points, batch_size, _Limit(tolerance, most_points, incomplete))


def budget(
    model: nn.Module | Sites | Change,
    functions: Mapping[str, Function],
    *,
    snapshots: Sequence[str | Path] = (),
    points: int = 1,
    batch_size: int = 8,
    tolerance: float | None = TOLERANCE,
    most_points: int = MOST_POINTS,
    incomplete: Incomplete = "raise",
) -> dict[str, Attribution]:
    """What each neuron and hidden unit contributed to the change of a number along the saved steps of a training.

    aᵢ = Σ over snapshots k of ∇M·(wᵢ⁽ᵏ⁺¹⁾ - wᵢ⁽ᵏ⁾), the gradient taken midway between two snapshots (`points` of them).

    Parameters
    ----------
    model
        W₀, a loaded model without adapters; or a `Change` with all its states.
    snapshots
        Folders of the saved steps, adapters or full models, in order; one with `checkpoint-N` folders stands for all.
    functions, batch_size, tolerance, most_points, incomplete
        As in `path_attribution`; where the sum misses the change, the steps that miss most get more points.

    Returns
    -------
    Name -> `Attribution`: `values` are the number at W₀ and at each snapshot, `steps` what was attributed between.

    Raises
    ------
    As `path_attribution`.
    """
    if isinstance(model, Change) and snapshots:
        raise ConfigError("A Change has its snapshots already", received=len(snapshots))
    change = model if isinstance(model, Change) else change_along(model, snapshots)
    return _attributed(change, functions, points, batch_size, _Limit(tolerance, most_points, incomplete))


class _Limit(NamedTuple):
    """How far a sum may be from the change, at how many points it is sought at most, and what becomes of the others."""

    tolerance: float | None
    most_points: int
    incomplete: Incomplete


@dataclass(eq=False)
class _Sums:
    """Sums over points, float64: of rows, of hidden units' columns, and of what is no site."""

    rows: dict[str, torch.Tensor] = field(default_factory=dict)
    columns: dict[str, torch.Tensor] = field(default_factory=dict)
    elsewhere: dict[str, float] = field(default_factory=dict)

    def add(self, other: _Sums, share: float = 1.0) -> None:
        for name, value in other.elsewhere.items():
            self.elsewhere[name] = self.elsewhere.get(name, 0.0) + share * value
        for own, more in ((self.rows, other.rows), (self.columns, other.columns)):
            for name, values in more.items():
                own[name] = share * values if name not in own else own[name] + share * values

    @property
    def total(self) -> float:
        return math.fsum([*(float(rows.sum()) for rows in self.rows.values()), *self.elsewhere.values()])


@dataclass(eq=False)
class _Step:
    """What is known of one function between two states: sums over `points` midpoints, not yet divided by them."""

    sums: _Sums
    points: int

    @property
    def attributed(self) -> float:
        return self.sums.total / self.points


def _attributed(
    change: Change, functions: Mapping[str, Function], points: int, batch_size: int, limit: _Limit
) -> dict[str, Attribution]:
    if not functions:
        raise ConfigError("There is nothing to attribute", allowed="one or more functions, such as a Margin")
    if points < 1:
        raise ConfigError("Gradients are taken at one point or more", received=points)
    vessel, states = change.vessel, change.states
    check_loaded(vessel.sites)
    downs = downs_of(vessel.sites)
    pairs = list(itertools.pairwise(states))
    values: dict[str, list[float]] = {name: [] for name in functions}
    known: dict[str, list[_Step]] = {name: [] for name in functions}

    def gradients(name: str, step: int, shares: Sequence[float]) -> _Sums:
        sums = _Sums()
        for share in shares:
            vessel.go(*pairs[step], share)
            sums.add(_at_point(vessel, *pairs[step], functions[name], downs, batch_size))
        return sums

    with vessel:
        for at, state in enumerate(states):
            vessel.go(state, state, 1.0)
            for name, function in functions.items():
                values[name].append(float(values_of(vessel.sites.model, function, batch_size=batch_size).mean()))
            if at:
                shares = midpoints(points)
                sums = {name: _Sums() for name in functions}
                for share in shares:  # the vessel moves once for all functions
                    vessel.go(*pairs[at - 1], share)
                    for name, function in functions.items():
                        sums[name].add(_at_point(vessel, *pairs[at - 1], function, downs, batch_size))
                for name in functions:
                    known[name].append(_Step(sums[name], points))
        for name in functions if limit.tolerance is not None and math.isfinite(limit.tolerance) else ():
            _refine(name, values[name], known[name], gradients, limit)
    return {name: _finished(vessel.sites, values[name], known[name]) for name in functions}


def midpoints(count: int, *, without: int = 0) -> list[float]:
    """(j - ½)/count; without those that are the midpoints of `without`, a third as many."""
    shares = [(j + 0.5) / count for j in range(count)]
    return shares if not without else [share for j, share in enumerate(shares) if j % REFINEMENT != REFINEMENT // 2]


def _refine(
    name: str,
    values: Sequence[float],
    steps: list[_Step],
    gradients: Callable[[str, int, Sequence[float]], _Sums],
    limit: _Limit,
) -> None:
    """Take more points where a step misses most, until the sum is the change, up to the tolerance."""
    tolerance = float(limit.tolerance or 0.0)
    while True:
        misses = [abs(step.attributed - (values[k + 1] - values[k])) for k, step in enumerate(steps)]
        missed = abs(math.fsum(step.attributed for step in steps) - (values[-1] - values[0]))
        if missed <= _allowed(values, tolerance):
            return
        open_steps = [k for k, step in enumerate(steps) if step.points * REFINEMENT <= limit.most_points]
        if not open_steps and limit.incomplete == "keep":
            return
        if not open_steps:
            raise ModelError(
                f"The parts of {name} do not add up to its change: its gradient turns too sharply along the way",
                received=f"{math.fsum(step.attributed for step in steps):.6g} of {values[-1] - values[0]:.6g}",
                allowed=f"a difference of {tolerance:.2g} of it",
                fix="use dtype float32 and more snapshots, or accept it with tolerance=None",
            )
        worst = max(open_steps, key=lambda k: misses[k])
        more = steps[worst].points * REFINEMENT
        steps[worst].sums.add(gradients(name, worst, midpoints(more, without=steps[worst].points)))
        steps[worst].points = more


def _at_point(
    vessel: Vessel, first: State, second: State, function: Function, downs: Mapping[str, int], batch_size: int
) -> _Sums:
    """The sums over a function's items with the vessel where it is, divided by their count."""
    moved = {
        name: site
        for name, site in vessel.sites.items()
        if any(name in part for state in (first, second) for part in (state.factors, state.dense))
    }
    rows = {name: _zeros(site, site.shape[0]) for name, site in moved.items()}
    columns = {name: _zeros(site, site.shape[1]) for name, site in moved.items() if name in downs}

    number, count = sharers()

    def record(site: Site, tokens: Tokens) -> None:
        delta = vessel.delta(first, second, site.name)
        if delta is None or tokens.gradients is None or tokens.inputs is None:
            return
        of_rows, of_columns = contributions(delta, tokens.inputs, tokens.gradients, columns=site.name in columns)
        rows[site.name] += of_rows
        if of_columns is not None:
            columns[site.name] += of_columns

    with _gradients_kept(vessel, first, second) as elsewhere:
        parameters = [vessel.elsewhere[name] for name, _ in elsewhere]
        run(
            vessel.sites.model,
            moved,
            function.batches(batch_size)[number::count],
            record,
            backward=True,
            objective=function,
            kept=parameters,
        )
        outside = _over_all(
            {
                name: float((parameter.grad.to(part.dtype) * part).sum(dtype=torch.float64)) / function.count
                for (name, part), parameter in zip(elsewhere, parameters, strict=True)
                if parameter.grad is not None
            }
        )
    add_up([*rows.values(), *columns.values()])
    return _Sums(
        {name: (found / function.count).cpu() for name, found in rows.items()},
        {name: (found / function.count).cpu() for name, found in columns.items()},
        outside,
    )


def _over_all(parts: dict[str, float]) -> dict[str, float]:
    """The sums over the processes that share the items."""
    told = from_all(parts) if sharers().total > 1 else [parts]
    names = dict.fromkeys(name for own in told for name in own)
    return {name: math.fsum(own.get(name, 0.0) for own in told) for name in names}


def _zeros(site: Site, size: int) -> torch.Tensor:
    device = site.tensor.device
    return torch.zeros(size, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)


@contextlib.contextmanager
def _gradients_kept(vessel: Vessel, first: State, second: State) -> Iterator[list[tuple[str, torch.Tensor]]]:
    """What moves elsewhere, with room for its gradients; the gradients that were there before come back."""
    elsewhere = list(vessel.delta_elsewhere(first, second))
    before = {name: vessel.elsewhere[name].grad for name, _ in elsewhere}
    try:
        for name in before:
            vessel.elsewhere[name].grad = None
        yield elsewhere
    finally:
        for name, gradient in before.items():
            vessel.elsewhere[name].grad = gradient


def contributions(
    delta: Delta, inputs_TI: torch.Tensor, gradients_TO: torch.Tensor, *, columns: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Σₜ δₜᵢ (Dᵢ·xₜ) of each row `[O]`, and Σₜ (δₜD)ᵤ xₜᵤ of each column `[I]` where it is asked for."""
    dtype = delta.a.dtype if isinstance(delta, LowRank) else delta.dtype
    inputs, gradients = inputs_TI.to(dtype), gradients_TO.to(dtype)
    if isinstance(delta, LowRank):
        of_rows = ((gradients.T @ (inputs @ delta.a.T)) * delta.b).sum(dim=1)
        if not columns:
            return of_rows, None
        return of_rows, ((inputs.T @ (gradients @ delta.b)) * delta.a.T).sum(dim=1)
    of_rows = (gradients * (inputs @ delta.T)).sum(dim=0)
    return of_rows, (inputs * (gradients @ delta)).sum(dim=0) if columns else None


def downs_of(sites: Sites) -> dict[str, int]:
    """Site whose columns are hidden units or heads -> how many columns each of them has."""
    both = (known_compounds(sites, unit) for unit in ("hidden_unit", "head"))
    return {one.down: one.size for found in both for one in found.values()}


def known_compounds(sites: Sites, unit: Unit) -> Mapping[str, Compound]:
    """The hidden units of every MLP of a model, or the heads of every attention; empty where it has none known."""
    try:
        return compounds(sites, unit)
    except ModelError:
        return {}


def compounds_from(
    sites: Sites,
    unit: Unit,
    rows: Mapping[str, torch.Tensor],
    columns: Mapping[str, torch.Tensor],
    *,
    cut: bool = False,
) -> dict[str, torch.Tensor]:
    """MLP (attention) -> sum over each hidden unit's (head's) rows and columns, in the dtype of what is summed; parts
    that are not there have not moved, and an MLP without any is left out. `cut` as in `Compound.sums`."""
    found = {name: one.sums(rows, columns, cut=cut) for name, one in known_compounds(sites, unit).items()}
    return {name: total for name, total in found.items() if total is not None}


def _finished(sites: Sites, values: Sequence[float], steps: Sequence[_Step]) -> Attribution:
    total = _Sums()
    for step in steps:
        total.add(step.sums, 1 / step.points)
    return Attribution(
        rows={name: total.rows[name].float() for name in sites if name in total.rows},
        units=_floats(compounds_from(sites, "hidden_unit", total.rows, total.columns)),
        heads=_floats(compounds_from(sites, "head", total.rows, total.columns)),
        elsewhere=total.elsewhere,
        values=tuple(values),
        steps=tuple(step.attributed for step in steps),
        points=tuple(step.points for step in steps),
    )


def _floats(found: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: values.float() for name, values in found.items()}
