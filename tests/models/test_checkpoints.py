"""Names, sites and fingerprint of a model from its files alone, against the loaded model."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.families import FAMILIES, build, gpt_oss, save
from neurondrift.models.disk.checkpoints import Checkpoint
from neurondrift.models.sites import fingerprint, linear_sites


@pytest.mark.parametrize("family", FAMILIES)
def test_sites_and_fingerprint_from_files_are_those_of_the_model(family, tmp_path):
    model = build(family)
    checkpoint = Checkpoint(save(model, tmp_path), "here")
    sites = linear_sites(model)
    assert list(checkpoint.sites) == list(sites)
    for name, site in sites.items():
        stored = checkpoint.sites[name]
        assert (stored.layer, stored.module_type, stored.shape) == (site.layer, site.module_type, site.shape)
        assert torch.equal(stored.read(), site.weight)
    assert checkpoint.fingerprint() == fingerprint(model)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "mixtral"])
def test_names_of_the_model_without_a_head_are_the_same(family, tmp_path):
    """GPT-2 and others lie on the hub without the `transformer.` or `model.` in front."""
    model = build(family)
    save(getattr(model, model.base_model_prefix), tmp_path)
    assert Checkpoint(tmp_path, "here").fingerprint() == fingerprint(model)


def test_experts_stored_in_out_are_read_transposed(tmp_path):
    model = gpt_oss(intermediate_size=12)
    checkpoint = Checkpoint(save(model, tmp_path), "here")
    assert list(checkpoint.sites) == list(linear_sites(model))
    assert checkpoint.fingerprint() == fingerprint(model)


def test_layers_behind_the_last_block_are_no_sites(tmp_path):
    """DeepSeek and GLM keep blocks for multi-token prediction, which transformers does not load."""
    model = build("llama")
    tensors = load_file(save(model, tmp_path) / "model.safetensors")
    extra = {k.replace("layers.1.", "layers.2."): v.clone() for k, v in tensors.items() if "layers.1." in k}
    save_file(tensors | extra, tmp_path / "model.safetensors")
    assert Checkpoint(tmp_path, "here").fingerprint() == fingerprint(model)
