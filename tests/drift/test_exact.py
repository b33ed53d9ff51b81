"""Drift against dense float64 arithmetic, over ten decades and every family."""

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model

from helpers.adapters import adapt
from helpers.families import FAMILIES, build
from helpers.oracles import dense
from neurondrift.base.errors import ConfigError, ModelError
from neurondrift.drift.callback import DriftCallback
from neurondrift.drift.meter import DriftMeter, compare_models, measure_drift
from neurondrift.models.adapters import low_rank_delta
from neurondrift.models.disk.initial import CheckpointWeights
from neurondrift.models.sites import linear_sites


def check(measured, expected):
    for actual, wanted, tolerance in zip(measured, expected, (1e-5, 1e-5, 1e-4), strict=True):
        assert actual.dtype == torch.float32
        assert ((actual.double() - wanted).abs() / wanted).max() < tolerance


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scale", [1.0, 1e-1, 1e-3, 1e-5, 1e-7])
def test_closed_form_equals_dense_float64(family, scale):
    wrapped = adapt(build(family), scale=scale)
    drift = measure_drift(wrapped)
    sites = linear_sites(wrapped)
    assert drift
    for name, measured in drift.items():
        delta = low_rank_delta(sites[name])
        check(measured, dense(sites[name].weight, delta.b.double() @ delta.a.double()))


def test_closed_form_is_what_peft_adds():
    """The factors that are read are those that PEFT applies: scaling (rsLoRA, patterns) and orientation included."""
    for family, extra in [
        ("llama", {"use_rslora": True}),
        ("gpt2", {}),
        ("llama", {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"up_proj": 3}}),
    ]:
        wrapped = adapt(build(family), scale=0.1, **extra)
        for site in linear_sites(wrapped).values():
            delta = low_rank_delta(site)
            if delta is not None:
                added = site.wrapper.get_delta_weight("default").detach()
                added = added.T if site.transposed else added
                assert torch.allclose((delta.b @ delta.a.double()).float(), added, rtol=1e-5, atol=1e-7)


def test_two_active_adapters_add_up():
    wrapped = adapt(build("llama"), scale=0.1)
    wrapped.add_adapter("second", LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights=False))
    wrapped.base_model.set_adapter(["default", "second"])
    site = linear_sites(wrapped)["model.layers.0.self_attn.q_proj"]
    delta = sum(site.wrapper.get_delta_weight(name).detach().double() for name in ("default", "second"))
    check(measure_drift(wrapped)[site.name], dense(site.weight, delta))


def test_a_fresh_adapter_has_no_drift_and_untrained_sites_are_named():
    model = build("llama")
    meter = DriftMeter(get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])))
    assert {name.rsplit(".", 1)[-1] for name in meter.sites} == {"q_proj"}
    assert len(meter.untrained) == 2 * 6
    for drift in meter.measure().values():
        assert not any(values.any() for values in drift)


@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e-6])
def test_two_models_are_compared_site_by_site(scale):
    before, after = build("gpt2").double(), build("gpt2").double()
    deltas = {}
    generator = torch.Generator().manual_seed(0)
    for name, site in linear_sites(after).items():
        deltas[name] = torch.randn(site.shape, generator=generator).double() * scale
        site.weight.add_(deltas[name])
    for name, measured in compare_models(before, after).items():
        check(measured, dense(linear_sites(before)[name].weight, deltas[name]))


def test_full_fine_tuning_is_measured_against_the_saved_weights(tmp_path):
    model = build("llama")
    model.save_pretrained(tmp_path)
    initial = CheckpointWeights(tmp_path, linear_sites(model))
    before = {name: site.weight.clone() for name, site in linear_sites(model).items()}
    for site in linear_sites(model).values():
        site.weight.mul_(1.01).add_(0.001)
    for name, measured in measure_drift(model, initial=initial).items():
        check(measured, dense(before[name], linear_sites(model)[name].weight.double() - before[name].double()))


def test_a_neuron_of_zero_norm_is_undefined_not_zero():
    wrapped = adapt(build("llama"), scale=0.1)
    site = linear_sites(wrapped)["model.layers.0.mlp.up_proj"]
    site.weight[3] = 0.0
    drift = measure_drift(wrapped)[site.name]
    assert drift.l2[3] > 0
    assert math.isnan(drift.relative[3])
    assert math.isnan(drift.cosine_distance[3])
    assert int(drift.relative.isnan().sum()) == 1


def test_cosine_covers_opposite_and_vanished_neurons():
    before, after = build("llama"), build("llama")
    weight = linear_sites(after)["model.layers.0.mlp.up_proj"].weight
    weight[0] *= -1
    weight[1] = 0
    weight[2] *= 3
    drift = compare_models(before, after)["model.layers.0.mlp.up_proj"]
    assert drift.cosine_distance[0] == pytest.approx(2.0)
    assert math.isnan(drift.cosine_distance[1])
    assert drift.cosine_distance[2] < 1e-14
    assert drift.relative[:3].tolist() == pytest.approx([2.0, 1.0, 2.0])


def test_what_cannot_be_measured_is_an_error():
    with pytest.raises(ModelError, match="without an adapter has no drift by itself"):
        measure_drift(build("llama"))
    wrapped = adapt(build("llama"), scale=0.1)
    wrapped.merge_adapter()
    with pytest.raises(ModelError, match=r"merged into model.layers.0.*unmerge_adapter"):
        measure_drift(wrapped)
    with pytest.raises(ModelError, match="different sites or shapes"):
        compare_models(build("llama"), build("gpt2"))
    with pytest.raises(ConfigError, match="number of steps.*0"):
        DriftCallback("x", every=0)
