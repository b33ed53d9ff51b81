"""Drift against dense float64 arithmetic, over ten decades and every family; the log; the callback in a Trainer."""

import math

import numpy as np
import pytest
import torch
from families import FAMILIES, build, examples
from peft import LoraConfig, get_peft_model

from neurondrift.drift import DriftLog, DriftMeter, compare_models, measure_drift
from neurondrift.drift.callback import DriftCallback
from neurondrift.drift.exact import CheckpointWeights, low_rank_delta
from neurondrift.errors import ArtifactError, ConfigError, ModelError
from neurondrift.sites import linear_sites


def dense(base, delta):
    """l2, relative and cosine distance of float64 rows, without cancellation: 1 - cos from the sine of the angle."""
    base, delta = base.double(), delta.double()
    now = base + delta
    l2 = delta.norm(dim=1)
    unit = base / base.norm(dim=1, keepdim=True)
    across = delta - (delta * unit).sum(dim=1, keepdim=True) * unit
    angle = torch.atan2(across.norm(dim=1), (now * unit).sum(dim=1))
    return l2, l2 / base.norm(dim=1), 2 * torch.sin(angle / 2) ** 2


def adapt(model, *, scale, rank=4, seed=0, **settings):
    """A LoRA adapter on every plain linear site, with factors such that the relative drift is about `scale`."""
    kinds = sorted(
        {
            site.module_type
            for site in linear_sites(model).values()
            if site.expert is None and isinstance(site.owner, torch.nn.Module)
        }
    )
    kinds = [
        kind
        for kind in kinds
        if any(
            type(s.owner).__name__ in ("Linear", "Conv1D")
            for s in linear_sites(model).values()
            if s.module_type == kind
        )
    ]
    wrapped = get_peft_model(model, LoraConfig(r=rank, lora_alpha=8, target_modules=kinds, **settings))
    generator = torch.Generator().manual_seed(seed)
    for site in linear_sites(wrapped).values():
        delta = low_rank_delta(site)
        if delta is None:
            continue
        layer = site.wrapper
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        a.data = torch.randn(a.shape, generator=generator)
        b.data = torch.randn(b.shape, generator=generator)
        current = low_rank_delta(site)
        size = (current.b.double() @ current.a.double()).norm() / site.weight.double().norm()
        b.data *= scale / size
    return wrapped


def check(measured, expected):
    for actual, wanted, tolerance in zip(measured, expected, (1e-5, 1e-5, 1e-4), strict=True):
        assert actual.dtype == torch.float32
        assert ((actual.double() - wanted).abs() / wanted).max() < tolerance


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scale", [1.0, 1e-1, 1e-3, 1e-5, 1e-7])
def test_closed_form_equals_dense_float64(family, scale):
    wrapped = adapt(build(family), scale=scale)
    drift = measure_drift(wrapped)
    sites = linear_sites(wrapped)
    assert drift
    for name, measured in drift.items():
        delta = low_rank_delta(sites[name])
        check(measured, dense(sites[name].weight, delta.b.double() @ delta.a.double()))


def test_closed_form_is_what_peft_adds():
    """The factors that are read are those that PEFT applies: scaling (rsLoRA, patterns) and orientation included."""
    for family, extra in [
        ("llama", {"use_rslora": True}),
        ("gpt2", {}),
        ("llama", {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"up_proj": 3}}),
    ]:
        wrapped = adapt(build(family), scale=0.1, **extra)
        for site in linear_sites(wrapped).values():
            delta = low_rank_delta(site)
            if delta is not None:
                added = site.wrapper.get_delta_weight("default").detach()
                added = added.T if site.transposed else added
                assert torch.allclose((delta.b @ delta.a.double()).float(), added, rtol=1e-5, atol=1e-7)


def test_two_active_adapters_add_up():
    wrapped = adapt(build("llama"), scale=0.1)
    wrapped.add_adapter("second", LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights=False))
    wrapped.base_model.set_adapter(["default", "second"])
    site = linear_sites(wrapped)["model.layers.0.self_attn.q_proj"]
    delta = sum(site.wrapper.get_delta_weight(name).detach().double() for name in ("default", "second"))
    check(measure_drift(wrapped)[site.name], dense(site.weight, delta))


