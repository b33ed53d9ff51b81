"""How the inputs of a site are spread over directions: kept as tokens or as second moments, without what texts share.

Owns the sums over tokens, the leading directions, and what is asked of both. Knows no model and no change. Shapes:
I = in, N = tokens, O = out, R = a few rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch

KEPT_TOKENS = 512  # of an input that are kept before they are added to its moments
PARTS = 3  # of the data: safety, and the two halves of the ordinary set
SMALL = 256  # inputs up to which all eigenvectors are computed
# Of the iteration for the leading ones: rounds at most, vectors beside, residual of each, and of the largest.
ROUNDS, SPARE, CLOSE, ROUNDING = 40, 12, 1e-3, 1e-6


@dataclass(eq=False)
class Moments:
    """One input in each part of the data, float32: its tokens `[N, I]`, as long as these are no more than the rows of
    the three sums of x xᵀ `[I, I]` that they are added up to otherwise."""

    size: int
    device: torch.device
    tokens: list[int] = field(default_factory=lambda: [0] * PARTS)
    kept: list[list[torch.Tensor]] = field(default_factory=lambda: [[] for _ in range(PARTS)])
    sums: list[torch.Tensor] = field(default_factory=list)
    waiting: int = 0

    def add(self, inputs_NI: torch.Tensor, part: int) -> None:
        self.tokens[part] += len(inputs_NI)
        self.kept[part].append(inputs_NI.float())
        self.waiting += len(inputs_NI)
        if sum(self.tokens) > PARTS * self.size and self.waiting >= KEPT_TOKENS:
            self.sum_up()

    def sum_up(self) -> None:
        """Add the tokens that are kept to their sums."""
        for part, several in enumerate(self.kept):
            if not self.sums:
                self.sums = [torch.zeros(self.size, self.size, device=self.device) for _ in range(PARTS)]
            if several:
                inputs_NI = torch.cat(several)
                several.clear()
                self.sums[part].addmm_(inputs_NI.T, inputs_NI)
        self.waiting = 0


@dataclass(eq=False)
class Spread:
    """C of the inputs of a site on safety text and on either half of the ordinary text: as the sums of x xᵀ, float32
    `[I, I]`, or (where there are few) as the tokens x themselves, `[N, I]`. B: the directions that are taken out,
    float64 `[I, shared]`. What a part without tokens gives is NaN."""

    sums: Sequence[torch.Tensor]
    inputs: Sequence[torch.Tensor]
    counts: tuple[int, int, int]
    basis: torch.Tensor

    @property
    def tokens(self) -> tuple[float, ...]:
        """Of each part; NaN for none, as it is divided by."""
        return tuple(count or float("nan") for count in self.counts)

    @cached_property
    def projected(self) -> list[torch.Tensor]:
        """P x of the tokens with P = I - B Bᵀ, float32: formed in float64, as a few directions may hold nearly all."""
        return [(x.double() - (x.double() @ self.basis) @ self.basis.T).float() for x in self.inputs]

    @cached_property
    def rests(self) -> list[torch.Tensor]:
        """P C P, float32."""
        if not self.sums:
            return [x.T @ x / n for x, n in zip(self.projected, self.tokens, strict=True)]
        rests = []
        for total, n in zip(self.sums, self.tokens, strict=True):
            whole = total.double() / n
            rest = whole - self.basis @ (self.basis.T @ whole)
            rests.append((rest - (rest @ self.basis) @ self.basis.T).float())
        return rests

    @cached_property
    def diagonals(self) -> list[torch.Tensor]:
        """The diagonals of P C P, float64 `[I]`."""
        if not self.sums:
            pairs = zip(self.projected, self.tokens, strict=True)
            return [x.square().sum(dim=0, dtype=torch.float64) / n for x, n in pairs]
        found = []
        for total, n in zip(self.sums, self.tokens, strict=True):
            along = total.double() @ self.basis / n
            within = self.basis @ (self.basis.T @ along)
            found.append(total.diagonal().double() / n + ((within - 2 * along) * self.basis).sum(dim=1))
        return found

    def along(self, rows_RI: torch.Tensor) -> list[torch.Tensor]:
        """R P C P Rᵀ for a few rows, float64 `[R, R]`."""
        rest = rows_RI.double() - (rows_RI.double() @ self.basis) @ self.basis.T
        if self.sums:
            return [rest @ (total.double() / n) @ rest.T for total, n in zip(self.sums, self.tokens, strict=True)]
        moved = [(x @ rest.T.to(x)).double() for x in self.projected]
        return [one.T @ one / n for one, n in zip(moved, self.tokens, strict=True)]

    def squares(self, rows_OI: torch.Tensor) -> list[torch.Tensor]:
        """The diagonal of the same for many rows, `[O]`."""
        if self.sums or max(self.counts) > rows_OI.shape[1]:
            return [((rows_OI @ part.to(rows_OI)) * rows_OI).sum(dim=1) for part in self.rests]
        pairs = zip(self.projected, self.tokens, strict=True)
        return [(x.to(rows_OI) @ rows_OI.T).square().sum(dim=0) / n for x, n in pairs]

    def powers(self, found: Sequence[torch.Tensor], norm: torch.Tensor) -> torch.Tensor:
        """Powers of the three parts as `[members, 5]`: safety, all ordinary text, its halves, and ‖D‖²; float64."""
        safety, even, odd = (part.cpu().double().clamp(min=0) for part in found)
        whole = self.counts[1] + self.counts[2]
        shares = [(part, tokens) for part, tokens in ((even, self.counts[1]), (odd, self.counts[2])) if tokens]
        utility = torch.stack([part * (tokens / whole) for part, tokens in shares]).sum(dim=0) if shares else even
        return torch.stack([safety, utility, even, odd, norm.cpu().double().clamp(min=0)], dim=1)


def spread_of(moments: Moments, shared: int) -> Spread:
    if moments.sums:
        moments.sum_up()
    counts = (moments.tokens[0], moments.tokens[1], moments.tokens[2])
    device = torch.device("cpu") if moments.device.type == "mps" else moments.device  # which has no float64
    sums = [total.to(device) for total in moments.sums]
    none = torch.zeros(0, moments.size, device=device)
    inputs = [] if sums else [torch.cat([none, *(x.to(device) for x in part)]) for part in moments.kept]
    basis = torch.zeros(moments.size, 0, dtype=torch.float64, device=device)
    ordinary = counts[1] + counts[2]
    if shared and counts[0] and ordinary:
        weights = (0.5 / counts[0], 0.5 / ordinary, 0.5 / ordinary)
        if sums:
            both = torch.stack([total.double() * w for total, w in zip(sums, weights, strict=True)]).sum(dim=0)
            basis = leading(both, shared)
        else:
            rows = torch.cat([x * w**0.5 for x, w in zip(inputs, weights, strict=True)])
            basis = leading_of(rows, shared)
    return Spread(sums, inputs, counts, basis)


def leading(moments_II: torch.Tensor, count: int) -> torch.Tensor:
    """The leading eigenvectors of a symmetric matrix without negative eigenvalues, float64 `[I, count]`; of a large one
    by `_subspace`, or where that takes too long, by all eigenvectors."""
    size = len(moments_II)
    narrow_II = moments_II.float()
    found = _subspace(lambda v: narrow_II @ v, size, count, moments_II.device) if size > SMALL else None
    if found is not None:
        return torch.linalg.qr(moments_II @ found.double()).Q
    vectors = torch.linalg.eigh(moments_II).eigenvectors
    return vectors.flip(1)[:, :count]


def leading_of(rows_NI: torch.Tensor, count: int) -> torch.Tensor:
    """The same of Rᵀ R, which is formed only where it is small, or where the iteration takes too long."""
    size = rows_NI.shape[1]
    found = _subspace(lambda v: rows_NI.T @ (rows_NI @ v), size, count, rows_NI.device) if size > SMALL else None
    wide_NI = rows_NI.double()
    if found is None:
        return leading(wide_NI.T @ wide_NI, count)
    return torch.linalg.qr(wide_NI.T @ (wide_NI @ found.double())).Q


def _subspace(
    product: Callable[[torch.Tensor], torch.Tensor], size: int, count: int, device: torch.device
) -> torch.Tensor | None:
    """The leading eigenvectors of what `product` multiplies with, but for a last round: `[I, count]`, float32.

    Subspace iteration (Halko et al., arXiv 0909.4061) from a fixed start, until each residual is below a thousandth of
    its eigenvalue, so that a millionth of the direction's energy is left; None where that takes too long.
    """
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(size, count + SPARE, generator=generator).to(device)
    vectors: torch.Tensor = torch.linalg.qr(start).Q
    for _ in range(ROUNDS):
        moved = product(vectors)
        values, turn = torch.linalg.eigh(vectors.T @ moved)
        top, chosen = values.flip(0)[:count].clamp(min=0), turn.flip(1)[:, :count]
        residual = (moved @ chosen - (vectors @ chosen) * top).norm(dim=0)
        # What float32 cannot tell from the largest has no energy worth taking out.
        if bool((residual <= CLOSE * top + ROUNDING * values[-1]).all()):
            return vectors @ chosen
        vectors = torch.linalg.qr(moved).Q
    return None
