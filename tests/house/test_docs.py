"""docs/cli.md is what --help says."""

import subprocess
import sys

from helpers.paths import REPOSITORY


def test_cli_reference_is_up_to_date():
    done = subprocess.run(
        [sys.executable, REPOSITORY / "docs" / "make_cli_reference.py", "--print"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == (REPOSITORY / "docs" / "cli.md").read_text(), "run: python docs/make_cli_reference.py"
