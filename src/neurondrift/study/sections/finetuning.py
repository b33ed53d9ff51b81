"""The table `[finetune]`: how the model is fine-tuned; how many steps that takes, and which of them are looked at."""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator

from neurondrift.base.roles import group_names
from neurondrift.models.data import DataReference
from neurondrift.study.sections.section import Count, Positive, Section


class FinetuneSection(Section):
    data: DataReference = DataReference(source="builtin:ordinary")
    method: Literal["lora", "full"] = "lora"
    lora_r: Count = 8
    lora_alpha: Positive = 16
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: list[str] | Literal["all-linear"] = "all-linear"
    epochs: Positive = 1
    max_steps: int = Field(-1, description="stop after this many steps; -1: after the epochs")
    batch_size: Count = 4
    gradient_accumulation: Count = 1
    optimiser: Literal["adamw", "sgd"] = "adamw"
    momentum: Annotated[float, Field(ge=0, lt=1)] = Field(0.9, description="of sgd")
    learning_rate: Positive = 1e-4
    scheduler: Literal["linear", "cosine", "constant"] = "linear"
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_length: Annotated[int, Field(ge=8)] = 512
    drift_interval: Count = Field(100, description="DRIFT_LOG_INTERVAL: steps between drift snapshots")
    evaluated_steps: Annotated[int, Field(ge=2)] = Field(4, description="snapshots at which behaviour is measured")
    checkpoint_interval: Count | None = Field(
        None, description="steps between resumable checkpoints; default: drift_interval"
    )
    freeze_granularity: Literal["neuron", "weight", "unit"] = Field(
        "neuron", description="which of the study's groups of that name; a file has its own"
    )
    freeze: str | None = Field(
        None,
        description="hold a group still while training: a group of the study, matched:NAME for its control, or a file",
    )

    report_to: list[Literal["tensorboard", "wandb", "trackio"]] = Field(
        [], description="trackers that follow the training, as the Trainer does; needs their packages"
    )

    @field_validator("freeze")
    @classmethod
    def _freeze(cls, value: str | None, others: ValidationInfo) -> str | None:
        if value is None or value.endswith((".parquet", ".json")):
            return value
        names = group_names(others.data.get("freeze_granularity", "neuron"))
        if value.removeprefix("matched:") not in names:
            raise ValueError(f"must be {', '.join(names)}, matched: and one of these, or a .parquet or .json file")
        return value

    def unsaid(self) -> Collection[str]:
        plain = ["optimiser", "momentum"] if self.optimiser == "adamw" else []
        return plain if self.report_to else [*plain, "report_to"]

    @field_validator("max_steps")
    @classmethod
    def _steps(cls, value: int) -> int:
        if value != -1 and value < 1:
            raise ValueError("must be -1 (all epochs) or at least 1")
        return value


def total_steps(examples: int, settings: FinetuneSection) -> int:
    """Optimizer steps that the Trainer will take."""
    if settings.max_steps > 0:
        return settings.max_steps
    batches = -(-examples // settings.batch_size)
    per_epoch = -(-batches // settings.gradient_accumulation)
    return max(1, int(-(-per_epoch * settings.epochs // 1)))


def snapshot_steps(total: int, interval: int) -> list[int]:
    """Steps with a drift snapshot: 0, every `interval`, and the last."""
    return sorted({*range(0, total + 1, interval), total})


def evaluated_steps(total: int, interval: int, count: int) -> list[int]:
    """About `count` of the snapshots' steps, evenly spread, always with 0 and the last."""
    snapshots = snapshot_steps(total, interval)
    if len(snapshots) <= count:
        return snapshots
    targets = [total * i / (count - 1) for i in range(count)]
    return sorted({min(snapshots, key=lambda step: (abs(step - target), step)) for target in targets})
