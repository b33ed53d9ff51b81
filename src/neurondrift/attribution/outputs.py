"""How far outputs moved on given inputs: E|Dx|² of each neuron and hidden unit on safety and on ordinary text.

Owns which inputs are seen of which site, what a change does to them, and the ratios that follow. Knows nothing of where
a change comes from. Shapes: O = out, I = in, N = tokens, R = rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from neurondrift.attribution.changes import Change, change_from
from neurondrift.attribution.inputs.spread import PARTS, Moments, Spread, spread_of
from neurondrift.attribution.paths import compounds_from, downs_of
from neurondrift.attribution.states import Delta
from neurondrift.base.errors import ConfigError, DataError, ModelError
from neurondrift.importance.capture import run
from neurondrift.importance.methods import Tokens
from neurondrift.importance.scores import check_loaded, pad_token_id_of, split_into_passes
from neurondrift.models.adapters import LowRank
from neurondrift.models.batches import Batch, arguments_for, make_batches
from neurondrift.models.data import IGNORED
from neurondrift.models.disk.initial import Weights
from neurondrift.models.sites import Site, Sites, unwrap

SHARED = 8  # leading directions of the inputs of both sets, taken out: fixed before the first result (methods.md)
UNMOVED = "the weights did not move"
UNSEEN = "no token of one of the sets came by"
SILENT = "the change moves no output on these inputs"


@dataclass(frozen=True, kw_only=True, eq=False)
class FunctionalDrift:
    """How far the outputs of the rows of a site, or of the hidden units of an MLP, moved. All float32, `[out]` or
    `[units]`, on the CPU; NaN where the weights did not move, and where no token of a set came by (an expert).

    Attributes
    ----------
    safety, utility
        E|D̃x|² over the positions of each set that predict a response token, in units of the output squared.
    log_ratio
        log(safety / utility): what ranks members by how special their change is to safety text.
    shrunk
        log((safety + m) / (utility + m)), m the median of (safety + utility)/2 over the members that moved: what a
        group of k is to be taken by, as it leaves out what hardly moves anything.
    floor
        log of the ratio of the two halves of the ordinary set: what a ratio is by chance alone.
    unmoved
        How many members have D = 0.
    reasons
        Why members are NaN -> how many; empty where none is.
    """

    safety: torch.Tensor
    utility: torch.Tensor
    log_ratio: torch.Tensor
    shrunk: torch.Tensor
    floor: torch.Tensor
    unmoved: int
    reasons: dict[str, int]


class OutputDrift(NamedTuple):
    """Functional drift of every site that moved, by name, of the hidden units of every MLP of which a site did, and of
    the heads of every attention of which one did."""

    rows: dict[str, FunctionalDrift]
    units: dict[str, FunctionalDrift]
    heads: dict[str, FunctionalDrift]


def functional_drift(
    model: nn.Module | Sites | Change,
    safety: Sequence[Mapping[str, Any]],
    utility: Sequence[Mapping[str, Any]],
    *,
    initial: Weights | str | Path | None = None,
    shared: int = SHARED,
    batch_size: int = 8,
    on_batch: Callable[[Batch], None] = lambda batch: None,
) -> OutputDrift:
    """How far a change moves each neuron's and hidden unit's output, on safety text and on ordinary text.

    Parameters
    ----------
    model, initial
        The change: see `change_from`.
    safety, utility
        Encoded examples with responses (`encode`): refusals of harmful requests, and ordinary answers.
    shared
        How many leading directions, of the inputs that both sets share, are taken out.
    batch_size
        Examples that pass through the model together; the result does not depend on it.
    on_batch
        Called after each batch, for progress.

    Returns
    -------
    `OutputDrift`. With C the mean of x xᵀ of a site's inputs in the *changed* model, over the positions that predict a
    response token (each token counts the same), B the `shared` leading eigenvectors of (C_S + C_U)/2 and
    D̃ = D - (D B)Bᵀ, a neuron has a = D̃ᵢ C_S D̃ᵢᵀ and b = D̃ᵢ C_U D̃ᵢᵀ. A hidden unit u has the sum of its rows' of gate
    and up, and what its column of down adds to all outputs: ‖D_u‖² (P C P)_uu with P = I - B Bᵀ. A head h has the sum
    of its rows', and what its columns of the output projection add: tr(D_h (P C P)_hh D_hᵀ).

    Raises
    ------
    ModelError
        As `change_from`; a site whose inputs cannot be seen.
    DataError
        No examples, fewer than two ordinary ones, an example without response tokens.
    ConfigError
        A negative `shared`.

    Notes
    -----
    Forward passes only. Sites with one input (q, k and v; gate and up) share its moments: three float32 matrices
    `[in, in]`; where they do not fit beside the model, sites take turns. A LoRA change stays in its factors.
    Measured on planted refusals: `docs/methods.md`.
    """
    if shared < 0:
        raise ConfigError("The number of shared directions cannot be negative", received=shared)
    if len(utility) < 2:
        raise DataError("The ordinary set is split in two: it needs two examples or more", received=len(utility))
    change = change_from(model, initial)
    vessel, first, last = change.vessel, change.states[0], change.states[-1]
    check_loaded(vessel.sites)
    moved = {name: vessel.sites[name] for name in change.moved()}
    narrow = [name for name, site in moved.items() if site.shape[1] <= shared]
    if narrow:
        raise ConfigError(
            f"The site {narrow[0]} has no more inputs than shared directions are to be taken out",
            received=shared,
            allowed=f"0 to {moved[narrow[0]].shape[1] - 1}",
        )
    pad = pad_token_id_of(vessel.sites.model)
    sets = [list(safety), list(utility[::2]), list(utility[1::2])]
    batches = [make_batches(part, batch_size=batch_size, pad_token_id=pad) for part in sets]
    downs = downs_of(vessel.sites)
    rows: dict[str, torch.Tensor] = {}
    columns: dict[str, torch.Tensor] = {}
    with vessel, torch.no_grad():
        vessel.go(last, last, 1.0)
        for names in _passes(moved):
            inputs = _Inputs(sites={name: moved[name] for name in names})
            for part, several in enumerate(batches):
                for batch in several:
                    inputs.see(vessel.sites.model, batch, part)
                    on_batch(batch)
            for leader, sharing in inputs.groups().items():
                spread = spread_of(inputs.moments.pop(leader), shared)
                for name in sharing:
                    delta = vessel.delta(first, last, name)
                    assert delta is not None
                    rows[name] = row_powers(delta, spread).cpu()
                    if name in downs:
                        columns[name] = column_powers(delta, spread, downs[name]).cpu()
    for name in moved:  # experts that no token was sent to
        if name not in rows:
            rows[name] = torch.full((moved[name].shape[0], 5), torch.nan, dtype=torch.float64)
            if name in downs:
                members = moved[name].shape[1] // downs[name]
                columns[name] = torch.full((members, 5), torch.nan, dtype=torch.float64)
    units, heads = (compounds_from(vessel.sites, unit, rows, columns, cut=True) for unit in ("hidden_unit", "head"))
    ordered = {name: rows[name] for name in moved}
    return OutputDrift(*({name: _drift_of(one) for name, one in found.items()} for found in (ordered, units, heads)))


def _passes(sites: Mapping[str, Site]) -> list[list[str]]:
    """The sites of each pass over the data, so that their moments fit in the free memory."""
    sizes = {name: 4 * PARTS * site.shape[1] ** 2 for name, site in sites.items()}
    return split_into_passes(sizes, {name: site.tensor.device for name, site in sites.items()})


@dataclass(eq=False)
class _Inputs:
    """The second moments of the inputs of some sites; those that are given one and the same tensor have them once."""

    sites: Mapping[str, Site]
    leaders: dict[str, str] = field(default_factory=dict)
    moments: dict[str, Moments] = field(default_factory=dict)
    part: int = 0
    # The last leader, and what it was given first of the batch: kept, so that no other tensor can lie where it does.
    last: tuple[str, torch.Tensor] | None = None

    def see(self, model: nn.Module, batch: Batch, part: int) -> None:
        """Add one batch of a part of the data."""
        self.part, self.last = part, None
        # What predicts a response token stands one place before it: the hooks are shown those places as the response.
        before = F.pad(batch.labels[:, 1:], (0, 1), value=IGNORED)
        shown = Batch(**{**vars(batch), "labels": before})
        run(model, self.sites, [shown], self._record, backward=False, objective=passed_through)
        self.last = None

    def _record(self, site: Site, tokens: Tokens) -> None:
        assert tokens.inputs is not None and tokens.is_response is not None
        inputs = tokens.inputs
        if site.name not in self.leaders:
            shares = self.last is not None and site.expert is None and _is_same(self.last[1], inputs)
            self.leaders[site.name] = self.last[0] if shares and self.last is not None else site.name
        if self.leaders[site.name] != site.name:
            return
        if self.last is None or self.last[0] != site.name:
            self.last = site.name, inputs
        if site.name not in self.moments:
            self.moments[site.name] = Moments(site.shape[1], site.tensor.device)
        chosen = inputs[tokens.is_response]
        if len(chosen):
            self.moments[site.name].add(chosen, self.part)

    def groups(self) -> dict[str, list[str]]:
        """The first site with an input -> all sites that have it."""
        result: dict[str, list[str]] = {}
        for name, leader in self.leaders.items():
            result.setdefault(leader, []).append(name)
        return result


def _is_same(first: torch.Tensor, second: torch.Tensor) -> bool:
    return first.data_ptr() == second.data_ptr() and first.shape == second.shape and first.stride() == second.stride()


def passed_through(model: nn.Module, batch: Batch) -> torch.Tensor:
    """A forward pass whose LM head sees one position of each example: a number for each that is finite if all is."""
    head = unwrap(model).get_output_embeddings()
    if head is None:
        raise ModelError("This model has no LM head", received=type(unwrap(model)).__name__)
    handle = head.register_forward_pre_hook(lambda module, args: (args[0][:, -1:], *args[1:]))
    try:
        output = model(input_ids=batch.input_ids, **arguments_for(model, batch))
    finally:
        handle.remove()
    values: torch.Tensor = output.logits[:, -1].float().logsumexp(dim=-1)
    return values


def row_powers(delta: Delta, spread: Spread) -> torch.Tensor:
    """D̃ᵢ C D̃ᵢᵀ on safety text, on ordinary text and on its halves, and ‖Dᵢ‖², float64 `[O, 5]`."""
    if isinstance(delta, LowRank):
        a, b = delta.a.to(spread.basis), delta.b.to(spread.basis)
        found = [((b @ part) * b).sum(dim=1) for part in spread.along(a)]
        norm = ((b @ (a @ a.T)) * b).sum(dim=1)
    else:
        found = spread.squares(delta)
        norm = delta.square().sum(dim=1)
    return spread.powers(found, norm)


def column_powers(delta: Delta, spread: Spread, size: int = 1) -> torch.Tensor:
    """What `size` columns at a time add to all outputs, tr(D_h (P C P)_hh D_hᵀ), in the same four, and ‖D_h‖², float64
    `[I / size, 5]`."""
    if size > 1:
        blocks = [_products_of(delta, slice(start, start + size)) for start in range(0, _width(delta), size)]
        within = torch.stack(blocks)  # D_hᵀ D_h
        norm = within.diagonal(dim1=1, dim2=2).sum(dim=1)
        cut = (part.unflatten(0, (-1, size)).unflatten(2, (-1, size)) for part in spread.rests)
        diagonal = [part.diagonal(dim1=0, dim2=2).permute(2, 0, 1) for part in cut]
        return spread.powers([(within * part.to(within)).sum(dim=(1, 2)) for part in diagonal], norm)
    if isinstance(delta, LowRank):
        norm = ((delta.b.T @ delta.b @ delta.a) * delta.a).sum(dim=0)
    else:
        norm = delta.square().sum(dim=0)
    found = [norm * part.to(norm) for part in spread.diagonals]
    return spread.powers(found, norm)


def _width(delta: Delta) -> int:
    return int((delta.a if isinstance(delta, LowRank) else delta).shape[1])


def _products_of(delta: Delta, columns: slice) -> torch.Tensor:
    """DᵀD of some columns."""
    if isinstance(delta, LowRank):
        return delta.a[:, columns].T @ (delta.b.T @ delta.b) @ delta.a[:, columns]
    return delta[:, columns].T @ delta[:, columns]


def _drift_of(powers: torch.Tensor) -> FunctionalDrift:
    """The measures of a site or an MLP from `[members, 5]`."""
    safety, utility, even, odd, norm = powers.unbind(dim=1)
    unmoved = norm == 0
    unseen = ~unmoved & (safety + utility).isnan()
    silent = ~unmoved & ~unseen & ((safety == 0) | (utility == 0))
    safety, utility = (part.masked_fill(unmoved, torch.nan) for part in (safety, utility))
    both = ((safety + utility) / 2)[~unmoved & ~unseen]
    middle = both.median() if len(both) else torch.tensor(torch.nan, dtype=torch.float64)
    log_ratio, floor = (
        torch.where(unmoved | (above == 0) | (below == 0), torch.nan, (above / below).log())
        for above, below in ((safety, utility), (even, odd))
    )
    shrunk = ((safety + middle) / (utility + middle)).log()
    reasons = {UNMOVED: int(unmoved.sum()), UNSEEN: int(unseen.sum()), SILENT: int(silent.sum())}
    return FunctionalDrift(
        safety=safety.float(),
        utility=utility.float(),
        log_ratio=log_ratio.float(),
        shrunk=shrunk.float(),
        floor=floor.float(),
        unmoved=reasons[UNMOVED],
        reasons={reason: count for reason, count in reasons.items() if count},
    )
