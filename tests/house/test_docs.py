"""docs/cli.md is what --help says; the documents name no file that is not there."""

import re
import subprocess
import sys

import pytest

from helpers.paths import REPOSITORY


def test_cli_reference_is_up_to_date():
    done = subprocess.run(
        [sys.executable, REPOSITORY / "docs" / "make_cli_reference.py", "--print"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == (REPOSITORY / "docs" / "cli.md").read_text(), "run: python docs/make_cli_reference.py"


@pytest.mark.parametrize(
    "document", sorted([*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").glob("*.md")]), ids=lambda p: p.name
)
def test_links_lead_somewhere(document):
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", document.read_text()):
        if not target.startswith(("http", "mailto")):
            assert (document.parent / target).exists(), target
