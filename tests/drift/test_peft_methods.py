"""Every other method of PEFT against its own layers' answers to unit vectors; what is refused."""

import peft
import pytest
import torch

from helpers.adapters import DOWN, METHODS, Q, adapted, answer, shake, state, unchanged
from helpers.families import build
from helpers.oracles import check, dense
from neurondrift.base.errors import ModelError
from neurondrift.drift.meter import DriftMeter, measure_drift
from neurondrift.models.adapters import low_rank_delta
from neurondrift.models.sites import linear_sites


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
