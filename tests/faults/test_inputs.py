"""Inputs that nobody means: each is read or refused with a message, never a traceback.

The generators are seeded random numbers of our own (`helpers/mutations.py`; hypothesis is not among the dependencies).
`benchmarks/faults.py tries` does 2,000 of each.
"""

import pytest

from helpers.mutations import KINDS, tries


@pytest.mark.parametrize("kind", KINDS)
def test_no_traceback(kind, reference, tmp_path):
    assert tries(kind, tmp_path, 50, 0, reference[0]) == []
