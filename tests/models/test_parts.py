"""Which rows, columns and entries of which site a group means."""

import pytest
import torch

from helpers.families import build
from helpers.frozen import mask_of
from helpers.groups import group_of
from neurondrift.base.errors import GroupError
from neurondrift.groups.selection import select_top
from neurondrift.models.parts import parts, row_marks, weights_of_units
from neurondrift.models.sites import linear_sites, mlp_units


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe"])
def test_rows_columns_and_entries_cover_the_group_once(family):
    model = build(family)
    sites = linear_sites(model)
    shapes = {name: site.shape for name, site in sites.items()}
    units = group_of(model, "unit")
    some = group_of(model, "weight") | weights_of_units(units, mlp_units(sites), shapes)
    for group in (units, some, group_of(model, "neuron")):
        masks = mask_of(model, group)
        for name, part in parts(group, sites).items():
            seen = torch.zeros(shapes[name], dtype=torch.bool)
            for index in part.indices(torch.device("cpu")):
                seen[index] = True
            assert torch.equal(seen, masks[name])
            assert part.weights == int(seen.sum())
            if group is units:
                assert not len(part.entries)
    wide = parts(weights_of_units(units, mlp_units(sites), shapes), sites)
    assert all(not len(part.entries) for part in wide.values())  # units as weights need no mask either


def test_marks_of_rows_notice_one_bit():
    weight = torch.randn(50, 30)
    weight[0, 0] = 0.0
    changed = weight.clone()
    changed[0, 0] = -0.0
    changed[7, 3] = torch.nextafter(changed[7, 3], torch.tensor(9.0))
    assert torch.nonzero(row_marks(weight) != row_marks(changed)).flatten().tolist() == [0, 7]
    assert torch.equal(row_marks(weight.bfloat16().T), row_marks(weight.bfloat16().T.contiguous()))


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "opt", "gpt_neox", "mixtral", "qwen3_moe"])
def test_units_are_the_rows_and_the_column_of_one_hidden_unit(family):
    from neurondrift.models.parts import unit_scores, weights_of_units
    from neurondrift.models.sites import linear_sites, mlp_units

    model = build(family)
    sites = linear_sites(model)
    units, shapes = mlp_units(sites), {name: site.shape for name, site in sites.items()}
    scored = {name: site.weight.abs() for name, site in sites.items()}
    group = select_top(unit_scores(scored, units), fraction=0.1, granularity="unit")
    assert set(group.shapes) == set(units)
    weights = weights_of_units(group, units, shapes)
    total = sum(
        float(scored[site].reshape(-1)[torch.from_numpy(indices)].sum()) for site, indices in weights.members.items()
    )
    expected = sum(float(unit_scores(scored, units)[name][indices].sum()) for name, indices in group.members.items())
    assert total == pytest.approx(expected, rel=1e-5)
    # zeroing these weights is the same as silencing the units: the MLP's outputs no longer depend on their inputs
    if family == "llama":
        name, chosen = next(iter(group.members.items()))
        mlp, hidden = model.get_submodule(name), torch.randn(3, 16)
        gated = mlp.act_fn(mlp.gate_proj(hidden)) * mlp.up_proj(hidden)
        gated[:, torch.from_numpy(chosen)] = 0
        expected_output = mlp.down_proj(gated)
        for site, indices in weights.members.items():
            if site.startswith(name):
                sites[site].weight.view(-1)[torch.from_numpy(indices)] = 0
        assert torch.allclose(mlp(hidden), expected_output, atol=1e-6)
    with pytest.raises(GroupError, match="Only a group of hidden units"):
        weights_of_units(weights, units, shapes)
