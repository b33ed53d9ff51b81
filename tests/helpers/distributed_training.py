"""Run under torchrun by study/test_processes.py, and called by it in one process: fine-tunes the tiny models.

Not a test itself. In FOLDER/NAME of each case: the last adapter (or model) and its drift, as the study keeps them.
"""

import faulthandler
import sys
from pathlib import Path

import torch

from helpers.families import build, examples, save
from helpers.groups import group_of
from helpers.training import KillAt, Killed
from neurondrift.base.processes import from_first, is_first_process, joined_processes
from neurondrift.drift.callback import DriftCallback
from neurondrift.models.disk.initial import CheckpointWeights
from neurondrift.models.sites import Sites
from neurondrift.study.settings import FinetuneSection
from neurondrift.study.training import finetune

#: Name -> family, settings, granularity of a group that is frozen. Seven examples: the last batch of an epoch has three
#: rows, and with accumulation one, so that a process has none.
CASES = {
    "llama": ("llama", {}, None),
    "qwen3": ("qwen3", {"gradient_accumulation": 2}, None),
    "gemma2": ("gemma2", {"batch_size": 3, "weight_decay": 0.1}, None),
    # By sgd: an expert that is not chosen has a gradient of nothing but rounding, of which Adam makes whole steps.
    "experts": ("mixtral", {"optimiser": "sgd", "learning_rate": 0.5}, None),
    "full": ("llama", {"method": "full", "learning_rate": 1e-3}, None),
    "frozen": ("llama", {}, "neuron"),
    "frozen-weights": ("qwen3", {}, "weight"),
    "frozen-full": ("phi3", {"method": "full", "learning_rate": 1e-3, "weight_decay": 0.1}, "neuron"),
}
SMALL = {"batch_size": 4, "epochs": 2, "lora_r": 2, "lora_alpha": 8, "learning_rate": 0.01, "drift_interval": 2}


def train(name: str, folder: Path, kill_at: int | None = None, *, strategy: str = "ddp") -> None:
    family, settings, frozen = CASES[name]
    section = FinetuneSection(**SMALL | settings, checkpoint_interval=1)
    model, where = build(family), folder / name
    initial = None
    if section.method == "full":
        base = from_first(lambda: str(save(model, folder / f"{name}.base")))
        initial = CheckpointWeights(base, Sites(model))
    drift = DriftCallback(where / "drift", every=2, initial=initial)
    group = None if frozen is None else group_of(model, frozen)
    finetune(
        model,
        None,
        examples(7),
        section,
        seed=3,
        folder=where,
        save_at=[2, 4],
        callbacks=[drift, *([] if kill_at is None else [KillAt(kill_at)])],
        freeze=group,
        beside=[where / "drift"],
        shard_on=torch.device("cpu") if strategy == "fsdp2" else None,
    )


def main(folder: Path, names: list[str], kill_at: int | None = None, *, strategy: str = "ddp") -> None:
    torch.set_num_threads(1)
    with joined_processes():
        for name in names:
            try:
                train(name, folder, kill_at, strategy=strategy)
            except Killed:
                assert kill_at is not None
            if is_first_process():
                print(name, flush=True)


if __name__ == "__main__":
    faulthandler.dump_traceback_later(45)
    main(Path(sys.argv[1]), sys.argv[4:] or list(CASES), int(sys.argv[2]) or None, strategy=sys.argv[3])
