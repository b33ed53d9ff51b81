"""A user's own script: a Trainer with a `DriftCallback`, in a process that can be killed at one of its writes to the log."""

import os
from pathlib import Path

import torch
from transformers.trainer_utils import get_last_checkpoint

from helpers.adapters import lora
from helpers.faults import FORKS, Refusal, _Writes
from helpers.groups import group_of
from helpers.training import trainer
from neurondrift.drift.callback import DriftCallback


def _script(folder, refusal):
    """The child: train from the last checkpoint on, as scripts do, with a log in `drift`."""
    torch.set_num_threads(1)
    writes = _Writes(refusal)
    writes.watch()
    model = lora()
    callback = DriftCallback(folder / "drift", every=2, groups={"g": group_of(model, "weight")})
    checkpoints = folder / "trainer"
    last = get_last_checkpoint(str(checkpoints)) if checkpoints.is_dir() else None
    trainer(model, checkpoints, callback, steps=6, save=2).train(resume_from_checkpoint=last)
    Path(folder / "writes").write_text(str(writes.count))
    os._exit(0)


def train(folder, *, after=0, number=None):
    """Run the script; the exit code of its process. With `number` `KILLED` it is killed at the write to the log that
    follows the first `after`; how many there are is in the file `writes` of one that ends."""
    folder.mkdir(exist_ok=True)
    child = FORKS.Process(target=_script, args=(folder, Refusal(folder / "drift", after, number)))
    child.start()
    child.join()
    return child.exitcode
