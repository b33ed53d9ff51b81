"""The callback in real Trainers: snapshots, what reaches the log and reporters, resuming, stopping early."""

import json

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from helpers.adapters import UP, Q, adapt, lora
from helpers.families import build, examples
from helpers.groups import group_of
from helpers.training import KillAt, Killed, sft_trainer, trainer
from neurondrift.base.errors import ArtifactError, ConfigError, GroupError
from neurondrift.drift.callback import DriftCallback, summarise_groups
from neurondrift.drift.log import DriftLog
from neurondrift.drift.meter import DriftMeter, measure_drift
from neurondrift.groups.group import Group
from neurondrift.models.sites import linear_sites


class Reporter(TrainerCallback):
    """What TensorBoard's, W&B's and trackio's callbacks do: keep every figure with its step, until training ends."""

    def __init__(self):
        self.rows, self.open = [], False

    def on_train_begin(self, args, state, control, **kwargs):
        self.open = True

    def on_log(self, args, state, control, logs=None, **kwargs):
        assert self.open
        self.rows.append({"step": state.global_step, **logs})

    def on_train_end(self, args, state, control, **kwargs):
        self.open = False


def with_reporter_before(run, reporter):
    """Reporting integrations stand before the callbacks that a script passes."""
    run.callback_handler.callbacks.insert(1, reporter)
    return run


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
    with pytest.raises(Killed):
        trainer(lora(), tmp_path / "t2", DriftCallback(tmp_path / "resumed", every=1), KillAt(5)).train()
    assert DriftLog(tmp_path / "resumed").steps() == [0, 1, 2, 3, 4, 5]
    resumed = DriftCallback(tmp_path / "resumed", every=1)
    trainer(lora(), tmp_path / "t2", resumed).train(resume_from_checkpoint=str(tmp_path / "t2" / "checkpoint-4"))
    one, two = DriftLog(tmp_path / "straight").table(), DriftLog(tmp_path / "resumed").table()
    assert DriftLog(tmp_path / "resumed").steps() == list(range(7))
    assert one.equals(two)


def test_a_summary_by_group_reaches_the_log_and_every_reporter(tmp_path):
    model = lora()
    groups = {
        "neurons": group_of(model, "neuron"),
        "weights": group_of(model, "weight"),
        "units": Group(granularity="unit", members={"model.layers.0.mlp": np.array([1, 5])}),
    }
    callback, reporter = DriftCallback(tmp_path / "d", every=2, groups=groups), Reporter()
    run = with_reporter_before(trainer(model, tmp_path / "t", callback, steps=5, save=5), reporter)
    run.args.logging_steps = 1
    run.train()
    kept = [entry for entry in run.state.log_history if any(key.startswith("drift/") for key in entry)]
    assert [entry["step"] for entry in kept] == [0, 2, 4, 5]
    assert [row["step"] for row in reporter.rows if "drift/all/relative" in row] == [0, 2, 4, 5]
    assert [row["step"] for row in reporter.rows if "loss" in row] == [1, 2, 3, 4, 5]  # the Trainer's own stay
    assert {key for key in kept[-1] if key.startswith("drift/")} == {
        "drift/all/relative", "drift/neurons/relative", "drift/neurons/l2", "drift/weights/mean_abs",
        "drift/weights/mean_relative", "drift/units/mean_abs", "drift/units/mean_relative",
    }  # fmt: skip
    drift, sites = measure_drift(model), linear_sites(model)
    chosen = [drift[site].relative[groups["neurons"].rows(site)] for site in drift if site in groups["neurons"].members]
    assert kept[-1]["drift/neurons/relative"] == pytest.approx(float(torch.cat(chosen).mean()), rel=1e-6)
    deltas = []
    for site in drift:
        delta = sites[site].wrapper.get_delta_weight("default").detach().reshape(-1)
        deltas.append(delta[groups["weights"].members[site]].abs())
    assert kept[-1]["drift/weights/mean_abs"] == pytest.approx(float(torch.cat(deltas).mean()), rel=1e-5)
    assert callback.history[-1]["drift/weights/mean_abs"] == kept[-1]["drift/weights/mean_abs"]
    json.dumps(run.state.log_history, allow_nan=False)


