"""Small pieces of work side by side: in order, without gradients, and the threads as they were afterwards."""

import threading

import pytest
import torch

from neurondrift.threads import SMALL, side_by_side


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_small_work_is_done_by_two_threads_of_one_each(two_threads):
    both = threading.Barrier(2, timeout=10)  # passes only where two are at work at once

    def work(item):
        both.wait()
        return item, torch.get_num_threads(), torch.is_grad_enabled()

    assert side_by_side(work, range(6), elements=[10], at_once=True) == [(item, 1, False) for item in range(6)]
    assert torch.get_num_threads() == 2 and torch.is_grad_enabled()


@pytest.mark.parametrize(("elements", "at_once", "threads"), [(10, False, 1), (SMALL, True, 2), (SMALL, False, 2)])
def test_other_work_is_done_one_after_the_other(two_threads, elements, at_once, threads):
    caller = threading.get_ident()
    found = side_by_side(
        lambda item: (item, torch.get_num_threads(), threading.get_ident()),
        [1, 2],
        elements=[elements],
        at_once=at_once,
    )
    assert found == [(1, threads, caller), (2, threads, caller)]


@pytest.mark.parametrize("at_once", [True, False])
def test_an_error_comes_through_and_the_threads_are_as_before(two_threads, at_once):
    with pytest.raises(ZeroDivisionError):
        side_by_side(lambda item: 1 // item, [1, 0, 2], elements=[1], at_once=at_once)
    assert torch.get_num_threads() == 2
