"""Drift between models on disk, against the loaded models; and what cannot be compared."""

import json
import shutil
import struct

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from helpers.families import FAMILIES, build, save
from neurondrift.base.errors import ArtifactError, ConfigError, ModelError
from neurondrift.cli.__main__ import main
from neurondrift.drift.difference import diff
from neurondrift.drift.meter import compare_models, measure_drift
from neurondrift.models.disk.checkpoints import Checkpoint
from neurondrift.models.disk.factors import AdapterFolder
from neurondrift.models.loading import folder_of
from neurondrift.models.sites import fingerprint, linear_sites


def moved(family, *, scale=1e-2, seed=1):
    """The family's model with every site moved by about `scale`, one neuron left alone and one turned round."""
    model = build(family)
    generator = torch.Generator().manual_seed(seed)
    for site in linear_sites(model).values():
        weight = site.weight
        weight.add_(torch.randn(weight.shape, generator=generator) * scale * weight.std())
    first, original = next(iter(linear_sites(model).values())), next(iter(linear_sites(build(family)).values()))
    first.weight[0] = original.weight[0]
    first.weight[1] = -original.weight[1]
    return model


def adapted(family, *, seed=0, **settings):
    """LoRA on every linear module (and on the experts), with factors that are not zero."""
    model = build(family)
    sites = linear_sites(model).values()
    kinds = sorted({s.module_type for s in sites if s.expert is None and s.module_type != "gate"})
    experts = sorted({f"experts.{s.parameter}" for s in sites if s.expert is not None})
    torch.manual_seed(seed)
    defaults = dict(r=4, lora_alpha=6, target_modules=kinds, target_parameters=experts or None)
    wrapped = get_peft_model(model, LoraConfig(**defaults | settings))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
        if "magnitude" in name:
            parameter.data.mul_(1 + 0.1 * torch.rand_like(parameter))
    return wrapped.eval()


def check(log, step, expected, *, tolerance=1e-6):
    """The snapshot holds what was expected, site for site in order, NaN where NaN."""
    frame = log.read(steps=[step])
    assert list(dict.fromkeys(frame["site"])) == list(expected)
    for site, drift in expected.items():
        rows = frame[frame["site"] == site]
        assert rows["row"].tolist() == list(range(len(drift.l2)))
        for metric, values in zip(("l2", "relative", "cosine_distance"), drift, strict=True):
            np.testing.assert_allclose(rows[metric], values.numpy(), rtol=tolerance, atol=1e-15, err_msg=site)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_stored_one_by_one_or_stacked_are_the_same_sites(family, tmp_path):
    model = build(family)
    apart = Checkpoint(save(model, tmp_path / "apart"), "apart")
    stacked = Checkpoint(save(model, tmp_path / "stacked", save_original_format=False), "stacked")
    assert set(apart.tensors) != set(stacked.tensors)
    assert list(apart.sites) == list(stacked.sites)
    assert apart.fingerprint() == stacked.fingerprint() == fingerprint(model)
    save(moved(family), tmp_path / "tuned", save_original_format=False)
    result = diff(tmp_path / "apart", [tmp_path / "tuned"], tmp_path / "log", threads=1)
    check(result.log, 1, compare_models(model, moved(family)))


@pytest.mark.parametrize("family", FAMILIES)
def test_two_folders_equal_two_models(family, tmp_path):
    before, after = build(family), moved(family)
    save(before, tmp_path / "a")
    save(after, tmp_path / "b", max_shard_size="8KB")
    assert (tmp_path / "b" / "model.safetensors.index.json").exists()
    result = diff(tmp_path / "a", [tmp_path / "b"], tmp_path / "log")
    check(result.log, 1, compare_models(before, after))
    norms = torch.cat([site.weight.double().norm(dim=1) for site in linear_sites(before).values()])
    np.testing.assert_allclose(result.log.initial()["norm"], norms.numpy(), rtol=1e-12)
    overall, last = result.summaries[1][0], result.log.read(steps=[1])
    assert overall.neurons == len(norms)
    assert overall.relative == pytest.approx(last["relative"].astype(float).mean())
    assert overall.unmoved == 1 / len(norms)


