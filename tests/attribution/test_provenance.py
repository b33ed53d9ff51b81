"""Provenance against dense float64 gradients on every family; a step of gradient descent as the known answer."""

import copy

import pytest
import torch

import neurondrift as nd
from helpers.adapters import adapt
from helpers.attribution import built, gradients_at, mean_loss, merged, moved, per_site, weights_of
from helpers.families import FAMILIES, examples, save
from neurondrift.attribution import provenance as module
from neurondrift.attribution.provenance import UNMOVED
from neurondrift.models.sites import linear_sites, mlp_units

SAFETY, UTILITY = examples(5, seed=1), examples(6, seed=2)


def cosine(first, second):
    return (first * second).sum(dim=-1) / (first.norm(dim=-1) * second.norm(dim=-1))


@pytest.mark.parametrize("family", list(FAMILIES))
def test_equals_dense_gradients(family, tmp_path):
    before = built(family)
    after = moved(before, 0.01)
    save(before, tmp_path)
    start, end = weights_of(before), weights_of(after)
    change, _ = per_site(before, {name: end[name] - start[name] for name in start})
    pair = [
        per_site(before, gradients_at(before, start, lambda m, rows=rows: mean_loss(m, rows))[0])[0]
        for rows in (SAFETY, UTILITY)
    ]
    found = nd.provenance(after, SAFETY, UTILITY, initial=tmp_path, batch_size=3)
    assert set(found.rows) == set(change)
    for name, measure in found.rows.items():
        for values, gradients in ((measure.safety, pair[0][name]), (measure.utility, pair[1][name])):
            expected = cosine(change[name], -gradients)
            kept = gradients.norm(dim=1) > 1e-4 * gradients.norm(dim=1).max()
            torch.testing.assert_close(values.double()[kept], expected[kept], atol=2e-3, rtol=0)
        torch.testing.assert_close(measure.difference, measure.safety - measure.utility, equal_nan=True)
        torch.testing.assert_close(measure.directional, -measure.safety, equal_nan=True)
    for name, unit in mlp_units(linear_sites(before)).items():
        whole = [
            torch.cat([part[unit.down].T, *(part[site][unit.rows(offset)] for site, offset in unit.ups)], dim=1)
            for part in (change, *pair)
        ]
        if whole[1].norm() == 0 or whole[2].norm() == 0:
            continue  # an expert that no token was sent to
        kept = whole[1].norm(dim=1) > 1e-4 * whole[1].norm(dim=1).max()
        expected = cosine(whole[0], -whole[1])
        torch.testing.assert_close(found.units[name].safety.double()[kept], expected[kept], atol=2e-3, rtol=0)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_lora_in_factors_equals_the_dense_change(family, tmp_path):
    base = built(family)
    save(base, tmp_path)
    adapted = adapt(built(family), scale=0.1).eval()
    found = nd.provenance(adapted, SAFETY, UTILITY)
    expected = nd.provenance(merged(adapted, base), SAFETY, UTILITY, initial=tmp_path)
    for kind in ("rows", "units"):
        for name, measure in getattr(found, kind).items():
            other = getattr(expected, kind)[name]
            torch.testing.assert_close(measure.difference, other.difference, atol=2e-3, rtol=0)


def test_a_step_down_the_safety_loss_is_all_provenance(tmp_path):
    before = built("llama")
    save(before, tmp_path)
    after = copy.deepcopy(before)
    gradients, _ = gradients_at(before, weights_of(before), lambda m: mean_loss(m, SAFETY))
    for name, parameter in after.named_parameters():
        parameter.data -= 0.5 * gradients[name].float()
    found = nd.provenance(after, SAFETY, UTILITY, initial=tmp_path)
    for measure in (*found.rows.values(), *found.units.values()):
        torch.testing.assert_close(measure.safety, torch.ones_like(measure.safety), atol=5e-3, rtol=0)
        assert (measure.difference >= -1e-3).all() and (measure.directional < -0.99).all()


def test_batch_size_and_passes_do_not_matter(monkeypatch):
    adapted = adapt(built("llama"), scale=0.1).eval()
    expected = nd.provenance(adapted, SAFETY, UTILITY, batch_size=1)
    names = list(expected.rows)
    monkeypatch.setattr(module, "split_into_passes", lambda sizes, devices: [names[:4], names[4:]])
    found = nd.provenance(adapted, SAFETY, UTILITY, batch_size=50)
    for name, measure in expected.rows.items():
        torch.testing.assert_close(found.rows[name].difference, measure.difference, atol=1e-3, rtol=0)


def test_what_did_not_move_is_undefined_with_a_reason(tmp_path):
    before = built("llama")
    save(before, tmp_path)
    after = copy.deepcopy(before)
    name = "model.layers.1.mlp.up_proj"
    linear_sites(after)[name].weight[3] += 0.1
    found = nd.provenance(after, SAFETY, UTILITY, initial=tmp_path).rows[name]
    assert found.safety[3].isfinite() and found.safety.isnan().sum() == 23
    assert found.reasons == {UNMOVED: 23}
