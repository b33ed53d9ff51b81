"""Inputs that nobody means: each is read or refused with a message, never a traceback.

`benchmarks/faults.py tries` does 2,000 of each.
"""

import pytest

from helpers.mutations import KINDS, expect_no_fault


@pytest.mark.parametrize("kind", KINDS)
def test_no_traceback(kind, reference, tmp_path):
    expect_no_fault(kind, tmp_path, reference[0], 60)
