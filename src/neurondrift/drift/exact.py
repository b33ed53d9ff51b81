"""Moments of a change -> drift: the formulas.

Owns the closed forms for low-rank and rescaled adapters and the dense form for everything else. Where Δ comes from is
the business of `models.adapters`. Writes no files and knows nothing of models.
Shapes: O = out, I = in, R = rank of all active adapters together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch

from neurondrift.models.adapters import Rescaled, stretch
from neurondrift.models.sites import row_blocks

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
    """‖Δ‖², w₀·Δ and ‖Δ⊥‖² of DoRA's Δᵢ = γᵢ w₀ᵢ + bᵢ A (`adapters.stretch`), without forming Δ, in float64.

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
