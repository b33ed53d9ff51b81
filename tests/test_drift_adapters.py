"""Every kind of adapter against an oracle that shares nothing with the closed forms: dense float64 rows, or what
PEFT's own layer answers to unit vectors in a float64 copy of the model."""

import copy
import inspect
import warnings

import peft
import pytest
import torch
from families import FAMILIES, build
from peft import LoraConfig, get_peft_model

from neurondrift.base.errors import ArtifactError, ModelError
from neurondrift.drift.exact import drift_from_moments, low_rank_moments, rescaled_moments
from neurondrift.drift.meter import DriftMeter, measure_drift
from neurondrift.models.adapters import Adapter, Rescaled, change_of, effective_weight, low_rank_delta
from neurondrift.models.disk.initial import CheckpointWeights
from neurondrift.models.sites import linear_sites, row_norms

Q = "model.layers.0.self_attn.q_proj"
DOWN = "model.layers.1.mlp.down_proj"
SCALES = (1.0, 1e-2, 1e-4, 1e-7)


def dense(base, delta):
    """l2, relative and cosine distance of float64 rows, without cancellation: 1 - cos from the sine of the angle."""
    base, delta = base.double(), delta.double()
    norm = base.norm(dim=1)
    unit = base / norm[:, None]
    along = (delta * unit).sum(dim=1)
    angle = torch.atan2((delta - along[:, None] * unit).norm(dim=1), norm + along)
    return delta.norm(dim=1), delta.norm(dim=1) / norm, 2 * torch.sin(angle / 2) ** 2


def check(measured, expected, tolerances=(1e-5, 1e-5, 1e-4)):
    for actual, wanted, tolerance in zip(measured, expected, tolerances, strict=True):
        assert actual.dtype == torch.float32
        assert (
            (actual.double() - wanted).abs() <= tolerance * wanted
        ).all()  # a neuron that has not moved is exactly 0


def kinds(model):
    """Module types that PEFT can wrap as linear layers."""
    return sorted(
        {s.module_type for s in linear_sites(model).values() if type(s.owner).__name__ in ("Linear", "Conv1D")}
    )


def answer(layer, width):
    """The weight `[out, in]` that a layer applies: its answers to unit vectors."""
    layer = copy.deepcopy(layer).double().eval()
    with torch.no_grad():
        units = torch.eye(width, dtype=torch.float64)[None]
        return (layer(units) - layer(torch.zeros_like(units)))[0].T


def shake(model, scale, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += (scale * torch.randn(parameter.shape, generator=generator)).to(parameter.dtype)


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if isinstance(tensor, torch.Tensor)}


def unchanged(model, before):
    after = state(model)
    return all(
        torch.equal(after[name].contiguous().view(torch.uint8), tensor.contiguous().view(torch.uint8))
        for name, tensor in before.items()
    )


# --- DoRA ---------------------------------------------------------------------------------------------------


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


# --- LoRA ---------------------------------------------------------------------------------------------------


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


# --- parameters as targets: experts -------------------------------------------------------------------------


def gpt_oss():
    import transformers as t

    torch.manual_seed(0)
    config = t.GptOssConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
        num_local_experts=4,
        num_experts_per_tok=2,
        pad_token_id=0,
    )
    return t.GptOssForCausalLM(config).eval()


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


# --- every other method of PEFT -----------------------------------------------------------------------------

METHODS = {
    "AdaLoraConfig": {"total_step": 10, "init_r": 4},
    "BOFTConfig": {"boft_block_size": 4},
    "C3AConfig": {"block_size": 4},
    "DeloraConfig": {"r": 4},
    "FourierFTConfig": {"n_frequency": 20},
    "GraloraConfig": {"r": 4, "gralora_k": 2},
    "HRAConfig": {"r": 4},
    "IA3Config": {"feedforward_modules": ["down_proj"]},
    "LoHaConfig": {"r": 4},
    "LoKrConfig": {"r": 4},
    "MissConfig": {"r": 4},
    "OFTConfig": {"oft_block_size": 4},
    "OSFConfig": {},
    "RandLoraConfig": {"r": 4},
    "RoadConfig": {"group_size": 4},
    "ShiraConfig": {"r": 2},
    "VBLoRAConfig": {"vector_length": 4, "num_vectors": 16},
    "VeraConfig": {"r": 4},
    "WaveFTConfig": {"n_frequency": 20},
}


def adapted(method, model=None, **settings):
    config = getattr(peft, method)
    known = inspect.signature(config).parameters
    settings = {"target_modules": ["q_proj", "down_proj"]} | METHODS.get(method, {}) | settings
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(
            model or build("llama"), config(**{key: value for key, value in settings.items() if key in known})
        )
    return model.eval()


