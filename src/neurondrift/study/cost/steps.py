"""How many steps a fine-tuning takes, and which of them are looked at."""

from __future__ import annotations

from neurondrift.study.settings import FinetuneSection


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