@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e-6])
def test_blocks_of_rows_make_no_difference_and_float64_is_kept(scale, tmp_path, monkeypatch):
    before, after = build("llama").double(), build("llama").double()
    torch.manual_seed(0)
    for site in linear_sites(after).values():
        site.weight.add_(torch.randn(site.shape, dtype=torch.float64) * scale)
    save(before, tmp_path / "a")
    save(after, tmp_path / "b")
    monkeypatch.setattr("neurondrift.drift.difference.BLOCK", 40)
    check(diff(tmp_path / "a", [tmp_path / "b"], tmp_path / "log").log, 1, compare_models(before, after))


def test_bfloat16_against_float32_is_exact(tmp_path):
    before = build("llama")
    after = build("llama").to(torch.bfloat16)
    save(before, tmp_path / "a")
    save(after, tmp_path / "b")
    result = diff(tmp_path / "a", [tmp_path / "b"], tmp_path / "log")
    check(result.log, 1, compare_models(before, after.float()))


def test_neurons_of_zero_norm_and_unmoved_ones_are_counted(tmp_path):
    before, after = build("llama"), moved("llama")
    linear_sites(before)["model.layers.0.mlp.up_proj"].weight[:3] = 0
    save(before, tmp_path / "a")
    save(after, tmp_path / "b")
    result = diff(tmp_path / "a", [tmp_path / "b"], tmp_path / "log")
    lines = {line.part: line for line in result.summaries[1]}
    assert (lines["all neurons"].zero_norm, lines["up_proj"].zero_norm, lines["down_proj"].zero_norm) == (3, 3, 0)
    assert lines["first third"].zero_norm == 3
    assert result.log.metadata()["zero_norm"] == {"model.layers.0.mlp.up_proj": 3}
    assert int(result.log.read()["relative"].isna().sum()) == 3


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_folder_equals_the_closed_form(family, tmp_path):
    wrapped = adapted(family)
    save(build(family), tmp_path / "base")
    save(wrapped, tmp_path / "adapter")
    result = diff(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "log")
    expected = measure_drift(wrapped)
    assert set(expected) == {name for name in linear_sites(wrapped) if not name.endswith(".gate")}
    check(result.log, 1, {name: expected[name] for name in linear_sites(wrapped) if name in expected}, tolerance=1e-5)
    assert result.log.metadata()["untrained"] == [n for n in linear_sites(wrapped) if n.endswith(".gate")]


@pytest.mark.parametrize(
    "settings",
    [
        {"use_rslora": True, "target_modules": ["q_proj", "up_proj"]},
        {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 3}, "alpha_pattern": {"up_proj": 9}},
        {"use_dora": True, "target_modules": ["q_proj", "down_proj"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["up_proj", "lm_head"], "bias": "lora_only"},
    ],
    ids=["rslora", "patterns", "dora", "modules_to_save"],
)
def test_settings_of_lora_are_read_as_peft_reads_them(settings, tmp_path):
    wrapped = adapted("llama", **settings)
    for name, parameter in wrapped.named_parameters():
        if "modules_to_save" in name:
            parameter.data.mul_(1.25)
    save(build("llama"), tmp_path / "base")
    save(wrapped, tmp_path / "adapter")
    result = diff(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "log")
    check(result.log, 1, measure_drift(wrapped), tolerance=1e-5)


def test_dora_on_conv1d(tmp_path):
    wrapped = adapted("gpt2", use_dora=True, fan_in_fan_out=True)
    save(build("gpt2"), tmp_path / "base")
    save(wrapped, tmp_path / "adapter")
    check(
        diff(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "log").log, 1, measure_drift(wrapped), tolerance=1e-5
    )


def test_adapters_of_different_sites_share_one_log(tmp_path):
    save(build("llama"), tmp_path / "base")
    save(adapted("llama", target_modules=["q_proj"]), tmp_path / "one")
    save(adapted("llama", target_modules=["up_proj"]), tmp_path / "two")
    log = diff(tmp_path / "base", [tmp_path / "one", tmp_path / "two"], tmp_path / "log").log
    frame = log.read().groupby(["step", "site"], observed=True)["l2"].max()
    assert log.steps() == [1, 2]
    assert frame[1, "model.layers.0.self_attn.q_proj"] > 0 == frame[1, "model.layers.0.mlp.up_proj"]
    assert frame[2, "model.layers.0.mlp.up_proj"] > 0 == frame[2, "model.layers.0.self_attn.q_proj"]


