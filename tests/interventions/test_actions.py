"""What each trial's intervention does to a fully fine-tuned model and to one with an adapter."""

import copy
from contextlib import contextmanager

import numpy as np
import pytest
import torch

import neurondrift as nd
from helpers.adapters import random_lora
from helpers.attribution import TOKENIZER, with_bytes
from helpers.families import build
from neurondrift.base.errors import ConfigError
from neurondrift.behaviour.generate import generate
from neurondrift.interventions.acting.contexts import Applied
from neurondrift.interventions.acting.removal import remove_rank
from neurondrift.interventions.trials import ACTIONS, INTERVENTIONS, REFERENCES, Subject, Trial, acted
from neurondrift.models.sites import linear_sites


def weights_of(model):
    return {name: site.weight.clone() for name, site in linear_sites(model).items()}


def some_rows(model):
    generator = np.random.default_rng(0)
    scores = {name: generator.random(site.shape).astype(np.float32) for name, site in linear_sites(model).items()}
    return nd.select_top(scores, fraction=0.2, granularity="neuron")


def trial(what, group):
    return Trial(what, "g", 1.0, None, group, True)


def test_every_intervention_has_an_action():
    assert tuple(ACTIONS) == INTERVENTIONS
    assert tuple(REFERENCES) == ("before", "after")


def test_a_whole_model_is_acted_on_and_given_back():
    before = build("llama")
    after = copy.deepcopy(before)
    with torch.no_grad():
        for site in linear_sites(after).values():
            site.weight.add_(1.0)
    old, new = weights_of(before), weights_of(after)
    first = {name: weight - 2.0 for name, weight in old.items()}
    subject = Subject(before=before, after=after, tokenizer=None, unaligned=lambda name: first[name])
    group = some_rows(before)

    def seen(what, members):
        with acted(subject, trial(what, members), "zero") as (model, applied):
            return weights_of(model), applied

    assert all(torch.equal(seen("before", None)[0][name], old[name]) for name in old)
    assert all(torch.equal(seen("after", None)[0][name], new[name]) for name in new)
    assert seen("before", None)[1] == Applied(0, 0, 0)
    for what, inside, outside in (
        ("prune", {name: torch.zeros_like(value) for name, value in old.items()}, old),
        ("unalign", first, old),
        ("rewind", old, new),
        ("transplant", new, old),
    ):
        found, applied = seen(what, group)
        assert applied == Applied(len(group), len(group), 0)
        for name, weight in found.items():
            rows = group.members[name]
            others = np.setdiff1d(np.arange(len(weight)), rows)
            assert torch.equal(weight[rows], inside[name][rows]), (what, name)
            assert torch.equal(weight[others], outside[name][others]), (what, name)
        for model, kept in ((before, old), (after, new)):
            assert all(torch.equal(weight, kept[name]) for name, weight in weights_of(model).items())


def test_the_alignment_of_a_group_is_undone_below_an_adapter_that_is_off():
    model = random_lora("llama")
    old = weights_of(model)
    group = some_rows(model)
    subject = Subject(before=model, after=model, tokenizer=None, unaligned=lambda name: old[name] + 1.0)
    with acted(subject, trial("unalign", group), "zero") as (given, applied):
        assert applied == Applied(len(group), len(group), 0)
        found = weights_of(given)
        for name, weight in found.items():
            rows = group.members[name]
            assert torch.equal(weight[rows], old[name][rows] + 1.0)
            assert (weight != old[name]).any(dim=1).sum() == len(rows)
    assert all(torch.equal(weight, old[name]) for name, weight in weights_of(model).items())


def test_undoing_the_alignment_needs_the_model_from_before_it():
    model = build("llama")
    subject = Subject(before=model, after=model, tokenizer=None)
    with pytest.raises(ConfigError, match="not known"), acted(subject, trial("unalign", some_rows(model)), "zero"):
        pass


