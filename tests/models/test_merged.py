"""An adapter is merged to be read from only where nothing is lost by it."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from helpers.families import FAMILIES, build
from neurondrift.models.masked_lora import hold_weights, lora_factors
from neurondrift.models.merged import merge_to_read
from neurondrift.models.sites import Sites

TOKENS = torch.arange(3, 33)[None]


def adapted(family="llama", dtype=torch.float32, **settings):
    torch.manual_seed(0)
    targets = {"gpt2": ["c_attn", "c_proj", "c_fc"]}.get(family, "all-linear")
    how = {"r": 4, "lora_alpha": 32, "target_modules": targets, "init_lora_weights": False, **settings}
    return get_peft_model(build(family).to(dtype), LoraConfig(**how)).eval()


@torch.no_grad()
def logits(model):
    return model(input_ids=TOKENS, use_cache=False).logits.double()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_merged_adapter_answers_as_it_did(family):
    model = adapted(family)
    with model.disable_adapter():
        base = logits(model)
    before = logits(model)
    stacked = family in ("mixtral", "qwen3_moe")  # factors of all experts in one parameter
    assert merge_to_read(model) != stacked
    after = logits(model)
    assert (after - before).norm() < 1e-5 * before.norm() < 0.1 * (before - base).norm()
    assert not merge_to_read(model)  # it is merged already, or cannot be


@pytest.mark.parametrize(
    "make",
    [
        lambda: adapted(dtype=torch.bfloat16),
        lambda: adapted(use_dora=True),
        lambda: build("llama"),
        lambda: adapted(target_modules=["lm_head"], family="gemma2"),  # its weight is the embeddings' too
    ],
    ids=["16 bits", "DoRA", "no adapter", "tied"],
)
def test_what_would_lose_by_it_is_left_unmerged(make):
    model = make()
    before = logits(model)
    assert not merge_to_read(model)
    torch.testing.assert_close(logits(model), before, atol=1e-5, rtol=1e-5)


def test_weights_that_are_held_still_are_left_unmerged():
    model = adapted()
    site = next(iter(Sites(model).values()))
    hold_weights(lora_factors(site)[0], torch.arange(5), site.name)
    before = logits(model)
    assert not merge_to_read(model)
    assert torch.equal(logits(model), before)
