"""How torch's threads are shared out among many small pieces of work."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")

# Elements of a matrix below which two threads within an operation wait for each other longer than they compute.
SMALL = 1 << 22


def side_by_side(
    function: Callable[[Item], Result], items: Sequence[Item], *, elements: Iterable[int], at_once: bool
) -> list[Result]:
    """`function` of each item, in order, without gradients.

    Where every matrix (given by its number of elements) is small, an operation has one thread, and with `at_once` as
    many items are worked on at a time as torch has threads. Else one item after the other, with all threads.
    """

    def call(item: Item) -> Result:
        with torch.no_grad():  # is a setting of each thread
            return function(item)

    threads = torch.get_num_threads()
    if max(elements, default=0) >= SMALL:
        return [call(item) for item in items]
    torch.set_num_threads(1)
    try:
        if not at_once or threads == 1:
            return [call(item) for item in items]
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(call, items))
    finally:
        torch.set_num_threads(threads)
