"""Several processes of one command, started by torchrun or `accelerate launch`: who they are, and how they join."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator


def process_count() -> int:
    """How many processes were launched together; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first_process() -> bool:
    """Whether this process is the one that writes files and speaks."""
    return int(os.environ.get("RANK", "0")) == 0


def local_rank() -> int:
    """This process's number on its machine, which is also its accelerator's."""
    return int(os.environ.get("LOCAL_RANK", "0"))


@contextlib.contextmanager
def joined_processes() -> Iterator[None]:
    """Within the block the launched processes can sum tensors; nothing happens where there is one.

    A group that is there already is used and left as it is.
    """
    import torch.distributed as dist

    if process_count() == 1 or dist.is_initialized():
        yield
        return
    dist.init_process_group()  # gloo for tensors in main memory, nccl for those on GPUs
    try:
        yield
        dist.barrier()
    finally:
        dist.destroy_process_group()
