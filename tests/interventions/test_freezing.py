"""Frozen means bit-equal: in every family, granularity and way of training, whatever the optimizer does."""

import copy

import numpy as np
import pytest
import torch
from peft import get_peft_model

from helpers.adapters import lora_on
from helpers.families import build, examples
from helpers.frozen import OPTIMIZERS, check_frozen, effective, loss_of, mask_of, train, weights
from helpers.groups import group_of
from neurondrift.base.errors import FreezeError, GroupError
from neurondrift.drift.meter import measure_drift
from neurondrift.groups.group import Group
from neurondrift.interventions.acting.freezing import freeze
from neurondrift.models.masked_lora import lora_factors
from neurondrift.models.sites import linear_sites

GRANULARITIES = ["neuron", "weight", "unit"]


def with_experts(model):
    """LoRA on attention and on the 3-D parameters of the experts."""
    return lora_on(
        model,
        target_modules=["q_proj", "o_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe"])
def test_full_fine_tuning_leaves_frozen_weights_bit_equal(family, granularity, optimizer):
    model = build(family)
    group, before = group_of(model, granularity), weights(model)
    frozen, first, last = train(model, group, optimizer=optimizer, accumulation=2)
    masks = check_frozen(model, before, group)
    assert last < first
    for name, site in linear_sites(model).items():
        # Everything that is free moved: weight decay reaches every weight that is not zero.
        assert bool((site.weight != before[name])[~masks[name]].all()) or site.expert is not None, name
    report = frozen.report
    assert report.weights == sum(int(mask.sum()) for mask in masks.values())
    assert report.outside == 0 and report.members == len(group)
    rows = {name: (site.weight != before[name]).any(dim=1) for name, site in linear_sites(model).items()}
    assert report.moved == sum(int(moved.sum()) for moved in rows.values())


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_lora_leaves_frozen_weights_of_the_effective_model_bit_equal(family, granularity, optimizer):
    model = build(family)
    group, before = group_of(model, granularity), weights(model)
    wrapped = lora_on(model, use_rslora=family == "gpt2")
    frozen, first, last = train(wrapped, group, optimizer=optimizer, accumulation=2)
    check_frozen(wrapped, before, group)
    assert last < first
    _, change = effective(wrapped)
    assert frozen.report.moved == sum(int((delta != 0).any(dim=1).sum()) for delta in change.values())
    assert frozen.report.weights == sum(int(mask.sum()) for mask in mask_of(wrapped, group).values())
    assert all(torch.equal(site.weight, before[name]) for name, site in linear_sites(wrapped).items())


@pytest.mark.parametrize("granularity", ["neuron", "unit"])
def test_lora_on_experts(granularity):
    model = build("qwen3_moe")
    group, before = group_of(model, granularity), weights(model)
    wrapped = with_experts(model)
    _, first, last = train(wrapped, group)
    masks = check_frozen(wrapped, before, group)
    assert last < first
    # What PEFT itself adds, asked of its own function.
    for name, site in linear_sites(wrapped).items():
        if site.expert is not None:
            layer = lora_factors(site)[0].layer
            delta = layer.get_delta_weight("default").detach()[site.expert]
            assert not delta[masks[name]].any()
            assert torch.allclose(delta, effective(wrapped)[1][name])


def test_single_weights_of_experts_under_lora_are_refused():
    model = build("qwen3_moe")
    with pytest.raises(FreezeError, match=r"Single weights of .*ParamWrapper.*whole neurons and hidden units"):
        freeze(with_experts(model), group_of(model, "weight"))


