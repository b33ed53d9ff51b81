"""LoRA with single weights held still: its pass against plain autograd, merged, saved, loaded and trained on."""

import numpy as np
import pytest
import torch
from peft import PeftModel

from helpers.adapters import lora_on
from helpers.families import build, examples
from helpers.frozen import check_frozen, effective, loss_of, mask_of, train, weights
from helpers.groups import group_of
from neurondrift.base.errors import FreezeError
from neurondrift.drift.meter import measure_drift
from neurondrift.interventions.acting.freezing import freeze
from neurondrift.models.loading import attach_adapter
from neurondrift.models.masked_lora import FILE, lora_factors
from neurondrift.models.sites import linear_sites


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_outputs_and_gradients_are_those_of_the_masked_model(family, dropout):
    """Oracle: torch's own autograd through W₀ + M ∘ (s B A), as a reparametrisation of every site."""
    model = build(family)
    group = group_of(model, "weight", fraction=0.4)
    wrapped = lora_on(model, lora_dropout=dropout)
    for name, parameter in wrapped.named_parameters():
        if "lora_A" in name:
            parameter.data.normal_()
    freeze(wrapped, group)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    masks = mask_of(wrapped, group)
    rows = examples(4)
    wrapped.train()
    torch.manual_seed(7)
    loss = loss_of(wrapped, rows)
    loss.backward()
    found = {name: p.grad.clone() for name, p in wrapped.named_parameters() if p.requires_grad}
    wrapped.zero_grad()
    for name, site in linear_sites(wrapped).items():
        layer = site.wrapper
        layer.lora_variant.clear()
        keep = (~masks[name]).float()

        def masked(x, layer=layer, keep=keep):
            delta = keep * (layer.lora_B["default"].weight @ layer.lora_A["default"].weight)
            return layer.base_layer(x) + layer.scaling["default"] * (layer.lora_dropout["default"](x) @ delta.T)

        layer.forward = masked
    torch.manual_seed(7)
    expected = loss_of(wrapped, rows)
    expected.backward()
    assert torch.allclose(loss, expected, rtol=1e-5)
    for name, parameter in wrapped.named_parameters():
        if parameter.requires_grad:
            assert torch.allclose(found[name], parameter.grad, rtol=1e-3, atol=1e-5), name
            assert found[name].abs().max() > 0


def test_an_empty_mask_changes_nothing():
    """A mask on one weight of a site gives PEFT's own output but for that weight's contribution."""
    model = build("llama")
    wrapped = lora_on(model, init_lora_weights=False)
    site = next(iter(linear_sites(wrapped).values()))
    layer, x = site.wrapper, torch.randn(5, site.shape[1])
    plain = layer(x)
    (factors,) = lora_factors(site)
    dense = factors.delta()
    from neurondrift.models.masked_lora import hold_weights

    hold_weights(factors, torch.tensor([2 * site.shape[1] + 1]), site.name)
    expected = plain.clone()
    expected[:, 2] -= x[:, 1] * dense[2, 1]
    assert torch.allclose(layer(x), expected, atol=1e-5)


def test_autocast_in_bfloat16_is_near_float32_and_still_exact_where_frozen():
    model = build("llama")
    group, before = group_of(model, "weight"), weights(model)
    wrapped = lora_on(model)
    freeze(wrapped, group).release()
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    gradients = []
    for enabled in (False, True):
        wrapped.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            loss = loss_of(wrapped, examples(4))
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in wrapped.parameters() if p.requires_grad]))
    assert all(p.grad.dtype == torch.float32 for p in wrapped.parameters() if p.requires_grad)
    one, two = gradients
    assert torch.nn.functional.cosine_similarity(one, two, dim=0) > 0.99
    check_frozen(wrapped, before, group)


