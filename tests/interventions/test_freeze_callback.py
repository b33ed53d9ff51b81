"""The freeze in real Trainers: resumed, added later, read from a file, and in TRL's."""

import pytest
import torch

from helpers import training
from helpers.adapters import lora_on
from helpers.families import build, examples
from helpers.frozen import check_frozen, weights
from helpers.groups import group_of
from helpers.training import KillAt, Killed, sft_trainer
from neurondrift.base.errors import FreezeError
from neurondrift.interventions.acting.freezing import FreezeCallback

# What leaks where only the gradient is held: weight decay, momentum, clipping by a norm of all.
LEAKY = {
    "steps": 3,
    "accumulation": 2,
    "learning_rate": 0.02,
    "weight_decay": 0.1,
    "max_grad_norm": 0.5,
    "optim": "adamw_torch_fused",
}


def trainer(model, folder, *callbacks, **settings):
    return training.trainer(model, folder, *callbacks, **LEAKY | settings)


SGD = {"optim": "sgd", "optim_args": "momentum=0.9", "learning_rate": 0.5}


@pytest.mark.parametrize("optimiser", [{}, SGD], ids=["adamw", "sgd"])
@pytest.mark.parametrize(
    ("method", "granularity"),
    [("lora", "neuron"), ("lora", "weight"), ("lora", "unit"), ("full", "neuron"), ("full", "weight")],
)
def test_in_a_trainer_with_a_resume_nothing_leaks(method, granularity, optimiser, tmp_path):
    def fresh():
        return lora_on(build("llama")) if method == "lora" else build("llama")

    group, before = group_of(build("llama"), granularity), weights(build("llama"))
    straight, resumed = fresh(), fresh()
    callback = FreezeCallback(group)
    trainer(straight, tmp_path / "straight", callback, **optimiser).train()
    check_frozen(straight, before, group)
    assert callback.report.moved > 0
    with pytest.raises(Killed):
        trainer(fresh(), tmp_path / "t", FreezeCallback(group), KillAt(3), **optimiser).train()
    again = FreezeCallback(group)
    trainer(resumed, tmp_path / "t", again, **optimiser).train(
        resume_from_checkpoint=str(tmp_path / "t" / "checkpoint-2")
    )
    check_frozen(resumed, before, group)
    assert again.report == callback.report
    for one, two in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_checkpoint_that_was_made_without_the_freeze_is_refused(method, tmp_path):
    def fresh():
        return lora_on(build("llama")) if method == "lora" else build("llama")

    with pytest.raises(Killed):
        trainer(fresh(), tmp_path, KillAt(3)).train()
    model = fresh()
    run = trainer(model, tmp_path, FreezeCallback(group_of(model, "neuron")))
    with pytest.raises(FreezeError, match="checkpoint has moved frozen weights"):
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_added_to_a_trainer_later_and_from_a_file(tmp_path):
    model = lora_on(build("llama"))
    group, before = group_of(model, "neuron"), weights(model)
    group.save(tmp_path / "group.parquet")
    run = trainer(model, tmp_path / "t", save_strategy="no")
    run.add_callback(FreezeCallback(tmp_path / "group.parquet"))
    run.train()
    check_frozen(model, before, group)


def test_in_trls_trainer(tmp_path):
    model = build("llama")
    group, before = group_of(model, "weight"), weights(model)
    rows = [{"input_ids": row["input_ids"], "labels": row["labels"]} for row in examples(8)]
    from neurondrift.models.loading import byte_tokenizer

    callback = FreezeCallback(group)
    run = sft_trainer(
        model,
        byte_tokenizer(),
        tmp_path,
        rows,
        callback,
        max_steps=2,
        learning_rate=0.02,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    run.train()
    check_frozen(run.model, before, group)
    assert callback.report.sites == 4
