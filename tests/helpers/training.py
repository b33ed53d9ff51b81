"""Trainers on the tiny models, transformers' and TRL's, and how one of them is killed."""

import pytest
import torch
from peft import LoraConfig
from transformers import Trainer, TrainerCallback, TrainingArguments

from helpers.families import examples


class Killed(Exception):
    """What ends a training in its midst."""


class KillAt(TrainerCallback):
    """Ends the training after this step, once the callbacks before it have seen the step."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Killed


def collate(rows):
    """A batch padded on the right, independent of `neurondrift.models.batches`."""
    length = max(len(row["input_ids"]) for row in rows)
    pad = lambda values, fill: values + [fill] * (length - len(values))  # noqa: E731
    return {
        "input_ids": torch.tensor([pad(row["input_ids"], 0) for row in rows]),
        "labels": torch.tensor([pad(row["labels"], -100) for row in rows]),
        "attention_mask": torch.tensor([pad([1] * len(row["input_ids"]), 0) for row in rows]),
    }


def trainer(model, folder, *callbacks, steps=6, save=2, accumulation=1, **settings):
    """transformers' Trainer on twelve examples, two at a time."""
    given = {
        "max_steps": steps,
        "save_steps": save,
        "gradient_accumulation_steps": accumulation,
        "per_device_train_batch_size": 2,
        "learning_rate": 0.01,
        "seed": 3,
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
    }
    return Trainer(
        model=model,
        args=TrainingArguments(str(folder), **given | settings),
        train_dataset=examples(12),
        data_collator=collate,
        callbacks=list(callbacks),
    )


def sft_trainer(model, tokenizer, folder, rows, *callbacks, **settings):
    """TRL's SFTTrainer, which makes a LoRA on two kinds of site itself; skips the test where there is no TRL."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    given = {"report_to": [], "use_cpu": True, "bf16": False, "save_strategy": "no", "disable_tqdm": True}
    return trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(str(folder), **given | settings),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=2, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM"),
        callbacks=list(callbacks),
    )
