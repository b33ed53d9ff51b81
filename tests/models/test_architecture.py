"""Where blocks lie, how experts are stored, what is left out and what is shared: cases of shared/cases/README.md."""

import copy
import logging

import pytest
import torch
import transformers as t
from peft import LoraConfig, get_peft_model
from torch import nn

import neurondrift as nd
from helpers.every_class import Numbers, rows
from helpers.every_class import build as tiny
from helpers.families import build, gpt_oss, save
from neurondrift.base.errors import DataError, ModelError
from neurondrift.behaviour.generate import _Loop, answer
from neurondrift.behaviour.requests import Decoding, Request
from neurondrift.drift.difference import diff
from neurondrift.drift.meter import DriftMeter
from neurondrift.models import loading
from neurondrift.models.architecture.blocks import decoder_blocks
from neurondrift.models.architecture.classes import auto_class, configuration, model_class
from neurondrift.models.architecture.conventions import conventions_of
from neurondrift.models.architecture.experts import is_transposed, told_by_shapes
from neurondrift.models.architecture.saying import kinds_of, say_once
from neurondrift.models.batches import context_length
from neurondrift.models.sites import Sites, linear_sites, magnitudes_of, mlp_units


@pytest.fixture(autouse=True)
def said(caplog):
    """What is said once may be said again in each test."""
    say_once.cache_clear()
    caplog.set_level(logging.WARNING, logger="neurondrift")
    return caplog


# Where the blocks of the text model lie (M8).


def vision_and_text(depth: int = 2):
    rope = dict(rope_type="default", rope_theta=1e4, mrope_section=[1, 1, 0])
    sizes = dict(vocab_size=64, hidden_size=16, intermediate_size=24, num_attention_heads=4, num_key_value_heads=2)
    text = dict(**sizes, num_hidden_layers=2, head_dim=4, rope_parameters=rope)
    vision = dict(depth=depth, hidden_size=16, intermediate_size=24, num_heads=4, out_hidden_size=16)
    config = t.Qwen3VLConfig(text_config=text, vision_config=vision | dict(deepstack_visual_indexes=[0]))
    torch.manual_seed(0)
    return t.Qwen3VLForConditionalGeneration(config).eval()


@pytest.mark.parametrize("depth", [2, 3])
def test_the_text_model_is_found_where_a_vision_model_has_as_many_blocks(depth):
    model = vision_and_text(depth)
    names = list(linear_sites(model))
    assert names
    assert all(name.startswith("model.language_model.layers.") for name in names)
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    drift = nd.measure_drift(wrapped)
    assert list(drift) == [name for name in names if name.endswith("q_proj")]
    assert all((one.l2 > 0).all() for one in drift.values())


class Beside(nn.Module):
    """A model of unknown make: an image part of as many blocks as the text part, and no rule of transformers."""

    def __init__(self, first: str, second: str):
        super().__init__()
        self.config = t.LlamaConfig(num_hidden_layers=2)
        for name in (first, second):
            part = nn.Module()
            part.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
            self.add_module(name, part)
        self.writer.tokens = nn.Embedding(8, 4)

    def get_input_embeddings(self):
        return self.writer.tokens


@pytest.mark.parametrize("order", [("looker", "writer"), ("writer", "looker")])
def test_the_blocks_nearest_to_the_embedding_are_the_text_models(order):
    assert decoder_blocks(Beside(*order))[0].name == "writer.layers"


def test_lists_within_a_block_are_no_blocks():
    model = tiny("longcat_flash", "LongcatFlashForCausalLM")
    sites = linear_sites(model)
    assert decoder_blocks(model)[0].name == "model.layers"
    assert {site.layer for site in sites.values()} == set(range(len(model.model.layers)))
    assert sum(".mlps." in name for name in sites)


# Experts (M10).


def test_one_unit_of_an_expert_is_one_row_however_it_is_stored():
    for model, changed in (
        (tiny("llama4_text", "Llama4ForCausalLM"), "feed_forward"),
        (gpt_oss(), "mlp"),
        (tiny("aria_text", "AriaTextForCausalLM"), "mlp"),
    ):
        experts = next(m for name, m in model.named_modules() if name.endswith(f"{changed}.experts"))
        tuned = copy.deepcopy(model)
        with torch.no_grad():
            tuned.get_parameter(name_of(model, experts.gate_up_proj))[0][:, 5] += 1  # one output unit, stored [in, out]
        drift = nd.compare_models(model, tuned)
        moved = {name: int((one.l2 > 0).sum()) for name, one in drift.items() if (one.l2 > 0).any()}
        assert moved == {f"{name_of(model, experts.gate_up_proj)}.0": 1}


