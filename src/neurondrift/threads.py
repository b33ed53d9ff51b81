"""How many of torch's threads a row of small operations is given."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch

# Elements of a matrix below which two threads wait for each other longer than they compute.
SMALL = 1 << 22


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
