"""The handle for sites: what it holds, how long it is valid, and that whatever takes a model takes it too."""

import copy

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

import neurondrift as nd
from helpers.families import FAMILIES, build
from neurondrift.base.errors import GroupError
from neurondrift.groups.selection import random_group
from neurondrift.importance.directions import projection
from neurondrift.interventions.acting.contexts import adapter_delta
from neurondrift.interventions.acting.removal import remove_rank
from neurondrift.models.adapters import is_trained
from neurondrift.models.parts import parts
from neurondrift.models.sites import Sites, fingerprint, linear_sites, magnitudes_of, mlp_units

LORA = {"r": 2, "init_lora_weights": False}


def lora(family="llama", **settings):
    torch.manual_seed(0)
    return get_peft_model(build(family), LoraConfig(**{"target_modules": ["q_proj", "up_proj"], **LORA, **settings}))


def some(sites, granularity, seed=0, fraction=0.3):
    shapes = {name: (unit.count, 1) for name, unit in sites.units.items()} if granularity == "unit" else sites.shapes
    about = {"model": sites.fingerprint}
    return random_group(shapes, fraction=fraction, seed=seed, granularity=granularity, provenance=about)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_handle_is_a_mapping_with_what_is_asked_of_a_model(family):
    model = build(family)
    sites = nd.linear_sites(model)
    modules = dict(model.named_modules())
    for name, site in sites.items():
        assert name == site.name
        assert modules[name if site.expert is None else name.rsplit(".", 2)[0]] is site.owner is site.wrapper
    order = list(modules)
    held_by = [name if site.expert is None else name.rsplit(".", 2)[0] for name, site in sites.items()]
    assert held_by == sorted(held_by, key=order.index)
    assert sites.shapes == {name: tuple(site.weight.shape) for name, site in sites.items()}
    assert sites.units == mlp_units(dict(sites))
    assert sites.fingerprint == fingerprint(model) == fingerprint(sites)
    assert sites.model is model
    assert sites == dict(sites)
    assert "nothing" not in sites


def test_every_matrix_of_the_blocks_is_a_site_or_named_as_left_out():
    model = build("llama")
    model.model.layers[1].mlp.odd = torch.nn.Embedding(3, 5)
    assert Sites(model).left_out == ["model.layers.1.mlp.odd.weight"]
    assert list(Sites(model)) == list(Sites(build("llama")))


def test_a_copy_that_peft_trains_is_seen_at_the_original_with_the_way_to_the_copy():
    model = lora(target_modules=["q_proj"], modules_to_save=["mlp"])
    sites = linear_sites(model)
    assert list(sites) == list(linear_sites(build("llama")))
    for name, site in sites.items():
        kept = ".mlp." in name
        assert is_trained(site) == (kept or name.endswith("q_proj"))
        assert site.inner == (site.module_type if kept else "")
        if kept:
            trained = site.wrapper.modules_to_save["default"].get_submodule(site.inner)
            assert torch.equal(trained.weight, site.weight)
            assert trained is not site.owner


