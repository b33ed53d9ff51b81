"""The README is short, and its figures (and those of the studies' pages) are those of the results that are committed."""

import json
import re
import sys

import pytest

from helpers.paths import REPOSITORY
from neurondrift.study.settings import resolve

sys.path.insert(0, str(REPOSITORY / "docs"))
import make_example
import make_sweep

README = REPOSITORY / "README.md"
DOCUMENTS = make_example.documents()


def test_it_is_read_in_five_minutes():
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 110
    prose = re.sub(r"```.*?```", "", text, flags=re.S)
    lines = [line for line in prose.splitlines() if not line.startswith("|")]
    long = [line[:60] for line in lines if len(re.sub(r"\]\([^)]*\)", "]", line)) > 500]
    assert not long


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_what_it_says_of_a_study_is_in_the_committed_results(document):
    """Made again from docs/example and docs/studies, nothing differs: python docs/make_example.py."""
    assert document.read_text(encoding="utf-8") == DOCUMENTS[document]


def test_the_figures_that_it_shows_are_there():
    for document in DOCUMENTS:
        shown = re.findall(r"!\[[^]]*\]\(([^)]+)\)", document.read_text(encoding="utf-8"))
        assert shown and all((document.parent / figure).exists() for figure in shown)


def test_the_page_of_the_sweep_is_of_its_committed_results():
    """Made again from docs/example/sweep, nothing differs: python docs/make_sweep.py."""
    found = json.loads((make_sweep.SWEEP / "sweep_results.json").read_text())
    assert (make_sweep.SWEEP / "README.md").read_text(encoding="utf-8") == make_sweep.page(found)
    assert len(found["studies"]) == 6 and all(study["state"] == "done" for study in found["studies"])


@pytest.mark.parametrize(
    "file", sorted(REPOSITORY.glob("docs/studies/*/config.toml")), ids=lambda file: file.parent.name
)
def test_the_configuration_of_a_committed_study_is_one(file):
    study = resolve(file=file)
    assert study.name == file.parent.name in make_example.STUDIES
