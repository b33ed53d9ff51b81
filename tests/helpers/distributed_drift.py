"""Run under torchrun by drift/test_processes.py: two processes train, one writes. Not a test itself.

First a Trainer over two processes (FOLDER/ddp), then FSDP2 with parameters cut in two, in a plain loop that calls the
callback through transformers' handler (FOLDER/fsdp).
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback

from helpers.adapters import lora
from helpers.families import examples
from helpers.groups import group_of
from helpers.training import trainer
from neurondrift.drift.callback import DriftCallback
from neurondrift.models.sites import linear_sites

torch.set_num_threads(1)


def ddp(folder: Path) -> None:
    model = lora()
    callback = DriftCallback(folder / "drift", every=2, groups={"weights": group_of(model, "weight")})
    run = trainer(model, folder / "t", callback, steps=4, save=4)
    run.train()
    rank = dist.get_rank()
    logged = sum("drift/weights/mean_abs" in entry for entry in run.state.log_history)
    (folder / f"logged.{rank}").write_text(f"{run.args.world_size} {logged} {len(callback.history)}")


def fsdp(folder: Path) -> None:
    from torch.distributed.fsdp import fully_shard

    rank, model = dist.get_rank(), lora()
    callback = DriftCallback(folder / "drift", every=1, groups={"weights": group_of(model, "weight")})
    for block in model.base_model.model.model.layers:
        fully_shard(block)
    fully_shard(model)
    cut = linear_sites(model)["model.layers.0.mlp.up_proj"].tensor
    assert cut.to_local().shape[0] == cut.shape[0] // 2  # this process holds one half
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    handler = CallbackHandler([DefaultFlowCallback, callback], model, None, optimizer, None)
    arguments = TrainingArguments(str(folder / "t"), use_cpu=True, report_to=[], max_steps=3)
    state, control = TrainerState(is_world_process_zero=rank == 0, max_steps=3, logging_steps=500), TrainerControl()
    handler.on_train_begin(arguments, state, control)
    for row in examples(3):
        ids = torch.tensor([row["input_ids"]])
        model(input_ids=ids, labels=torch.tensor([row["labels"]])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        state.global_step += 1
        handler.on_step_end(arguments, state, control)
    handler.on_train_end(arguments, state, control)
    whole = {name: value.full_tensor() for name, value in model.state_dict().items() if "lora" in name}
    if rank == 0:
        save_file({name: value.contiguous() for name, value in whole.items()}, folder / "adapter.safetensors")
    (folder / f"logged.{rank}").write_text(f"{dist.get_world_size()} {len(state.log_history)} {len(callback.history)}")


if __name__ == "__main__":
    target = Path(sys.argv[1])
    for name, run in (("ddp", ddp), ("fsdp", fsdp)):
        (target / name).mkdir(exist_ok=True)
        run(target / name)
    dist.barrier()  # neither leaves while the other still talks to it
    dist.destroy_process_group()
