"""`diff` and `load_model` with `measure_drift` give the same drift of every layout of an adapter, or the same error."""

import json
import re

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from helpers.disk import ADAPTER, adapter, configure, expert_factors, folder_with_tokenizer, rename, rewrite
from helpers.families import build
from neurondrift.base.errors import ModelError, UserError
from neurondrift.drift.difference import diff
from neurondrift.drift.meter import measure_drift
from neurondrift.models.loading import attach_adapter, load_model
from neurondrift.models.sites import linear_sites


@pytest.fixture
def base(tmp_path):
    return folder_with_tokenizer(build("llama"), tmp_path / "base")


def in_memory(base, folder):
    return measure_drift(load_model(base, dtype="float32", device="cpu", adapter=folder)[0])


def from_files(base, folder, log):
    return diff(base, [folder], log)


def both(base, folder, tmp_path):
    """The drift of an adapter, the same by both ways; the sites."""
    expected = in_memory(base, folder)
    result = from_files(base, folder, tmp_path / "log")
    frame = result.log.read(steps=[1])
    assert set(frame["site"]) == set(expected)
    for site, drift in expected.items():
        rows = frame[frame["site"] == site]
        for metric, values in zip(("l2", "relative", "cosine_distance"), drift, strict=True):
            np.testing.assert_array_equal(rows[metric], values.numpy(), err_msg=f"{metric} of {site}")
    return expected


def refused(base, folder, tmp_path):
    """What both ways say of an adapter that neither takes."""
    said = []
    for call in (lambda: in_memory(base, folder), lambda: from_files(base, folder, tmp_path / "log")):
        with pytest.raises(UserError) as caught:
            call()
        said.append(str(caught.value).replace(str(base), "BASE"))
    assert said[0] == said[1]
    return said[0]


def same(first, second):
    return list(first) == list(second) and all(torch.equal(first[site].l2, second[site].l2) for site in first)


LAYOUTS = {
    "compiled": lambda key: "_orig_mod." + key,
    "compiled inside": lambda key: key.replace("base_model.model.", "base_model.model._orig_mod."),
    "one block compiled": lambda key: key.replace("layers.1.", "layers.1._orig_mod."),
    "data-parallel": lambda key: "module." + key,
    "data-parallel inside": lambda key: key.replace("base_model.model.", "base_model.model.module."),
    "fsdp": lambda key: key.replace("layers.", "layers.").replace(".self_attn", "._fsdp_wrapped_module.self_attn"),
    "checkpointed": lambda key: key.replace(".self_attn", "._checkpoint_wrapped_module.self_attn"),
    "without PEFT's prefix": lambda key: key.removeprefix("base_model.model."),
    "with the adapter's name": lambda key: re.sub(r"(lora_[AB]|lora_magnitude_vector)", r"\1.default", key),
    "multimodal": lambda key: key.replace("model.model.", "model.model.language_model."),
    "multimodal, as in version 4": lambda key: key.replace("model.model.", "model.language_model.model."),
    "decoder alone": lambda key: key.replace("base_model.model.model.", "base_model.model."),
}


# A2, and its kind
@pytest.mark.parametrize("layout", LAYOUTS)
def test_names_of_other_trainers_are_the_models(layout, base, tmp_path):
    folder = adapter(build("llama"), tmp_path / "adapter", rank_pattern={"layers.1.self_attn.q_proj": 2})
    right = in_memory(base, folder)
    assert len(right) == 4 and min(float(drift.l2.min()) for drift in right.values()) > 0
    rename(folder / ADAPTER, LAYOUTS[layout])
    assert same(both(base, folder, tmp_path), right)


def test_targets_of_another_name_are_those_of_the_file(base, tmp_path):
    folder = adapter(build("llama"), tmp_path / "adapter")
    right = in_memory(base, folder)
    rename(folder / ADAPTER, LAYOUTS["multimodal"])
    configure(folder, target_modules=r"model\.language_model\.layers\.\d+\.self_attn\.[qv]_proj")
    assert same(both(base, folder, tmp_path), right)