def test_is_trained_asks_the_adapter_of_this_parameter_whether_switched_on_or_not():
    model = lora("mixtral", target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"])
    sites = linear_sites(model)
    expected = {name for name in sites if name.endswith("q_proj") or ".experts.down_proj." in name}
    assert {name for name, site in sites.items() if is_trained(site)} == expected
    with model.disable_adapter():
        assert {name for name, site in sites.items() if is_trained(site)} == expected
    assert not any(is_trained(site) for site in linear_sites(build("llama")).values())


def test_a_handle_does_what_the_model_does():
    model = lora()
    sites = linear_sites(model)
    assert fingerprint(model) == sites.fingerprint == fingerprint(build("llama"))
    for one, other in zip(nd.measure_drift(model).values(), nd.measure_drift(sites).values(), strict=True):
        assert torch.equal(one.l2, other.l2)
    ids = torch.arange(3, 23)[None]
    answers = []
    for given in (model, sites):
        for granularity in ("neuron", "weight", "unit"):
            for context in (nd.prune, nd.rewind, nd.transplant):
                with context(given, some(sites, granularity)) as applied, torch.no_grad():
                    answers.append((applied, model(input_ids=ids).logits.clone()))
        name = next(iter(sites))
        with remove_rank(given, {name: projection(torch.eye(sites.shapes[name][0], dtype=torch.float64)[:, :3])}):
            answers.append(((), sites[name].weight.clone()))
    half = len(answers) // 2
    for (one, first), (other, second) in zip(answers[:half], answers[half:], strict=True):
        assert one == other
        assert torch.equal(first, second)


def test_freezing_takes_a_handle():
    model = lora(init_lora_weights=True)
    reports = []
    for given in (model, linear_sites(model)):
        held = nd.freeze(given, some(linear_sites(model), "unit"))
        held.release()
        assert held.model is model
        reports.append(held.report)
    assert reports[0] == reports[1]


@pytest.mark.parametrize("given", ["model", "sites"])
def test_a_context_within_another_knows_the_model_by_what_its_weights_were(given):
    model = lora()
    sites = linear_sites(copy.deepcopy(model))
    groups = [some(sites, granularity, fraction=0.9) for granularity in ("neuron", "weight", "unit")]
    foreign = some(linear_sites(build("llama", seed=1)), "neuron")
    before = fingerprint(model)
    target = model if given == "model" else linear_sites(model)
    with nd.prune(target, groups[0]):
        assert fingerprint(model) != before  # what a handle that is made now would say
        with nd.rewind(target, groups[1]), nd.prune(target, groups[2]):
            pass
        with pytest.raises(GroupError, match="another model"), nd.prune(target, foreign):
            pass
    assert fingerprint(model) == before
    linear_sites(model)["model.layers.0.mlp.up_proj"].weight.mul_(2)  # nothing outlives the contexts
    with pytest.raises(GroupError, match="another model"), nd.prune(model, groups[0]):
        pass


def test_a_replaced_change_is_found_again_by_the_contexts_within_and_gone_after_them():
    model = lora()
    sites = linear_sites(model)
    first, second = some(sites, "weight", seed=1), some(sites, "weight", seed=2)
    name = "model.layers.0.mlp.up_proj"
    whole = adapter_delta(sites[name])
    with nd.rewind(model, first), nd.rewind(linear_sites(model), second):
        left = adapter_delta(linear_sites(model)[name])
        gone = torch.from_numpy((first | second).mask(name))
        assert not left[gone].any()
        assert torch.equal(left[~gone], whole[~gone])
    assert torch.equal(adapter_delta(sites[name]), whole)
    assert not sites[name].wrapper._forward_hooks


@pytest.mark.parametrize("family", FAMILIES)
def test_all_forms_of_a_group_mean_the_same_weights(family):
    sites = linear_sites(build(family))
    rng = np.random.default_rng(0)
    groups = [some(sites, granularity) for granularity in ("neuron", "weight", "unit")]
    mixed = {}
    for name, shape in sites.shapes.items():
        mask = rng.random(shape) < 0.1
        mask[rng.choice(shape[0], 2, replace=False)] = True
        mask[:, rng.choice(shape[1], 1)] = True
        mixed[name] = np.flatnonzero(mask)
    groups.append(groups[1].with_members(mixed, {}))
    for group in groups:
        for name, part in parts(group, sites).items():
            seen = torch.zeros(part.shape, dtype=torch.bool)
            for index in part.indices(torch.device("cpu")):
                seen[index] = True
            assert np.array_equal(part.flat(), np.flatnonzero(seen))
            assert part.weights == len(part.flat())
            region, ones = part.region(), torch.zeros(part.shape)
            region.put(ones, 1.0)
            assert torch.equal(ones.bool(), seen)
            region.complement(part.shape).put(ones, 2.0)
            assert torch.equal(ones == 1, seen)
            assert (ones > 0).all()
            if group.granularity == "weight":
                assert np.array_equal(part.flat(), group.members[name])


def test_a_group_of_another_shape_is_refused_by_interventions_too():
    model = build("llama")
    sites = linear_sites(model)
    name = next(iter(sites))
    narrow = some(sites, "weight").with_members({name: np.array([1])}, {})
    narrow = type(narrow)(granularity="weight", members=narrow.members, shapes={name: (16, 3)})
    with pytest.raises(GroupError, match=rf"another shape of {name}.*\(16, 3\).*\(16, 16\)"), nd.prune(model, narrow):
        pass


def test_magnitudes_of_weights_are_read_as_they_are_asked_for():
    sites = linear_sites(build("llama"))
    magnitudes = magnitudes_of(sites, "weight")
    name = next(iter(sites))
    sites[name].weight.mul_(-2)
    assert np.array_equal(magnitudes[name], sites[name].weight.abs().numpy())
