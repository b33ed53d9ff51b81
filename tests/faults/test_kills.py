"""Killed at any moment: nothing is lost, and the results are those of a study that was never killed.

`benchmarks/faults.py kills` does it many more times.
"""

import random

from helpers.faults import attempt, differences, killed_study
from neurondrift.drift.log import DriftLog


def test_a_study_that_is_killed_again_and_again_ends_as_if_it_never_was(reference, tmp_path):
    folder, seconds = reference
    kills, problems = killed_study(folder, tmp_path, random.Random(1), seconds)
    assert kills > 0
    assert problems == []


def test_a_model_on_its_own_and_a_difference_are_killed(reference, tmp_path):
    folder, _ = reference
    tuned = folder / "finetuned_models" / "lora" / "step=000006"
    base = folder / "finetuned_models" / "aligned"
    commands = {
        "evaluate": ("evaluate", "tiny:llama", "--limit", 2, "--max-new-tokens", 4),
        "diff": ("diff", base, tuned),
    }
    for name, command in commands.items():
        made = {}
        for way in ("straight", "killed"):
            made[way] = tmp_path / name / way
            if way == "killed":
                attempt([*command, "--output-dir", made[way]], tmp_path / "told", kill_after=0.3)
            done = attempt([*command, "--output-dir", made[way]], tmp_path / "told")
            assert done.code == 0, done.err
        assert differences(made["straight"], made["killed"]) == []
    assert DriftLog(made["killed"]).steps() == [6]
