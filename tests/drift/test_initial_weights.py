"""Drift against initial weights that are read from a folder."""

import peft
import pytest
import torch

from helpers.adapters import adapted, answer, shake
from helpers.families import build
from helpers.oracles import check, dense
from neurondrift.base.errors import ArtifactError, ModelError
from neurondrift.drift.meter import DriftMeter, measure_drift
from neurondrift.models.disk.initial import CheckpointWeights
from neurondrift.models.sites import linear_sites


@pytest.mark.parametrize("way", ["pissa", "pissa_niter_4", "olora", "kasa"])
def test_an_initialisation_that_changes_the_base_is_measured_against_the_original_or_refused(way, tmp_path):
    build("llama").save_pretrained(tmp_path)
    settings = {"kasa_config": peft.tuners.lora.config.KasaConfig()} if way == "kasa" else {"init_lora_weights": way}
    wrapped = adapted("LoraConfig", r=4, **settings)
    with pytest.raises(ModelError, match=rf"changed the base weights when it was made.*{way}.*initial="):
        measure_drift(wrapped)
    meter = DriftMeter(wrapped, initial=CheckpointWeights(tmp_path, linear_sites(wrapped)))
    original = {name: site.weight.double() for name, site in linear_sites(build("llama")).items()}
    # KaSA cuts the smallest singular values off for good; the others only round.
    assert all((drift.relative.max() < 1e-6) == (way != "kasa") for drift in meter.measure().values())
    shake(wrapped, 0.01)
    for name, measured in meter.measure().items():
        site = meter.sites[name]
        delta = answer(site.wrapper, site.shape[1]) - original[name]
        check(measured, dense(original[name], delta))
        assert torch.equal(meter.base(name).double(), original[name])
        assert (meter.delta(name).double() - delta).norm() < 1e-6 * delta.norm()


def test_a_merged_adapter_is_measured_against_initial_weights(tmp_path):
    build("llama").save_pretrained(tmp_path)
    wrapped = adapted("LoraConfig", r=4, init_lora_weights=False)
    meter = DriftMeter(wrapped, initial=CheckpointWeights(tmp_path, linear_sites(wrapped)))
    unmerged = meter.measure()
    wrapped.merge_adapter()
    for name, drift in meter.measure().items():
        assert torch.allclose(drift.relative, unmerged[name].relative, rtol=1e-4)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("as_saved", ["one by one", "fused", "in shards"])
def test_full_fine_tuning_of_experts_is_measured_against_their_folder(family, as_saved, tmp_path):
    model = build(family)
    model.save_pretrained(
        tmp_path,
        save_original_format=as_saved != "fused",
        max_shard_size="4KB" if as_saved == "in shards" else "1GB",
    )
    assert len(list(tmp_path.glob("*.safetensors"))) > 1 or as_saved != "in shards"
    sites = linear_sites(model)
    initial = CheckpointWeights(tmp_path, sites)
    before = {name: site.weight.clone() for name, site in sites.items()}
    for name in sites:
        assert torch.equal(initial(name), before[name]), name
    for site in sites.values():
        site.weight.mul_(1.01).add_(0.001)
    for name, measured in measure_drift(model, initial=initial).items():
        check(measured, dense(before[name], sites[name].weight.double() - before[name].double()))


def test_a_folder_of_another_model_is_refused(tmp_path):
    build("llama").save_pretrained(tmp_path)
    with pytest.raises(ArtifactError, match=r"has no tensor .*mlp\.gate\.weight"):
        measure_drift(build("mixtral"), initial=CheckpointWeights(tmp_path, linear_sites(build("mixtral"))))
    sites = linear_sites(build("phi3"))
    with pytest.raises(ArtifactError, match="has no tensor .*qkv_proj"):
        CheckpointWeights(tmp_path, sites)("model.layers.0.self_attn.qkv_proj")
    narrow = linear_sites(build("qwen3_moe"))
    build("mixtral").save_pretrained(tmp_path / "mixtral")
    with pytest.raises(ArtifactError, match=r"another shape.*\(48, 16\).*\(24, 16\)"):
        CheckpointWeights(tmp_path / "mixtral", narrow)("model.layers.0.mlp.experts.gate_up_proj.0")
