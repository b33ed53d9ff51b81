"""The compiled loops against dense float64, for every stored type and for shapes that fill no vector register."""

import numpy as np
import pytest
import torch

from neurondrift.drift.kernels import Tallies, low_rank_moments, row_moments


def assert_moments(measured, base, delta, *, rtol=1e-12):
    """‖w₀‖, ‖Δ‖², w₀·Δ (as a share of the two lengths) and ‖Δ⊥‖² against dense float64."""
    norm, squared, dot, across = map(torch.as_tensor, measured)
    base, delta = base.double(), delta.double()
    length = base.norm(dim=1)
    along = (base * delta).sum(dim=1) / length
    torch.testing.assert_close(norm, length, rtol=1e-12, atol=0)
    torch.testing.assert_close(squared, delta.square().sum(dim=1), rtol=1e-12, atol=0)
    assert ((dot - along * length).abs() <= rtol * length * delta.norm(dim=1)).all()
    expected = (delta - along[:, None] * base / length[:, None]).square().sum(dim=1)
    assert ((across - expected).abs() <= 1e3 * rtol * expected + 1e-15 * squared).all()


DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [1, 7, 16, 577])
def test_row_moments_equal_dense_float64(dtype, columns):
    generator = torch.Generator().manual_seed(columns)
    base = torch.randn(5, columns, generator=generator).to(dtype)
    now = (base.double() + 1e-2 * torch.randn(5, columns, generator=generator)).to(dtype)
    delta = now.double() - base.double()
    assert_moments(row_moments(base, now), base, delta)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rank", [1, 8, 13])
def test_low_rank_dots_equal_dense_float64(dtype, rank):
    generator = torch.Generator().manual_seed(rank)
    base = torch.randn(6, 70, generator=generator).to(dtype)
    a, b = torch.randn(rank, 70, generator=generator), torch.randn(6, rank, generator=generator).double()
    norm = base.double().norm(dim=1)
    assert_moments([norm, *low_rank_moments(a, b, base, norm)], base, b @ a.double(), rtol=1e-5)


def test_nan_and_infinity_stay_where_they_are():
    base = torch.ones(3, 40, dtype=torch.bfloat16)
    now = base.clone()
    now[0, 3], now[1, 5] = float("nan"), float("inf")
    squared = torch.from_numpy(row_moments(base, now)[1])
    assert squared[0].isnan() and squared[1].isinf() and squared[2] == 0


def test_strided_weights_are_taken_by_their_logical_rows():
    base = torch.randn(9, 4).T
    now = base + torch.randn(4, 9)
    expected = (now.double() - base.double()).square().sum(dim=1)
    torch.testing.assert_close(torch.from_numpy(row_moments(base, now)[1]), expected)


def test_a_change_along_the_row_leaves_its_own_part_across():
    base = torch.randn(4, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    delta = 0.3 * base
    delta[:, 0] += 1e-6
    along = (base * delta).sum(dim=1) / base.square().sum(dim=1)
    expected = (delta - along[:, None] * base).square().sum(dim=1)
    across = torch.from_numpy(row_moments(base, base + delta)[3])
    torch.testing.assert_close(across, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (70, 577), (2, 40_000)], ids=str)
def test_tallies_of_factors_equal_those_of_the_dense_change(dtype, shape):
    """Rows that do not fill a block, blocks of one row, groups that are empty or overlap; room used again."""
    generator = torch.Generator().manual_seed(shape[1])
    base = torch.randn(shape, generator=generator).to(dtype)
    a, b = torch.randn(6, shape[1], generator=generator), torch.randn(shape[0], 6, generator=generator).double()
    delta = (b @ a.double()).float()
    entries = np.arange(base.numel())
    parts = [entries[::3], entries[:0], entries[1::2], entries]
    flat, counts = np.concatenate(parts).astype(np.int32), [len(part) for part in parts]
    tallies = Tallies()
    for measured in (tallies.low_rank(a, b, base, flat, counts), tallies.dense(delta, base, flat, counts)):
        for part, both in zip(parts, measured, strict=True):
            moved = delta.reshape(-1)[part].abs().numpy()
            share = moved / base.float().reshape(-1)[part].abs().numpy()
            for values, tally in zip((moved, share), both, strict=True):
                codes = values.view(np.int32) >> 17
                assert (tally.zeros, tally.undefined, tally.bins.sum()) == (0, 0, len(values))
                if len(values):
                    assert (tally.bins == np.bincount(codes - tally.first)).all()
                    assert tally.mean == pytest.approx(values.mean(dtype=np.float64), rel=1e-9)
                    assert tally.variance == pytest.approx(values.var(dtype=np.float64), rel=1e-7, abs=1e-15)
                else:
                    assert np.isnan(tally.mean) and np.isnan(tally.variance)