def test_a_second_call_makes_the_same_log_and_another_is_refused(tmp_path):
    save(build("llama"), tmp_path / "a")
    save(moved("llama"), tmp_path / "b")
    first = diff(tmp_path / "a", [tmp_path / "b"], tmp_path / "log").log.table()
    assert diff(tmp_path / "a", [tmp_path / "b"], tmp_path / "log").log.table().equals(first)
    with pytest.raises(ArtifactError, match="holds another drift log.*another --output-dir"):
        diff(tmp_path / "b", [tmp_path / "a"], tmp_path / "log")


@pytest.fixture
def base(tmp_path):
    return save(build("llama"), tmp_path / "base")


def test_models_that_do_not_fit_are_named(base, tmp_path):
    from transformers import LlamaForCausalLM

    config = build("llama").config
    config.intermediate_size = 20
    save(LlamaForCausalLM(config), tmp_path / "narrow")
    with pytest.raises(ModelError, match=r"shapes of model.layers.0.mlp.gate_proj differ.*\[24, 16\].*\[20, 16\]"):
        diff(base, [tmp_path / "narrow"], tmp_path / "log")
    config.intermediate_size, config.num_hidden_layers = 24, 1
    save(LlamaForCausalLM(config), tmp_path / "shallow")
    with pytest.raises(ModelError, match=r"shallow has not the site model.layers.1.self_attn.q_proj"):
        diff(base, [tmp_path / "shallow"], tmp_path / "log")
    with pytest.raises(ModelError, match=r"shallow has not the site model.layers.1.* of .*base"):
        diff(tmp_path / "shallow", [base], tmp_path / "log")
    save(build("gpt2"), tmp_path / "other")
    with pytest.raises(ModelError, match="has not the site"):
        diff(base, [tmp_path / "other"], tmp_path / "log")
    assert not (tmp_path / "log").exists()


def test_adapters_that_do_not_fit_are_named(base, tmp_path, caplog):
    save(adapted("gpt_neox"), tmp_path / "foreign")
    with pytest.raises(ModelError, match=r"gpt_neox.layers.0.* of the adapter .*foreign fits nothing in .*base"):
        diff(base, [tmp_path / "foreign"], tmp_path / "log")
    save(adapted("llama"), tmp_path / "adapter")
    with pytest.raises(ModelError, match="BASE is an adapter"):
        diff(tmp_path / "adapter", [base], tmp_path / "log")
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())

    def edited(**changes):
        (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(settings | changes))
        return diff(base, [tmp_path / "adapter"], tmp_path / "log")

    with pytest.raises(ModelError, match=r"factors of .* do not fit .*rank 8"):
        edited(r=8)
    with pytest.raises(ModelError, match="cannot be read from its files.*VERA.*LORA"):
        edited(peft_type="VERA")
    with pytest.raises(ModelError, match="changed the base weights when it was made.*pissa"):
        edited(init_lora_weights="pissa_niter_4")
    with pytest.raises(ModelError, match="LoRA adapter with use_qalora"):
        edited(use_qalora=True)
    edited(base_model_name_or_path="meta-llama/Llama-2-7b-chat-hf")
    assert "was trained on meta-llama/Llama-2-7b-chat-hf, and is compared with" in caplog.text
    assert str(base) in caplog.text
    caplog.clear()
    edited(base_model_name_or_path=str(base))
    assert not caplog.text