@pytest.mark.parametrize("granularity", ["neuron", "weight"])
def test_the_drift_of_frozen_neurons_is_exactly_zero(granularity):
    model = build("llama")
    group = group_of(model, "neuron")
    if granularity == "weight":  # single weights of half a row, and whole rows
        name, site = next(iter(linear_sites(model).items()))
        width = site.shape[1]
        entries = np.concatenate([np.arange(3 * width, 4 * width), np.arange(5 * width, 5 * width + width // 2)])
        group = Group(granularity="weight", members={name: entries}, shapes={name: site.shape})
    before = weights(model)
    wrapped = lora_on(model)
    train(wrapped, group)
    drift = measure_drift(wrapped)
    masks = mask_of(wrapped, group)
    total, _ = effective(wrapped)
    for name, measured in drift.items():
        frozen = masks[name].all(dim=1)
        assert not measured.l2[frozen].any() and not measured.cosine_distance[frozen].any()
        expected = (total[name] - before[name].double()).norm(dim=1)
        assert torch.allclose(measured.l2.double(), expected, rtol=1e-4)
        assert (measured.l2[~frozen] > 0).all()


def test_the_gradient_norm_is_that_of_the_free_weights():
    """Clipping by a norm that frozen entries enter would slow the others down."""
    for granularity in GRANULARITIES:
        model = build("llama")
        group = group_of(model, granularity)
        masks = mask_of(model, group)
        plain = copy.deepcopy(model)
        loss_of(plain, examples(4)).backward()
        squares = sum(float(p.grad.square().sum()) for p in plain.parameters())
        squares -= sum(
            float(site.oriented(site.tensor.grad)[masks[name]].square().sum())
            for name, site in linear_sites(plain).items()
        )
        freeze(model, group)
        loss_of(model, examples(4)).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)
        assert float(norm) == pytest.approx(squares**0.5, rel=1e-5)


def test_a_gradient_that_is_not_finite_does_not_reach_frozen_weights():
    model = build("llama")
    group, before = group_of(model, "neuron"), weights(model)
    frozen = freeze(model, group)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    (loss_of(model, examples(4)) * float("nan")).backward()
    optimizer.step()
    frozen.restore()
    masks = mask_of(model, group)
    for name, site in linear_sites(model).items():
        assert torch.equal(site.weight[masks[name]], before[name][masks[name]])
        assert site.weight[~masks[name]].isnan().all()


def test_without_the_freeze_the_same_training_does_move_them():
    """The test of the tests: the checks above fail where nothing is held, or where only the gradient is."""
    model = build("llama")
    group, before = group_of(model, "neuron"), weights(model)
    frozen = freeze(model, group)
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    loss_of(model, examples(4)).backward()
    optimizer.step()  # no restore(): weight decay leaks
    with pytest.raises(FreezeError, match="have moved while training"):
        frozen.verify()
    with pytest.raises(AssertionError):
        check_frozen(model, before, group)
    frozen.restore()
    assert frozen.verify().moved > 0
    frozen.release()


def test_nothing_that_moves_is_an_error():
    model = build("llama")
    with pytest.raises(FreezeError, match="Nothing moved"), freeze(model, group_of(model, "neuron")):
        pass
    wrapped = lora_on(build("llama"))
    with pytest.raises(FreezeError, match="Nothing moved"):
        freeze(wrapped, group_of(wrapped, "weight")).verify()


def test_hooks_are_gone_afterwards():
    model = build("llama")
    with pytest.raises(ValueError, match="stop"), freeze(model, group_of(model, "neuron")):
        raise ValueError("stop")
    before = weights(model)
    loss_of(model, examples(4)).backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert all((site.weight != before[name]).all() for name, site in linear_sites(model).items())


def test_mistakes_are_named():
    model = build("llama")
    name, site = next(iter(linear_sites(model).items()))
    with pytest.raises(GroupError, match="made from another model"):
        freeze(model, group_of(build("llama", seed=1), "neuron"))
    with pytest.raises(GroupError, match="made from another model"):
        freeze(model, group_of(build("llama", seed=1), "unit"))
    narrow = Group(granularity="weight", members={name: np.array([1])}, shapes={name: (site.shape[0], 3)})
    with pytest.raises(GroupError, match=rf"another shape of {name}.*\(16, 3\).*\(16, 16\)"):
        freeze(model, narrow)
    with pytest.raises(GroupError, match="beyond the end"):
        freeze(model, Group(granularity="neuron", members={name: np.array([16])}))
    with pytest.raises(GroupError, match="has no MLP nowhere"):
        freeze(model, Group(granularity="unit", members={"nowhere": np.array([1])}))
    with pytest.raises(GroupError, match="hidden unit beyond the end"):
        freeze(model, Group(granularity="unit", members={"model.layers.0.mlp": np.array([24])}))
    with pytest.raises(GroupError, match="no members"):
        freeze(model, Group(granularity="neuron", members={}))
    with pytest.raises(FreezeError, match="every weight that is trained"):
        freeze(model, group_of(model, "neuron", fraction=1.0))
    with pytest.raises(FreezeError, match=r"lies in a site that is trained.*target_modules"):
        freeze(lora_on(model, target_modules=["v_proj"]), Group(granularity="neuron", members={name: np.array([1])}))


def test_adapters_that_cannot_be_held_are_refused():
    group = group_of(build("llama"), "neuron")
    with pytest.raises(FreezeError, match="cannot be held exactly.*DoraLinearVariant.*rsLoRA"):
        freeze(lora_on(build("llama"), use_dora=True), group)
    with pytest.raises(FreezeError, match="already|before training has begun"):
        freeze(lora_on(build("llama"), init_lora_weights=False), group)
    from peft import IA3Config

    other = get_peft_model(
        build("llama"), IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"])
    )
    with pytest.raises(FreezeError, match="cannot be held exactly"):
        freeze(other, group)


def test_members_outside_the_trained_sites_are_counted():
    model = build("llama")
    group = group_of(model, "neuron")
    frozen, *_ = train(lora_on(model, target_modules=["q_proj", "up_proj"]), group)
    inside = sum(len(members) for name, members in group.members.items() if name.endswith(("q_proj", "up_proj")))
    report = frozen.report
    assert (report.members, report.outside) == (inside, len(group) - inside)
    assert (report.sites, report.trained_sites) == (4, 4)
    assert f"{report.outside} members lie outside the trained sites" in str(report)
    assert f"{report.moved} of {report.others} other neurons moved" in str(report)
