"""The stage evaluate, killed on its way: what is finished stands, and what all seeds share is measured once."""

import shutil

import pyarrow.parquet as pq
import pytest

from helpers.faults import Killing, attempt
from helpers.studies import run, smoke
from neurondrift.behaviour import evaluate as behaviour
from neurondrift.study.folder import StudyFolder
from neurondrift.study.stages import evaluation

ANSWERS_OF_A_SET = 6


@pytest.fixture
def asked(monkeypatch):
    """How many answers the model is asked for at a time."""
    counts, answer = [], behaviour.answer

    def counting(model, tokenizer, requests, **how):
        counts.append(len(requests))
        return answer(model, tokenizer, requests, **how)

    monkeypatch.setattr(behaviour, "answer", counting)
    return counts


def bytes_of(folder):
    return {file.name: file.read_bytes() for file in (folder / "behaviour").iterdir()}


@pytest.mark.parametrize(
    ("after", "sets_left"),
    [
        (1, 12),  # the answers before the alignment are there, but not judged
        (4, 10),  # all of that point, and two sets of the next
        (18, 0),  # all but the files
    ],
)
def test_an_evaluation_that_is_killed_goes_on_where_it_was(copy, asked, tmp_path, after, sets_left):
    """One set before the alignment, three at each of four steps; each set, and each point, is a part."""
    study, expected = smoke(), bytes_of(copy)
    shutil.rmtree(copy / "behaviour")
    (copy / ".neurondrift" / "evaluate.seed=0.json").unlink()
    command = ("evaluate", "--config", copy / "study.toml", "--output-dir", copy)
    killed = attempt(command, tmp_path / "told", before=Killing(after))
    assert killed.code == -9, killed.err
    assert asked == []
    run(study, copy, stages=["evaluate"])
    assert sum(asked) == sets_left * ANSWERS_OF_A_SET
    assert bytes_of(copy) == expected
    assert not list((copy / ".neurondrift").glob("*.parts"))


def test_what_was_asked_otherwise_is_asked_again(copy, asked, tmp_path):
    (copy / ".neurondrift" / "evaluate.seed=0.json").unlink()
    command = ("evaluate", "--config", copy / "study.toml", "--output-dir", copy)
    assert attempt(command, tmp_path / "told", before=Killing(6)).code == -9
    run(smoke(**{"evaluate.system_prompt": "Be brief."}), copy, stages=["evaluate"])
    assert sum(asked) == 13 * ANSWERS_OF_A_SET


def test_what_all_seeds_share_is_measured_once(copy, monkeypatch):
    points, measured = [], evaluation._measured

    def watched(study, folder, seed, point, *rest):
        points.append((seed, point.step))
        return measured(study, folder, seed, point, *rest)

    monkeypatch.setattr(evaluation, "_measured", watched)
    study = smoke(seeds=[0, 1])
    run(study, copy, stages=["finetune", "evaluate"], force=["evaluate"])
    assert points == [(0, None), (0, 0), (0, 2), (0, 4), (0, 6), (1, 2), (1, 4), (1, 6)]
    first, second = (StudyFolder(copy, study).behaviour(seed) / "step=000000.parquet" for seed in (0, 1))
    one, other = (pq.read_table(file, partitioning=None).to_pylist() for file in (first, second))
    assert [row | {"seed": 1} for row in one] == other
    values = pq.read_table(StudyFolder(copy, study).behaviour(1) / "perplexity.parquet", partitioning=None).to_pylist()
    assert [(row["seed"], row["step"]) for row in values] == [(1, 0), (1, 2), (1, 4), (1, 6)]
    assert not list((copy / ".neurondrift").glob("*.parts"))
