"""The inner loops of measuring drift on a CPU, compiled by numba: one pass over the weights as they are stored.

Owns nothing but arithmetic. torch would convert each block to float32 or float64 in memory first, which takes several
times as long as reading it. Importing numba takes a third of a second, so this module is imported where it is used.
All loops run without the interpreter's lock. Shapes: O = out, I = in, R = rank, N = members of all groups, G = groups,
C = `CODES`. What the loops over members take, beside the `Running` counts and sums:

    name    shape     dtype                       meaning
    a       [R, I]    as stored, or float64       A of Δ = B A; R is a multiple of `UNROLLED`
    b       [O, R]    float64                     B of Δ = B A, scaling included
    block   [rows, I] float32                     some rows of Δ at a time, formed from A and B
    delta   [..]      float32                     Δ, flat, from the entry `start` on
    base    [O, I]    as stored (`stored`)        w₀, flat in `_tally`
    flat    [N]       int32 or int64              the members' entries, group after group, each ascending
    start   -         int64                       the first entry that `delta` holds
    stop    -         int64                       the entry after its last
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numba
import numpy as np
import numpy.typing as npt
import torch
from numba import types
from numba.extending import intrinsic, overload

from neurondrift.drift.bins import SHIFT

# Sums may be taken in another order and fused with products, so that they fill vector registers; NaN and infinity stay.
ARITHMETIC = {"reassoc", "contract", "nsz"}
# Rows of A that one pass over a weight is multiplied by. The loops name their eight sums one by one (`p0` to `p7`):
# LLVM keeps names in registers; an array of eight is written to memory at every step, which takes twelve times as long
# (and sums in another order).
UNROLLED = 8
# Below these shares of ‖Δ‖² the part across w₀, as a difference of two squares, has lost the accuracy of w₀·Δ
# (float32 or float64), and is taken from the row itself.
CANCELLED_FLOAT32 = 1e-2
CANCELLED_FLOAT64 = 1e-8
# The bits of a float32's absolute value: infinity's, and the largest. A bin of `bins` is such bits, shifted.
INFINITE, NO_BITS = 0x7F800000, 0x7FFFFFFF
CODES = 1 << 31 - SHIFT
# Members that are counted at a time.
CHUNK = 1 << 10
# Elements of Δ that are formed, and then looked up by every group, at a time.
FORMED = 1 << 15


def stored(weight_OI: torch.Tensor) -> npt.NDArray[Any]:
    """A CPU tensor as the loops take it, without a copy where it is contiguous: float32 and float64 as they are,
    bfloat16 as its bits in uint16, other types in float32."""
    weight_OI = weight_OI.detach().contiguous()
    if weight_OI.dtype == torch.bfloat16:
        return weight_OI.view(torch.uint16).numpy()
    if weight_OI.dtype in (torch.float32, torch.float64):
        return weight_OI.numpy()
    return weight_OI.float().numpy()


def row_moments(base_OI: torch.Tensor, now_OI: torch.Tensor) -> npt.NDArray[np.float64]:
    """‖w₀‖, ‖Δ‖², w₀·Δ and ‖Δ⊥‖² of each row, Δ = `now` - `base`: `[4, out]`, all in float64."""
    moments = np.empty((4, base_OI.shape[0]))
    _row_moments(stored(base_OI), stored(now_OI), moments)
    return moments


def low_rank_moments(
    a_RI: torch.Tensor, b_OR: torch.Tensor, base_OI: torch.Tensor, norm_O: torch.Tensor
) -> npt.NDArray[np.float64]:
    """‖Δ‖², w₀·Δ and ‖Δ⊥‖² of each row of Δ = B A, `[3, out]`, with ‖w₀‖ `[out]`.

    In float64 but for A w₀, which is float32; the few rows nearly parallel to w₀ are formed in float64.
    """
    moments = np.empty((3, base_OI.shape[0]))
    a, b = _factors(a_RI.detach().float(), b_OR)
    _low_rank_moments(a, b, stored(base_OI), stored(norm_O.double()), moments)
    return moments


def _factors(a_RI: torch.Tensor, b_OR: torch.Tensor) -> tuple[npt.NDArray[Any], npt.NDArray[np.float64]]:
    """A as it is and B in float64, with zeros up to a multiple of `UNROLLED`."""
    b_OR, missing = b_OR.detach().double(), -a_RI.shape[0] % UNROLLED
    if missing:
        a_RI = torch.nn.functional.pad(a_RI, (0, 0, 0, missing))
        b_OR = torch.nn.functional.pad(b_OR, (0, missing))
    return stored(a_RI), stored(b_OR)


class Running(NamedTuple):
    """What is counted and summed while Δ passes by, and how far each group has come; the loops write to it. The second
    axis of the last three is the metric: |Δ|, |Δ|/|w₀|."""

    at: npt.NDArray[np.int64]  # [G]: the group's next member in `flat`
    ends: npt.NDArray[np.int64]  # [G]: the place after its last
    table: npt.NDArray[np.int32]  # [G, 2, C]: how many values have each code
    numbers: npt.NDArray[np.int64]  # [G, 2, 4]: zeros, undefined, lowest and highest bits of the positive
    sums: npt.NDArray[np.float64]  # [G, 2, 3]: of the positive a shift, Σ(x - shift), Σ(x - shift)²


class Tally(NamedTuple):
    """Non-negative float32 values summed up: how many are zero or undefined (not finite), mean and variance of the
    others (zeros included; NaN where there are none), and the counts of the positive ones from code `first` on."""

    zeros: int
    undefined: int
    mean: float
    variance: float
    first: int
    bins: npt.NDArray[np.int32]


class Tallies:
    """Sums up |Δ| and |Δ|/|w₀| of groups of entries of a weight, one weight after the other: the room for it, two
    histograms a group (64 kB each)."""

    def __init__(self) -> None:
        self._table = np.zeros((0, 2, CODES), dtype=np.int32)

    def low_rank(
        self,
        a_RI: torch.Tensor,
        b_OR: torch.Tensor,
        base_OI: torch.Tensor,
        flat_N: npt.NDArray[Any],
        counts: Sequence[int],
    ) -> list[tuple[Tally, Tally]]:
        """Of Δ = B A, formed in float64 a few rows at a time and rounded to float32; else as `dense`."""
        (a, b), base = _factors(a_RI.detach().double(), b_OR), stored(base_OI)
        block = np.empty((max(1, FORMED // max(1, base.shape[1])), base.shape[1]), dtype=np.float32)
        return self._run(counts, lambda running: _tally_low_rank(a, b, block, base, flat_N, running))

    def dense(
        self, delta_OI: torch.Tensor, base_OI: torch.Tensor, flat_N: npt.NDArray[Any], counts: Sequence[int]
    ) -> list[tuple[Tally, Tally]]:
        """Of a Δ that is there in full, float32. The groups' entries lie in `flat_N` one group after the other, each
        ascending, `counts` of each group."""
        delta, base = stored(delta_OI), stored(base_OI)
        return self._run(counts, lambda running: _tally_dense(delta.reshape(-1), base, flat_N, running))

    def _run(self, counts: Sequence[int], loop: Callable[[Running], None]) -> list[tuple[Tally, Tally]]:
        groups = len(counts)
        if len(self._table) < groups:
            self._table = np.zeros((groups, 2, CODES), dtype=np.int32)
        ends = np.cumsum([0, *counts])
        numbers = np.zeros((groups, 2, 4), dtype=np.int64)
        numbers[:, :, 2] = NO_BITS
        running = Running(ends[:-1].copy(), ends[1:], self._table, numbers, np.zeros((groups, 2, 3)))
        loop(running)
        moments, stops = np.empty((groups, 2, 2)), np.empty((groups, 2), dtype=np.int64)
        bins = _finish(np.diff(ends), running, moments, stops)
        parts = np.split(bins, stops.reshape(-1)[:-1])
        tallies = [
            Tally(zeros, undefined, mean, variance, first, part)
            for (zeros, undefined, first, _), (mean, variance), part in zip(
                numbers.reshape(-1, 4).tolist(), moments.reshape(-1, 2).tolist(), parts, strict=True
            )
        ]
        return list(zip(tallies[::2], tallies[1::2], strict=True))


def _compiled(loop: Callable[..., Any]) -> Callable[..., Any]:
    """The loop in machine code, kept on disk for the next process where there is a place to write."""
    options: dict[str, Any] = {"nogil": True, "fastmath": ARITHMETIC, "error_model": "numpy"}
    try:
        kept: Callable[..., Any] = numba.njit(loop, cache=True, **options)
    except RuntimeError:  # neither the package's folder nor the user's cache can be written
        kept = numba.njit(loop, **options)
    return kept


def _bfloat16_in_code(context: Any, bits: Any) -> Any:
    """The float32 whose upper half is `bits`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        from llvmlite import ir

        wide = builder.zext(arguments[0], ir.IntType(32))
        return builder.bitcast(builder.shl(wide, ir.Constant(ir.IntType(32), 16)), ir.FloatType())

    return types.float32(types.uint16), generate


