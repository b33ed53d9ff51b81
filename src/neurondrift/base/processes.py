"""The process that runs: which of a launch it is, how such join, its memory, and the cores that others leave it.

Several processes are started by torchrun or `accelerate launch`. What is about memory has no effect where the C library
is not glibc.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import platform
import time
from collections.abc import Callable, Iterator

import psutil

#: Seconds for which it is looked at what other processes do.
LOOK = 0.2


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


def tune_allocator() -> None:
    """Let glibc keep freed memory instead of giving it back and faulting it in again: 1.1 to 2 times faster on a CPU.

    Left alone where the environment already says something (`MALLOC_...`).
    """
    if platform.libc_ver()[0] == "glibc" and not any(name.startswith("MALLOC_") for name in os.environ):
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD, its maximum
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        libc.mallopt(-2, 64 << 20)  # M_TOP_PAD


def cores_taken(seconds: float = LOOK) -> float:
    """How many of the cores that this process may use others keep busy, in a moment in which this one does nothing.

    What runs at a lower priority is not counted: it gives way.
    """
    began, before = time.perf_counter(), _busy()
    time.sleep(seconds)
    return max(0.0, (_busy() - before) / (time.perf_counter() - began))


def _busy() -> float:
    """Seconds that the cores have worked, or were lent to another machine."""
    each = psutil.cpu_times(percpu=True)
    return sum(_worked(each[core]) for core in _cores() if core < len(each))


def _worked(times: object) -> float:
    return float(sum(getattr(times, name, 0.0) for name in ("user", "system", "irq", "softirq", "steal")))


def _cores() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(psutil.cpu_count() or 1))


@contextlib.contextmanager
def leaving_busy_cores(say: Callable[[str], None] = lambda line: None) -> Iterator[None]:
    """Within the block torch has a thread for each core that other processes leave free, at least one.

    Threads that share a core with another process keep all the others waiting at every step. What was chosen is said
    where it is fewer than usual. `OMP_NUM_THREADS` in the environment is a choice of the user's, and stands.
    """
    import torch

    usual = torch.get_num_threads()
    if usual == 1 or "OMP_NUM_THREADS" in os.environ:
        yield
        return
    taken, cores = cores_taken(), len(_cores())
    left = max(1, min(usual, cores - int(taken + 0.5)))
    if left < usual:
        say(f"{left} of {usual} threads, as other processes keep {taken:.1f} of {cores} cores busy")
    torch.set_num_threads(left)
    try:
        yield
    finally:
        torch.set_num_threads(usual)


def release_memory() -> None:
    """Collect garbage and hand freed memory back to the system, between two large pieces of work."""
    gc.collect()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