def name_of(model, parameter):
    return next(name for name, one in model.named_parameters() if one is parameter)


def test_diff_of_experts_stored_in_out_equals_memory(tmp_path):
    model = tiny("llama4_text", "Llama4ForCausalLM")
    tuned = copy.deepcopy(model)
    with torch.no_grad():
        tuned.model.layers[0].feed_forward.experts.gate_up_proj[0][:, 5] += 1
    log = diff(save(model, tmp_path / "a"), [save(tuned, tmp_path / "b")], tmp_path / "log").log.read(steps=[1])
    moved = log[log["l2"] > 0]
    assert moved["site"].tolist() == ["model.layers.0.feed_forward.experts.gate_up_proj.0"]
    assert moved["row"].tolist() == [5]


@pytest.mark.parametrize(
    ("into", "down", "transposed"),
    [
        ((4, 48, 16), (4, 16, 24), False),
        ((4, 16, 48), (4, 24, 16), True),
        ((4, 24, 16), (4, 16, 24), None),
        ((4, 16, 24), (4, 24, 16), None),
        ((4, 16, 16), (4, 16, 16), None),
        ((4, 48, 16), (4, 20, 24), None),
    ],
)
def test_shapes_tell_which_way_round_experts_lie(into, down, transposed):
    assert told_by_shapes(into, down) is transposed


def test_hidden_units_of_interleaved_gate_and_up_rows():
    model = gpt_oss()
    assert not model.model.layers[0].mlp.experts.is_concatenated
    sites = linear_sites(model)
    name, unit = next(iter(mlp_units(sites).items()))
    fused = sites[unit.ups[0][0]]
    together = torch.cat([fused.weight[[2 * 3, 2 * 3 + 1]].flatten(), sites[unit.down].weight[:, 3]])
    assert magnitudes_of(sites, "unit")[name][3] == pytest.approx(float(together.double().norm()))
    group = nd.random_group({name: (unit.count, 1)}, fraction=1 / unit.count, seed=0, granularity="unit")
    chosen = int(group.members[name][0])
    with nd.prune(model, group):
        rows_ = [row for row in range(fused.shape[0]) if not fused.weight[row].any()]
    assert rows_ == [2 * chosen, 2 * chosen + 1]


@pytest.mark.parametrize(("kind", "ups"), [("gptj", 1), ("codegen", 1), ("lfm2", 2)])
def test_hidden_units_are_found(kind, ups):
    name = {"gptj": "GPTJForCausalLM", "codegen": "CodeGenForCausalLM", "lfm2": "Lfm2ForCausalLM"}[kind]
    units = linear_sites(tiny(kind, name)).units
    assert len(units) == 2
    assert all(len(unit.ups) == ups for unit in units.values())


# What is left out, and what is shared (F5, F6, F8).


def test_what_is_no_matrix_is_left_out_and_named_once(said):
    model = build("llama")
    model.model.layers[1].mlp.odd = nn.Embedding(3, 5)
    expected = list(linear_sites(build("llama")))
    for _ in range(2):
        sites = Sites(model)
    assert list(sites) == expected
    assert sites.left_out == ["model.layers.1.mlp.odd.weight"]
    messages = [record.getMessage() for record in said.records]
    assert messages == ["left out, as they are no matrix of a linear layer: model.layers.*.mlp.odd.weight"]


def test_names_in_few_words():
    assert kinds_of(["a.0.b", "a.1.b", "c"]) == "a.*.b (2), c"
    assert kinds_of(f"a.{letter}" for letter in "bcdefghi").endswith("a.g, and 2 kinds more")


@pytest.mark.parametrize(
    ("kind", "name"),
    [("jamba", "JambaForCausalLM"), ("mamba", "MambaForCausalLM"), ("falcon_mamba", "FalconMambaForCausalLM")],
)
def test_a_decay_does_not_block_the_linear_weights(kind, name, said):
    sites = linear_sites(tiny(kind, name))
    assert any(site.endswith("in_proj") for site in sites)
    assert any(left.endswith("A_log") for left in sites.left_out)
    assert "A_log" in said.text


