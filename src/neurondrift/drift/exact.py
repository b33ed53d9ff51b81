"""The exact drift of neurons: the maths, and the meter that applies it to a model again and again.

Owns the closed forms for low-rank and rescaled adapters and the dense form for everything else. Where Δ comes from is
the business of `deltas`, where the initial weights lie of `initial`. Writes no files and knows nothing of trainers.
Shapes: O = out, I = in, R = rank of all active adapters together.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from neurondrift.drift.deltas import (
    Change,
    Dense,
    LowRank,
    Rescaled,
    change_of,
    check_methods,
    delta_of,
    dense_delta,
    effective_weight,
    is_adapted,
    low_rank_delta,
    row_blocks,
    row_norms,
    stretch,
)
from neurondrift.drift.initial import CheckpointWeights, Weights
from neurondrift.errors import ModelError
from neurondrift.models import load_model
from neurondrift.sites import Site, linear_sites, unwrap
from neurondrift.threads import at_once, side_by_side, threads_for

__all__ = [
    "CheckpointWeights",
    "DriftMeter",
    "LowRank",
    "Moments",
    "NeuronDrift",
    "Weights",
    "compare_models",
    "delta_of",
    "dense_moments",
    "drift_from_moments",
    "low_rank_delta",
    "low_rank_moments",
    "measure_drift",
    "rescaled_moments",
    "row_norms",
]

# Below this share of ‖Δ‖² the part across w₀, as a difference of two squares, has lost the accuracy of w₀·Δ, and is
# taken from the rows themselves.
CANCELLED = 1e-8

# Below this share of ‖w₀‖ the length of w₀ + Δ is what float64 leaves of zero.
VANISHED = 1e-13


class NeuronDrift(NamedTuple):
    """Drift of each neuron of a site, three float32 tensors `[out]` on the CPU.

    `l2` ‖Δ‖, `relative` ‖Δ‖/‖w₀‖, `cosine_distance` 1 - cos(w₀, w₀ + Δ). A neuron with ‖w₀‖ = 0 has NaN for
    `relative` and `cosine_distance`; one with ‖w₀ + Δ‖ = 0 has NaN for `cosine_distance`.
    """

    l2: torch.Tensor
    relative: torch.Tensor
    cosine_distance: torch.Tensor


class Moments(NamedTuple):
    """What the drift of a row depends on, float64 `[out]`: ‖Δ‖², w₀·Δ and, where it was computed by itself, ‖Δ⊥‖²
    (the part of Δ across w₀)."""

    squared: torch.Tensor
    dot: torch.Tensor
    across: torch.Tensor | None = None


def drift_from_moments(norm_O: torch.Tensor, moments: Moments) -> NeuronDrift:
    """Drift from ‖w₀‖, ‖Δ‖² and w₀·Δ, all float64 `[out]`.

    1 - cos of a small drift cancels. With Δ∥ = w₀·Δ/‖w₀‖, ‖Δ⊥‖² = ‖Δ‖² - Δ∥² (unless given), x = ‖w₀‖ + Δ∥ and the
    length h = ‖w₀ + Δ‖ = √(x² + ‖Δ⊥‖²), it is 2 sin²(θ/2) of the angle θ = atan2(‖Δ⊥‖, x), here as
    ‖Δ⊥‖² / (h (h + |x|)) where x ≥ 0, and two less that where x < 0: the same numbers, without the angle.
    """
    nan = torch.full_like(norm_O, math.nan)
    l2_O = moments.squared.clamp(min=0).sqrt()
    parallel_O = moments.dot / torch.where(norm_O > 0, norm_O, nan)
    across_O = moments.squared - parallel_O.square() if moments.across is None else moments.across
    across_O = across_O.clamp(min=0)
    along_O = norm_O + parallel_O
    length_O = (along_O.square() + across_O).sqrt_()
    cosine_O = across_O / (length_O * (length_O + along_O.abs()))
    cosine_O = torch.where(along_O < 0, 2 - cosine_O, cosine_O)
    cosine_O = torch.where(length_O <= VANISHED * norm_O, nan, cosine_O)
    relative_O = l2_O / torch.where(norm_O > 0, norm_O, nan)
    return NeuronDrift(l2_O.float().cpu(), relative_O.float().cpu(), cosine_O.float().cpu())


def drifts_from_moments(parts: Mapping[str, tuple[torch.Tensor, Moments]]) -> dict[str, NeuronDrift]:
    """The same for the ‖w₀‖ and moments (with ‖Δ⊥‖²) of many sites at once: a dozen operations on a few rows each cost
    more than their arithmetic."""
    sizes = [len(norm) for norm, _ in parts.values()]
    norm_N = torch.cat([norm.cpu() for norm, _ in parts.values()])
    columns = zip(*(of_site for _, of_site in parts.values()), strict=True)
    moments = Moments(*(torch.cat([of_site.cpu() for of_site in column]) for column in columns))
    metrics = [values.split(sizes) for values in drift_from_moments(norm_N, moments)]
    return {name: NeuronDrift(*of_site) for name, *of_site in zip(parts, *metrics, strict=True)}


def low_rank_moments(a_RI: torch.Tensor, b_OR: torch.Tensor, base_OI: torch.Tensor, norm_O: torch.Tensor) -> Moments:
    """‖Δ‖², w₀·Δ and ‖Δ⊥‖² of Δ = B A (scaling included in B), with ‖w₀‖ `[out]`, without forming Δ.

    ‖Δᵢ‖² = bᵢ (A Aᵀ) bᵢᵀ and w₀ᵢ·Δᵢ = bᵢ · (A w₀ᵢ): work of R·R and R·I a row, in float64 but for A w₀ on a CPU
    (`kernels.low_rank_moments`). The few rows that are nearly parallel to w₀ are formed.
    """
    if base_OI.device.type == "cpu":
        from neurondrift.drift import kernels

        return Moments(*torch.from_numpy(kernels.low_rank_moments(a_RI, b_OR, base_OI, norm_O)))
    a64_RI, b64_OR = a_RI.double(), b_OR.double()
    squared_O = ((b64_OR @ (a64_RI @ a64_RI.T)) * b64_OR).sum(dim=1)
    projected_OR = torch.cat([block.double() @ a64_RI.T for block in row_blocks(base_OI)])
    dot_O = (projected_OR * b64_OR).sum(dim=1)
    across_O = squared_O - (dot_O / norm_O).square()
    rows = (across_O < CANCELLED * squared_O).nonzero().flatten()
    if len(rows):
        across_O[rows] = _across(base_OI[rows].double(), b64_OR[rows] @ a64_RI, norm_O[rows], dot_O[rows])
    return Moments(squared_O, dot_O, across_O)


def rescaled_moments(change: Rescaled, base_OI: torch.Tensor, norm_O: torch.Tensor) -> Moments:
    """‖Δ‖², w₀·Δ and ‖Δ⊥‖² of DoRA's Δᵢ = γᵢ w₀ᵢ + bᵢ A (`deltas.stretch`), without forming Δ, in float64.

    Only b A has a part across w₀: ‖Δ⊥‖² = ‖bA‖² - (w₀·bA)²/‖w₀‖², and along it Δ∥ = γ‖w₀‖ + w₀·bA/‖w₀‖. The norm
    is put together from the two, since γ w₀ and b A cancel (a change along w₀ that the magnitude undoes).
    """
    form = stretch(change, base_OI, norm_O)
    dot_O = (form.projected * form.b).sum(dim=1)
    squared_O = ((form.b @ (form.a @ form.a.T)) * form.b).sum(dim=1)
    across_O = (squared_O - (dot_O / norm_O).square()).clamp(min=0)
    rows = (across_O < CANCELLED * squared_O).nonzero().flatten()
    if len(rows):
        across_O[rows] = _across(base_OI[rows].double(), form.b[rows] @ form.a, norm_O[rows], dot_O[rows])
    along_O = form.stretch * norm_O + dot_O / norm_O
    # ‖w₀‖ = 0 has no direction: there Δ is b A alone.
    return Moments(torch.where(norm_O > 0, along_O.square() + across_O, squared_O), along_O * norm_O, across_O)


def dense_moments(base_OI: torch.Tensor, now_OI: torch.Tensor) -> tuple[torch.Tensor, Moments]:
    """‖w₀‖ and the moments of Δ = `now` - `base`, in float64."""
    if base_OI.device.type == "cpu":
        from neurondrift.drift import kernels

        norm_O, *moments = torch.from_numpy(kernels.row_moments(base_OI, now_OI))
        return norm_O, Moments(*moments)
    parts = []
    for base, now in zip(row_blocks(base_OI), row_blocks(now_OI), strict=True):
        base64 = base.double()
        parts.append(_block_moments(base64, now.double() - base64))
    norm_O, squared_O, dot_O, across_O = (torch.cat(part) for part in zip(*parts, strict=True))
    return norm_O, Moments(squared_O, dot_O, across_O)


def delta_moments(base_OI: torch.Tensor, delta_OI: torch.Tensor) -> Moments:
    """The moments of a Δ that is there in full, row block by row block, in float64."""
    pairs = zip(row_blocks(base_OI), row_blocks(delta_OI), strict=True)
    parts = [_block_moments(base.double(), delta.double())[1:] for base, delta in pairs]
    return Moments(*(torch.cat(part) for part in zip(*parts, strict=True)))


def _block_moments(
    base: torch.Tensor, delta: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """‖w₀‖, ‖Δ‖², w₀·Δ and ‖Δ⊥‖² of a block of rows, float64."""
    norm, squared, dot = _row_dots(base, base).sqrt(), _row_dots(delta, delta), _row_dots(base, delta)
    across = squared - (dot / norm).square()
    rows = (across < CANCELLED * squared).nonzero().flatten()
    if len(rows):
        across[rows] = _across(base[rows], delta[rows], norm[rows], dot[rows])
    return norm, squared, dot, across


def _row_dots(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """The dot product of each row with the other's, float64 `[out]`. numpy's needs no product in memory, and is twice
    as fast."""
    if first.device.type != "cpu":
        return (first * second).sum(dim=1)
    return torch.from_numpy(np.vecdot(first.detach().numpy(), second.detach().numpy()))


def _across(base: torch.Tensor, delta: torch.Tensor, norm: torch.Tensor, dot: torch.Tensor) -> torch.Tensor:
    """‖Δ⊥‖² from the rows themselves, float64: what is left of Δ without its part along w₀."""
    return (delta - (dot / norm.square())[:, None] * base).square().sum(dim=1)


class DriftMeter:
    """Measures one model again and again: what does not change (‖w₀‖) is computed once.

    Parameters
    ----------
    model
        A PEFT model (its base weights are w₀), or a plain one with `initial`.
    initial
        Where w₀ is read from: for full fine-tuning, and for adapters that changed the base weights when they were
        made (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA, KaSA). The weight that the model computes with is then compared
        with it, also where an adapter has been merged.

    Attributes
    ----------
    sites
        The sites that training can move: the adapted ones, or all.
    untrained
        The other sites; their drift is exactly zero.

    Raises
    ------
    ModelError
        No adapter and no initial weights; a method whose drift no weight shows (prompt tuning, mixtures that depend
        on the input); adapters that changed the base weights, without `initial`.
    """

    def __init__(self, model: nn.Module, *, initial: Weights | None = None) -> None:
        everything = linear_sites(model)
        self._initial = initial
        outer: Any = model
        while isinstance(getattr(outer, "module", None), nn.Module):
            outer = outer.module
        check_methods(outer, initial_given=initial is not None)
        adapted = {name: site for name, site in everything.items() if is_adapted(site)}
        if not adapted and initial is None and not hasattr(outer, "peft_config"):
            raise ModelError(
                "A model without an adapter has no drift by itself",
                received=type(model).__name__,
                fix="pass the initial weights, or use compare_models(before, after)",
            )
        is_plain = unwrap(model) is outer and not adapted
        self.sites: dict[str, Site] = everything if is_plain else adapted
        self.untrained: list[str] = [name for name in everything if name not in self.sites]
        self._norms: dict[str, torch.Tensor] = {}

    def norms(self, site: str) -> torch.Tensor:
        """‖w₀‖ of each neuron of a site, float64 `[out]`."""
        if site not in self._norms:
            self._norms[site] = row_norms(self.base(site))
        return self._norms[site]

    @property
    def zero_norm_neurons(self) -> dict[str, int]:
        """How many neurons of each site have ‖w₀‖ = 0, so that their relative drift and cosine distance are NaN;
        sites without any are left out. The norms are computed where they have not been yet."""
        counts = {name: int((self.norms(name) == 0).sum()) for name in self.sites}
        return {name: count for name, count in counts.items() if count}

    def base(self, site: str) -> torch.Tensor:
        """w₀ of a site, `[out, in]`, in the dtype that it is stored in, on the site's device; a view where it lies in
        the model's memory: do not write."""
        known = self.sites[site]
        return known.weight if self._initial is None else self._initial(site).to(known.tensor.device)

    def change(self, site: str) -> Change:
        """Δ of a site as it is now, in the cheapest exact form, on the site's device."""
        known = self.sites[site]
        if self._initial is not None:
            return Dense(effective_weight(known) - self.base(site).double())
        change = change_of(known)
        if change is None:
            raise ModelError(f"{site} has no active adapter any more", fix="activate the adapter that was measured")
        return change

    @torch.no_grad()
    def delta(self, site: str) -> torch.Tensor:
        """Δ of a site as it is now, float32 `[out, in]` (formed in float64), on the site's device."""
        return dense_delta(self.change(site), self.base(site))

    @torch.no_grad()
    def measure(self) -> dict[str, NeuronDrift]:
        """Drift of every neuron of every trained site, now."""
        return drifts_from_moments(dict(zip(self.sites, self._moments(self.sites), strict=True)))

    @torch.no_grad()
    def measure_site(self, name: str) -> NeuronDrift:
        """Drift of every neuron of one site, now."""
        return drift_from_moments(*self._moments([name])[0])

    def _moments(self, names: Iterable[str]) -> list[tuple[torch.Tensor, Moments]]:
        """‖w₀‖ and the moments of sites; on a CPU of several at once."""
        sites = [self.sites[name] for name in names]
        devices = {site.tensor.device.type for site in sites}
        parts = ((self.norms(site.name), self.change(site.name), self.base(site.name)) for site in sites)
        several = at_once() if devices == {"cpu"} else 1
        with contextlib.ExitStack() as stack:
            stack.enter_context(threads_for(math.prod(site.shape) for site in sites))
            for device in devices:  # autocast, where a caller has left it on, would compute the products in bfloat16
                stack.enter_context(torch.autocast(device, enabled=False))
            return list(side_by_side(_moments_of, parts, threads=several))


