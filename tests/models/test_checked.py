"""Loading says what it loaded: each tensor of the model from a file, each of a file in the model, or one error."""

import json
import logging
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from helpers.disk import MODEL, adapter, folder_with_tokenizer, rename, rewrite
from helpers.families import FAMILIES, build
from neurondrift.base.errors import ArtifactError, ModelError, UserError
from neurondrift.behaviour.evaluate import judge_answers
from neurondrift.cli.__main__ import main
from neurondrift.drift.difference import diff
from neurondrift.drift.meter import measure_drift
from neurondrift.models.checked.weights import check_finite
from neurondrift.models.data import Example, render_prompt
from neurondrift.models.disk.checkpoints import Checkpoint
from neurondrift.models.loading import attach_adapter, byte_tokenizer, describe_checkpoint, load_model
from neurondrift.models.sites import fingerprint, linear_sites


@pytest.fixture
def base(tmp_path):
    return folder_with_tokenizer(build("llama"), tmp_path / "base")


def load(folder, **more):
    return load_model(folder, dtype="float32", device="cpu", **more)[0]


def edit_config(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def without(word):
    return lambda tensors: {key: value for key, value in tensors.items() if word not in key}


# M1: a folder whose file lacks tensors, lacks a block, or whose configuration names more blocks
@pytest.mark.parametrize(
    ("word", "named", "cause"),
    [
        (
            "layers.1.",
            r"lack model\.layers\.1\.input_layernorm\.weight.*9 of 21 parameters",
            "more blocks than the fil",
        ),
        ("layers.0.self_attn.k_proj", r"lack model\.layers\.0\.self_attn\.k_proj\.weight.*1 of 21", "are incomplete"),
        ("model.norm", r"lack model\.norm\.weight", "are incomplete"),
        ("lm_head", r"lack lm_head\.weight", "tie_word_embeddings"),
        ("embed_tokens", r"lack model\.embed_tokens\.weight", "are incomplete"),
    ],
)
def test_parameters_that_no_file_holds_are_named(base, word, named, cause):
    rewrite(base / MODEL, without(word))
    for look in (load, lambda folder: describe_checkpoint(str(folder))):
        with pytest.raises(ModelError, match=f"{named}.*{cause}"):
            look(base)


def test_a_configuration_of_another_model_is_told(base, tmp_path):
    shutil.copytree(base, tmp_path / "deeper")
    edit_config(tmp_path / "deeper", num_hidden_layers=3)
    with pytest.raises(ModelError, match=r"lack model\.layers\.2\..*config.json names more blocks"):
        load(tmp_path / "deeper")
    shutil.copytree(base, tmp_path / "shallower")
    edit_config(tmp_path / "shallower", num_hidden_layers=1)
    with pytest.raises(ModelError, match=r"no place for model\.layers\.1\..*9 tensors.*names fewer blocks"):
        load(tmp_path / "shallower")
    shutil.copytree(base, tmp_path / "wider")
    edit_config(tmp_path / "wider", intermediate_size=48)
    with pytest.raises(ModelError, match=r"mlp\..*has another size than its config.json.*5 others"):
        load(tmp_path / "wider")


@pytest.mark.parametrize("family", FAMILIES)
def test_whole_models_load_without_a_word(family, tmp_path, caplog):
    model = build(family)
    model.save_pretrained(tmp_path / "a")
    byte_tokenizer().save_pretrained(tmp_path / "a")
    again = load(tmp_path / "a")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert describe_checkpoint(str(tmp_path / "a"))["parameters"] == sum(p.numel() for p in model.parameters())


def test_tied_weights_and_buffers_need_not_be_in_the_files(tmp_path):
    model = build("llama")
    model.config.tie_word_embeddings = True
    model.tie_weights()
    folder_with_tokenizer(model, tmp_path / "tied")
    assert "lm_head.weight" not in load_file(tmp_path / "tied" / MODEL)
    own = load(tmp_path / "tied")
    assert own.lm_head.weight.data_ptr() == own.model.embed_tokens.weight.data_ptr()
    rewrite(
        tmp_path / "tied" / MODEL,
        lambda tensors: tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)},
    )
    assert torch.equal(load(tmp_path / "tied").lm_head.weight, own.lm_head.weight)


WRAPPED = {
    "compiled": lambda key: f"_orig_mod.{key}",
    "compiled block": lambda key: key.replace("layers.1.", "layers.1._orig_mod."),
    "data-parallel": lambda key: f"module.{key}",
    "compiled data-parallel": lambda key: f"_orig_mod.module.{key}",
    "fsdp": lambda key: "_fsdp_wrapped_module." + key.replace("layers.0.", "layers.0._fsdp_wrapped_module."),
    "fsdp, checkpointed": lambda key: key.replace(
        "layers.1.", "layers.1._fsdp_wrapped_module._checkpoint_wrapped_module."
    ),
    "peft": lambda key: f"base_model.model.{key}",
    "lightning": lambda key: f"model.{key}",
}