def test_shared_weights_count_once_and_their_gradients_add_up(said):
    model = build("llama")
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    first, second = "model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"
    sites = linear_sites(model)
    assert first in sites
    assert second not in sites
    assert sites.shared == {second: first}
    assert "count once" in said.text
    apart = build("llama")
    apart.model.layers[1].mlp.up_proj.weight.data = apart.model.layers[0].mlp.up_proj.weight.data.clone()
    row = rows()[:1]
    together = [nd.score(apart, row, method="fisher")[name].sqrt() for name in (first, second)]
    found = nd.score(model, row, method="fisher")[first].sqrt()
    assert not torch.allclose(found, together[0], rtol=1e-3)
    assert (found <= together[0] + together[1] + 1e-6).all()


def test_a_module_that_is_used_twice_has_the_gradient_of_both(said):
    """F5: against plain autograd, beside a module that takes no part."""
    model = build("llama")
    mlp = model.model.layers[0].mlp
    mlp.forward = lambda x: mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * mlp.gate_proj(x))
    rows_ = rows()
    found = nd.score(model, rows_, method="taylor", batch_size=3)
    mlp.gate_proj.weight.requires_grad_(True)
    total = torch.zeros(mlp.gate_proj.weight.shape[0])
    for row in rows_:
        labels = torch.tensor(row["labels"])[1:]
        logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
        loss = nn.functional.cross_entropy(logits, labels, ignore_index=-100)
        gradient = torch.autograd.grad(loss, mlp.gate_proj.weight)[0]
        total += (gradient * mlp.gate_proj.weight.detach()).sum(dim=1).abs()
    torch.testing.assert_close(found["model.layers.0.mlp.gate_proj"], total / len(rows_), rtol=1e-4, atol=1e-7)
    assert not found["model.layers.0.mlp.up_proj"].any()
    assert "took no part in a forward pass, so that their scores are 0: model.layers.*.mlp.up_proj" in said.text


def test_a_weight_that_is_used_outside_of_its_module(said):
    model = build("llama")
    reference = nd.score(model, rows(), method="snip")
    mlp = model.model.layers[0].mlp
    mlp.forward = lambda x: mlp.down_proj(mlp.act_fn(x @ mlp.gate_proj.weight.T) * mlp.up_proj(x))
    name = "model.layers.0.mlp.gate_proj"
    for method in ("snip", "fisher", "taylor"):
        wanted = nd.score(build("llama"), rows(), method=method)
        for site, values in nd.score(model, rows(), method=method, batch_size=3).items():
            assert (values - wanted[site]).norm() <= 1e-5 * wanted[site].norm(), (method, site)
    assert f"scored one example at a time, as no hook sees what they compute: {name.replace('.0.', '.*.')}" in said.text
    with pytest.raises(ModelError, match=rf"What goes into {name} cannot be seen.*score the other sites only"):
        nd.score(model, rows(), method="wanda")
    others = {site: known for site, known in linear_sites(model).items() if site != name}
    assert list(nd.score(model, rows(), method="wanda", sites=others)) == list(others)
    assert list(reference) == list(linear_sites(model))


def test_a_model_that_writes_into_what_a_layer_gave():
    """F1: Falcon's `mlp_output += attention_output`, in every layout."""
    for settings in (dict(num_kv_heads=1), dict(new_decoder_architecture=True), dict(parallel_attn=False)):
        config = t.FalconConfig(
            vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0, **settings
        )
        torch.manual_seed(0)
        model = t.FalconForCausalLM(config).eval()
        for method in ("snip", "fisher", "taylor", "wanda"):
            one = nd.score(model, rows(), method=method, batch_size=1)
            for name, values in nd.score(model, rows(), method=method, batch_size=4).items():
                assert (values - one[name]).norm() <= 1e-5 * one[name].norm(), (settings, method, name)


# Adapters outside of the blocks.


