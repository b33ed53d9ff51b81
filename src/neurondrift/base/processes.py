"""The process that runs: which of a launch it is, how such join and share work, its memory, and the cores left to it.

Several processes are started by torchrun or `accelerate launch`. What is about memory has no effect where the C library
is not glibc.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import hashlib
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import psutil

from neurondrift.base.errors import ResourceError

if TYPE_CHECKING:
    import torch

#: Seconds for which it is looked at what other processes do.
LOOK = 0.2


#: What a launcher tells each process it starts; transformers and accelerate read it too.
LAUNCH = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")
#: Work of one process for which others wait may take days.
PATIENCE = timedelta(days=14)

Items = TypeVar("Items")
Result = TypeVar("Result")


@dataclass(kw_only=True)
class _State:
    """Of this process: what the launcher told it, while it works alone; whether `joined_processes` holds; and whether
    it shares work with the others."""

    launched: dict[str, str] | None = None
    in_step: bool = False
    shares: bool = False


_STATE = _State()


def _told(name: str, default: str) -> str:
    given = os.environ if _STATE.launched is None else _STATE.launched
    return given.get(name, default)


def process_count() -> int:
    """How many processes were launched together; 1 without a launcher, and for one that works alone."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first_process() -> bool:
    """Whether this process is the one that writes files and speaks."""
    return int(_told("RANK", "0")) == 0


def local_rank() -> int | None:
    """This process's number on its machine, which is also its accelerator's; None where it is the only one."""
    return int(_told("LOCAL_RANK", "0")) if int(_told("WORLD_SIZE", "1")) > 1 else None


class Joined(NamedTuple):
    """The processes that work together: this one's number, and how many there are; 0 of 1 where it works alone."""

    number: int
    total: int


def joined() -> Joined:
    """The processes that `torch.distributed` has joined, also where a script of the user's did."""
    torch = sys.modules.get("torch")
    if torch is None or _STATE.launched is not None or not torch.distributed.is_initialized():
        return Joined(0, 1)
    return Joined(torch.distributed.get_rank(), torch.distributed.get_world_size())