def test_merging_a_masked_adapter_merges_the_masked_change_and_undoes_it():
    for family in ("llama", "gpt2"):
        model = build(family)
        group, before = group_of(model, "weight"), weights(model)
        wrapped = lora_on(model)
        train(wrapped, group)
        total, _ = effective(wrapped)
        for safe in (False, True):
            wrapped.merge_adapter(safe_merge=safe)
            for name, site in linear_sites(wrapped).items():
                assert torch.allclose(site.weight.double(), total[name], atol=1e-6)
                mask = mask_of(wrapped, group)[name]
                assert torch.equal(site.weight[mask], before[name][mask])
            wrapped.unmerge_adapter()
        assert all(torch.allclose(s.weight, before[n], atol=1e-6) for n, s in linear_sites(wrapped).items())


def test_a_masked_adapter_survives_saving(tmp_path):
    model = build("llama")
    group, before = group_of(model, "weight"), weights(model)
    wrapped = lora_on(model)
    train(wrapped, group)
    wrapped.eval()
    ids = torch.randint(3, 64, (2, 9))
    with torch.no_grad():
        expected = wrapped(input_ids=ids).logits
    wrapped.save_pretrained(tmp_path / "one")
    wrapped.save_pretrained(tmp_path / "two")
    assert (tmp_path / "one" / FILE).read_bytes() == (tmp_path / "two" / FILE).read_bytes()
    again = attach_adapter(build("llama"), tmp_path / "two").eval()
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, expected)
        plain = PeftModel.from_pretrained(build("llama"), str(tmp_path / "two")).eval()
        assert not torch.allclose(plain(input_ids=ids).logits, expected)  # what PEFT alone would load
    check_frozen(again, before, group)
    again.save_pretrained(tmp_path / "three")  # a loaded adapter keeps its mask when it is saved again
    third = attach_adapter(build("llama"), tmp_path / "three").eval()
    with torch.no_grad():
        assert torch.equal(third(input_ids=ids).logits, expected)
    with pytest.raises(FreezeError, match="belongs to another model"):
        other = attach_adapter(build("gpt2"), lora_folder(tmp_path / "gpt2"))
        from neurondrift.models.masked_lora import reapply_masks

        reapply_masks(other, tmp_path / "one")


def lora_folder(folder):
    lora_on(build("gpt2")).save_pretrained(folder)
    return folder


def test_the_drift_between_folders_sees_the_mask(tmp_path):
    from neurondrift.drift.difference import diff
    from neurondrift.drift.log import DriftLog

    model = build("llama")
    group = group_of(model, "weight", fraction=0.5)
    model.save_pretrained(tmp_path / "base")
    wrapped = lora_on(model)
    train(wrapped, group)
    wrapped.save_pretrained(tmp_path / "adapter")
    diff(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "drift", threads=1)
    found = DriftLog(tmp_path / "drift").read()
    for name, measured in measure_drift(wrapped).items():
        here = found[found["site"] == name].sort_values("row")
        assert np.allclose(here["l2"], measured.l2, rtol=1e-6)
        assert np.allclose(here["cosine_distance"], measured.cosine_distance, rtol=1e-5)


def test_neurons_and_units_need_no_file(tmp_path):
    for granularity in ("neuron", "unit"):
        model = build("llama")
        group, before = group_of(model, granularity), weights(model)
        wrapped = lora_on(model)
        train(wrapped, group)
        wrapped.save_pretrained(tmp_path / granularity)
        assert not (tmp_path / granularity / FILE).exists()
        plain = PeftModel.from_pretrained(build("llama"), str(tmp_path / granularity))
        check_frozen(plain, before, group)


def test_training_on_from_a_saved_masked_adapter(tmp_path):
    model = build("llama")
    group, before = group_of(model, "weight"), weights(model)
    wrapped = lora_on(model)
    train(wrapped, group, steps=1)
    wrapped.save_pretrained(tmp_path)
    again = attach_adapter(build("llama"), tmp_path, trainable=True)
    train(again, group, steps=2)
    check_frozen(again, before, group)
    more = group_of(model, "weight", seed=5)
    with pytest.raises(FreezeError, match="before training has begun"):
        freeze(again, more)  # these have moved already