# The configuration that PEFT 0.10 wrote, whose fields are those of all later versions, and the keys of its DoRA
OF_0_10 = (
    "alpha_pattern auto_mapping base_model_name_or_path bias fan_in_fan_out inference_mode init_lora_weights "
    "layer_replication layers_pattern layers_to_transform loftq_config lora_alpha lora_dropout megatron_config "
    "megatron_core modules_to_save peft_type r rank_pattern revision target_modules task_type use_dora use_rslora"
).split()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"use_dora": True},
        {"layers_to_transform": [1]},
        {"exclude_modules": ["layers.0.self_attn.q_proj"]},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {r"layers\.1\.self_attn\.v_proj": 3}},
        {"target_modules": "all-linear"},
        {"target_modules": r".*\.1\..*(q_proj|down_proj)"},
        {"bias": "lora_only", "lora_bias": True},
    ],
    ids=["lora", "rslora", "dora", "layers", "excluded", "patterns", "all-linear", "regex", "bias"],
)
@pytest.mark.parametrize("layout", ["as written", "compiled", "with the adapter's name", "multimodal"])
@pytest.mark.parametrize("old", [False, True], ids=["0.21", "0.10"])
def test_settings_and_versions(settings, layout, old, base, tmp_path):
    folder = adapter(build("llama"), tmp_path / "adapter", **settings)
    right = in_memory(base, folder)
    if old and not settings.keys() & {"exclude_modules", "lora_bias"}:
        file = folder / "adapter_config.json"
        file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k in OF_0_10}))
    if layout != "as written":
        rename(folder / ADAPTER, LAYOUTS[layout])
    assert same(both(base, folder, tmp_path), right)


def mixtral_v4(layer, expert):
    place = f"base_model.model.model.layers.{layer}.block_sparse_moe.experts.{expert}"
    return [f"{place}.{name}" for name in ("w1", "w3", "w2")]


def qwen_v4(layer, expert):
    place = f"base_model.model.model.layers.{layer}.mlp.experts.{expert}"
    return [f"{place}.{name}" for name in ("gate_proj", "up_proj", "down_proj")]


EXPERTS = {
    "mixtral": ("mixtral", mixtral_v4, 24),
    "mixtral, compiled": ("mixtral", lambda *at: ["_orig_mod." + key for key in mixtral_v4(*at)], 24),
    "mixtral by newer names": ("mixtral", qwen_v4, 24),
    "qwen3_moe": ("qwen3_moe", qwen_v4, 12),
}


@pytest.fixture(params=EXPERTS)
def mixture(request, tmp_path):
    """A mixture's base, and an adapter with the factors of single experts."""
    family, names, inner = EXPERTS[request.param]
    base = folder_with_tokenizer(build(family), tmp_path / "base")
    return base, adapter(build(family), tmp_path / "adapter"), names, inner


def oracle(base, folder, names):
    """The change of every expert by hand, from the file: name of the site -> ‖Δ‖ of its neurons."""
    from safetensors.torch import load_file

    tensors = {key: value.double() for key, value in load_file(folder / ADAPTER).items()}
    config = json.loads((folder / "adapter_config.json").read_text())
    rank, alpha = config["r"], config["lora_alpha"]
    scale = alpha / (rank**0.5 if config["use_rslora"] else rank)
    found = {}
    for layer in range(2):
        for expert in range(4):
            gate, up, down = (
                tensors[f"{key}.lora_B.weight"] @ tensors[f"{key}.lora_A.weight"] * scale
                if f"{key}.lora_A.weight" in tensors
                else None
                for key in names(layer, expert)
            )
            place = f"model.layers.{layer}.mlp.experts"
            if gate is not None or up is not None:
                other = gate if gate is not None else up
                rows = [torch.zeros_like(other) if part is None else part for part in (gate, up)]
                found[f"{place}.gate_up_proj.{expert}"] = torch.cat(rows).norm(dim=1)
            if down is not None:
                found[f"{place}.down_proj.{expert}"] = down.norm(dim=1)
    return found


# A1, and its kind: in transformers 4 each expert is a module of its own
@pytest.mark.parametrize(
    ("settings", "left_out", "sites"),
    [
        ({}, "nothing", 20),
        ({"use_rslora": True}, "nothing", 20),
        ({"lora_dropout": 0.1}, "nothing", 20),
        ({}, r"(w3|up_proj)$", 20),
        ({}, r"(w2|down_proj)$", 12),
        ({}, r"(w1|w3|gate_proj|up_proj)$", 12),
        ({}, r"experts\.2\.", 20),
    ],
    ids=["all", "rslora", "dropout", "gate and down", "gate and up", "down alone", "an expert without"],
)
def test_factors_of_single_experts_are_those_of_the_stacked_ones(mixture, settings, left_out, sites, tmp_path):
    base, folder, names, inner = mixture
    expert_factors(folder, names, inner=inner, leave_out=lambda key: bool(re.search(left_out, key)))
    configure(folder, **settings)
    drift = both(base, folder, tmp_path)
    assert len(drift) == sites
    for site, norms in oracle(base, folder, names).items():
        np.testing.assert_allclose(drift[site].l2.numpy(), norms.numpy(), rtol=1e-5)