def test_in_trls_trainer_the_summary_arrives_and_trls_own_means_stay(tmp_path):
    from neurondrift.models.loading import load_model

    model, tokenizer = load_model("tiny:llama", dtype="float32")
    group = group_of(model, "weight")
    rows = [{"prompt": f"Say {i}.", "completion": f" It is {i}, and {i} it is."} for i in range(8)]
    callback, reporter = DriftCallback(tmp_path / "d", every=2, groups={"g": group}), Reporter()
    run = sft_trainer(
        model,
        tokenizer,
        tmp_path / "t",
        rows,
        callback,
        max_steps=4,
        logging_steps=4,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=0.01,
    )
    with_reporter_before(run, reporter).train()
    assert DriftLog(tmp_path / "d").steps() == [0, 2, 4]
    kept = [entry for entry in run.state.log_history if "drift/g/mean_abs" in entry]
    assert [entry["step"] for entry in kept] == [0, 2, 4]
    assert [row["step"] for row in reporter.rows if "drift/g/mean_abs" in row] == [0, 2, 4]
    assert kept[-1]["drift/g/mean_abs"] > kept[0]["drift/g/mean_abs"] == 0
    assert not any("mean_token_accuracy" in entry for entry in kept)  # Trainer.log would have handed them over here
    assert any("mean_token_accuracy" in entry for entry in run.state.log_history if "loss" in entry)
    final = DriftLog(tmp_path / "d").read(steps=[4])
    for site, values in measure_drift(run.model).items():
        assert np.array_equal(final[final["site"] == site]["l2"], values.l2.numpy())


def test_names_come_from_files_and_rules(tmp_path):
    model = lora()
    group_of(model, "neuron").save(tmp_path / "safety_top.matched.neurons.parquet")
    group_of(model, "neuron").save(tmp_path / "utility.json")
    again = DriftCallback(
        tmp_path, every=1,
        groups=[tmp_path / "safety_top.matched.neurons.parquet", str(tmp_path / "utility.json"), group_of(model, "neuron"),
                group_of(model, "weight"), group_of(model, "weight", seed=1)],
    )  # fmt: skip
    assert list(again.groups) == [
        "safety_top.matched", "utility", "random_neurons", "random_weights", "random_weights_2",
    ]  # fmt: skip
    with pytest.raises(GroupError, match="one group rather than a list"):
        DriftCallback(tmp_path, every=1, groups=group_of(model, "neuron"))
    with pytest.raises(GroupError, match=r"no group.*7"):
        DriftCallback(tmp_path, every=1, groups=[7])
    with pytest.raises(ConfigError, match="on_full_disk is unknown.*'ignore'.*continue, stop"):
        DriftCallback(tmp_path, every=1, on_full_disk="ignore")