@contextlib.contextmanager
def joined_processes() -> Iterator[None]:
    """Within the block the launched processes do the same things in the same order; nothing happens where there is one.

    They stay joined until they end: one store takes no second group. A group that is there already is used.
    """
    if process_count() == 1 or _STATE.in_step:
        yield
        return
    import torch
    import torch.distributed as dist

    if torch.cuda.is_available() and (number := local_rank() or 0) < torch.cuda.device_count():
        torch.cuda.set_device(number)
    if not dist.is_initialized():
        with lost_as_error():
            dist.init_process_group(timeout=PATIENCE)  # gloo for tensors in main memory, nccl for those on GPUs
        atexit.register(dist.destroy_process_group)
    _STATE.in_step = True
    try:
        yield
        from_all(None)  # none leaves while another still talks to it
    finally:
        _STATE.in_step = False


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Within the block this process works as if it were the only one, transformers and accelerate too; what it writes
    and says is still that of one of several."""
    if _STATE.launched is not None or process_count() == 1:
        yield
        return
    _STATE.launched = {name: os.environ.pop(name) for name in LAUNCH if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(_STATE.launched)
        _STATE.launched = None


def in_step() -> Joined:
    """The processes that do one thing after the other together, within `joined_processes`."""
    return joined() if _STATE.in_step else Joined(0, 1)


@contextlib.contextmanager
def sharing_work() -> Iterator[None]:
    """Within the block `in_shares` cuts work between the joined processes, all of which must come to it."""
    before, _STATE.shares = _STATE.shares, True
    try:
        yield
    finally:
        _STATE.shares = before


def sharers() -> Joined:
    """The processes among which `in_shares` cuts: this one only, outside of `sharing_work`."""
    return in_step() if _STATE.shares else Joined(0, 1)


def add_up(tensors: Iterable[torch.Tensor]) -> None:
    """Each tensor becomes the sum over the sharers, which must have the same ones in the same order."""
    if sharers().total == 1:
        return
    import torch.distributed as dist

    with lost_as_error():
        for tensor in tensors:
            dist.all_reduce(tensor)


def in_shares(items: Sequence[Items], do: Callable[[Sequence[Items]], Sequence[Result]]) -> list[Result]:
    """What `do` makes of items, one result each, in the order of the items and in all processes.

    Every process does each so manieth item and tells the others its results, which must be what JSON knows. Outside of
    `sharing_work` one process does all. A mistake in one ends all.
    """
    number, count = sharers()
    if count == 1:
        return list(do(items))
    own: Sequence[Result] | None = None
    error: Exception | None = None
    with alone():
        try:
            share = items[number::count]
            own = do(share) if share else []
        except Exception as raised:
            error = raised
    told = from_all(None if error is not None else list(own or ()))
    if error is not None:
        raise error
    if any(part is None for part in told):
        raise StoppedElsewhere
    found: list[Any] = [None] * len(items)
    for at, part in enumerate(told):
        found[at::count] = part
    return found


class StoppedElsewhere(SystemExit):
    """Another process has met a mistake, and says so."""

    def __init__(self) -> None:
        super().__init__(2)


def from_all(value: Any) -> list[Any]:
    """What each of the joined processes has to say, in their order: anything that JSON knows, numbers to the bit."""
    number, count = joined()
    if count == 1:
        return [value]
    import torch
    import torch.distributed as dist

    own = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    with lost_as_error():
        lengths = torch.zeros(count, dtype=torch.int64)
        lengths[number] = len(own)
        dist.all_reduce(lengths)
        room = torch.zeros((count, int(lengths.max())), dtype=torch.uint8)
        room[number, : len(own)] = own
        dist.all_reduce(room)  # all else is zero
    return [json.loads(bytes(row[:length].numpy())) for row, length in zip(room, lengths.tolist(), strict=True)]


def from_first(make: Callable[[], Result]) -> Result:
    """What the first process makes, by itself while the others wait; told to all, so it must be what JSON knows.

    A mistake that it meets ends all.
    """
    if in_step().total == 1:
        return make()
    made: Result | None = None
    error: Exception | None = None
    if is_first_process():
        with alone():
            try:
                made = make()
            except Exception as raised:
                error = raised
    told = from_all({"made": made, "failed": error is not None})[0]
    if error is not None:
        raise error
    if told["failed"]:
        raise StoppedElsewhere
    result: Result = told["made"]
    return result


@contextlib.contextmanager
def lost_as_error(among: int | None = None) -> Iterator[None]:
    """What the network says of a process that is gone, in words. `among`: of how many that work together, where other
    things may fail too."""
    try:
        yield
    except RuntimeError as error:
        if among is not None and (among == 1 or not _is_of_network(error)):
            raise
        raise ResourceError(
            "Another process of this launch has ended or cannot be reached",
            received=str(error).splitlines()[0][:200],
            fix="see what it said, then run the command again, in any number of processes: it goes on from here",
        ) from error


def _is_of_network(error: RuntimeError) -> bool:
    return "Dist" in type(error).__name__ or any(word in str(error) for word in ("gloo/", "NCCL", "closed by peer"))


def says(message: str) -> bool:
    """Whether this process is to say what may be a mistake in all of a launch: the first that comes to it."""
    if int(_told("WORLD_SIZE", "1")) == 1 or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return is_first_process()
    import torch.distributed

    name = f"{os.environ.get('TORCHELASTIC_RESTART_COUNT', '')} {hashlib.sha256(message.encode()).hexdigest()}"
    try:
        at = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = torch.distributed.TCPStore(*at, is_master=False, timeout=timedelta(seconds=5))  # type: ignore[attr-defined]
        return bool(store.add(f"neurondrift says {name}", 1) == 1)
    except (RuntimeError, KeyError, ValueError):  # the launcher has gone
        return True


TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD = -1, -2, -3  # of glibc's malloc.h


def tune_allocator() -> None:
    """Let glibc keep freed memory instead of giving it back and faulting it in again: 1.1 to 2 times faster on a CPU.

    Left alone where the environment already says something (`MALLOC_...`).
    """
    _mallopt(MMAP_THRESHOLD, 32 << 20)  # its maximum
    _mallopt(TRIM_THRESHOLD, 2**31 - 1)
    _mallopt(TOP_PAD, 64 << 20)


def leave_no_gaps() -> None:
    """Let glibc map each larger block by itself, so that what is freed goes back: where memory counts more than time.

    Left alone where the environment already says something (`MALLOC_...`).
    """
    _mallopt(MMAP_THRESHOLD, 1 << 20)


def _mallopt(option: int, value: int) -> None:
    if platform.libc_ver()[0] == "glibc" and not any(name.startswith("MALLOC_") for name in os.environ):
        ctypes.CDLL(None).mallopt(option, value)


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
