"""Killed at any moment: nothing is lost, and the results are those of what was never killed.

`benchmarks/faults.py kills` does it many more times; kills at a certain write are in `test_writes.py`.
"""

import random
import signal

from helpers.faults import FROM_NOTHING, KILLED, killed_job, partial_files
from helpers.own_training import train
from neurondrift.drift.log import DriftLog


def test_a_study_that_is_killed_again_and_again_ends_as_if_it_never_was(reference, tmp_path):
    """Every command, in evaluation, interventions, subspaces, stability and `diff` too."""
    folder, seconds = reference
    kills, problems = killed_job(FROM_NOTHING, folder, tmp_path, random.Random(1), dict(seconds), most=3)
    assert kills > 0
    assert problems == []


def test_the_log_of_a_script_of_the_users_own_is_that_of_one_that_was_never_killed(tmp_path):
    """`DriftCallback` sweeps up what a killed run has left when it opens the log again."""
    straight = tmp_path / "straight"
    assert train(straight) == 0
    writes = int((straight / "writes").read_text())
    log, left = DriftLog(straight / "drift"), 0
    assert log.steps() == [0, 2, 4, 6] and writes > 12
    for after in (writes // 4 + 1, writes - 8):  # within the snapshots of step 0 and of step 4
        folder = tmp_path / f"killed{after}"
        assert train(folder, after=after, number=KILLED) == -signal.SIGKILL
        left += len(partial_files(folder / "drift"))
        assert train(folder) == 0
        resumed = DriftLog(folder / "drift")
        assert resumed.table().equals(log.table()) and resumed.weights_table().equals(log.weights_table())
        files = [sorted(path.relative_to(one) for path in one.rglob("*")) for one in (log.directory, resumed.directory)]
        assert files[0] == files[1]
        assert all(
            (log.directory / f).read_bytes() == (resumed.directory / f).read_bytes() for f in files[0] if f.suffix
        )
    assert left > 0
