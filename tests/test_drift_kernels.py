"""The compiled loops against dense float64, for every stored type and for shapes that fill no vector register."""

import pytest
import torch

from neurondrift.drift.kernels import low_rank_dots, row_moments

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [1, 7, 16, 577])
def test_row_moments_equal_dense_float64(dtype, columns):
    generator = torch.Generator().manual_seed(columns)
    base = torch.randn(5, columns, generator=generator).to(dtype)
    now = (base.double() + 1e-2 * torch.randn(5, columns, generator=generator)).to(dtype)
    delta = now.double() - base.double()
    expected = torch.stack([base.double().square(), delta.square(), base.double() * delta]).sum(dim=2)
    torch.testing.assert_close(torch.from_numpy(row_moments(base, now)), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rank", [1, 8, 13])
def test_low_rank_dots_equal_dense_float64(dtype, rank):
    generator = torch.Generator().manual_seed(rank)
    base = torch.randn(6, 70, generator=generator).to(dtype)
    a, b = torch.randn(rank, 70, generator=generator), torch.randn(6, rank, generator=generator).double()
    expected = (base.double() * (b @ a.double())).sum(dim=1)
    size = base.double().norm(dim=1) * (b @ a.double()).norm(dim=1)
    assert ((low_rank_dots(a, b, base) - expected).abs() <= 1e-6 * size).all()


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
