"""A patched model, by explicit hooks on two plain models; with a cache as without; with itself unchanged, bit for bit."""

import copy
from contextlib import ExitStack, nullcontext

import numpy as np
import pytest
import torch
from transformers import DynamicCache

import neurondrift as nd
from helpers.adapters import random_lora
from helpers.attribution import TOKENIZER, with_bytes
from helpers.families import build
from helpers.groups import everything, some
from neurondrift.attribution.margin import Margin, values_of
from neurondrift.base.errors import GroupError, ModelError
from neurondrift.behaviour.generate import generate
from neurondrift.groups.group import Group
from neurondrift.models.sites import linear_sites, mlp_units

FAMILIES = ("llama", "gpt2", "gemma3", "phi3")
IDS = torch.arange(3, 43).view(2, 20)
PROMPTS = ["Hi", "How are you?", "Write a poem about rain.", "x y"]


@torch.no_grad()
def logits(model, ids=IDS):
    return model(input_ids=ids, use_cache=False).logits.clone()


def dense(family, adapted):
    """The plain models before and after: W and W + B A."""
    before = build(family)
    after = copy.deepcopy(before)
    targets = linear_sites(after)
    for name, site in linear_sites(adapted).items():
        layer = site.wrapper
        change = layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double() * 5 / 3
        targets[name].weight.copy_((site.weight.double() + change).float())
    return before, after


def by_hand(taker, giver, group, ids=IDS):
    """The oracle: forward hooks of the test's own on two separate models."""
    kept, handles = {}, []

    def places(model):
        sites = linear_sites(model)
        units = mlp_units(sites)
        for name, members in group.members.items():
            is_unit = group.granularity == "unit"
            site = sites[units[name].down if is_unit else name]
            yield site.owner, is_unit, torch.from_numpy(np.array(members))

    for module, is_unit, members in places(giver):

        def keep(module, args, output, members=members, is_unit=is_unit):
            kept.setdefault(len(kept), (args[0] if is_unit else output)[..., members].clone())

        handles.append(module.register_forward_hook(keep))
    order = iter(range(10**6))
    for module, is_unit, members in places(taker):

        def put(module, args, members=members):
            changed = args[0].clone()
            changed[..., members] = kept[next(order)]
            return (changed,)

        def put_out(module, args, output, members=members):
            output = output.clone()
            output[..., members] = kept[next(order)]
            return output

        handles.append(module.register_forward_pre_hook(put) if is_unit else module.register_forward_hook(put_out))
    try:
        logits(giver, ids)
        return logits(taker, ids)
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("granularity", ["neuron", "unit"])
@pytest.mark.parametrize("what", ["patch", "patch_back"])
def test_it_is_what_hooks_on_two_plain_models_give(family, granularity, what):
    adapted = random_lora(family)
    before, after = dense(family, adapted)
    group = some(adapted, granularity)
    tuned, plain = logits(adapted), logits(before)
    taker, giver = (after, before) if what == "patch" else (before, after)
    expected = by_hand(taker, giver, group)
    assert not torch.allclose(expected, logits(taker), atol=1e-4)
    with getattr(nd, what)(adapted, group) as applied:
        found = logits(adapted)
    assert applied == (len(group), len(group), 0)
    assert torch.allclose(found, expected, atol=2e-5)
    with getattr(nd, what)(taker, group, donor=giver):
        assert torch.equal(logits(taker), expected)
    assert torch.equal(logits(adapted), tuned) and torch.equal(logits(before), plain)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("what", ["patch", "patch_back"])
