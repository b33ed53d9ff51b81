"""LoRA and DoRA, on layers and on experts, against dense float64 rows or what PEFT's own layer answers."""

import copy
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model

from helpers.adapters import Q, adapted, answer, kinds, shake
from helpers.families import FAMILIES, build, gpt_oss
from helpers.oracles import check, dense
from neurondrift.base.errors import ModelError
from neurondrift.drift.exact import drift_from_moments, low_rank_moments, rescaled_moments
from neurondrift.drift.meter import DriftMeter, measure_drift
from neurondrift.models.adapters import Adapter, Rescaled, change_of, effective_weight, low_rank_delta
from neurondrift.models.sites import linear_sites, row_norms

SCALES = (1.0, 1e-2, 1e-4, 1e-7)


def set_dora(site, scale, generator):
    """Factors and magnitude such that the low-rank part and the stretch are both about `scale`; the effective rows in
    float64, from the definition: m (w₀ + sBA)/‖w₀ + sBA‖."""
    layer = site.wrapper
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    magnitude = layer.lora_magnitude_vector["default"].weight
    a.data = torch.randn(a.shape, generator=generator)
    b.data = torch.randn(b.shape, generator=generator)
    base = site.weight.double()
    b.data *= scale * base.norm() / (layer.scaling["default"] * (b.double() @ a.double()).norm())
    magnitude.data = (base.norm(dim=1) * (1 + scale * torch.randn(len(magnitude), generator=generator) / 3)).float()
    inner = base + layer.scaling["default"] * (b.detach().double() @ a.detach().double())
    return magnitude.detach().double()[:, None] * inner / inner.norm(dim=1, keepdim=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_dora_equals_dense_float64(family):
    model = build(family)
    wrapped = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=kinds(model), use_dora=True))
    sites = linear_sites(wrapped)
    meter = DriftMeter(wrapped)
    generator = torch.Generator().manual_seed(0)
    for scale in SCALES:
        for name in meter.sites:
            now = set_dora(sites[name], scale, generator)
            check(meter.measure()[name], dense(sites[name].weight, now - sites[name].weight.double()))
            delta = meter.delta(name)
            assert delta.dtype == torch.float32
            exact = now - sites[name].weight.double()
            assert (delta.double() - exact).norm() < 1e-6 * exact.norm()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_dora_is_what_peft_applies(family):
    model = build(family)
    target = kinds(model)[:2]
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=target, use_dora=True, use_rslora=True)).double()
    shake(wrapped, 0.1)
    wrapped.add_adapter("plain", LoraConfig(r=3, target_modules=target[:1], init_lora_weights=False))
    wrapped.add_adapter("second", LoraConfig(r=3, target_modules=target, use_dora=True, init_lora_weights=False))
    for active in (["default"], ["default", "plain"], ["default", "second", "plain"]):
        wrapped.base_model.set_adapter(active)
        for name, measured in measure_drift(wrapped).items():
            site = linear_sites(wrapped)[name]
            check(measured, dense(site.weight, answer(site.wrapper, site.shape[1]) - site.weight.double()))


def test_dora_where_the_magnitude_undoes_a_change_along_the_neuron():
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(6, 32, generator=generator)
    scale = torch.tensor([0.5, -0.5, 2.0, 1e-3, 1e-6, 3.0])
    # Δ of the low-rank part is `scale` times the neuron and a little noise; the magnitude takes the neuron's back.
    a = torch.cat([base, torch.randn(1, 32, generator=generator)])
    b = torch.cat([torch.diag(scale), torch.full((6, 1), 1e-5)], dim=1).double()
    magnitude = base.norm(dim=1).double() * (1 + 1e-6)
    inner = base.double() + b @ a.double()
    now = magnitude[:, None] * inner / inner.norm(dim=1, keepdim=True)
    norm = row_norms(base)
    measured = drift_from_moments(norm, rescaled_moments(Rescaled((Adapter(a, b, magnitude),)), base, norm))
    check(measured, dense(base, now - base.double()))


