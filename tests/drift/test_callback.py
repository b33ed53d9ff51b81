"""The callback in real Trainers: what reaches the log, resuming, stopping early, full disks, several processes."""

import errno
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from families import build, examples
from peft import LoraConfig
from safetensors.torch import load_file
from test_drift import adapt, lora, trainer
from test_drift_weights import weights_of
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from neurondrift.drift import DriftLog, DriftMeter, measure_drift
from neurondrift.drift.callback import DriftCallback, summarise_groups
from neurondrift.errors import ConfigError, GroupError, ModelError, ResourceError
from neurondrift.groups import Group, random_group
from neurondrift.sites import fingerprint, linear_sites

UP, Q = "model.layers.0.mlp.up_proj", "model.layers.0.self_attn.q_proj"


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


def neurons(model, fraction=0.2):
    shapes = {name: site.shape for name, site in linear_sites(model).items()}
    return random_group(
        shapes, fraction=fraction, seed=0, granularity="neuron", provenance={"model": fingerprint(model)}
    )


def with_reporter_before(run, reporter):
    """Reporting integrations stand before the callbacks that a script passes."""
    run.callback_handler.callbacks.insert(1, reporter)
    return run


def test_a_summary_by_group_reaches_the_log_and_every_reporter(tmp_path):
    model = lora()
    groups = {
        "neurons": neurons(model),
        "weights": weights_of(model),
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
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    from neurondrift.models import load_model

    model, tokenizer = load_model("tiny:llama", dtype="float32")
    group = weights_of(model)
    rows = [{"prompt": f"Say {i}.", "completion": f" It is {i}, and {i} it is."} for i in range(8)]
    callback, reporter = DriftCallback(tmp_path / "d", every=2, groups={"g": group}), Reporter()
    run = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(
            str(tmp_path / "t"),
            max_steps=4,
            logging_steps=4,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            learning_rate=0.01,
            report_to=[],
            use_cpu=True,
            bf16=False,
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=2, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM"),
        callbacks=[callback],
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
    neurons(model).save(tmp_path / "safety_top.matched.neurons.parquet")
    neurons(model).save(tmp_path / "utility.json")
    again = DriftCallback(
        tmp_path, every=1,
        groups=[tmp_path / "safety_top.matched.neurons.parquet", str(tmp_path / "utility.json"), neurons(model),
                weights_of(model), weights_of(model, seed=1)],
    )  # fmt: skip
    assert list(again.groups) == [
        "safety_top.matched", "utility", "random_neurons", "random_weights", "random_weights_2",
    ]  # fmt: skip
    with pytest.raises(GroupError, match="one group rather than a list"):
        DriftCallback(tmp_path, every=1, groups=neurons(model))
    with pytest.raises(GroupError, match=r"no group.*7"):
        DriftCallback(tmp_path, every=1, groups=[7])
    with pytest.raises(ConfigError, match="on_full_disk is unknown.*'ignore'.*continue, stop"):
        DriftCallback(tmp_path, every=1, on_full_disk="ignore")


def test_evaluation_and_early_stopping_lose_no_snapshot_and_log_before_reporters_close(tmp_path):
    class Stop(TrainerCallback):
        def on_evaluate(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 3

    model, reporter = lora(), Reporter()
    run = trainer(model, tmp_path / "t", DriftCallback(tmp_path / "d", every=2, groups={"g": neurons(model)}))
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
        class Killed(Exception):
            pass

        class Kill(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                if state.global_step == stop:
                    raise Killed

        model = lora()
        found = trainer(model, tmp_path / folder, DriftCallback(tmp_path / name, every=4, groups=groups(model)))
        found.add_callback(Kill())
        try:
            found.train(resume_from_checkpoint=resume)
        except Killed:
            assert stop is not None
        return found

    follow = lambda model: {"g": weights_of(model)}  # noqa: E731
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
    from neurondrift.errors import ArtifactError

    with pytest.raises(ArtifactError, match="follow other groups of weights"):
        run("t3", "resumed", lambda model: {"other": weights_of(model)})


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


# --- what DriftLog gives of groups -------------------------------------------------------------------------


def test_the_log_gives_the_members_of_groups(tmp_path):
    model = lora()
    group = neurons(model)
    trainer(model, tmp_path / "t", DriftCallback(tmp_path / "d", every=3)).train()
    group.save(tmp_path / "random.neurons.parquet")
    log = DriftLog(tmp_path / "d")
    other = Group(granularity="neuron", members={UP: np.array([2, 23])})
    frame = log.read(steps=[3, 6], groups={"first": group, "second": other})
    assert list(frame.columns) == ["step", "group", "site", "row", "l2", "relative", "cosine_distance"]
    trained = log.metadata()["sites"]
    for name, members in (("first", group), ("second", other)):
        expected = [(s, int(r)) for s in trained for r in members.rows(s)]
        for step in (3, 6):
            part = frame[(frame["group"] == name) & (frame["step"] == step)]
            assert list(zip(part["site"], part["row"], strict=True)) == expected
    everything = log.read(steps=[6])
    merged = frame[(frame["step"] == 6)].merge(everything, on=["site", "row"])
    assert (merged["l2_x"] == merged["l2_y"]).all()
    one = log.read(steps=[6], groups=[tmp_path / "random.neurons.parquet"], sites=[UP], columns=["row", "l2"])
    assert one["row"].tolist() == group.rows(UP).tolist()
    assert list(one.columns) == ["step", "group", "row", "l2"]
    assert set(one["group"]) == {"random"}
    with pytest.raises(GroupError, match="by a group of weights"):
        log.read(groups={"w": weights_of(model)})
    with pytest.raises(GroupError, match="another model"):
        log.read(groups={"f": Group(granularity="neuron", members={UP: np.array([1])}, provenance={"model": "x"})})


def test_duckdb_and_polars_read_the_snapshots(tmp_path, monkeypatch):
    """The commands of docs/results.md, as they stand there."""
    duckdb, polars = pytest.importorskip("duckdb"), pytest.importorskip("polars")
    model = lora()
    trainer(model, tmp_path / "t", DriftCallback(tmp_path / "drift", every=3)).train()
    (tmp_path / "neuron_groups").mkdir()
    neurons(model).save(tmp_path / "neuron_groups" / "safety_top.neurons.parquet")
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parents[1] / "docs" / "results.md").read_text()
    sql = text.split("```sql\n")[1].split("```")[0]
    log = DriftLog("drift")
    expected = log.read(groups=["neuron_groups/safety_top.neurons.parquet"]).groupby("step")["relative"].mean()
    found = duckdb.sql(sql).fetchall()
    assert [row[0] for row in found] == expected.index.tolist() == [0, 3, 6]
    assert [row[1] for row in found] == pytest.approx(expected.tolist(), rel=1e-5)
    code = next(block for block in text.split("```python\n")[1:] if "import polars" in block).split("```")[0]
    space = {}
    exec(code, space)
    assert isinstance(space["means"], polars.DataFrame)
    assert space["means"]["relative"].to_list() == pytest.approx(expected.tolist(), rel=1e-5)
    import pyarrow.compute as pc

    lazily = log.dataset().to_table(
        columns=["step", "row", "l2"], filter=(pc.field("step") == 6) & (pc.field("row") < 2)
    )
    assert lazily.num_rows == 2 * len(log.metadata()["sites"])


# --- a full disk -------------------------------------------------------------------------------------------


class Limited(DriftLog):
    """A log under a limit on the size of files while it writes step 2: a real OSError, on any machine."""

    def write(self, step, *args, **kwargs):
        old = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000 if step == 2 else old[0], old[1]))
        try:
            super().write(step, *args, **kwargs)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, old)