def test_a_head_is_what_goes_into_its_columns_of_the_output_projection(family, what):
    adapted = random_lora(family)
    before, after = dense(family, adapted)
    taker, giver = (after, before) if what == "patch" else (before, after)
    sites = linear_sites(adapted)
    outputs = [name for name in sites if name.endswith(("o_proj", "attn.c_proj"))]
    width = sites[outputs[0]].shape[1] // adapted.config.num_attention_heads
    columns = {name: np.arange(width) + width * (1 + k % 2) for k, name in enumerate(outputs)}
    weights = {
        name: np.sort((np.arange(sites[name].shape[0])[:, None] * sites[name].shape[1] + members).ravel())
        for name, members in columns.items()
    }
    shapes = {name: site.shape for name, site in sites.items()}
    heads = Group(granularity="weight", members=weights, shapes=shapes)
    kept = {}

    def keep(name):
        def hook(module, args):
            kept[name] = args[0][..., columns[name]].clone()

        return hook

    def put(name):
        def hook(module, args):
            changed = args[0].clone()
            changed[..., columns[name]] = kept[name]
            return (changed,)

        return hook

    handles = [linear_sites(giver)[name].owner.register_forward_pre_hook(keep(name)) for name in outputs]
    handles += [linear_sites(taker)[name].owner.register_forward_pre_hook(put(name)) for name in outputs]
    logits(giver)
    expected = logits(taker)
    for handle in handles:
        handle.remove()
    assert not torch.allclose(expected, logits(taker), atol=1e-4)
    with getattr(nd, what)(adapted, heads):
        assert torch.allclose(logits(adapted), expected, atol=2e-5)
    with getattr(nd, what)(taker, heads, donor=giver):
        assert torch.equal(logits(taker), expected)


