"""ActSVD against a dense SVD of stored activations; the identities of projections; errors."""

import numpy as np
import pytest
import torch

from helpers.families import build, examples
from helpers.oracles import stored_inputs
from neurondrift.base.errors import ConfigError, DataError, ModelError
from neurondrift.importance import directions
from neurondrift.importance.directions import (
    bases,
    outside,
    overlap,
    plan_moments,
    projection,
    random_directions,
    safety_only,
    safety_only_directions,
    share_of_change,
)
from neurondrift.interventions.acting.removal import remove_rank
from neurondrift.models.sites import is_router, linear_sites

RANK = 3

ORACLES = ["llama", "phi3", "gpt2", "gpt_neox", "mixtral", "qwen3_moe"]


@pytest.mark.parametrize("wanted", [RANK, 1])
@pytest.mark.parametrize("family", ORACLES)
def test_equals_a_dense_svd_of_wx(family, wanted):
    model, rows = build(family), examples()
    inputs = stored_inputs(model, rows)
    found = bases(model, rows, rank=wanted, batch_size=3)
    assert list(found) == list(linear_sites(model))
    compared = 0
    for name, site in linear_sites(model).items():
        weight = site.weight.double().numpy()
        basis = found[name]
        assert basis.tokens == len(inputs[name])
        if basis.tokens == 0:
            assert basis.directions.shape[1] == 0
            continue
        outputs = weight @ inputs[name].T
        left, values, right = np.linalg.svd(outputs, full_matrices=False)
        u = basis.directions.numpy()
        rank = u.shape[1]
        assert rank == min(wanted, np.linalg.matrix_rank(outputs, tol=1e-6 * values[0]))
        np.testing.assert_allclose(u.T @ u, np.eye(rank), atol=1e-10)
        np.testing.assert_allclose(basis.lengths.numpy(), values[:rank], rtol=1e-4)
        np.testing.assert_allclose(basis.energy, (outputs**2).sum(), rtol=1e-4)
        # The best rank-r approximation of W X, and the weight that gives it.
        best = (left[:, :rank] * values[:rank]) @ right[:rank]
        assert np.linalg.norm(u @ (u.T @ outputs) - best) < 1e-4 * np.linalg.norm(best), name
        dense = left[:, :rank] @ (left[:, :rank].T @ weight)
        assert np.linalg.norm(u @ (u.T @ weight) - dense) < 1e-4 * np.linalg.norm(dense), name
        compared += 1
    assert compared > len(found) / 2


def test_moments_are_of_inputs_or_outputs_whichever_is_smaller():
    sites = linear_sites(build("llama"))
    shapes = {site.module_type: site.shape for site in sites.values()}
    assert shapes["up_proj"] == (24, 16)
    assert shapes["down_proj"] == (16, 24)
    for kind, of_outputs in (("up_proj", False), ("down_proj", True), ("q_proj", True), ("k_proj", True)):
        site = next(site for site in sites.values() if site.module_type == kind)
        moments = directions._Moments(site=site, factor=None)
        assert moments.of_outputs is of_outputs
        assert len(moments.matrix) == min(site.shape)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe"])
def test_batch_size_padding_and_passes_do_not_matter(family, monkeypatch):
    model, rows = build(family), examples()
    reference = bases(model, rows, rank=RANK, batch_size=1)
    monkeypatch.setattr(directions, "KEPT_TOKENS", 5)
    sites = linear_sites(model)
    size = sum(directions.moment_bytes(site) for site in sites.values())
    monkeypatch.setattr("neurondrift.importance.scores.free_memory", lambda device: size // 2)
    assert len(plan_moments(sites)) > 2
    assert [name for part in plan_moments(sites) for name in part] == list(sites)
    for batch_size, side in [(3, "right"), (8, "left")]:
        other = bases(model, rows, rank=RANK, batch_size=batch_size, padding_side=side)
        assert list(other) == list(reference)
        for name in reference:
            one, two = reference[name], other[name]
            assert one.tokens == two.tokens
            assert torch.allclose(one.lengths, two.lengths, rtol=1e-5)
            if one.directions.shape[1]:
                assert overlap(one.directions, two.directions) > 1 - 1e-6, (name, batch_size, side)


def test_few_tokens_give_fewer_directions():
    model = build("llama")
    rows = [{"input_ids": [1, 5, 9, 12], "labels": [-100, -100, 9, 12]}]
    for basis in bases(model, rows, rank=5).values():
        assert basis.tokens == 2
        assert basis.directions.shape[1] == 2
        assert basis.explained == pytest.approx(1)


def subspace_pair(seed=0, out=20, safety=4, utility=6):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, 11, dtype=torch.float64, generator=generator)
    return weight, random_directions(out, safety, generator), random_directions(out, utility, generator)


def apply(change, weight):
    return change.left @ (change.right @ weight)