def test_the_model_runs_what_the_files_say(mixture):
    base, folder, names, inner = mixture
    expert_factors(folder, names, inner=inner)
    tuned, _ = load_model(base, dtype="float32", device="cpu", adapter=folder)
    merged, _ = load_model(base, dtype="float32", device="cpu")
    from neurondrift.models.adapters import effective_weight

    tuned_sites = linear_sites(tuned)
    for name, site in linear_sites(merged).items():
        site.weight.copy_(effective_weight(tuned_sites[name]))
    ids = torch.arange(5, 15)[None]
    with torch.no_grad():
        torch.testing.assert_close(tuned(ids).logits, merged(ids).logits, rtol=1e-4, atol=1e-5)


def test_a_router_under_its_older_name(tmp_path):
    base = folder_with_tokenizer(build("mixtral"), tmp_path / "base")
    folder = adapter(build("mixtral"), tmp_path / "adapter")

    def change(tensors):
        for layer in range(2):
            key = f"base_model.model.model.layers.{layer}.block_sparse_moe.gate"
            tensors |= {f"{key}.lora_A.weight": torch.randn(4, 16), f"{key}.lora_B.weight": torch.randn(4, 4) * 0.05}
        return tensors

    rewrite(folder / ADAPTER, change)
    expert_factors(folder, mixtral_v4)
    configure(folder, target_modules=["q_proj", "v_proj", "gate", "w1", "w2", "w3"])
    assert len(both(base, folder, tmp_path)) == 22


@pytest.mark.parametrize("changes", [{"use_dora": True}, {"rank_pattern": {"w2": 4, "experts.1.w1": 2}}])
def test_experts_that_cannot_be_stacked_are_refused_alike(changes, tmp_path):
    base = folder_with_tokenizer(build("mixtral"), tmp_path / "base")
    folder = expert_factors(adapter(build("mixtral"), tmp_path / "adapter"), mixtral_v4)
    configure(folder, **changes)
    assert re.search("single experts with use_dora|different ranks", refused(base, folder, tmp_path))


# A6
@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "norm"]},
    ],
    ids=["head", "embeddings", "both", "head saved", "embeddings and norms saved"],
)
@pytest.mark.parametrize("layout", ["right", "compiled", "one block compiled"])
def test_what_is_trained_outside_the_blocks_is_noted(settings, layout, base, tmp_path):
    folder = adapter(build_resized(), tmp_path / "adapter", **settings)
    if layout != "right":
        rename(folder / ADAPTER, LAYOUTS[layout])
    assert len(both(base, folder, tmp_path)) == 2
    notes = diff(base, [folder], tmp_path / "log").notes
    outside = [*settings["target_modules"][1:], *settings.get("modules_to_save", [])]
    assert len(notes) == 1 and "is not measured" in notes[0]
    assert any(name in notes[0] for name in outside)


def build_resized():
    model = build("llama")
    model.resize_token_embeddings(264)
    return model


def test_adapters_that_fit_nothing_or_lack_something_are_refused_alike(base, tmp_path):
    folder = adapter(build("llama"), tmp_path / "adapter")
    rewrite(folder / ADAPTER, lambda tensors: {k: v for k, v in tensors.items() if "layers.1.self_attn.v" not in k})
    assert re.search(r"no factors of model.layers.1.self_attn.v_proj, which its", refused(base, folder, tmp_path))
    folder = adapter(build("llama"), tmp_path / "renamed")
    rename(folder / ADAPTER, lambda key: key.replace("layers", "stages"))
    assert re.search(r"stages.0.self_attn.* fits nothing in BASE", refused(base, folder, tmp_path))
    folder = adapter(build("llama"), tmp_path / "extra")
    rewrite(folder / ADAPTER, lambda tensors: tensors | {"base_model.model.score.weight": torch.ones(2, 2)})
    assert re.search(r"score.weight of the adapter .* fits nothing in BASE", refused(base, folder, tmp_path))
    folder = adapter(build("llama"), tmp_path / "size")
    configure(folder, r=8)
    assert re.search(r"factors of .*_proj in the adapter .* do not fit BASE.*rank 8", refused(base, folder, tmp_path))
    folder = adapter(build("llama"), tmp_path / "half")
    rewrite(
        folder / ADAPTER, lambda tensors: {k: v for k, v in tensors.items() if "0.self_attn.q_proj.lora_B" not in k}
    )
    assert re.search(r"only one factor of model.layers.0.self_attn.q_proj", refused(base, folder, tmp_path))
    folder = adapter(build("llama"), tmp_path / "kind")
    configure(folder, peft_type=None, fine_tune_type="lora")
    assert re.search("does not say what kind of adapter", refused(base, folder, tmp_path))


