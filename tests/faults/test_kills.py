"""Killed at any moment: nothing is lost, and the results are those of a study that was never killed.

`benchmarks/faults.py kills` does it many more times; kills at a certain write are in `test_writes.py`.
"""

import random

from helpers.faults import FROM_NOTHING, killed_job


def test_a_study_that_is_killed_again_and_again_ends_as_if_it_never_was(reference, tmp_path):
    """Every command, in evaluation, interventions, subspaces, stability and `diff` too."""
    folder, seconds = reference
    kills, problems = killed_job(FROM_NOTHING, folder, tmp_path, random.Random(1), dict(seconds), most=3)
    assert kills > 0
    assert problems == []
