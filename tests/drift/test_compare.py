"""Two models compared: a module with an adapter counts as it computes."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

import neurondrift as nd
from helpers.families import build


def tuned(**settings):
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False, **settings)
    return get_peft_model(build("llama"), config)


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"modules_to_save": ["o_proj"]}], ids=str)
def test_an_adapter_that_is_not_merged_is_part_of_the_model(settings):
    model = tuned(**settings)
    measured = nd.measure_drift(model)
    compared = nd.compare_models(build("llama"), model)
    assert set(compared) == set(nd.linear_sites(model))
    assert any(drift.l2.any() for drift in measured.values())
    for name, drift in compared.items():
        for metric in drift._fields:
            expected = getattr(measured[name], metric) if name in measured else torch.zeros_like(drift.l2)
            assert torch.allclose(getattr(drift, metric), expected, rtol=1e-4, atol=1e-9), (name, metric)


def test_a_merged_adapter_is_compared_as_it_is_stored():
    model = tuned()
    apart = nd.compare_models(build("llama"), model)
    model.merge_adapter()
    merged = nd.compare_models(build("llama"), model)
    for name, drift in apart.items():
        assert torch.allclose(merged[name].l2, drift.l2, rtol=1e-3, atol=1e-5)
