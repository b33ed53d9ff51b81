"""Names, sites and fingerprint of a model from its files alone, against the loaded model."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.every_class import build as tiny
from helpers.families import FAMILIES, build, gpt_oss, save
from neurondrift.base.errors import ModelError
from neurondrift.drift.difference import diff
from neurondrift.models.disk.checkpoints import Checkpoint
from neurondrift.models.loading import byte_tokenizer, load_model
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


def with_a_block_more(model, folder, last):
    """The model's folder, with the last block once more, as block `last`."""
    own = model.config.num_hidden_layers - 1
    tensors = load_file(save(model, folder) / "model.safetensors")
    extra = {
        k.replace(f"layers.{own}.", f"layers.{last}."): v.clone() for k, v in tensors.items() if f"layers.{own}." in k
    }
    save_file(tensors | extra, folder / "model.safetensors")
    return folder


def test_blocks_behind_the_last_one_are_no_sites_where_the_class_says_that_there_may_be_some(tmp_path):
    """DeepSeek and GLM keep blocks for multi-token prediction, which transformers does not load."""
    model = tiny("glm4_moe", "Glm4MoeForCausalLM")
    assert Checkpoint(with_a_block_more(model, tmp_path, 46), "here").fingerprint() == fingerprint(model)


def test_other_blocks_behind_the_last_one_are_the_same_error_in_the_files_as_in_memory(tmp_path):
    folder = with_a_block_more(build("llama"), tmp_path, 2)
    byte_tokenizer().save_pretrained(folder)
    said = []
    for read in (
        lambda: Checkpoint(folder, str(folder)),
        lambda: load_model(folder),
        lambda: diff(folder, [folder], tmp_path / "log"),
    ):
        with pytest.raises(ModelError, match="no place for model.layers.2.*names fewer blocks") as caught:
            read()
        said.append(str(caught.value))
    assert len(set(said)) == 1