@pytest.mark.parametrize("method", METHODS)
def test_other_methods_are_measured_as_they_answer(method):
    wrapped = adapted(method)
    for scale in (1e-4, 0.05):
        shake(wrapped, scale)
        before, random = state(wrapped), torch.get_rng_state()
        drift = measure_drift(wrapped)
        assert {linear_sites(wrapped)[name].module_type for name in drift} == {"q_proj", "down_proj"}
        for name in (Q, DOWN):
            site = linear_sites(wrapped)[name]
            expected = dense(site.weight, answer(site.wrapper, site.shape[1]) - site.weight.double())
            if method == "IA3Config" and name == Q:  # scales whole neurons: the direction stays
                check(drift[name][:2], expected[:2], (1e-5, 1e-5))
                assert drift[name].cosine_distance.max() < 1e-20
            else:
                check(drift[name], expected)
        assert unchanged(wrapped, before)
        assert torch.equal(torch.get_rng_state(), random)


def test_adapters_without_a_peft_model_around_them_and_of_two_methods_at_once():
    lora, loha = (
        getattr(peft, f"{kind}Config")(r=4, target_modules=["q_proj"], **{f"init_{where}weights": False})
        for kind, where in (("Lora", "lora_"), ("LoHa", ""))
    )
    inside = build("llama")
    inside.add_adapter(lora)
    injected = peft.inject_adapter_in_model(loha, build("llama"))
    mixed = peft.PeftMixedModel(build("llama"), loha, "first")
    mixed.add_adapter("second", lora)
    mixed.set_adapter(["first", "second"])
    for model in (inside, injected, mixed):
        meter = DriftMeter(model)
        assert len(meter.sites) == 2
        assert len(meter.untrained) == 12
        site = meter.sites[Q]
        check(meter.measure()[Q], dense(site.weight, answer(site.wrapper, 16) - site.weight.double()))


def test_a_small_change_of_a_multiplicative_method_is_resolved():
    """A merge in float32 would round it: 1e-7 of the weight is half a unit in its last place."""
    wrapped = adapted("OFTConfig")
    shake(wrapped, 1e-7)
    site = linear_sites(wrapped)[Q]
    drift = measure_drift(wrapped)[Q]
    assert 1e-8 < drift.relative.median() < 1e-6
    check(drift, dense(site.weight, answer(site.wrapper, 16) - site.weight.double()))


def test_a_variant_of_lora_that_is_no_product_of_two_matrices():
    from peft.tuners.lora.config import BdLoraConfig

    blocks = BdLoraConfig(target_modules_bd_a=["q_proj"], target_modules_bd_b=["down_proj"], nblocks=2)
    wrapped = adapted("LoraConfig", r=4, use_bdlora=blocks)
    shake(wrapped, 0.05)
    drift = measure_drift(wrapped)
    for name in (Q, DOWN):
        site = linear_sites(wrapped)[name]
        check(drift[name], dense(site.weight, answer(site.wrapper, site.shape[1]) - site.weight.double()))
        with pytest.raises(ModelError, match="no low-rank form.*BdLoraLinearVariant"):
            low_rank_delta(site)


# --- what is refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "settings", "named"),
    [
        ("PromptTuningConfig", {"num_virtual_tokens": 2}, "PROMPT_TUNING"),
        ("PrefixTuningConfig", {"num_virtual_tokens": 2}, "PREFIX_TUNING"),
        (
            "AdaptionPromptConfig",
            {"adapter_len": 2, "adapter_layers": 1, "target_modules": "self_attn"},
            "ADAPTION_PROMPT",
        ),
        ("LilyConfig", {"r": 4}, "LILY"),
        ("DeftConfig", {"r": 4}, "deft.layer.DeftLinear"),  # computes in float32 whatever the dtype
        ("LoraConfig", {"r": 4, "alora_invocation_tokens": [3]}, "ALoraLinearVariant"),
    ],
)
def test_what_no_weight_shows_is_refused_by_name(method, settings, named):
    if not hasattr(peft, method):
        pytest.skip(f"this PEFT has no {method}")
    wrapped = adapted(method, task_type="CAUSAL_LM", **settings)
    shake(wrapped, 1e-4)
    with pytest.raises(ModelError, match=f"cannot be measured.*{named}"):
        measure_drift(wrapped)


def test_merged_and_disabled_adapters_are_refused():
    for settings in ({}, {"use_dora": True}):
        wrapped = adapted("LoraConfig", r=2, init_lora_weights=False, **settings)
        with wrapped.disable_adapter(), pytest.raises(ModelError, match="adapters of .* are disabled"):
            measure_drift(wrapped)
        wrapped.merge_adapter()
        with pytest.raises(ModelError, match="merged into"):
            measure_drift(wrapped)
    wrapped = adapted("LoHaConfig")
    wrapped.merge_adapter()
    with pytest.raises(ModelError, match="merged into"):
        measure_drift(wrapped)


