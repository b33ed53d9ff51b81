"""Interventions undo themselves bit for bit, add up, and are the dense model that they stand for."""

import numpy as np
import pytest
import torch

import neurondrift as nd
from helpers.adapters import random_lora
from helpers.families import build
from helpers.groups import everything, shapes_of, some
from neurondrift.base.errors import GroupError, ModelError
from neurondrift.groups.group import Group
from neurondrift.interventions.acting.contexts import adapter_delta, save_model
from neurondrift.models.sites import fingerprint, linear_sites, mlp_units

FAMILIES = ("llama", "gpt2")

GRANULARITIES = ("neuron", "weight", "unit")

IDS = torch.arange(3, 43).view(2, 20)


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits.clone()


def bits(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_bits(before, model):
    return all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def delta_now(model):
    return {name: adapter_delta(site) for name, site in linear_sites(model).items()}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_leaving_restores_every_bit_also_after_an_exception(family, granularity, dtype):
    model = random_lora(family, dtype=dtype)
    group = some(model, granularity)
    before, answers = bits(model), logits(model)
    contexts = [
        lambda: nd.prune(model, group),
        lambda: nd.prune(model, group, mode="mean"),
        lambda: nd.rewind(model, group),
        lambda: nd.transplant(model, group),
    ]
    for context in contexts:
        with context():
            assert not torch.equal(logits(model), answers)
        assert same_bits(before, model)
        assert torch.equal(logits(model), answers)
        with pytest.raises(KeyboardInterrupt), context():
            raise KeyboardInterrupt
        assert same_bits(before, model)
        assert torch.equal(logits(model), answers)
    with nd.rewind(model, group), nd.prune(model, some(model, "weight", seed=5)):
        pass
    assert same_bits(before, model)
    assert torch.equal(logits(model), answers)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("granularity", ["neuron", "weight"])
def test_everything_transplanted_is_the_tuned_model_and_everything_rewound_the_original(family, granularity):
    model = random_lora(family)
    group = everything(model, granularity)
    tuned = logits(model)
    with model.disable_adapter():
        original = logits(model)
    assert not torch.equal(tuned, original)
    with nd.transplant(model, group) as applied:
        assert torch.equal(logits(model), tuned)
    assert applied == (len(group), len(group), 0)
    with nd.rewind(model, group):
        assert torch.equal(logits(model), original)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_group_and_its_complement_add_up_to_the_change_exactly(family, granularity):
    model = random_lora(family)
    group = some(model, granularity)
    if granularity == "unit":  # units do not cover attention: their complement is one of weights
        group = nd.weights_of_units(group, mlp_units(linear_sites(model)), shapes_of(model))
    whole = delta_now(model)
    rest = group.complement()
    with nd.transplant(model, group):
        first, answers = delta_now(model), logits(model)
    with nd.transplant(model, rest):
        second = delta_now(model)
    with nd.rewind(model, rest):
        assert all(torch.equal(delta, first[name]) for name, delta in delta_now(model).items())
        assert torch.equal(logits(model), answers)  # rewind(complement) = transplant(group), to the bit
    for name, delta in whole.items():
        assert torch.equal(first[name] + second[name], delta)
        assert not ((first[name] != 0) & (second[name] != 0)).any()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("what", ["prune", "mean", "rewind", "transplant"])
def test_contexts_are_the_dense_model_in_float64(family, granularity, what):
    """The oracle: a plain model whose weights are written by hand, W₀ + M ∘ Δ in float64."""
    model, plain = random_lora(family), build(family).double()
    group = some(model, granularity)
    dense = (
        nd.weights_of_units(group, mlp_units(linear_sites(model)), shapes_of(model)) if granularity == "unit" else group
    )
    sites, targets = linear_sites(model), linear_sites(plain)
    for name, site in sites.items():
        layer = site.wrapper
        change = (layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double()) * 5 / 3
        mask = torch.from_numpy(dense.mask(name)).expand(2, -1).T if granularity == "neuron" else dense.mask(name)
        mask = torch.as_tensor(mask)[:, :1].expand(site.shape) if granularity == "neuron" else torch.as_tensor(mask)
        now = site.weight.double() + change
        if what == "prune":
            now = now.masked_fill(mask, 0)
        elif what == "mean":
            if granularity == "weight":
                filled = now.mean().expand(site.shape)
            elif granularity == "unit" and name.endswith(("down_proj", "mlp.c_proj")):
                filled = now.mean(1, keepdim=True).expand(site.shape)
            else:
                filled = now.mean(0).expand(site.shape)
            now = torch.where(mask, filled, now)
        else:
            keep = mask if what == "transplant" else ~mask
            now = site.weight.double() + change * keep
        targets[name].weight.copy_(now)
    context = nd.prune(model, group, mode="mean") if what == "mean" else getattr(nd, what)(model, group)
    with context:
        assert torch.allclose(logits(model).double(), logits(plain), atol=2e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_fully_tuned_models_by_the_other_models_weights(family):
    before, after = build(family, seed=0), build(family, seed=1)
    initial = {name: site.weight.clone() for name, site in linear_sites(before).items()}
    tuned = {name: site.weight.clone() for name, site in linear_sites(after).items()}
    group, bits_before, bits_after = some(before, "weight"), bits(before), bits(after)
    with nd.rewind(after, group, initial=initial.__getitem__), nd.transplant(before, group, tuned=tuned.__getitem__):
        for name, site in linear_sites(after).items():
            mask = torch.from_numpy(group.mask(name))
            assert torch.equal(site.weight, torch.where(mask, initial[name], tuned[name]))
            planted = linear_sites(before)[name].weight
            assert torch.equal(planted, torch.where(mask, tuned[name], initial[name]))
    assert same_bits(bits_before, before)
    assert same_bits(bits_after, after)
    with nd.rewind(after, everything(after, "neuron"), initial=initial.__getitem__):
        assert all(torch.equal(site.weight, initial[name]) for name, site in linear_sites(after).items())


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_model_is_the_one_in_the_context(family, granularity, tmp_path):
    model = random_lora(family)
    group = some(model, granularity)
    with nd.rewind(model, group):
        expected = logits(model)
        save_model(model, tmp_path / "saved")
    read = type(build(family)).from_pretrained(tmp_path / "saved").eval()
    assert read.dtype == torch.float32
    assert torch.allclose(logits(read), expected, atol=1e-5)
    with model.disable_adapter(), nd.prune(model, group):
        expected = logits(model)
        save_model(model, tmp_path / "pruned")
    assert torch.allclose(logits(type(read).from_pretrained(tmp_path / "pruned").eval()), expected, atol=1e-6)


def test_the_masked_adapter_is_saved_by_peft_itself(tmp_path):
    model = random_lora("llama")
    with nd.transplant(model, some(model, "neuron")):
        expected = logits(model)
        model.save_pretrained(tmp_path)
    from peft import PeftModel

    assert torch.equal(logits(PeftModel.from_pretrained(build("llama"), tmp_path).eval()), expected)


def test_members_outside_the_trained_sites_are_counted_or_refused():
    model = random_lora("llama", targets=["q_proj", "v_proj"])
    group = some(model, "neuron")
    inside = sum(len(rows) for name, rows in group.members.items() if name.endswith(("q_proj", "v_proj")))
    with nd.rewind(model, group) as applied:
        assert applied == (len(group), inside, len(group) - inside)
    outside = group.with_members({n: r for n, r in group.members.items() if n.endswith("o_proj")}, {})
    nothing = r"No member of the group lies in a trained site: rewind can do nothing"
    with pytest.raises(GroupError, match=nothing), nd.rewind(model, outside):
        pass
    with nd.prune(model, outside) as applied:
        assert applied.outside == 0


def test_mistakes_are_named():
    model = random_lora("llama")
    group = some(model, "neuron")
    foreign = Group(granularity="neuron", members=group.members, shapes=group.shapes, provenance={"model": "feed"})
    for context in (nd.prune, nd.rewind, nd.transplant):
        with pytest.raises(GroupError, match="made from another model"), context(model, foreign):
            pass
    own = Group(
        granularity="neuron", members=group.members, shapes=group.shapes, provenance={"model": fingerprint(model)}
    )
    with nd.rewind(model, own):
        pass
    with pytest.raises(ModelError, match="no active adapter"), nd.rewind(build("llama"), group):
        pass
    for site, row, message in (("nowhere", 0, "no site nowhere"), ("model.layers.0.mlp.up_proj", 24, "beyond the end")):
        wrong = Group(granularity="neuron", members={site: np.array([row])})
        with pytest.raises(GroupError, match=message), nd.prune(model, wrong):
            pass
    with pytest.raises(GroupError, match="no such way"), nd.prune(model, group, mode="median"):
        pass
    model.merge_adapter()
    with pytest.raises(ModelError, match="merged"), nd.rewind(model, group):
        pass