# A2, M7: of whole models
@pytest.mark.parametrize("way", WRAPPED)
def test_wrappers_in_the_names_of_a_model_are_stripped_everywhere(base, way, tmp_path):
    wrapped = shutil.copytree(base, tmp_path / "wrapped")
    rename(wrapped / MODEL, WRAPPED[way])
    right, model = load(base), load(wrapped)
    assert all(torch.equal(a, b) for a, b in zip(right.parameters(), model.parameters(), strict=True))
    assert fingerprint(right) == fingerprint(model) == Checkpoint(wrapped, "wrapped").fingerprint()
    model.save_pretrained(tmp_path / "again")
    assert set(load_file(tmp_path / "again" / MODEL)) == set(load_file(base / MODEL))
    result = diff(base, [wrapped], tmp_path / "log")
    assert (result.summaries[1][0].unmoved, list(result.log.metadata()["sites"])) == (1.0, list(linear_sites(right)))


# M7
def test_compiled_models_have_the_sites_of_the_model():
    plain = build("llama")
    names, own = list(linear_sites(plain)), fingerprint(plain)
    whole = torch.compile(build("llama"))
    inner, blocks, layer = build("llama"), build("llama"), build("llama")
    inner.model = torch.compile(inner.model)
    for index, block in enumerate(blocks.model.layers):
        blocks.model.layers[index] = torch.compile(block)
    layer.model.layers[0].mlp.up_proj = torch.compile(layer.model.layers[0].mlp.up_proj)
    parallel = torch.nn.DataParallel(torch.compile(build("llama")))
    for model in (whole, inner, blocks, layer, parallel):
        assert (list(linear_sites(model)), fingerprint(model)) == (names, own)
    tuned = get_peft_model(build("llama"), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    expected = measure_drift(tuned)
    assert list(measure_drift(torch.compile(tuned))) == list(expected)


def broken_files():
    yield "cut", lambda file: file.write_bytes(file.read_bytes()[:-100]), "truncated or no safetensors"
    yield "empty", lambda file: file.write_bytes(b""), "truncated or no safetensors"
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    yield "pointer", lambda file: file.write_text(pointer), "truncated or no safetensors.*git lfs pull"


# A9, M5
@pytest.mark.parametrize(("name", "break_it", "message"), list(broken_files()))
def test_files_that_are_cut_off_have_one_message_everywhere(name, break_it, message, base, tmp_path, capsys):
    good = adapter(build("llama"), tmp_path / "adapter")
    (tmp_path / "copy").mkdir()
    bad_model, bad_adapter = shutil.copytree(base, tmp_path / "bad"), shutil.copytree(good, tmp_path / "bad_adapter")
    break_it(bad_model / MODEL)
    break_it(bad_adapter / "adapter_model.safetensors")
    for calls in (
        [
            lambda: load(bad_model),
            lambda: diff(base, [bad_model], tmp_path / "log"),
            lambda: describe_checkpoint(str(bad_model)),
        ],
        [
            lambda: load(base, adapter=bad_adapter),
            lambda: diff(base, [bad_adapter], tmp_path / "log"),
            lambda: attach_adapter(build("llama"), bad_adapter),
        ],
    ):
        said = []
        for call in calls:
            with pytest.raises(ArtifactError, match=message) as caught:
                call()
            said.append(str(caught.value))
        assert len(set(said)) == 1
    with pytest.raises(SystemExit) as stopped:
        main(["evaluate", str(bad_model), "--output-dir", str(tmp_path / "out")])
    assert stopped.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


def test_an_index_that_names_more_than_the_files_hold_is_told(tmp_path):
    model = build("llama")
    model.save_pretrained(tmp_path / "shards", max_shard_size="8KB")
    byte_tokenizer().save_pretrained(tmp_path / "shards")
    file = next((tmp_path / "shards").glob("model-00001*"))
    first = next(iter(load_file(file)))
    rewrite(file, without(first))
    for call in (load, lambda folder: Checkpoint(folder, str(folder))):
        with pytest.raises(ArtifactError, match=f"lack {first}, which their index names"):
            call(tmp_path / "shards")


# M3
@pytest.mark.parametrize("method", ["gptq", "awq", "aqlm", "compressed-tensors", "fp_quant"])
def test_a_quantised_model_without_its_package_is_one_message(method, base, tmp_path):
    more = {"gptq": {"bits": 4, "group_size": 8}, "awq": {"bits": 4}}
    edit_config(base, quantization_config={"quant_method": method, **more.get(method, {})})
    for look in (load, lambda folder: describe_checkpoint(str(folder))):
        with pytest.raises(UserError) as caught:
            look(base)
        assert str(base) in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        lambda config: {},
        lambda config: {"model_type": "llama", "hidden_size": "sixteen"},
        lambda config: config | {"model_type": "no-such-type"},
        lambda config: config | {"num_attention_heads": 0},
        lambda config: config | {"hidden_act": "no-such-function"},
    ],
)
def test_configurations_that_say_too_little_or_nonsense_are_one_message(change, base):
    file = base / "config.json"
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    for look in (load, lambda folder: describe_checkpoint(str(folder))):
        with pytest.raises(UserError, match="model"):
            look(base)