def test_freeze_needs_a_training_that_can_be_repeated():
    model = build("llama")
    subject = Subject(before=model, after=model, tokenizer=None)
    with pytest.raises(ConfigError, match="trains again"), acted(subject, trial("freeze", some_rows(model)), "zero"):
        pass


def answers_of(model):
    """What a model says: logits, margins, and written answers."""
    ids = torch.arange(3, 43).view(2, 20)
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits
    prompts = ["Hi", "How are you?", "Write a poem."]
    return logits, nd.refusal_margin(model, TOKENIZER, prompts), generate(model, TOKENIZER, prompts, max_new_tokens=6)


def same(found, expected):
    return torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1]) and found[2] == expected[2]


def bits_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("kind", ["adapter", "whole"])
@pytest.mark.parametrize("what", [what for what in INTERVENTIONS if what != "freeze"])
def test_where_nothing_has_changed_every_intervention_changes_nothing_bit_for_bit(what, kind):
    """The model before is the model after: an adapter of zeros, or a copy. Pruning has nothing to take from a group
    that is zero already."""
    before = with_bytes("llama")
    group = some_rows(before)
    if what == "prune":
        with torch.no_grad():
            for name, rows in group.members.items():
                linear_sites(before)[name].weight[rows] = 0
    after = copy.deepcopy(before)
    if kind == "adapter":
        before = after = random_lora("llama", model=before)
        with torch.no_grad():
            for name, parameter in after.named_parameters():
                if "lora_B" in name:
                    parameter.zero_()
    own = weights_of(before)
    subject = Subject(before=before, after=after, tokenizer=TOKENIZER, unaligned=lambda name: own[name])
    expected, kept = answers_of(after), [bits_of(before), bits_of(after)]
    with acted(subject, trial(what, group), "zero") as (model, applied):
        assert applied.acted_on == len(group)
        assert same(answers_of(model), expected)
    for model, bits in zip((before, after), kept, strict=True):
        assert same(answers_of(model), expected)
        assert all(torch.equal(tensor, bits[name]) for name, tensor in model.state_dict().items())


def trained(model, group, site, row):
    """A training of one step that moves one row, which is no member of the group; the group's gradients are 0."""
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    linear_sites(model)[site].owner.weight.grad[row] = 1.0
    torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9).step()
    return model


def test_a_group_held_that_would_not_have_moved_changes_nothing_bit_for_bit():
    before = with_bytes("llama")
    group = some_rows(before)
    site = next(iter(group.members))
    row = next(row for row in range(linear_sites(before)[site].shape[0]) if row not in group.members[site])
    after = trained(copy.deepcopy(before), group, site, row)

    @contextmanager
    def train_frozen(members):
        model = copy.deepcopy(before)
        with nd.freeze(model, members):
            trained(model, members, site, row)
        yield model, Applied(len(members), len(members), 0)

    subject = Subject(before=before, after=after, tokenizer=TOKENIZER, train_frozen=train_frozen)
    expected, bits, untouched = answers_of(after), bits_of(after), bits_of(before)
    with acted(subject, trial("freeze", group), "zero") as (model, _):
        assert same(answers_of(model), expected)
        assert all(torch.equal(tensor, bits[name]) for name, tensor in model.state_dict().items())
    assert all(torch.equal(tensor, untouched[name]) for name, tensor in before.state_dict().items())


def test_nothing_removed_is_nothing_changed():
    """The same of the directions of `remove_rank`: a projection of zeros."""
    model = with_bytes("llama")
    expected, bits = answers_of(model), bits_of(model)
    nothing = {
        name: (torch.zeros(site.shape[0], 2), torch.zeros(2, site.shape[0]))
        for name, site in linear_sites(model).items()
    }
    with remove_rank(model, nothing):
        assert same(answers_of(model), expected)
        assert all(torch.equal(tensor, bits[name]) for name, tensor in model.state_dict().items())
    assert all(torch.equal(tensor, bits[name]) for name, tensor in model.state_dict().items())
