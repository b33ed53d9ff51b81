"""Sites are named and oriented alike in every family."""

import pytest
import torch

from helpers.families import FAMILIES, build
from neurondrift.models.sites import fingerprint, linear_sites


@pytest.mark.parametrize("family", FAMILIES)
def test_sites_are_every_linear_weight_of_the_blocks(family):
    model = build(family)
    sites = linear_sites(model)
    blocks = {name: p for name, p in model.named_parameters() if ".layers." in name or ".h." in name}
    linear = {name for name, p in blocks.items() if p.ndim > 1}
    owned = {
        f"{name if site.expert is None else name.rsplit('.', 2)[0]}.{site.parameter}" for name, site in sites.items()
    }
    assert owned == linear
    assert {site.layer for site in sites.values()} == {0, 1}
    for site in sites.values():
        assert tuple(site.weight.shape) == site.shape
        if site.expert is None:
            assert site.wrapper is model.get_submodule(site.name)


def test_conv1d_is_seen_as_out_in():
    sites = linear_sites(build("gpt2"))
    assert sites["transformer.h.0.attn.c_attn"].shape == (48, 16)
    assert sites["transformer.h.0.mlp.c_fc"].shape == (64, 16)


def test_experts_are_sites_of_their_own():
    sites = linear_sites(build("qwen3_moe"))
    assert sites["model.layers.0.mlp.experts.gate_up_proj.3"].shape == (24, 16)
    assert sites["model.layers.1.mlp.experts.down_proj.0"].module_type == "down_proj"


def test_a_site_is_a_view_of_the_model():
    model = build("gpt2")
    site = linear_sites(model)["transformer.h.0.mlp.c_fc"]
    site.weight[5] = 0.0
    assert not model.transformer.h[0].mlp.c_fc.weight[:, 5].any()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_names_and_fingerprint_are_the_same_under_peft(family):
    from peft import LoraConfig, get_peft_model

    model = build(family)
    names, mark = list(linear_sites(model)), fingerprint(model)
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=[names[0].rsplit(".", 1)[-1]]))
    assert list(linear_sites(wrapped)) == names
    assert fingerprint(wrapped) == mark


def test_fingerprint_tells_models_apart_but_not_dtypes():
    model = build("llama")
    mark = fingerprint(model)
    assert fingerprint(build("llama", seed=1)) != mark
    assert fingerprint(model.to(torch.bfloat16)) == mark