# A11
def test_the_tokenizer_and_template_beside_an_adapter_are_used(base, tmp_path, caplog):
    (base / "chat_template.jinja").unlink(missing_ok=True)
    own = adapter(build("llama"), tmp_path / "adapter")
    assert load_model(base, device="cpu", adapter=own)[1].chat_template is None
    template = "{% for m in messages %}<|user|>{{ m.content }}<|end|>{% endfor %}<|assistant|>"
    (own / "chat_template.jinja").write_text(template)
    assert render_prompt("hello", load_model(base, device="cpu", adapter=own)[1]) == "<|user|>hello<|end|><|assistant|>"
    (own / "chat_template.jinja").unlink()
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(own)
    caplog.clear()
    assert render_prompt("hello", load_model(base, device="cpu", adapter=own)[1]) == "<|user|>hello<|end|><|assistant|>"
    assert "has its own chat template, which is used" in caplog.text
    tokenizer.add_tokens(["<|new|>"])
    tokenizer.save_pretrained(own)
    assert len(load_model(base, device="cpu", adapter=own)[1]) == 262
    assert "other tokens than the base model's: the adapter's is used" in caplog.text
    tokenizer.add_tokens([f"<|{index}|>" for index in range(9)])
    tokenizer.save_pretrained(own)
    assert len(load_model(base, device="cpu", adapter=own)[1]) == 261
    assert "too few embeddings" in caplog.text


# A12
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_no_numbers_stop_an_evaluation(value, base, tmp_path):
    own = adapter(build("llama"), tmp_path / "adapter")
    rewrite(
        own / "adapter_model.safetensors",
        lambda tensors: {
            key: torch.full_like(tensor, value) if "layers.1." in key and "lora_B" in key else tensor
            for key, tensor in tensors.items()
        },
    )
    model, tokenizer = load_model(base, dtype="float32", device="cpu", adapter=own)
    with pytest.raises(ModelError, match=r"no numbers, first in model.layers.1.*of 2 tensors are NaN or infinite"):
        judge_answers(model, tokenizer, {"harmful": [Example(prompt="hi", response="", id="0")]}, max_new_tokens=2)
    healthy = load(base)
    check_finite(healthy)
    healthy.lm_head.weight.data[0, 0] = value
    with pytest.raises(ModelError, match=r"first in lm_head.weight.*1 values of 1 tensors"):
        check_finite(healthy)


@pytest.mark.real
def test_the_real_model_is_whole(real_model):
    check_finite(real_model[0])


def hub_snapshot(base, root, monkeypatch):
    """The folder as it lies in the hub's cache, as someone/model."""
    place = root / "models--someone--model"
    shutil.copytree(base, place / "snapshots" / ("0" * 40))
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("0" * 40)
    for name in ("huggingface_hub.constants.HF_HUB_CACHE", "transformers.utils.hub.constants.HF_HUB_CACHE"):
        monkeypatch.setattr(name, str(root))
    return place / "snapshots" / ("0" * 40)


def test_a_cached_model_of_the_hub_is_looked_at_by_its_headers(base, tmp_path, monkeypatch):
    snapshot = hub_snapshot(base, tmp_path / "hub", monkeypatch)
    assert describe_checkpoint("someone/model")["where"] == str(snapshot)
    rewrite(snapshot / MODEL, without("layers.1."))
    with pytest.raises(ModelError, match=r"lack model\.layers\.1\.input_layernorm\.weight"):
        describe_checkpoint("someone/model")
    (snapshot / MODEL).write_bytes((snapshot / MODEL).read_bytes()[:-8])
    with pytest.raises(ArtifactError, match="truncated"):
        describe_checkpoint("someone/model")
    (snapshot / MODEL).unlink()
    with pytest.raises(ModelError, match="not in the hub's cache, and the hub cannot be reached"):
        describe_checkpoint("someone/model")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    assert "only its configuration has been looked at" in describe_checkpoint("someone/model")["where"]


def test_wrappers_are_stripped_from_a_model_of_the_hub_too(base, tmp_path, monkeypatch):
    snapshot = hub_snapshot(base, tmp_path / "hub", monkeypatch)
    rename(snapshot / MODEL, WRAPPED["compiled"])
    model = load("someone/model")
    assert all(torch.equal(a, b) for a, b in zip(load(base).parameters(), model.parameters(), strict=True))
    assert model.name_or_path == "someone/model"
    rewrite(snapshot / MODEL, without("layers.1."))
    with pytest.raises(ModelError, match=r"lack model\.layers\.1\.input_layernorm\.weight"):
        load("someone/model")