def _moments_of(part: tuple[torch.Tensor, Change, torch.Tensor]) -> tuple[torch.Tensor, Moments]:
    norm, change, base = part
    if isinstance(change, LowRank):
        return norm, low_rank_moments(change.a, change.b, base, norm)
    if isinstance(change, Rescaled):
        return norm, rescaled_moments(change, base, norm)
    return norm, delta_moments(base, change.delta)


def measure_drift(model: nn.Module, *, initial: Weights | None = None) -> dict[str, NeuronDrift]:
    """How far every neuron of a fine-tuned model is from where it started.

    Parameters
    ----------
    model
        A PEFT model, its adapters unmerged; or any model together with `initial`.
    initial
        Callable site name -> initial weight `[out, in]`, for example `CheckpointWeights`.

    Returns
    -------
    dict
        Site name -> `NeuronDrift`, for the sites that training can move.

    Raises
    ------
    ModelError
        No adapter and no initial weights; a merged adapter; an adapter that cannot be measured exactly.
    """
    return DriftMeter(model, initial=initial).measure()


@torch.no_grad()
def compare_models(before: Any, after: Any) -> dict[str, NeuronDrift]:
    """Drift of every neuron between two models: modules, or references that `load_model` takes.

    Raises `ModelError` where the two have different sites or shapes.
    """
    first, second = (
        load_model(m, dtype="float32", device="cpu")[0] if isinstance(m, str | Path) else m for m in (before, after)
    )
    sites_before, sites_after = linear_sites(first), linear_sites(second)
    if {n: s.shape for n, s in sites_before.items()} != {n: s.shape for n, s in sites_after.items()}:
        different = sorted(set(sites_before) ^ set(sites_after)) or [
            name for name in sites_before if sites_before[name].shape != sites_after[name].shape
        ]
        raise ModelError("The two models have different sites or shapes", received=different[0])
    return {
        name: drift_from_moments(*dense_moments(site.weight, sites_after[name].weight))
        for name, site in sites_before.items()
    }