def test_a_snapshot_without_space_is_left_out_and_training_goes_on(tmp_path, caplog):
    callback = DriftCallback(tmp_path / "d", every=1)
    callback.log = Limited(tmp_path / "d")
    run = trainer(lora(), tmp_path / "t", callback, steps=5)
    run.train()
    assert run.state.global_step == 5
    assert callback.missed == [2]
    log = DriftLog(tmp_path / "d")
    assert log.steps() == [0, 1, 3, 4, 5]
    assert set(log.read()["step"]) == {0, 1, 3, 4, 5}
    assert caplog.text.count("No space is left for the drift snapshot of step 2") == 1
    assert not list((tmp_path / "d").glob(".*partial"))
    assert [entry["step"] for entry in callback.history] == [0, 1, 2, 3, 4, 5]  # the summary does not need the disk


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 200 kB."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("a small file system can only be mounted by root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("mode", ["continue", "stop"])
def test_a_full_file_system(small_disk, tmp_path, mode, caplog):
    class Fill(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 1:
                with pytest.raises(OSError, match="No space"), open(small_disk / "f", "wb", buffering=0) as stream:
                    while True:
                        stream.write(b"x" * 4096)
            if state.global_step == 4:
                (small_disk / "f").unlink()

    callback = DriftCallback(small_disk / "d", every=1, on_full_disk=mode)
    run = trainer(lora(), tmp_path / "t", callback, steps=5)
    run.add_callback(Fill())
    if mode == "stop":
        with pytest.raises(ResourceError, match="drift snapshot of step 2.*resume from the last checkpoint"):
            run.train()
    else:
        run.train()
    log = DriftLog(small_disk / "d")
    assert log.steps() == ([0, 1] if mode == "stop" else [0, 1, 5])
    assert callback.missed == ([] if mode == "stop" else [2, 3, 4])
    assert len(log.read()) == len(log.steps()) * len(log.initial())
    assert not list((small_disk / "d").glob(".*partial"))
    assert caplog.text.count("No space is left") == (0 if mode == "stop" else 1)


def test_only_a_full_disk_is_passed_over(tmp_path):
    callback = DriftCallback(tmp_path, every=1)

    def fails(number):
        def write():
            raise OSError(number, os.strerror(number))

        return write

    callback._guard(3, fails(errno.ENOSPC))
    assert callback.missed == [3]
    with pytest.raises(OSError, match="Input/output"):
        callback._guard(4, fails(errno.EIO))
    callback.on_full_disk = "stop"
    with pytest.raises(ResourceError, match="drift snapshot of step 5.*free some space"):
        callback._guard(5, fails(errno.EDQUOT))


# --- several processes -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    target = tmp_path_factory.mktemp("two")
    script = Path(__file__).with_name("distributed_drift.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    done = subprocess.run([*command, str(target)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return target


def test_of_two_processes_one_writes_and_logs(two_processes):
    folder = two_processes / "ddp"
    assert DriftLog(folder / "drift").steps() == [0, 2, 4]
    assert (folder / "logged.0").read_text() == "2 3 3"
    assert (folder / "logged.1").read_text() == "2 0 0"
    assert not list(folder.rglob("*.partial"))
    saved = load_file(folder / "t" / "checkpoint-4" / "adapter_model.safetensors")
    final = DriftLog(folder / "drift").read(steps=[4], sites=[UP])
    check_l2(final, saved, "")


def test_parameters_that_fsdp_cut_in_two_are_gathered_site_by_site(two_processes):
    folder = two_processes / "fsdp"
    log = DriftLog(folder / "drift")
    assert log.steps() == [0, 1, 2, 3]
    assert (folder / "logged.0").read_text() == "2 4 4"
    assert (folder / "logged.1").read_text() == "2 0 0"
    check_l2(log.read(steps=[3], sites=[UP]), load_file(folder / "adapter.safetensors"), ".default")
    whole = lora()
    assert log.metadata()["model"] == fingerprint(whole)
    initial = log.initial()
    norms = linear_sites(whole)[UP].weight.double().norm(dim=1)
    assert np.allclose(initial[initial["site"] == UP]["norm"], norms, rtol=1e-12)
    group = weights_of(whole)
    part = log.weights(steps=[3], sites=[UP])
    assert part["count"].tolist() == [len(group.members[UP])] * 2
    assert (part["mean"] > 0).all()


def check_l2(rows, factors, suffix):
    """Snapshot rows of UP against B A of a saved adapter (rank 2, alpha 8)."""
    name = f"base_model.model.{UP}"
    delta = 4.0 * factors[f"{name}.lora_B{suffix}.weight"].double() @ factors[f"{name}.lora_A{suffix}.weight"].double()
    assert delta.norm() > 0
    assert np.allclose(rows["l2"], delta.norm(dim=1), rtol=1e-5)


def test_parameters_that_cannot_be_gathered_are_refused(tmp_path):
    state, control = TrainerState(is_world_process_zero=True), TrainerControl()
    arguments = TrainingArguments(str(tmp_path / "t"), use_cpu=True, report_to=[])
    model = lora()
    next(model.parameters()).ds_id = 0  # how DeepSpeed marks a parameter that ZeRO-3 has cut
    with pytest.raises(ModelError, match="ZeRO-3.*ZeRO-2, or FSDP2"):
        DriftCallback(tmp_path / "d", every=1).on_train_begin(arguments, state, control, model=model)
    wrapper = type("FullyShardedDataParallel", (torch.nn.Module,), {})()
    wrapper.module = lora()
    with pytest.raises(ModelError, match="FSDP1 cannot be measured.*FSDP2"):
        DriftCallback(tmp_path / "d", every=1).on_train_begin(arguments, state, control, model=wrapper)