def test_an_adapter_outside_of_the_blocks_is_named(said):
    model = get_peft_model(
        build("llama"), LoraConfig(r=2, target_modules=["q_proj", "lm_head"], modules_to_save=["embed_tokens"])
    )
    meter = DriftMeter(model)
    assert meter.elsewhere == ["model.embed_tokens", "lm_head"]
    assert "is no site, and is not measured: model.embed_tokens, lm_head" in said.text
    for inside in (dict(target_modules=["q_proj"]), dict(target_modules=["q_proj"], modules_to_save=["mlp"])):
        assert DriftMeter(get_peft_model(build("llama"), LoraConfig(r=2, **inside))).elsewhere == []
    settings = dict(target_modules=["q_proj"], target_parameters=["experts.gate_up_proj", "experts.down_proj"])
    assert DriftMeter(get_peft_model(build("mixtral"), LoraConfig(r=2, **settings))).elsewhere == []


# Kinds of models (conventions).


def bert(**settings):
    config = t.BertConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, initializer_range=0.2, **settings
    )
    torch.manual_seed(0)
    return t.BertLMHeadModel(config).eval()


@pytest.mark.parametrize("ask", [conventions_of, lambda model: conventions_of(model)], ids=["first", "again"])
def test_a_model_is_causal_where_nothing_that_comes_later_changes_a_prediction(ask):
    assert ask(bert(is_decoder=True)) == (True, True)
    assert ask(bert(is_decoder=False)) == (False, True)
    assert ask(build("llama")) == (True, True)
    assert not ask(tiny("kosmos-2.5", "Kosmos2_5ForConditionalGeneration")).usual_positions


def test_a_model_that_reads_both_ways_is_not_scored():
    with pytest.raises(ModelError, match="no causal language model: what comes later in a text changes"):
        nd.score(bert(is_decoder=False), rows(), method="snip")
    assert nd.score(bert(is_decoder=True), rows(), method="snip")


# Several lists of blocks, and experts in a class of their own.


def test_all_lists_of_blocks_that_make_a_decoder_together_are_measured():
    model = tiny("hrm_text", "HrmTextForCausalLM")
    stacks = decoder_blocks(model)
    assert [stack.name for stack in stacks] == ["model.L_module.layers", "model.H_module.layers"]
    sites = linear_sites(model)
    each = len(stacks[0].modules)
    assert {site.layer for site in sites.values()} == set(range(2 * each))
    assert {name.split(".")[1] for name, site in sites.items() if site.layer >= each} == {"H_module"}
    linear = [module for module in model.model.modules() if isinstance(module, nn.Linear)]
    assert len(sites) == len(linear)


class Turned(nn.Module):
    """A stack of linear layers, stored [experts, in, out] if `turned`."""

    turned = True

    def __init__(self, num_experts, input_size, output_size):
        super().__init__()
        self.num_experts, self.input_size, self.output_size = num_experts, input_size, output_size
        shape = (input_size, output_size) if self.turned else (output_size, input_size)
        self.weight = nn.Parameter(torch.zeros(num_experts, *shape))

    def forward(self, inputs, sizes):
        parts = zip(inputs.split(sizes), self.weight, strict=True)
        return torch.cat([part @ (one if self.turned else one.T) for part, one in parts])


class Straight(Turned):
    turned = False


class Otherwise(Turned):
    def forward(self, inputs, sizes):
        return super().forward(inputs, sizes) ** 2


@pytest.mark.parametrize("kind", [Turned, Straight, Otherwise])
def test_which_way_round_a_stack_of_linear_layers_is_stored_is_found_by_asking_its_class(kind):
    assert is_transposed(kind(4, 8, 8)) is (None if kind is Otherwise else kind.turned)


def test_one_unit_of_an_expert_in_a_class_of_its_own_is_one_row():
    model = tiny("jetmoe", "JetMoeForCausalLM")
    tuned = copy.deepcopy(model)
    with torch.no_grad():
        tuned.model.layers[0].mlp.input_linear.weight[2, 5] += 1
    moved = {name: int((one.l2 > 0).sum()) for name, one in nd.compare_models(model, tuned).items() if one.l2.any()}
    assert moved == {"model.layers.0.mlp.input_linear.weight.2": 1}
    assert linear_sites(model)["model.layers.0.mlp.input_linear.weight.2"].module_type == "input_linear"


# Which class a configuration makes.


