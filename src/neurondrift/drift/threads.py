"""How many of torch's threads a row of small operations is given, and work on several sites at once."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")

# Elements of a matrix below which two threads wait for each other longer than they compute.
SMALL = 1 << 22
# Items that are prepared before the threads go on.
AHEAD = 64
# Threads that read memory at the same time; more than these add little.
MOST = 4


@contextlib.contextmanager
def threads_for(elements: Iterable[int]) -> Iterator[None]:
    """One thread within the block where every matrix (given by its number of elements) is small; else as it was."""
    before = torch.get_num_threads()
    if max(elements, default=0) >= SMALL:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def at_once() -> int:
    """How many sites are worked on at once: as many as torch has threads, at most `MOST`."""
    return min(torch.get_num_threads(), MOST)


def side_by_side(
    work: Callable[[Item], Result], items: Iterable[Item], *, threads: int, ahead: int = AHEAD
) -> Iterator[Result]:
    """`work` on every item, each by one of so many threads, without gradients: the results, in order.

    The caller's thread reads `ahead` items before the threads go on, so that neither waits for the interpreter's lock.
    """

    def all_of(part: list[Item]) -> list[Result]:
        with torch.no_grad():
            return [work(item) for item in part]

    rest = iter(items)
    if threads == 1:
        while part := list(itertools.islice(rest, 1)):
            yield from all_of(part)
        return
    within = torch.get_num_threads()
    # The number of threads within an operation is set for a thread, but MKL's for all: it is put back afterwards.
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            while batch := list(itertools.islice(rest, ahead)):
                results = [*map(iter, pool.map(all_of, [batch[start::threads] for start in range(threads)]))]
                yield from (next(results[index % threads]) for index in range(len(batch)))
    finally:
        torch.set_num_threads(within)