# --- initialisations that change the base -------------------------------------------------------------------


@pytest.mark.parametrize("way", ["pissa", "pissa_niter_4", "olora", "kasa"])
def test_an_initialisation_that_changes_the_base_is_measured_against_the_original_or_refused(way, tmp_path):
    build("llama").save_pretrained(tmp_path)
    settings = {"kasa_config": peft.tuners.lora.config.KasaConfig()} if way == "kasa" else {"init_lora_weights": way}
    wrapped = adapted("LoraConfig", r=4, **settings)
    with pytest.raises(ModelError, match=rf"changed the base weights when it was made.*{way}.*initial="):
        measure_drift(wrapped)
    meter = DriftMeter(wrapped, initial=CheckpointWeights(tmp_path, linear_sites(wrapped)))
    original = {name: site.weight.double() for name, site in linear_sites(build("llama")).items()}
    # KaSA cuts the smallest singular values off for good; the others only round.
    assert all((drift.relative.max() < 1e-6) == (way != "kasa") for drift in meter.measure().values())
    shake(wrapped, 0.01)
    for name, measured in meter.measure().items():
        site = meter.sites[name]
        delta = answer(site.wrapper, site.shape[1]) - original[name]
        check(measured, dense(original[name], delta))
        assert torch.equal(meter.base(name).double(), original[name])
        assert (meter.delta(name).double() - delta).norm() < 1e-6 * delta.norm()


def test_a_merged_adapter_is_measured_against_initial_weights(tmp_path):
    build("llama").save_pretrained(tmp_path)
    wrapped = adapted("LoraConfig", r=4, init_lora_weights=False)
    meter = DriftMeter(wrapped, initial=CheckpointWeights(tmp_path, linear_sites(wrapped)))
    unmerged = meter.measure()
    wrapped.merge_adapter()
    for name, drift in meter.measure().items():
        assert torch.allclose(drift.relative, unmerged[name].relative, rtol=1e-4)


# --- quantised bases ----------------------------------------------------------------------------------------


def quantised(bits, dtype=torch.float32, storage=torch.uint8):
    bnb = pytest.importorskip("bitsandbytes")
    model = build("llama").to(dtype)
    for name, site in list(linear_sites(model).items()):
        rows, columns = site.shape
        if bits == 4:
            plain = bnb.nn.Linear4bit(columns, rows, bias=False, compute_dtype=dtype, quant_storage=storage)
            plain.weight = bnb.nn.Params4bit(
                site.weight.clone(), requires_grad=False, quant_storage=storage, module=plain
            )
        else:
            plain = bnb.nn.Linear8bitLt(columns, rows, bias=False, has_fp16_weights=False)
            plain.weight = bnb.nn.Int8Params(site.weight.clone(), requires_grad=False, has_fp16_weights=False)
        model.set_submodule(name, plain.to("cpu"))
    return model


def plain_weight(site):
    """The weight that the packed numbers stand for, by bitsandbytes itself."""
    import bitsandbytes.functional as functional

    weight = site.owner.weight
    if type(weight).__name__ == "Params4bit":
        return functional.dequantize_4bit(weight.data, weight.quant_state).double()
    scale = weight.SCB if weight.SCB is not None else site.owner.state.SCB
    return weight.data.double() * scale.double()[:, None] / 127