def test_units_as_weights_are_the_same_units():
    adapted = random_lora("llama")
    group = some(adapted, "unit")
    sites = linear_sites(adapted)
    dense_group = nd.weights_of_units(group, mlp_units(sites), sites.shapes)
    with nd.patch(adapted, group):
        expected = logits(adapted)
    with nd.patch(adapted, dense_group):
        assert torch.allclose(logits(adapted), expected, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_all_outputs_patched_are_the_other_model(family):
    adapted = random_lora(family)
    group = everything(adapted, "neuron")
    tuned = logits(adapted)
    with adapted.disable_adapter():
        before = logits(adapted)
    with nd.patch(adapted, group):
        assert torch.equal(logits(adapted), before)
    with nd.patch_back(adapted, group):
        assert torch.equal(logits(adapted), tuned)


@pytest.mark.parametrize("what", ["patch", "patch_back"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("granularity", ["neuron", "unit"])
def test_a_model_patched_with_itself_is_unchanged_bit_for_bit(what, dtype, granularity):
    """As answers, as margins and as logits; by an adapter that changes nothing, and by a copy of the model."""
    base = with_bytes("llama").to(dtype)
    group = some(base, granularity)
    idle = random_lora("llama", model=copy.deepcopy(base))
    for name, parameter in idle.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()
    for model, donor in ((base, copy.deepcopy(base)), (idle, None)):
        bits = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        function = Margin(model, TOKENIZER, PROMPTS)

        def seen(model=model, function=function):
            return (
                generate(model, TOKENIZER, PROMPTS, max_new_tokens=12),
                logits(model),
                values_of(model, function),
            )

        answers, plain, margins = seen()
        with getattr(nd, what)(model, group, donor=donor):
            found = seen()
        assert found[0] == answers
        assert torch.equal(found[1], plain)
        assert torch.equal(found[2], margins)
        assert all(torch.equal(tensor, bits[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
@pytest.mark.parametrize("what", ["patch", "patch_back"])
def test_answers_with_a_cache_are_those_without(family, what):
    """Rows leave the batch, and begin with one shared head: the giver's part of the cache goes along."""
    adapted = random_lora(family, model=with_bytes(family), scale=0.5)
    group = some(adapted, "neuron")
    with getattr(nd, what)(adapted, group):
        answers = generate(adapted, TOKENIZER, PROMPTS, max_new_tokens=10, decided=lambda p, t: p == "Hi")
        for prompt, answer in zip(PROMPTS, answers, strict=True):
            ids = TOKENIZER.apply_chat_template(
                [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=True, return_dict=True
            )["input_ids"]
            said = []
            while len(said) < (8 if prompt == "Hi" else 10):
                said.append(int(logits(adapted, torch.tensor([ids + said]))[0, -1].argmax()))
                if said[-1] == TOKENIZER.eos_token_id:
                    break
            assert answer == TOKENIZER.decode(said, skip_special_tokens=True).strip()
    with nullcontext() if what == "patch" else adapted.disable_adapter():
        assert generate(adapted, TOKENIZER, PROMPTS, max_new_tokens=10) != answers


def test_margins_are_those_of_the_hooks():
    adapted = random_lora("llama", model=with_bytes("llama"))
    group = some(adapted, "neuron")
    function = Margin(adapted, TOKENIZER, PROMPTS)
    function.in_tree = True
    with nd.patch(adapted, group):
        tree = values_of(adapted, function)
        function.in_tree = False
        rows = values_of(adapted, function)
    assert torch.allclose(tree, rows, atol=1e-4)
    assert not torch.allclose(tree, values_of(adapted, function), atol=1e-3)


def test_leaving_takes_everything_away_also_after_an_exception():
    adapted = random_lora("llama")
    group, tuned = some(adapted, "neuron"), logits(adapted)
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in adapted.modules()]
    for context in (nd.patch, nd.patch_back):
        with pytest.raises(KeyboardInterrupt), context(adapted, group):
            raise KeyboardInterrupt
        assert torch.equal(logits(adapted), tuned)
        assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in adapted.modules()] == hooks
        assert not any(
            layer.disable_adapters is True for layer in adapted.modules() if hasattr(layer, "disable_adapters")
        )


def test_a_model_whose_state_is_no_cache_is_patched_for_single_passes_alone():
    """Asked, not listed: a model that says something else with a cache than without."""
    from neurondrift.interventions.acting import patching

    model, donor = build("llama"), build("llama", seed=1)
    group = some(model, "neuron")
    assert patching.writes_answers(model, group, donor=donor)
    model.config.name = "another"  # asked anew
    layer = model.model.layers[0]
    layer.register_forward_hook(lambda module, args, output: output + 0.1 * args[0].shape[1])
    assert not patching.writes_answers(model, group, donor=donor)
    with nd.patch(model, group, donor=donor):
        logits(model)
        with pytest.raises(ModelError, match="cannot write answers"):
            model(input_ids=IDS, past_key_values=DynamicCache(config=model.config), use_cache=True)


def test_mistakes_are_named():
    adapted, plain = random_lora("llama"), build("llama")
    group = some(adapted, "neuron")

    def refused(kind, message, *args, **kwargs):
        with pytest.raises(kind, match=message), nd.patch(*args, **kwargs):
            pass

    refused(GroupError, "Single weights have no outputs", adapted, some(adapted, "weight"))
    refused(ModelError, "no active adapter", plain, group)
    refused(ModelError, "no other state of this model", plain, group, donor=build("gpt2"))
    refused(ModelError, "no other state of this model", adapted, group, donor=plain)
    refused(GroupError, "no MLP nowhere", adapted, Group(granularity="unit", members={"nowhere": np.array([0])}))
    units = next(iter(linear_sites(adapted).units))
    refused(GroupError, "beyond the end", adapted, Group(granularity="unit", members={units: np.array([10**6])}))
    foreign = Group(granularity="neuron", members=group.members, shapes=group.shapes, provenance={"model": "feed"})
    refused(GroupError, "made from another model", adapted, foreign)
    with nd.patch(adapted, group):
        refused(ModelError, "patched already", adapted, group)
    mixture = random_lora("mixtral", targets=["q_proj", "v_proj"])
    refused(ModelError, "an expert is given other tokens", mixture, everything(mixture, "neuron"))
    adapted.merge_adapter()
    refused(ModelError, "merged", adapted, group)


def test_a_cache_that_was_begun_before_is_refused():
    adapted = random_lora("llama")
    cache = DynamicCache(config=adapted.config)
    with torch.no_grad(), ExitStack() as stack:
        adapted(input_ids=IDS, past_key_values=cache, use_cache=True)
        stack.enter_context(nd.patch(adapted, some(adapted, "neuron")))
        with pytest.raises(ModelError, match="begun before the model was patched"):
            adapted(input_ids=IDS[:, :1], past_key_values=cache, use_cache=True)
