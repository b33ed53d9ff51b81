"""Whose update a change resembles: its cosine with what safety examples ask of the weights, beside ordinary ones.

Owns the signed mean gradients at W₀ and the cosines with D, of rows and of hidden units. Shapes: O = out, I = in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from neurondrift.attribution.changes import Change, change_from
from neurondrift.attribution.paths import compounds_from, downs_of
from neurondrift.attribution.states import Delta, Vessel
from neurondrift.base.processes import add_up, sharers
from neurondrift.importance.capture import run
from neurondrift.importance.methods import Tokens, for_each_block_of_gradient
from neurondrift.importance.scores import check_loaded, pad_token_id_of, split_into_passes
from neurondrift.models.adapters import LowRank
from neurondrift.models.batches import Batch, make_batches
from neurondrift.models.disk.initial import Weights
from neurondrift.models.sites import Site, Sites

UNMOVED = "the weights did not move"
NO_GRADIENT = "the examples ask nothing of the weights: their gradient is zero"


@dataclass(frozen=True, kw_only=True, eq=False)
class Provenance:
    """Cosines of the changes of the rows of a site, or of the hidden units of an MLP; float32, on the CPU.

    Attributes
    ----------
    safety, utility
        cos(Dᵢ, -gᵢ), g the mean gradient at W₀ of the loss on that set: above 0 where the change went the way that
        the set asks for. The *directional drift* cos(Dᵢ, g_Sᵢ) is minus `safety`.
    difference
        `safety` minus `utility`.
    reasons
        Why members are NaN -> how many; empty where none is.
    """

    safety: torch.Tensor
    utility: torch.Tensor
    difference: torch.Tensor
    reasons: dict[str, int]

    @property
    def directional(self) -> torch.Tensor:
        """cos(Dᵢ, g_Sᵢ): above 0 where the change went against refusals. Of a change that has nothing to do with them
        it is 0 on average."""
        return -self.safety


class Provenances(NamedTuple):
    """Provenance of every site that moved, by name, of the hidden units of every MLP of which a site did, and of the
    heads of every attention of which one did."""

    rows: dict[str, Provenance]
    units: dict[str, Provenance]
    heads: dict[str, Provenance]


def provenance(
    model: nn.Module | Sites | Change,
    safety: Sequence[Mapping[str, Any]],
    utility: Sequence[Mapping[str, Any]],
    *,
    initial: Weights | str | Path | None = None,
    batch_size: int = 8,
    on_batch: Callable[[Batch], None] = lambda batch: None,
) -> Provenances:
    """Whether each neuron's and hidden unit's change is the one that safety examples ask for, or ordinary ones.

    Parameters
    ----------
    model, initial
        The change: see `change_from`.
    safety, utility
        Encoded examples with responses (`encode`).
    batch_size
        Examples that pass through the model together; the result does not depend on it.
    on_batch
        Called after each batch, for progress.

    Returns
    -------
    `Provenances`: cos(Dᵢ, -g^Sᵢ) - cos(Dᵢ, -g^Uᵢ) and its parts, with g the gradient at W₀ of the mean over examples of
    the mean cross-entropy over response tokens. A hidden unit's cosine is that of its rows of gate and up and its
    column of down put together into one vector; a head's likewise.

    Raises
    ------
    ModelError, DataError
        As `change_from` and `score`.

    Notes
    -----
    One float32 matrix as large as a site's weight for each site, for one set after the other; where they do not fit
    beside the model, sites take turns. D = B A of a LoRA adapter is never formed.
    """
    change = change_from(model, initial)
    vessel, first, last = change.vessel, change.states[0], change.states[-1]
    check_loaded(vessel.sites)
    moved = {name: vessel.sites[name] for name in change.moved()}
    pad = pad_token_id_of(vessel.sites.model)
    sets = [
        make_batches(list(part), model=vessel.sites.model, batch_size=batch_size, pad_token_id=pad)
        for part in (safety, utility)
    ]
    counts = [len(safety), len(utility)]
    downs = downs_of(vessel.sites)
    parts: dict[bool, dict[str, list[torch.Tensor]]] = {False: {}, True: {}}  # of columns -> site -> of each set
    sizes = {name: 4 * site.shape[0] * site.shape[1] for name, site in moved.items()}
    with vessel:
        vessel.go(first, first, 1.0)
        for names in split_into_passes(sizes, {name: site.tensor.device for name, site in moved.items()}):
            part = {name: moved[name] for name in names}
            for batches, count in zip(sets, counts, strict=True):
                gradients = _gradients(vessel, part, batches, count, on_batch)
                for name in names:
                    delta, gradient = vessel.delta(first, last, name), gradients.pop(name)
                    assert delta is not None
                    for by_column in (False, True) if name in downs else (False,):
                        with torch.no_grad():
                            of_set = products(delta, gradient, columns=by_column)
                        parts[by_column].setdefault(name, []).append(of_set)
    rows, columns = ({name: _of_both(pair) for name, pair in found.items()} for found in parts.values())
    units, heads = (compounds_from(vessel.sites, unit, rows, columns) for unit in ("hidden_unit", "head"))
    ordered = {name: rows[name] for name in moved}
    return Provenances(*({name: _cosines(one) for name, one in found.items()} for found in (ordered, units, heads)))


def _gradients(
    vessel: Vessel, sites: Mapping[str, Site], batches: Sequence[Batch], count: int, on_batch: Callable[[Batch], None]
) -> dict[str, torch.Tensor]:
    """The mean gradient of each site over all examples, float32 `[out, in]`."""
    sums = {name: torch.zeros(site.shape, device=site.tensor.device) for name, site in sites.items()}

    def record(site: Site, tokens: Tokens) -> None:
        for_each_block_of_gradient(sums[site.name], tokens, lambda block, gradient: block.add_(gradient.float()))

    number, sharing = sharers()
    run(vessel.sites.model, sites, batches[number::sharing], record, backward=True, on_batch=on_batch)
    add_up(sums.values())
    for total in sums.values():
        total.div_(count)
    return sums


def products(delta: Delta, gradient_OI: torch.Tensor, *, columns: bool) -> torch.Tensor:
    """D·g, ‖D‖² and ‖g‖² of each row or each column, float64 `[members, 3]`."""
    if isinstance(delta, LowRank):
        a, b = delta.a, delta.b
        gradient = gradient_OI.to(b)
        if columns:
            dots, norm = ((gradient.T @ b) * a.T).sum(dim=1), ((b.T @ b @ a) * a).sum(dim=0)
        else:
            dots, norm = ((gradient @ a.T) * b).sum(dim=1), ((b @ (a @ a.T)) * b).sum(dim=1)
    else:
        along = 0 if columns else 1
        dots, norm = (delta * gradient_OI.to(delta)).sum(dim=along), delta.square().sum(dim=along)
    squares = gradient_OI.square().sum(dim=0 if columns else 1)
    return torch.stack([dots, norm.clamp(min=0), squares], dim=1).cpu().double()


def _of_both(pair: Sequence[torch.Tensor]) -> torch.Tensor:
    """D·g of safety and of utility, ‖D‖², and ‖g‖² of both, float64 `[members, 5]`: all of it adds up over members."""
    (dot_safety, norm, of_safety), (dot_utility, _, of_utility) = (one.unbind(dim=1) for one in pair)
    return torch.stack([dot_safety, dot_utility, norm, of_safety, of_utility], dim=1)


def _cosines(found: torch.Tensor) -> Provenance:
    dot_safety, dot_utility, norm, of_safety, of_utility = found.unbind(dim=1)
    unmoved = norm == 0
    still = ~unmoved & ((of_safety == 0) | (of_utility == 0))
    safety, utility = (
        torch.where((norm == 0) | (square == 0), torch.nan, -dot / (norm * square).sqrt()).clamp(-1, 1)
        for dot, square in ((dot_safety, of_safety), (dot_utility, of_utility))
    )
    reasons = {UNMOVED: int(unmoved.sum()), NO_GRADIENT: int(still.sum())}
    return Provenance(
        safety=safety.float(),
        utility=utility.float(),
        difference=(safety - utility).float(),
        reasons={reason: count for reason, count in reasons.items() if count},
    )
