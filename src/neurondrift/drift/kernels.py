"""The two inner loops of measuring drift on a CPU, compiled by numba: one pass over the weights as they are stored.

Owns nothing but arithmetic. torch would convert each block to float32 or float64 in memory first, which takes several
times as long as reading it. Importing numba takes a third of a second, so this module is imported where it is used.
Both loops run without the interpreter's lock. Shapes: O = out, I = in, R = rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
import torch
from numba import types
from numba.extending import intrinsic, overload

# Sums may be taken in another order and fused with products, so that they fill vector registers; NaN and infinity stay.
ARITHMETIC = {"reassoc", "contract", "nsz"}
# Rows of A that one pass over a weight is multiplied by.
UNROLLED = 8


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
    """‖w₀‖², ‖Δ‖² and w₀·Δ of each row, Δ = `now` - `base`: `[3, out]`, all in float64."""
    sums = np.empty((3, base_OI.shape[0]))
    _row_moments(stored(base_OI), stored(now_OI), sums)
    return sums


def low_rank_dots(a_RI: torch.Tensor, b_OR: torch.Tensor, base_OI: torch.Tensor) -> torch.Tensor:
    """w₀·Δ of each row of Δ = B A, float64 `[out]`: A w₀ in float32, its product with B in float64."""
    missing = -a_RI.shape[0] % UNROLLED
    a = torch.nn.functional.pad(a_RI.detach().float(), (0, 0, 0, missing))
    b = torch.nn.functional.pad(b_OR.detach().double(), (0, missing))
    dots = np.empty(base_OI.shape[0])
    _low_rank_dots(stored(a), stored(b), stored(base_OI), dots)
    return torch.from_numpy(dots)


def _compiled(loop: Callable[..., None]) -> Callable[..., None]:
    """The loop in machine code, kept on disk for the next process where there is a place to write."""
    try:
        kept: Callable[..., None] = numba.njit(loop, nogil=True, fastmath=ARITHMETIC, cache=True)
    except RuntimeError:  # neither the package's folder nor the user's cache can be written
        kept = numba.njit(loop, nogil=True, fastmath=ARITHMETIC)
    return kept


@intrinsic
def _bfloat16(context: Any, bits: Any) -> Any:
    """The float32 whose upper half is `bits`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        from llvmlite import ir

        wide = builder.zext(arguments[0], ir.IntType(32))
        return builder.bitcast(builder.shl(wide, ir.Constant(ir.IntType(32), 16)), ir.FloatType())

    return types.float32(types.uint16), generate


def _value(entry: Any) -> Any:
    """An entry as a number: bits are those of a bfloat16."""
    raise NotImplementedError("only within a compiled loop")


@overload(_value, inline="always")
def _value_in_loops(entry):  # type: ignore[no-untyped-def]  # numba compares the signatures, annotations included
    if isinstance(entry, types.Integer):
        return lambda entry: _bfloat16(entry)  # type: ignore[call-arg]
    return lambda entry: entry


@_compiled
def _row_moments(base: Any, now: Any, sums: Any) -> None:
    rows, columns = base.shape
    for i in range(rows):
        norm = squared = dot = 0.0
        for j in range(columns):
            w = np.float64(_value(base[i, j]))
            d = np.float64(_value(now[i, j])) - w
            norm += w * w
            squared += d * d
            dot += w * d
        sums[0, i], sums[1, i], sums[2, i] = norm, squared, dot


@_compiled
def _low_rank_dots(a: Any, b: Any, base: Any, dots: Any) -> None:
    rows, columns = base.shape
    zero = np.float32(0)
    for i in range(rows):
        dot = 0.0
        for k in range(0, a.shape[0], 8):
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
        dots[i] = dot
