"""Tables in documents stand between the markers of the command that makes them (`benchmarks/document.py`)."""

import re
import sys

import pytest

from helpers.paths import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "benchmarks"))
from document import markers, write_between

DOCUMENTS = [*(REPOSITORY / "docs").rglob("*.md"), REPOSITORY / "benchmarks" / "README.md", REPOSITORY / "README.md"]


def test_a_table_is_replaced_between_its_markers_alone(tmp_path):
    file = tmp_path / "x.md"
    begin, end = markers("some.py")
    file.write_text(f"before\n\n{begin}\n\nold\n\n{end}\n\nafter\n")
    for table in ("| new |", "| newer |"):
        write_between(file, "some.py", [table])
        assert file.read_text() == f"before\n\n{begin}\n\n{table}\n\n{end}\n\nafter\n"
    file.write_text("no markers")
    with pytest.raises(SystemExit, match="lacks the markers"):
        write_between(file, "some.py", ["x"])


def test_every_place_for_a_table_belongs_to_a_script():
    """Each marker stands once and has its end; and what writes into a document says where to."""
    found = set()
    for document in DOCUMENTS:
        text = document.read_text()
        for script in re.findall(r"<!-- made by benchmarks/(\S+) -->", text):
            assert (REPOSITORY / "benchmarks" / script).exists(), (document, script)
            assert all(text.count(marker) == 1 for marker in markers(script)), (document, script)
            found.add(script)
    assert {"optimiser.py", "calibration.py"} <= found