def _bits_in_code(context: Any, value: Any) -> Any:
    """The bits of a float32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        from llvmlite import ir

        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.uint32(types.float32), generate


_bfloat16: Any = intrinsic(_bfloat16_in_code)
_bits: Any = intrinsic(_bits_in_code)


def _value(entry: Any) -> Any:
    """An entry as a number: bits are those of a bfloat16."""
    raise NotImplementedError("only within a compiled loop")


@overload(_value, inline="always")
def _value_in_loops(entry):  # type: ignore[no-untyped-def]  # numba compares the signatures, annotations included
    if isinstance(entry, types.Integer):
        return lambda entry: _bfloat16(entry)
    return lambda entry: entry


@_compiled
def _row_moments(base: Any, now: Any, moments: Any) -> None:
    rows, columns = base.shape
    for i in range(rows):
        square = squared = dot = 0.0
        for j in range(columns):
            w = np.float64(_value(base[i, j]))
            d = np.float64(_value(now[i, j])) - w
            square += w * w
            squared += d * d
            dot += w * d
        across = squared - dot * dot / square
        if across < CANCELLED_FLOAT64 * squared:
            across = 0.0
            for j in range(columns):
                w = np.float64(_value(base[i, j]))
                off = np.float64(_value(now[i, j])) - w - dot / square * w
                across += off * off
        moments[0, i], moments[1, i], moments[2, i], moments[3, i] = np.sqrt(square), squared, dot, across


@_compiled
def _low_rank_moments(a: Any, b: Any, base: Any, norm: Any, moments: Any) -> None:
    rank, columns = a.shape
    gram = np.empty((rank, rank))
    for k in range(rank):
        for m in range(k + 1):
            inner = 0.0
            for j in range(columns):
                inner += np.float64(a[k, j]) * np.float64(a[m, j])
            gram[k, m] = gram[m, k] = inner
    zero = np.float32(0)
    for i in range(len(b)):
        squared = 0.0
        for k in range(rank):
            inner = 0.0
            for m in range(rank):
                inner += gram[k, m] * b[i, m]
            squared += b[i, k] * inner
        dot = 0.0
        for k in range(0, rank, UNROLLED):
            p0 = p1 = p2 = p3 = p4 = p5 = p6 = p7 = zero
            for j in range(columns):
                w = np.float32(_value(base[i, j]))
                p0 += w * a[k, j]
                p1 += w * a[k + 1, j]
                p2 += w * a[k + 2, j]
                p3 += w * a[k + 3, j]
                p4 += w * a[k + 4, j]
                p5 += w * a[k + 5, j]
                p6 += w * a[k + 6, j]
                p7 += w * a[k + 7, j]
            dot += b[i, k] * p0 + b[i, k + 1] * p1 + b[i, k + 2] * p2 + b[i, k + 3] * p3
            dot += b[i, k + 4] * p4 + b[i, k + 5] * p5 + b[i, k + 6] * p6 + b[i, k + 7] * p7
        across = squared - (dot / norm[i]) ** 2
        if across < CANCELLED_FLOAT32 * squared:
            row, same = np.empty(columns), np.empty(columns)
            _form(a, b, i, i, row, same)
            dot = across = 0.0
            for j in range(columns):
                dot += np.float64(_value(base[i, j])) * row[j]
            along = dot / norm[i] / norm[i]
            for j in range(columns):
                off = row[j] - along * np.float64(_value(base[i, j]))
                across += off * off
        moments[0, i], moments[1, i], moments[2, i] = squared, dot, across


@_compiled
def _form(a: Any, b: Any, i: int, m: int, first: Any, second: Any) -> None:
    """Rows i and m of B A in float64. Two at once need each number of A once; the rank is a multiple of `UNROLLED`."""
    first[:] = 0.0
    second[:] = 0.0
    for k in range(0, len(a), UNROLLED):
        x0, x1, x2, x3 = b[i, k], b[i, k + 1], b[i, k + 2], b[i, k + 3]
        x4, x5, x6, x7 = b[i, k + 4], b[i, k + 5], b[i, k + 6], b[i, k + 7]
        y0, y1, y2, y3 = b[m, k], b[m, k + 1], b[m, k + 2], b[m, k + 3]
        y4, y5, y6, y7 = b[m, k + 4], b[m, k + 5], b[m, k + 6], b[m, k + 7]
        for j in range(a.shape[1]):
            a0, a1, a2, a3, a4, a5, a6, a7 = (
                a[k, j],
                a[k + 1, j],
                a[k + 2, j],
                a[k + 3, j],
                a[k + 4, j],
                a[k + 5, j],
                a[k + 6, j],
                a[k + 7, j],
            )
            first[j] += x0 * a0 + x1 * a1 + x2 * a2 + x3 * a3 + x4 * a4 + x5 * a5 + x6 * a6 + x7 * a7
            second[j] += y0 * a0 + y1 * a1 + y2 * a2 + y3 * a3 + y4 * a4 + y5 * a5 + y6 * a6 + y7 * a7


@_compiled
def _tally_low_rank(a: Any, b: Any, block: Any, base: Any, flat: Any, running: Any) -> None:
    rows, columns = base.shape
    several = len(block)
    one, other = np.empty(columns), np.empty(columns)
    for first in range(0, rows, several):
        last = min(rows, first + several)
        for i in range(first, last, 2):
            m = min(i + 1, last - 1)
            _form(a, b, i, m, one, other)
            for j in range(columns):
                block[i - first, j] = np.float32(one[j])
            for j in range(columns):
                block[m - first, j] = np.float32(other[j])
        _tally(block.reshape(-1), first * columns, last * columns, base.reshape(-1), flat, running)


@_compiled
def _tally_dense(delta: Any, base: Any, flat: Any, running: Any) -> None:
    _tally(delta, 0, len(delta), base.reshape(-1), flat, running)


@_compiled
def _tally(delta: Any, start: int, stop: int, base: Any, flat: Any, running: Any) -> None:
    """The members from `start` to before `stop`, whose Δ lies in `delta` from its beginning on; `at` moves on."""
    at, ends, table, numbers, sums = running
    values = np.empty(CHUNK, dtype=np.float32)
    for g in range(len(at)):
        while at[g] < ends[g] and flat[at[g]] < stop:
            members = flat[at[g] : min(ends[g], at[g] + CHUNK)]
            many = len(members) if members[-1] < stop else np.searchsorted(members, stop)
            at[g] += many
            for n in range(many):
                values[n] = abs(np.float32(delta[members[n] - start]))
            _count(values[:many], table[g, 0], numbers[g, 0], sums[g, 0])
            for n in range(many):
                values[n] /= abs(np.float32(_value(base[members[n]])))
            _count(values[:many], table[g, 1], numbers[g, 1], sums[g, 1])


@_compiled
def _count(values: Any, table: Any, numbers: Any, sums: Any) -> None:
    """A histogram of the codes of all values, those of zero and of no number too, and the sums over the positive."""
    shift = sums[0]
    if shift == 0.0:  # a sum of squares about zero would lose the variance of values that hardly differ
        for value in values:
            if 0.0 < value < np.inf:
                shift = np.float64(value)
                break
    zeros = undefined = np.int32(0)
    lowest, highest = np.uint32(NO_BITS), np.uint32(0)
    total = squares = 0.0
    for value in values:
        bits = _bits(value) & np.uint32(NO_BITS)
        is_zero, is_undefined = bits == 0, bits >= np.uint32(INFINITE)
        zeros += np.int32(is_zero)
        undefined += np.int32(is_undefined)
        other = is_zero or is_undefined
        lowest = min(lowest, np.uint32(NO_BITS) if other else bits)
        highest = max(highest, np.uint32(0) if other else bits)
        off = 0.0 if other else np.float64(value) - shift
        total += off
        squares += off * off
    for value in values:
        table[(_bits(value) & np.uint32(NO_BITS)) >> np.uint32(SHIFT)] += 1
    numbers[0] += zeros
    numbers[1] += undefined
    numbers[2], numbers[3] = min(numbers[2], np.int64(lowest)), max(numbers[3], np.int64(highest))
    sums[0] = shift
    sums[1] += total
    sums[2] += squares


@_compiled
def _finish(counts: Any, running: Any, moments: Any, stops: Any) -> Any:
    """Mean and variance into `moments` [G, 2, 2], the first code in the place of the lowest bits, and all bins on end,
    each ending at its `stops` [G, 2]; the table is cleared."""
    _, _, table, numbers, sums = running
    needed = 0
    for g in range(len(counts)):
        for metric in range(2):
            if numbers[g, metric, 3]:
                needed += (numbers[g, metric, 3] >> SHIFT) - (numbers[g, metric, 2] >> SHIFT) + 1
    bins = np.empty(needed, dtype=np.int32)
    at = 0
    for g in range(len(counts)):
        for metric in range(2):
            zeros, undefined, lowest, highest = numbers[g, metric]
            defined, positive = counts[g] - undefined, counts[g] - undefined - zeros
            counted = table[g, metric]
            counted[0] -= zeros
            numbers[g, metric, 2] = 0
            mean = variance = 0.0 if defined else np.nan
            if positive:
                first, last = lowest >> SHIFT, highest >> SHIFT
                numbers[g, metric, 2] = first
                for code in range(first, last + 1):
                    bins[at] = counted[code]
                    counted[code] = 0
                    at += 1
                off = sums[g, metric, 1] / positive
                of_positive = sums[g, metric, 0] + off
                mean = of_positive * positive / defined
                variance = positive * (max(0.0, sums[g, metric, 2] / positive - off * off) + (of_positive - mean) ** 2)
                variance = (variance + zeros * mean**2) / defined
            if undefined:
                counted[INFINITE >> SHIFT :] = 0
            moments[g, metric, 0], moments[g, metric, 1] = mean, variance
            stops[g, metric] = at
    return bins
