"""Adapters on a quantised base against what its packed numbers stand for."""

import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model

from helpers.adapters import DOWN, Q, adapted, shake, state, unchanged
from helpers.families import build
from helpers.oracles import check, dense
from neurondrift.drift.meter import measure_drift
from neurondrift.models.sites import linear_sites


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
