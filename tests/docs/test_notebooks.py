"""The notebooks are those of the scripts beside them, and they run."""

import re

import pytest

from helpers.paths import REPOSITORY

jupytext = pytest.importorskip("jupytext")
nbclient = pytest.importorskip("nbclient")
EXAMPLES = REPOSITORY / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))


def executed(path, folder):
    """The notebook after all of its cells; what they printed, as one text; and how many pictures they drew."""
    notebook = jupytext.read(path)
    resources = {"metadata": {"path": str(folder)}}
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    data = [output.get("data", {}) for output in outputs]
    said = [output.get("text", "") for output in outputs] + [each.get("text/plain", "") for each in data]
    return "\n".join(said), sum("image/png" in each for each in data)


def test_there_are_two():
    assert [path.stem for path in NOTEBOOKS] == ["look_at_a_study", "your_model_in_a_trainer"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_is_its_script(path):
    notebook = jupytext.read(path)
    script = path.with_suffix(".py").read_text()
    assert jupytext.writes(notebook, fmt="py:percent") == script, f"run: jupytext --sync {path.with_suffix('.py')}"
    assert not any(cell.get("outputs") for cell in notebook.cells)


def test_a_study_is_looked_at(finished, tmp_path, monkeypatch):
    monkeypatch.setenv("STUDY", str(finished[0]))
    said, pictures = executed(EXAMPLES / "look_at_a_study.ipynb", tmp_path)
    assert pictures == 4
    assert "inconclusive" in said.lower() and "utility_set_difference" in said
    assert re.search(r"[+-]\d\.\d{3} nats in all, [+-]\d\.\d{3} by the 1 %", said)


def test_a_model_in_a_trainer(tmp_path, monkeypatch):
    monkeypatch.setenv("MODEL", "tiny:llama")
    said, pictures = executed(EXAMPLES / "your_model_in_a_trainer.ipynb", tmp_path)
    assert pictures == 2
    assert "drift/safety/relative" in said
    row = re.search(r"^20 +(\S+) +(\S+)$", said, re.M)
    assert 0 < float(row[1]) < 1 and 0 < float(row[2]) < 1
    mean = [float(value) for value in re.search(r"^mean +(.+)$", said, re.M)[1].split()]
    assert len(mean) == 4 and len(set(mean)) == 4  # before, after, group rewound, control rewound
