"""Run under torchrun by study/test_processes.py, and called by it in one process: fine-tunes the tiny models.

Not a test itself. In FOLDER/NAME of each case: adapters (or models) of some steps and the drift, as a study keeps them.
"""

import json
import sys
from pathlib import Path

import torch

from helpers.families import build, examples, save
from helpers.groups import group_of
from helpers.training import KillAt, Killed
from neurondrift.base.processes import (
    StoppedElsewhere,
    from_all,
    from_first,
    in_shares,
    is_first_process,
    joined,
    joined_processes,
    process_count,
    sharing_work,
)
from neurondrift.drift.callback import DriftCallback
from neurondrift.models.disk.initial import CheckpointWeights
from neurondrift.models.sites import Sites
from neurondrift.study.settings import FinetuneSection
from neurondrift.study.training import finetune

#: Name -> family, settings, granularity of a group that is frozen. Seven examples: the last batch of an epoch has three
#: rows or one, so that a process has none.
CASES = {
    "llama": ("llama", {}, None),
    "accumulated": ("qwen3", {"gradient_accumulation": 2}, None),
    "decayed": ("gemma2", {"batch_size": 3, "weight_decay": 0.1}, None),
    # By sgd: an expert that is not chosen has a gradient of nothing but rounding, of which Adam makes whole steps.
    "experts": ("mixtral", {"optimiser": "sgd", "learning_rate": 0.5}, None),
    "full": ("llama", {"method": "full", "learning_rate": 1e-3}, None),
    "frozen": ("llama", {}, "neuron"),
    "frozen-weights": ("qwen3", {}, "weight"),
    "frozen-full": ("phi3", {"method": "full", "learning_rate": 1e-3, "weight_decay": 0.1}, "neuron"),
}
CUT = ["llama", "accumulated", "decayed", "experts", "full"]
SMALL = {"batch_size": 4, "epochs": 2, "lora_r": 2, "lora_alpha": 8, "learning_rate": 0.01, "drift_interval": 2}
KILLED_AT = 2


def train(name, folder, strategy="ddp", *, kill=False):
    """One case, from nothing or from what a run that was killed has left."""
    family, settings, frozen = CASES[name]
    section = FinetuneSection(**SMALL | settings, checkpoint_interval=1)
    model, where = build(family), folder / name
    initial = None
    if section.method == "full":
        base = from_first(lambda: str(save(model, folder / f"{name}.base")))
        initial = CheckpointWeights(base, Sites(model))
    drift = DriftCallback(where / "drift", every=2, initial=initial)
    try:
        finetune(
            model,
            None,
            examples(7),
            section,
            seed=3,
            folder=where,
            save_at=[2, 4],
            callbacks=[drift, *([KillAt(KILLED_AT)] if kill else [])],
            freeze=None if frozen is None else group_of(model, frozen),
            beside=[where / "drift"],
            shard_on=torch.device("cpu") if strategy == "fsdp2" else None,
        )
    except Killed:
        assert kill


def share(folder):
    """What the processes tell each other, and what becomes of mistakes that one of them makes."""

    def shares(numbers):
        assert joined().total == process_count() == 1  # each by itself
        if numbers[0] is None:
            raise ValueError("mine")
        return [{"third": number / 3, "nothing": None, "text": "ü"} for number in numbers]

    def met(do):
        try:
            do()
        except (ValueError, StoppedElsewhere) as error:
            return type(error).__name__

    def fail():
        raise ValueError("first")

    with sharing_work():
        found = {
            "shares": in_shares(range(5), shares),
            "one item": in_shares([1], shares),
            "mistake": met(lambda: in_shares([1, None], shares)),
        }
    found |= {"first": from_first(lambda: joined().number), "failed": met(lambda: from_first(fail))}
    found["gathered"] = from_all(joined().number)
    found["alone"] = in_shares([1.5], lambda numbers: list(numbers))
    (folder / f"shares.{joined().number}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    torch.set_num_threads(1)
    target = Path(sys.argv[1])
    with joined_processes():
        share(target)
        for case in CASES:
            train(case, target / "ddp")
        for case in CUT:
            train(case, target / "fsdp2", "fsdp2")
        for case, way in (("llama", "ddp"), ("full", "fsdp2")):
            train(case, target / "killed-in-two", way, kill=True)
            train(case, target / "killed-in-one", way)
        if is_first_process():
            print("done", flush=True)