def test_a_fresh_adapter_has_no_drift_and_untrained_sites_are_named():
    model = build("llama")
    meter = DriftMeter(get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])))
    assert {name.rsplit(".", 1)[-1] for name in meter.sites} == {"q_proj"}
    assert len(meter.untrained) == 2 * 6
    for drift in meter.measure().values():
        assert not any(values.any() for values in drift)


@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e-6])
def test_two_models_are_compared_site_by_site(scale):
    before, after = build("gpt2").double(), build("gpt2").double()
    deltas = {}
    generator = torch.Generator().manual_seed(0)
    for name, site in linear_sites(after).items():
        deltas[name] = torch.randn(site.shape, generator=generator).double() * scale
        site.weight.add_(deltas[name])
    for name, measured in compare_models(before, after).items():
        check(measured, dense(linear_sites(before)[name].weight, deltas[name]))


def test_full_fine_tuning_is_measured_against_the_saved_weights(tmp_path):
    model = build("llama")
    model.save_pretrained(tmp_path)
    initial = CheckpointWeights(tmp_path, linear_sites(model))
    before = {name: site.weight.clone() for name, site in linear_sites(model).items()}
    for site in linear_sites(model).values():
        site.weight.mul_(1.01).add_(0.001)
    for name, measured in measure_drift(model, initial=initial).items():
        check(measured, dense(before[name], linear_sites(model)[name].weight.double() - before[name].double()))


def test_a_neuron_of_zero_norm_is_undefined_not_zero():
    wrapped = adapt(build("llama"), scale=0.1)
    site = linear_sites(wrapped)["model.layers.0.mlp.up_proj"]
    site.weight[3] = 0.0
    drift = measure_drift(wrapped)[site.name]
    assert drift.l2[3] > 0
    assert math.isnan(drift.relative[3])
    assert math.isnan(drift.cosine_distance[3])
    assert int(drift.relative.isnan().sum()) == 1


def test_cosine_covers_opposite_and_vanished_neurons():
    before, after = build("llama"), build("llama")
    weight = linear_sites(after)["model.layers.0.mlp.up_proj"].weight
    weight[0] *= -1
    weight[1] = 0
    weight[2] *= 3
    drift = compare_models(before, after)["model.layers.0.mlp.up_proj"]
    assert drift.cosine_distance[0] == pytest.approx(2.0)
    assert math.isnan(drift.cosine_distance[1])
    assert drift.cosine_distance[2] < 1e-14
    assert drift.relative[:3].tolist() == pytest.approx([2.0, 1.0, 2.0])


def test_what_cannot_be_measured_is_an_error():
    with pytest.raises(ModelError, match="without an adapter has no drift by itself"):
        measure_drift(build("llama"))
    wrapped = adapt(build("llama"), scale=0.1)
    wrapped.merge_adapter()
    with pytest.raises(ModelError, match=r"merged into model.layers.0.*unmerge_adapter"):
        measure_drift(wrapped)
    with pytest.raises(ModelError, match="different sites or shapes"):
        compare_models(build("llama"), build("gpt2"))
    with pytest.raises(ConfigError, match="number of steps.*0"):
        DriftCallback("x", every=0)


# --- the log and the callback ------------------------------------------------------------------------------


def trainer(model, folder, callback, *, steps=6, save=2, accumulation=1):
    from transformers import Trainer, TrainingArguments

    def collate(rows):
        length = max(len(row["input_ids"]) for row in rows)
        pad = lambda values, fill: values + [fill] * (length - len(values))  # noqa: E731
        return {
            "input_ids": torch.tensor([pad(row["input_ids"], 0) for row in rows]),
            "labels": torch.tensor([pad(row["labels"], -100) for row in rows]),
            "attention_mask": torch.tensor([pad([1] * len(row["input_ids"]), 0) for row in rows]),
        }

    arguments = TrainingArguments(
        str(folder),
        max_steps=steps,
        save_steps=save,
        per_device_train_batch_size=2,
        learning_rate=0.01,
        seed=3,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        gradient_accumulation_steps=accumulation,
        dataloader_pin_memory=False,
    )
    return Trainer(model=model, args=arguments, train_dataset=examples(12), data_collator=collate, callbacks=[callback])


