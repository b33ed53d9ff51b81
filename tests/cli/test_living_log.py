"""A command whose output is no terminal: lines of what it is doing on standard error, results alone on standard output."""

import os
import re
import subprocess
import sys

SCRIPT = """
import sys
from neurondrift.base import progress
progress.FIRST, progress.BETWEEN = 0.05, 0.1
from neurondrift.cli.__main__ import main
main(sys.argv[1:])
"""


def test_a_study_to_a_pipe_says_how_far_it_is(tmp_path):
    command = [sys.executable, "-c", SCRIPT, "align", "--preset", "smoke", "--output-dir", str(tmp_path)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"FORCE_COLOR": "1", "OMP_NUM_THREADS": "1"},
    )  # busy cores would be said too
    assert re.fullmatch(r"align +\S+  4 steps on \d+ examples.*\n", done.stdout)
    said = [line for line in done.stderr.splitlines() if re.match(r"  (neurondrift align|align): ", line)]
    assert re.fullmatch(r"  (neurondrift )?align: [\d.]+s so far", said[0])  # before anything can be counted
    counted = [line for line in said if re.search(r"align: \d of 4,", line)]
    assert counted and any("each" in line or "/s" in line for line in counted)
    assert "\x1b" not in done.stderr


def test_an_evaluation_to_a_pipe_says_how_far_it_is(tmp_path):
    sizes = ["--limit", "3", "--max-new-tokens", "100", "--borderline", "none"]
    command = [sys.executable, "-c", SCRIPT, "evaluate", "tiny:llama", *sizes, "--output-dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert re.search(r"^  answers: \d of 6, .*so far", done.stderr, re.M)
    assert "so far" not in done.stdout