def test_the_projection_identities_of_the_paper():
    weight, safety, utility = subspace_pair()
    kept = apply(projection(safety), weight)
    assert torch.allclose(kept + (weight - kept), weight, atol=1e-14)
    assert torch.allclose(apply(projection(safety), kept), kept, atol=1e-13)  # a projection
    assert float((kept * (weight - kept)).sum()) == pytest.approx(0, abs=1e-12)  # orthogonal
    delta = apply(safety_only(safety, utility), weight)
    dense = (torch.eye(20, dtype=torch.float64) - utility @ utility.T) @ safety @ safety.T @ weight
    assert torch.allclose(delta, dense, atol=1e-13)
    assert float((utility.T @ delta).norm()) < 1e-13 * float(delta.norm())  # Π_u ΔW = 0
    assert int(torch.linalg.matrix_rank(delta)) <= 4
    # W - ΔW = Π_u W + (I - Π_u)(I - Π_s) W: utility's part is untouched.
    assert torch.allclose(utility.T @ (weight - delta), utility.T @ weight, atol=1e-13)
    span = safety_only_directions(safety, utility)
    assert span.shape == (20, 4)
    assert torch.allclose(span @ (span.T @ delta), delta, atol=1e-13)


def test_no_utility_is_plain_actsvd_and_all_utility_leaves_nothing():
    weight, safety, utility = subspace_pair()
    nothing = torch.zeros(20, 0, dtype=torch.float64)
    assert torch.equal(apply(safety_only(safety, nothing), weight), apply(projection(safety), weight))
    around = torch.linalg.qr(torch.cat([safety, utility], dim=1)).Q  # contains the safety subspace
    assert float(apply(safety_only(safety, around), weight).norm()) < 1e-13 * float(weight.norm())
    assert safety_only_directions(safety, around).shape == (20, 0)
    assert overlap(safety, around) == pytest.approx(1)
    half = torch.linalg.qr(torch.cat([safety[:, :1], utility], dim=1)).Q  # contains one safety direction
    assert safety_only_directions(safety, half).shape == (20, 3)
    assert float(outside(safety, half)[:, 0].norm()) < 1e-13


def test_share_of_a_change_inside_is_one_and_of_a_random_one_r_over_out():
    generator = torch.Generator().manual_seed(0)
    u = random_directions(64, 8, generator)
    inside = u @ torch.randn(8, 5, dtype=torch.float64, generator=generator)
    factor = torch.randn(5, 30, dtype=torch.float64, generator=generator)
    share = share_of_change(u, inside, factor @ factor.T)
    assert share.inside / share.total == pytest.approx(1)
    assert share.total == pytest.approx(float((inside @ factor).square().sum()))
    shares = []
    for _ in range(400):
        b = torch.randn(64, 5, dtype=torch.float64, generator=generator)
        low_rank, dense = share_of_change(u, b, factor @ factor.T), share_of_change(u, b @ factor)
        assert low_rank.inside == pytest.approx(dense.inside)
        assert low_rank.total == pytest.approx(dense.total)
        shares.append(dense.inside / dense.total)
    assert np.mean(shares) == pytest.approx(8 / 64, abs=4 * np.std(shares) / 20)


def test_the_share_in_outputs_needs_no_activations():
    model, rows = build("llama"), examples()
    inputs = stored_inputs(model, rows)
    sites = linear_sites(model)
    generator = torch.Generator().manual_seed(1)
    factors = {name: torch.randn(2, site.shape[1], generator=generator) for name, site in sites.items()}
    found = bases(model, rows, rank=RANK, factors=factors, batch_size=4)
    for name, basis in found.items():
        b = torch.randn(sites[name].shape[0], 2, dtype=torch.float64, generator=generator)
        changed = b @ factors[name].double() @ torch.from_numpy(inputs[name].T)  # Δ X
        share = share_of_change(basis.directions, b, basis.inner)
        assert share.total == pytest.approx(float(changed.square().sum()), rel=1e-4)
        assert share.inside == pytest.approx(float((basis.directions.T @ changed).square().sum()), rel=1e-4)


def test_random_directions_are_orthonormal_and_repeatable():
    one, two = (random_directions(12, 4, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(one, two)
    assert torch.allclose(one.T @ one, torch.eye(4, dtype=torch.float64), atol=1e-14)


def test_errors_name_what_is_wrong():
    model, rows = build("llama"), examples(3)
    with pytest.raises(ConfigError, match=r"site model\.layers\.0\.self_attn\.k_proj \[8, 16\].*9.*1 to 8"):
        bases(model, rows, rank=9)
    with pytest.raises(ConfigError, match="at least 1"):
        bases(model, rows, rank=0)
    with pytest.raises(DataError, match="Example 0 has no response token"):
        bases(model, [{"input_ids": [3, 4], "labels": [-100, -100]}], rank=2)
    with pytest.raises(DataError, match="no examples"):
        bases(model, [], rank=2)
    u = random_directions(16, 2, torch.Generator().manual_seed(0))
    with pytest.raises(ModelError, match="no such site.*'nowhere'"), remove_rank(model, {"nowhere": projection(u)}):
        pass
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    fits, does_not = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"
    with (
        pytest.raises(ModelError, match=f"do not fit the outputs of {does_not}"),
        remove_rank(model, {fits: projection(u), does_not: projection(u)}),
    ):
        pass
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    router = build("mixtral")
    assert any(is_router(site.owner) for site in linear_sites(router).values())
    with pytest.raises(ConfigError, match=r"gate .*1 to 4"):
        bases(router, rows, rank=5)