def test_evaluation_and_early_stopping_lose_no_snapshot_and_log_before_reporters_close(tmp_path):
    class Stop(TrainerCallback):
        def on_evaluate(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 3

    model, reporter = lora(), Reporter()
    run = trainer(
        model, tmp_path / "t", DriftCallback(tmp_path / "d", every=2, groups={"g": group_of(model, "neuron")})
    )
    run.args.eval_strategy, run.args.eval_steps, run.eval_dataset = "steps", 1, examples(2)
    run.state.eval_steps = 1
    run.add_callback(Stop())
    with_reporter_before(run, reporter).train()
    assert run.state.global_step == 3
    assert DriftLog(tmp_path / "d").steps() == [0, 2, 3]
    assert [row["step"] for row in reporter.rows if "drift/g/l2" in row] == [0, 2, 3]
    assert sum("eval_loss" in row for row in reporter.rows) == 3


def test_the_last_snapshot_is_of_the_last_step_also_where_the_best_model_is_loaded(tmp_path):
    model = lora()
    run = trainer(model, tmp_path / "t", DriftCallback(tmp_path / "d", every=4), steps=3, save=1)
    run.args.load_best_model_at_end, run.args.metric_for_best_model, run.args.greater_is_better = True, "loss", True
    run.args.eval_strategy, run.args.eval_steps, run.eval_dataset = "steps", 1, examples(2)
    run.state.eval_steps = 1
    run.train()
    assert run.state.best_global_step < 3  # the largest loss is not the last
    final = DriftLog(tmp_path / "d").read(steps=[3])["l2"].to_numpy()
    loaded = torch.cat([values.l2 for values in measure_drift(model).values()]).numpy()
    saved = load_file(tmp_path / "t" / "checkpoint-3" / "adapter_model.safetensors")
    first = "base_model.model." + Q
    delta = 4.0 * saved[f"{first}.lora_B.weight"].double() @ saved[f"{first}.lora_A.weight"].double()
    assert not np.allclose(final, loaded)
    assert np.allclose(final[: delta.shape[0]], delta.norm(dim=1), rtol=1e-5)


def test_resuming_loses_and_doubles_nothing_in_log_snapshots_and_weights(tmp_path):
    def run(folder, name, groups, resume=None, stop=None):
        model = lora()
        found = trainer(model, tmp_path / folder, DriftCallback(tmp_path / name, every=4, groups=groups(model)))
        found.add_callback(KillAt(stop))
        try:
            found.train(resume_from_checkpoint=resume)
        except Killed:
            assert stop is not None
        return found

    follow = lambda model: {"g": group_of(model, "weight")}  # noqa: E731
    straight = run("t1", "straight", follow)
    run("t2", "resumed", follow, stop=5)
    assert DriftLog(tmp_path / "resumed").steps() == [0, 4]
    resumed = run("t2", "resumed", follow, resume=str(tmp_path / "t2" / "checkpoint-2"))  # step 2 is no snapshot's
    one, two = DriftLog(tmp_path / "straight"), DriftLog(tmp_path / "resumed")
    assert one.steps() == two.steps() == [0, 4, 6]
    assert one.table().equals(two.table())
    assert one.weights_table().equals(two.weights_table())
    drifts = [[e for e in r.state.log_history if "drift/g/mean_abs" in e] for r in (straight, resumed)]
    assert drifts[0] == drifts[1]
    assert len(drifts[0]) == 3
    from neurondrift.base.errors import ArtifactError

    with pytest.raises(ArtifactError, match="follow other groups of weights"):
        run("t3", "resumed", lambda model: {"other": group_of(model, "weight")})


def test_without_a_trainer_the_summary_stays_in_the_state(tmp_path):
    model = adapt(build("llama"), scale=0.1)
    callback, state = DriftCallback(tmp_path / "d", every=1), TrainerState(is_world_process_zero=True)
    arguments = TrainingArguments(str(tmp_path / "t"), use_cpu=True, report_to=[])
    callback.on_train_begin(arguments, state, TrainerControl(), model=model)
    assert len(state.log_history) == 1
    assert state.log_history[0]["drift/all/relative"] > 0


def test_neurons_of_zero_norm_are_counted_and_reported(tmp_path, caplog):
    model = lora()
    linear_sites(model)[UP].weight[[3, 8]] = 0.0
    run = trainer(model, tmp_path / "t", DriftCallback(tmp_path / "d", every=3), steps=3)
    run.train()
    assert DriftLog(tmp_path / "d").metadata()["zero_norm"] == {UP: 2}
    assert f"2 neurons have a norm of zero before training ({UP}" in caplog.text
    rows = DriftLog(tmp_path / "d").read(steps=[3], sites=[UP])
    assert rows["relative"].isna().sum() == rows["cosine_distance"].isna().sum() == 2
    assert np.isfinite(run.state.log_history[-1].get("drift/all/relative", 0.0))


def test_a_group_outside_the_trained_sites_is_said_and_left_out(tmp_path, caplog):
    model = lora()
    group = Group(granularity="neuron", members={"model.layers.0.self_attn.k_proj": np.array([1, 2])})
    callback = DriftCallback(tmp_path / "d", every=3, groups={"elsewhere": group})
    trainer(model, tmp_path / "t", callback, steps=3).train()
    assert "No member of the group elsewhere lies in a trained site" in caplog.text
    assert not any("elsewhere" in key for key in callback.history[-1])
    assert summarise_groups({"elsewhere": group}, DriftMeter(model).measure(), []).keys() == {"drift/all/relative"}


def test_a_folder_of_another_run_is_refused(tmp_path):
    trainer(lora(), tmp_path / "t", DriftCallback(tmp_path / "drift", every=6)).train()
    other = get_peft_model(build("llama", seed=1), LoraConfig(r=2, target_modules=["q_proj", "up_proj"]))
    with pytest.raises(ArtifactError, match="drift snapshots of another model"):
        trainer(other, tmp_path / "t2", DriftCallback(tmp_path / "drift", every=6)).train()


def test_another_models_group_is_refused(tmp_path):
    from neurondrift.base.errors import GroupError
    from neurondrift.groups.group import Group

    group = Group(
        granularity="neuron", members={"model.layers.0.self_attn.q_proj": np.array([1])}, provenance={"model": "other"}
    )
    with pytest.raises(GroupError, match="made from another model"):
        trainer(lora(), tmp_path / "t", DriftCallback(tmp_path / "drift", every=6, groups=[group])).train()


# A12
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_neurons_that_are_no_numbers_are_counted_and_said_once(value, tmp_path, caplog):
    class Diverge(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step >= 2:
                linear_sites(model)[Q].wrapper.lora_B["default"].weight.data[:5] = value

    callback = DriftCallback(tmp_path / "drift", every=1)
    run = trainer(lora(), tmp_path / "t", callback)
    run.callback_handler.callbacks.insert(0, Diverge())
    run.train()
    counted = [entry.get("drift/all/not_finite") for entry in callback.history]
    assert counted[:2] == [None, None] and all(count and count >= 5 for count in counted[2:])
    assert np.isfinite(callback.history[2]["drift/all/relative"])
    assert caplog.text.count("training has diverged") == 1
    assert callback.log.not_finite()[2] == counted[2]