def test_adapters_in_folders_within_are_named(base, tmp_path):
    model = get_peft_model(build("llama"), LoraConfig(target_modules=["q_proj"]), adapter_name="safety")
    model.save_pretrained(tmp_path / "outer")
    said = refused(base, tmp_path / "outer", tmp_path)
    assert "holds no adapter in safetensors" in said and str(tmp_path / "outer" / "safety") in said
    with pytest.raises(ModelError, match="holds no adapter"):
        attach_adapter(build("llama"), tmp_path)


# A12
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", [r"layers\.1\.", r"layers\."])
def test_neurons_that_are_no_numbers_are_counted(value, where, base, tmp_path):
    folder = adapter(build("llama"), tmp_path / "adapter")
    healthy = diff(base, [folder], tmp_path / "healthy").summaries[1]
    rewrite(
        folder / ADAPTER,
        lambda tensors: {
            key: torch.full_like(tensor, value) if re.search(where, key) and "lora_B" in key else tensor
            for key, tensor in tensors.items()
        },
    )
    result = diff(base, [folder], tmp_path / "log")
    line = result.summaries[1][0]
    assert (line.neurons, line.not_finite) == (48, 24 if "1" in where else 48)
    assert result.log.not_finite() == {1: line.not_finite}
    assert re.search(rf"{line.not_finite} of 48 neurons of .* NaN or infinite, first in model.layers", result.notes[0])
    assert healthy[0].not_finite == 0
    if "1" in where:
        first = next(part for part in healthy if part.part == "first third")
        assert line.relative == pytest.approx(first.relative)
    else:
        assert np.isnan(line.relative)


# Weights that are trained whole, stacked experts as PEFT adapts them, and files of other kinds.


@pytest.mark.parametrize(
    ("settings", "sites"),
    [
        ({"modules_to_save": ["down_proj"]}, 6),
        ({"modules_to_save": ["up_proj", "lm_head"], "bias": "all"}, 6),
        ({"modules_to_save": ["mlp"]}, 10),
        ({"modules_to_save": ["down_proj"], "use_dora": True}, 6),
        ({"trainable_token_indices": [3, 5]}, 4),
    ],
    ids=["a layer", "a layer, the head, biases", "an MLP", "with DoRA", "tokens"],
)
@pytest.mark.parametrize(
    "layout", ["as written", "compiled", "data-parallel inside", "one block compiled", "multimodal"]
)
def test_modules_that_are_trained_whole(settings, sites, layout, base, tmp_path):
    model = build_resized()
    folder = adapter(model, tmp_path / "adapter", **settings)
    rewrite(
        folder / ADAPTER,
        lambda tensors: {k: v + 0.01 if "lora" not in k and v.ndim == 2 else v for k, v in tensors.items()},
    )
    right = in_memory(base, folder)
    assert len(right) == sites
    if layout != "as written":
        rename(folder / ADAPTER, LAYOUTS[layout])
    assert same(both(base, folder, tmp_path), right)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize(
    "targets", [["experts.gate_up_proj"], ["experts.down_proj"], ["experts.gate_up_proj", "experts.down_proj"]]
)
@pytest.mark.parametrize("layout", ["as written", "compiled", "with the adapter's name", "without PEFT's prefix"])
def test_stacked_experts_as_parameters(family, targets, layout, tmp_path):
    """PEFT's `target_parameters` (from 0.17 on): one pair of factors for all experts of a layer."""
    base = folder_with_tokenizer(build(family), tmp_path / "base")
    folder = adapter(build(family), tmp_path / "adapter", target_parameters=targets)
    right = in_memory(base, folder)
    assert sum(".experts." in site for site in right) == 8 * len(targets)
    if layout != "as written":
        rename(folder / ADAPTER, LAYOUTS[layout])
    assert same(both(base, folder, tmp_path), right)


def test_an_adapter_with_a_name_is_read_from_its_own_folder(base, tmp_path):
    model = build("llama")
    plain = adapter(model, tmp_path / "plain")
    wrapped = get_peft_model(
        build("llama"), LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]), "safety"
    )
    wrapped.save_pretrained(tmp_path / "outer")
    inner = tmp_path / "outer" / "safety"
    (inner / ADAPTER).write_bytes((plain / ADAPTER).read_bytes())
    assert same(both(base, inner, tmp_path), in_memory(base, plain))


def test_pickled_adapters_are_refused_alike(base, tmp_path):
    """PEFT wrote `adapter_model.bin` until 0.6, and does so still with safe_serialization=False."""
    folder = adapter(build("llama"), tmp_path / "adapter")
    (folder / ADAPTER).rename(folder / "adapter_model.bin")
    assert re.search("pickled, and nothing is ever unpickled.*adapter_model.bin", refused(base, folder, tmp_path))