def lora():
    torch.manual_seed(0)
    return get_peft_model(build("llama"), LoraConfig(r=2, target_modules=["q_proj", "up_proj"]))


def test_callback_writes_step_0_every_n_and_the_end(tmp_path):
    model = lora()
    callback = DriftCallback(tmp_path / "drift", every=4)
    trainer(model, tmp_path / "t", callback, accumulation=2).train()
    log = DriftLog(tmp_path / "drift")
    assert log.steps() == [0, 4, 6]
    assert not log.read(steps=[0])[["l2", "relative", "cosine_distance"]].to_numpy().any()
    final = log.read(steps=[6])
    drift = measure_drift(model)
    for site, values in drift.items():
        rows = final[final["site"] == site]
        assert rows["row"].tolist() == list(range(len(values.l2)))
        assert np.array_equal(rows["relative"].to_numpy(), values.relative.numpy())
    initial = log.initial()
    assert len(initial) == len(final)
    norms = linear_sites(model)["model.layers.1.mlp.up_proj"].weight.norm(dim=1)
    assert np.allclose(initial[initial["site"] == "model.layers.1.mlp.up_proj"]["norm"], norms)


def test_resuming_loses_and_doubles_no_snapshot(tmp_path):
    straight = DriftCallback(tmp_path / "straight", every=1)
    trainer(lora(), tmp_path / "t1", straight).train()

    class Killed(Exception):
        pass

    class Kill(DriftCallback):
        def on_step_end(self, args, state, control, **kwargs):
            super().on_step_end(args, state, control, **kwargs)
            if state.global_step == 5:
                raise Killed

    with pytest.raises(Killed):
        trainer(lora(), tmp_path / "t2", Kill(tmp_path / "resumed", every=1)).train()
    assert DriftLog(tmp_path / "resumed").steps() == [0, 1, 2, 3, 4, 5]
    resumed = DriftCallback(tmp_path / "resumed", every=1)
    trainer(lora(), tmp_path / "t2", resumed).train(resume_from_checkpoint=str(tmp_path / "t2" / "checkpoint-4"))
    one, two = DriftLog(tmp_path / "straight").table(), DriftLog(tmp_path / "resumed").table()
    assert DriftLog(tmp_path / "resumed").steps() == list(range(7))
    assert one.equals(two)


def test_the_log_reads_what_is_asked_for(tmp_path):
    callback = DriftCallback(tmp_path / "drift", every=2)
    trainer(lora(), tmp_path / "t", callback).train()
    log = DriftLog(tmp_path / "drift")
    part = log.read(steps=[2, 6], sites=["model.layers.0.self_attn.q_proj"], columns=["site", "row", "l2"])
    assert list(part.columns) == ["step", "site", "row", "l2"]
    assert set(part["step"]) == {2, 6}
    assert set(part["site"]) == {"model.layers.0.self_attn.q_proj"}
    with pytest.raises(ArtifactError, match=r"no drift snapshot of this step.*3.*\[0, 2, 4, 6\]"):
        log.read(steps=[3])
    (tmp_path / "drift" / "step=000002" / "neurons.parquet").write_bytes(b"half")
    with pytest.raises(ArtifactError, match="cannot be read as a drift snapshot"):
        log.read(steps=[2])
    with pytest.raises(ArtifactError, match="no drift snapshots"):
        DriftLog(tmp_path / "empty").read()


def test_a_folder_of_another_run_is_refused(tmp_path):
    trainer(lora(), tmp_path / "t", DriftCallback(tmp_path / "drift", every=6)).train()
    other = get_peft_model(build("llama", seed=1), LoraConfig(r=2, target_modules=["q_proj", "up_proj"]))
    with pytest.raises(ArtifactError, match="drift snapshots of another model"):
        trainer(other, tmp_path / "t2", DriftCallback(tmp_path / "drift", every=6)).train()


def test_another_models_group_is_refused(tmp_path):
    from neurondrift.errors import GroupError
    from neurondrift.groups import Group

    group = Group(
        granularity="neuron", members={"model.layers.0.self_attn.q_proj": np.array([1])}, provenance={"model": "other"}
    )
    with pytest.raises(GroupError, match="made from another model"):
        trainer(lora(), tmp_path / "t", DriftCallback(tmp_path / "drift", every=6, groups=[group])).train()