@pytest.mark.parametrize(
    ("bits", "dtype", "storage"),
    [(4, torch.float32, torch.uint8), (4, torch.bfloat16, torch.bfloat16), (8, torch.float32, torch.uint8)],
)
@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_on_a_quantised_base_is_measured_against_what_it_stands_for(bits, dtype, storage, dora):
    model = quantised(bits, dtype, storage)
    wrapped = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], use_dora=dora))
    sites = linear_sites(wrapped)
    assert {name: site.shape for name, site in sites.items()} == {
        name: site.shape for name, site in linear_sites(build("llama")).items()
    }
    before = state(wrapped)
    for scale in (0.1, 1e-4):
        shake(wrapped, scale)
        kept = {name: tensor for name, tensor in before.items() if "lora" not in name}
        for name, measured in measure_drift(wrapped).items():
            layer, base = sites[name].wrapper, plain_weight(sites[name])
            a, b = (getattr(layer, key)["default"].weight.detach().double() for key in ("lora_A", "lora_B"))
            now = base + layer.scaling["default"] * (b @ a)
            if dora:
                magnitude = layer.lora_magnitude_vector["default"].weight.detach().double()
                now = magnitude[:, None] * now / now.norm(dim=1, keepdim=True)
            check(measured, dense(base, now - base))
        assert unchanged(wrapped, kept)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_model_as_transformers_loads_it(bits, tmp_path):
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    build("llama").save_pretrained(tmp_path)
    settings = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True} if bits == 4 else {}
    quantisation = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8, **settings)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=quantisation, device_map="cpu")
    wrapped = get_peft_model(peft.prepare_model_for_kbit_training(model), LoraConfig(r=4, target_modules=["q_proj"]))
    shake(wrapped, 0.05)
    tokens = torch.tensor([[3, 4, 5]])
    wrapped(input_ids=tokens, labels=tokens).loss.backward()  # an 8-bit layer moves its scales on the first pass
    before = state(wrapped)
    site = linear_sites(wrapped)[Q]
    base = plain_weight(site)
    assert not torch.equal(base.float(), linear_sites(build("llama"))[Q].weight)
    a, b = (getattr(site.wrapper, key)["default"].weight.detach().double() for key in ("lora_A", "lora_B"))
    check(measure_drift(wrapped)[Q], dense(base, site.wrapper.scaling["default"] * (b @ a)))
    assert unchanged(wrapped, before)


@pytest.mark.parametrize(
    ("method", "bits"), [("IA3Config", 4), ("IA3Config", 8), ("AdaLoraConfig", 4), ("VeraConfig", 8)]
)
def test_other_methods_on_a_quantised_base(method, bits):
    wrapped = adapted(method, quantised(bits))
    sites = linear_sites(wrapped)
    shake(wrapped, 0.05)
    before = state(wrapped)
    drift = measure_drift(wrapped)
    assert unchanged(wrapped, before)
    for name in (Q, DOWN):
        layer, base = sites[name].wrapper, plain_weight(sites[name])
        if method == "IA3Config":
            scale = layer.ia3_l["default"].detach().double()
            delta = base * (scale - 1)  # [out, 1] on an output, [1, in] on an input
        elif method == "AdaLoraConfig":
            a, b, e = (getattr(layer, key)["default"].detach().double() for key in ("lora_A", "lora_B", "lora_E"))
            delta = (b @ (a * e)) * layer.scaling["default"] / (float(layer.ranknum["default"]) + 1e-5)
        else:
            rows, columns = sites[name].shape
            d, b = (getattr(layer, f"vera_lambda_{key}")["default"].detach().double() for key in "db")
            delta = b[:, None] * (
                layer.vera_B["default"].double()[:rows] @ (d[:, None] * layer.vera_A["default"].double()[:, :columns])
            )
        wanted = dense(base, delta)
        check(drift[name][:2], wanted[:2], (1e-5, 1e-5))


# --- experts in folders -------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("as_saved", ["one by one", "fused", "in shards"])
def test_full_fine_tuning_of_experts_is_measured_against_their_folder(family, as_saved, tmp_path):
    model = build(family)
    model.save_pretrained(
        tmp_path,
        save_original_format=as_saved != "fused",
        max_shard_size="4KB" if as_saved == "in shards" else "1GB",
    )
    assert len(list(tmp_path.glob("*.safetensors"))) > 1 or as_saved != "in shards"
    sites = linear_sites(model)
    initial = CheckpointWeights(tmp_path, sites)
    before = {name: site.weight.clone() for name, site in sites.items()}
    for name in sites:
        assert torch.equal(initial(name), before[name]), name
    for site in sites.values():
        site.weight.mul_(1.01).add_(0.001)
    for name, measured in measure_drift(model, initial=initial).items():
        check(measured, dense(before[name], sites[name].weight.double() - before[name].double()))


def test_a_folder_of_another_model_is_refused(tmp_path):
    build("llama").save_pretrained(tmp_path)
    with pytest.raises(ArtifactError, match=r"has no tensor .*mlp\.gate\.weight"):
        measure_drift(build("mixtral"), initial=CheckpointWeights(tmp_path, linear_sites(build("mixtral"))))
    sites = linear_sites(build("phi3"))
    with pytest.raises(ArtifactError, match="has no tensor .*qkv_proj"):
        CheckpointWeights(tmp_path, sites)("model.layers.0.self_attn.qkv_proj")
    narrow = linear_sites(build("qwen3_moe"))
    build("mixtral").save_pretrained(tmp_path / "mixtral")
    with pytest.raises(ArtifactError, match=r"another shape.*\(48, 16\).*\(24, 16\)"):
        CheckpointWeights(tmp_path / "mixtral", narrow)("model.layers.0.mlp.experts.gate_up_proj.0")


# --- the meter ----------------------------------------------------------------------------------------------


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
