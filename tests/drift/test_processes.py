"""The callback in several processes: one writes, and what is cut between them is gathered or refused."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerControl, TrainerState, TrainingArguments

from helpers.adapters import UP, lora
from helpers.groups import group_of
from helpers.processes import in_two_processes
from neurondrift.base.errors import ModelError
from neurondrift.drift.callback import DriftCallback
from neurondrift.drift.log import DriftLog
from neurondrift.models.sites import fingerprint, linear_sites


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    target = tmp_path_factory.mktemp("two")
    done = in_two_processes("helpers.distributed_drift", target)
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
    group = group_of(whole, "weight")
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