@pytest.mark.parametrize(
    ("config", "named", "made"),
    [
        (t.MllamaConfig, "MllamaForConditionalGeneration", t.MllamaForConditionalGeneration),
        (t.MllamaConfig, "MllamaForCausalLM", t.MllamaForCausalLM),
        (t.MllamaConfig, None, t.MllamaForCausalLM),
        (t.Llama4Config, "Llama4ForConditionalGeneration", t.Llama4ForConditionalGeneration),
        (t.Emu3Config, "Emu3ForConditionalGeneration", t.Emu3ForConditionalGeneration),
        (t.LlavaConfig, "LlavaForConditionalGeneration", t.LlavaForConditionalGeneration),
        (t.Qwen3_5Config, "Qwen3_5ForConditionalGeneration", t.Qwen3_5ForCausalLM),  # which passes the images over
        (t.LlamaConfig, "LlamaForSequenceClassification", t.LlamaForCausalLM),
        (t.Emu3TextConfig, "Emu3ForCausalLM", t.Emu3ForCausalLM),  # no AutoModel knows these two
        (t.models.mllama.configuration_mllama.MllamaTextConfig, "MllamaForCausalLM", t.MllamaForCausalLM),
    ],
)
def test_the_class_is_the_one_whose_files_they_are(config, named, made):
    config = config(architectures=named and [named])
    found, own = model_class(config, "a")
    assert found is made
    assert type(own) is made.config_class


@pytest.mark.parametrize("named", [None, "Emu3TextModel", "LlamaForCausalLM", "PreTrainedModel", "os"])
def test_a_text_models_configuration_that_names_no_class_of_its_own_is_refused(named):
    with pytest.raises(ModelError, match=r"no causal language model.*a \(Emu3TextConfig\)"):
        auto_class(t.Emu3TextConfig(architectures=named and [named]), "a")


@pytest.mark.parametrize("name", ["MllamaForConditionalGeneration", "MllamaForCausalLM"])
def test_verify_counts_the_class_whose_files_they_are(name, tmp_path, monkeypatch):
    model = tiny("mllama", name)
    folder = save(model, tmp_path / "a")
    wanted = sum(parameter.numel() for parameter in model.parameters())
    assert loading.describe_checkpoint(str(folder))["parameters"] == wanted
    kept = configuration(str(folder))
    monkeypatch.setattr(loading, "configuration", lambda *_, **__: kept)
    monkeypatch.setattr(loading, "cached", lambda *_: None)
    assert loading.describe_checkpoint("of/the-hub")["parameters"] == wanted


def test_load_model_makes_the_class_whose_files_they_are(tmp_path):
    model = tiny("mllama", "MllamaForConditionalGeneration")
    loading.byte_tokenizer().save_pretrained(str(save(model, tmp_path / "a")))
    loaded, _ = nd.load_model(tmp_path / "a", dtype="float32", device="cpu")
    assert type(loaded) is type(model)
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), loaded.parameters(), strict=True))


# How models of RoBERTa's kind are asked.


def test_answers_count_positions_as_the_model_does_where_it_is_trained():
    """transformers' `generate` counts them from 0, where embeddings of RoBERTa's kind are never trained."""
    model = tiny("roberta", "RobertaForCausalLM")
    assert model.config.pad_token_id == 0
    seen = []
    table = model.roberta.embeddings.position_embeddings
    hook = table.register_forward_pre_hook(lambda _, given: seen.append(given[0].flatten().tolist()))
    conventions_of(model), _Loop(model, Numbers(), Decoding(max_new_tokens=4), None)
    seen.clear()
    answer(model, Numbers(), [Request(prompt="", text="5 6 7")], decoding=Decoding(max_new_tokens=4))
    hook.remove()
    assert seen == [[1, 2, 3], [4], [5], [6]]


def test_a_text_is_as_long_as_the_positions_that_hold_tokens():
    config = t.RobertaConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    config.update(dict(is_decoder=True, pad_token_id=1, max_position_embeddings=16))
    model = t.RobertaForCausalLM(config).eval()
    assert context_length(model) == 14
    assert model(input_ids=torch.full((1, 14), 5)).logits.shape == (1, 14, 64)
    with pytest.raises((IndexError, RuntimeError), match="out of "):
        model(input_ids=torch.full((1, 15), 5))
    with pytest.raises(DataError, match="than the context leaves"):
        answer(model, Numbers(), [Request(prompt="", text="5 " * 11)], decoding=Decoding(max_new_tokens=4))
    (said,) = answer(model, Numbers(), [Request(prompt="", text="5 " * 10)], decoding=Decoding(max_new_tokens=4))
    assert len(said.split()) == 4
    assert context_length(build("llama")) == build("llama").config.max_position_embeddings
