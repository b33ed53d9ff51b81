"""Directions that are removed are gone from weights and outputs, and every bit comes back."""

import pytest
import torch

from helpers.families import build, examples
from neurondrift.importance.directions import bases, overlap, projection
from neurondrift.interventions.acting.removal import remove_rank
from neurondrift.models.sites import linear_sites


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_removal_takes_the_directions_out_and_gives_every_bit_back(family, dtype):
    model, rows = build(family).to(dtype), examples()
    found = bases(model, rows, rank=3)
    sites = linear_sites(model)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    weights = {name: site.weight.double().clone() for name, site in sites.items()}
    with remove_rank(model, {name: projection(basis.directions) for name, basis in found.items()}):
        for name, basis in found.items():
            u = basis.directions
            expected = weights[name] - u @ (u.T @ weights[name])
            assert torch.equal(sites[name].weight, expected.to(dtype)), name
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    with (
        pytest.raises(RuntimeError, match="within"),
        remove_rank(model, {name: projection(basis.directions) for name, basis in found.items()}),
    ):
        raise RuntimeError("within")
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())


def test_the_outputs_lose_what_was_removed():
    """At response tokens of the first site nothing is left along U; its rank-r part was all of it."""
    model, rows = build("llama"), examples()
    name = next(iter(linear_sites(model)))
    basis = bases(model, rows, rank=3)[name]
    with remove_rank(model, {name: projection(basis.directions)}):
        again = bases(model, rows, rank=3)[name]
    assert again.energy == pytest.approx(basis.energy * (1 - basis.explained), rel=1e-4)
    assert overlap(basis.directions, again.directions) < 1e-6