def test_broken_files_are_told_apart(base, tmp_path):
    def broken(name, change):
        folder = tmp_path / name
        shutil.copytree(base, folder)
        change(folder / "model.safetensors")
        return folder

    def cut(file):
        file.write_bytes(file.read_bytes()[:-100])

    with pytest.raises(ArtifactError, match="truncated or no safetensors file.*ends after the end"):
        diff(base, [broken("cut", cut)], tmp_path / "log")
    with pytest.raises(ArtifactError, match="truncated or no safetensors file.*header is longer"):
        diff(base, [broken("tiny", lambda file: file.write_bytes(struct.pack("<Q", 1 << 40)))], tmp_path / "log")
    with pytest.raises(ArtifactError, match="truncated or no safetensors"):
        diff(
            base, [broken("text", lambda file: file.write_text("version https://git-lfs.github.com"))], tmp_path / "log"
        )
    pickled = broken("pickled", lambda file: file.rename(file.with_name("pytorch_model.bin")))
    with pytest.raises(ModelError, match="pickled, and nothing is ever unpickled.*pytorch_model.bin"):
        diff(base, [pickled], tmp_path / "log")
    gguf = broken("gguf", lambda file: file.rename(file.with_name("model.gguf")))
    with pytest.raises(ModelError, match=r"holds a GGUF file in place of a model.*name the file itself"):
        diff(base, [gguf], tmp_path / "log")
    shards = save(build("llama"), tmp_path / "shards", max_shard_size="8KB")
    next(shards.glob("model-00002*")).unlink()
    with pytest.raises(ArtifactError, match="file is missing.*model-00002"):
        diff(base, [shards], tmp_path / "log")


def test_quantised_weights_are_refused(base, tmp_path):
    packed = shutil.copytree(base, tmp_path / "packed")
    tensors = load_file(packed / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"].to(torch.int8)
    save_file(tensors, packed / "model.safetensors")
    with pytest.raises(ModelError, match="model.layers.0.mlp.up_proj.weight .* is packed or quantised"):
        diff(base, [packed], tmp_path / "log")
    config = json.loads((packed / "config.json").read_text()) | {"quantization_config": {"quant_method": "gptq"}}
    (packed / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="is quantised.*gptq"):
        diff(base, [packed], tmp_path / "log")


def test_references_that_lead_nowhere(base, tmp_path, capsys):
    with pytest.raises(ModelError, match=r"hub's cache.*cannot be reached.*nobody/nothing.*HF_HUB_OFFLINE"):
        diff(base, ["nobody/nothing"], tmp_path / "log")
    with pytest.raises(ModelError, match="no such folder or hub model"):
        diff(base, [str(tmp_path / "missing" / "folder")], tmp_path / "log")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="holds no model: it has no config.json"):
        diff(base, [tmp_path / "empty"], tmp_path / "log")
    with pytest.raises(ModelError, match="a file, not a model"):
        diff(base, [base / "config.json"], tmp_path / "log")
    with pytest.raises(ConfigError, match="Two snapshots have the step 3"):
        diff(base, [shutil.copytree(base, tmp_path / n / "checkpoint-3") for n in "xy"], tmp_path / "log")
    with pytest.raises(SystemExit) as stopped:
        main(["diff", str(base), str(tmp_path / "empty"), "--output-dir", str(tmp_path / "log")])
    assert stopped.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


def test_the_hubs_cache_is_read(base, tmp_path, monkeypatch):
    """A hub id that is cached: safetensors and configuration only, no network."""
    commit = "0" * 40
    root = tmp_path / "hub" / "models--someone--model"
    shutil.copytree(base, root / "snapshots" / commit)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with folder_of("someone/model") as folder:
        assert Checkpoint(folder, "someone/model").fingerprint() == fingerprint(build("llama"))


def test_the_tiny_model_is_a_reference_and_no_number_is_in_memory(base, tmp_path, monkeypatch):
    with folder_of("tiny:llama") as folder:
        assert len(Checkpoint(folder, "tiny:llama").sites) == 21
    save(adapted("llama"), tmp_path / "adapter")

    register = torch.nn.Module.register_parameter

    def refuse(module, name, parameter):
        assert parameter is None or parameter.is_meta, "a module has numbers"
        register(module, name, parameter)

    monkeypatch.setattr(torch.nn.Module, "register_parameter", refuse)
    diff(base, [base, tmp_path / "adapter"], tmp_path / "log")
    assert AdapterFolder(tmp_path / "adapter", "adapter", Checkpoint(base, "base")).changes