def test_a_fresh_dora_adapter_has_moved_by_the_rounding_of_its_magnitude_and_no_more():
    """PEFT stores ‖w₀‖ in the dtype of the base and recomputes it in the adapter's: what it then applies differs from
    the base, and that is what is measured."""
    for dtype, bound in ((torch.float32, 1e-6), (torch.bfloat16, 2**-8)):
        model = build("llama").to(dtype)
        wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], use_dora=True))
        site = linear_sites(wrapped)[Q]
        drift = measure_drift(wrapped)[Q]
        applied = answer(site.wrapper, site.shape[1])
        check(drift[:1], (dense(site.weight, applied - site.weight.double())[0],), (1e-5,))
        assert drift.relative.max() < bound
        assert drift.cosine_distance.max() < 1e-14
    assert drift.relative.max() > 1e-4


def test_a_change_along_the_neuron_has_its_own_small_angle():
    """‖Δ‖² - Δ∥² would leave nothing of an angle that is 1e-6 of the change."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(8, 64, generator=generator)
    a = torch.cat([base, torch.randn(1, 64, generator=generator)])
    b = torch.cat([torch.eye(8) * 0.3, torch.full((8, 1), 1e-6)], dim=1).double()
    measured = drift_from_moments(row_norms(base), low_rank_moments(a, b, base, row_norms(base)))
    check(measured, dense(base, b @ a.double()))


def test_measuring_within_autocast_is_the_same():
    wrapped = get_peft_model(build("llama"), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    outside = measure_drift(wrapped)[Q]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = measure_drift(wrapped)[Q]
    assert all(torch.equal(one, two) for one, two in zip(outside, inside, strict=True))


@pytest.mark.parametrize(
    "settings",
    [
        {"lora_bias": True, "bias": "all"},
        {"lora_dropout": 0.5},
        {"use_rslora": True, "rank_pattern": {"q_proj": 5}, "alpha_pattern": {"q_proj": 3}},
        {"init_lora_weights": "orthogonal"},
        {"init_lora_weights": "eva"},
        {"init_lora_weights": "gaussian"},
    ],
    ids=lambda settings: next(iter(settings)) + "_" + str(next(iter(settings.values()))),
)
def test_settings_of_lora(settings):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = build("qwen2")
        wrapped = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], **settings)).train()
    shake(wrapped, 0.05)
    for name, measured in measure_drift(wrapped).items():
        site = linear_sites(wrapped)[name]
        check(measured, dense(site.weight, answer(site.wrapper, site.shape[1]) - site.weight.double()))


@pytest.mark.parametrize("kept", ["q_proj", "mlp"])
def test_a_module_that_peft_trains_whole_keeps_its_name_and_is_measured(kept):
    model = build("llama")
    names = list(linear_sites(model))
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["v_proj"], modules_to_save=[kept]))
    assert list(linear_sites(wrapped)) == names
    fresh = measure_drift(wrapped)
    assert not any(values.any() for drift in fresh.values() for values in drift)
    shake(wrapped, 0.01)
    drift = measure_drift(wrapped)
    assert {name for name in drift if kept in name} == {name for name in names if kept in name}
    saved = dict(wrapped.get_base_model().named_modules())
    for name in (name for name in drift if kept in name):
        site = linear_sites(wrapped)[name]
        path = name.replace(kept, f"{kept}.modules_to_save.default")
        check(drift[name], dense(site.weight, saved[path].weight.detach().double() - site.weight.double()))
    with pytest.raises(ModelError, match="no low-rank form"):
        low_rank_delta(linear_sites(wrapped)[next(name for name in drift if kept in name)])


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_each_expert_of_a_targeted_parameter_is_a_site(family):
    model = gpt_oss() if family == "gpt_oss" else build(family)
    for parameter in model.parameters():
        if parameter.ndim == 3:
            torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(0))
    sites = linear_sites(model)
    before = {name: site.weight.double().clone() for name, site in sites.items()}
    targets = ["experts.gate_up_proj", "experts.down_proj"]
    wrapped = get_peft_model(model, LoraConfig(r=3, target_modules=["q_proj"], target_parameters=targets))
    assert list(linear_sites(wrapped)) == list(before)
    meter = DriftMeter(wrapped)
    assert {s.module_type for s in meter.sites.values()} == {"q_proj", "gate_up_proj", "down_proj"}
    assert not any(values.any() for drift in meter.measure().values() for values in drift)
    for scale in SCALES:
        shake(wrapped, scale)
        merged = copy.deepcopy(wrapped).double().merge_and_unload()
        now = {name: site.weight for name, site in linear_sites(merged).items()}
        for name, measured in meter.measure().items():
            check(measured, dense(before[name], now[name] - before[name]))
            delta = now[name] - before[name]
            assert (meter.delta(name).double() - delta).norm() < 1e-6 * delta.norm()
        for parameter in wrapped.parameters():  # the next scale starts from nothing
            if parameter.requires_grad:
                parameter.data.zero_()
        for site in meter.sites.values():
            for module in site.wrapper.modules():
                if hasattr(module, "lora_A"):
                    torch.nn.init.normal_(module.lora_A["default"].weight)


def test_a_router_and_a_conv1d_as_targeted_parameters():
    for family, target, kind in (("mixtral", "gate.weight", "gate"), ("gpt2", "c_attn.weight", "c_attn")):
        model = build(family)
        before = {name: site.weight.double().clone() for name, site in linear_sites(model).items()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wrapped = get_peft_model(model, LoraConfig(r=3, target_modules=[], target_parameters=[target]))
        shake(wrapped, 0.1)
        drift = measure_drift(wrapped)
        assert {linear_sites(wrapped)[name].module_type for name in drift} == {kind}
        merged = linear_sites(copy.deepcopy(wrapped).double().merge_and_unload())
        for name, measured in drift.items():
            check(measured, dense(before[name], merged[name].weight - before[name]))


def test_neurons_of_zero_norm_are_counted():
    for settings in ({}, {"use_dora": True}):
        wrapped = adapted("LoraConfig", r=2, **settings)
        shake(wrapped, 0.1)
        linear_sites(wrapped)[Q].weight[[1, 4]] = 0
        meter = DriftMeter(wrapped)
        assert meter.zero_norm_neurons == {Q: 2}
        drift = meter.measure()[Q]
        for values in (drift.relative, drift.cosine_distance):
            assert values.isnan().nonzero().flatten().tolist() == [1, 4]
        exact = answer(linear_sites(wrapped)[Q].wrapper, 16) - linear_sites(wrapped)[Q].weight.double()
        assert torch.allclose(drift.l2.double(), exact.norm(dim=1), rtol=1e-5)
    assert DriftMeter(adapted("LoraConfig", r=2)).zero_norm_neurons == {}


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_base_and_delta_are_the_effective_weight(settings):
    wrapped = adapted("LoraConfig", r=2, init_lora_weights=False, **settings)
    meter = DriftMeter(wrapped)
    for name, site in meter.sites.items():
        now = answer(site.wrapper, site.shape[1])
        assert meter.base(name).data_ptr() == site.owner.weight.data_ptr()
        assert torch.allclose(meter.base(name).double() + meter.delta(name), now, rtol=0, atol=1e-6)
        assert torch.allclose(now - site.weight.double(), meter.delta(name).double(), rtol=1e-6, atol=1e-12)
        assert torch.allclose(effective_weight(site), now, rtol=0, atol=1e-12)
    assert torch.equal(
        effective_weight(linear_sites(wrapped)["model.layers.0.mlp.up_proj"]).float(),
        linear_sites(wrapped)["model.layers.0.mlp.up_proj"].weight,
    )
    assert change_of(linear_sites(wrapped)["model.layers.0.mlp.up_proj"]) is None
