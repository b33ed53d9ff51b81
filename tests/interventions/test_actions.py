"""What each trial's intervention does to a fully fine-tuned model and to one with an adapter."""

import copy

import numpy as np
import pytest
import torch

import neurondrift as nd
from helpers.families import build
from neurondrift.base.errors import ConfigError
from neurondrift.interventions.contexts import Applied
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
    subject, group = Subject(before=before, after=after, tokenizer=None), some_rows(before)
    old, new = weights_of(before), weights_of(after)

    def seen(what, members):
        with acted(subject, trial(what, members), "zero") as (model, applied):
            return weights_of(model), applied

    assert all(torch.equal(seen("before", None)[0][name], old[name]) for name in old)
    assert all(torch.equal(seen("after", None)[0][name], new[name]) for name in new)
    assert seen("before", None)[1] == Applied(0, 0, 0)
    for what, inside, outside in (
        ("prune", {name: torch.zeros_like(value) for name, value in old.items()}, old),
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


def test_freeze_needs_a_training_that_can_be_repeated():
    model = build("llama")
    subject = Subject(before=model, after=model, tokenizer=None)
    with pytest.raises(ConfigError, match="trains again"), acted(subject, trial("freeze", some_rows(model)), "zero"):
        pass
