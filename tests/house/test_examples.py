"""The examples run as their docstrings say, one after the other in one folder, and what they say is true."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import neurondrift as nd

EXAMPLES = Path(__file__).parents[2] / "examples"
#: But for the notebooks, which tests/docs runs.
PATHS = sorted(path for path in EXAMPLES.glob("*.py") if not path.with_suffix(".ipynb").exists())
LONGEST = 40
LORA = ("q_proj", "v_proj", "o_proj")  # what drift_callback.py trains: in the tiny model 9 sites of 21


def in_folder(folder, name, *arguments):
    """Run an example on the tiny model within a folder; what it printed."""
    done = subprocess.run(
        [sys.executable, EXAMPLES / name, "tiny:llama", *arguments], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("examples")


@pytest.fixture(scope="module")
def scored(folder):
    return in_folder(folder, "score_your_model.py", "--limit", "4")


@pytest.fixture(scope="module")
def trained(folder, scored):
    return in_folder(folder, "drift_callback.py", "--group", "safety.parquet")


def snapshots(printed):
    """The table that drift_callback.py ends with: step -> l2, relative, cosine_distance."""
    rows = re.findall(r"^(\d+) +(\S+) +(\S+) +(\S+)$", printed, re.M)
    return {int(step): tuple(map(float, values)) for step, *values in rows}


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.name)
def test_an_example_is_short_and_uses_public_names_alone(path):
    text = path.read_text()
    assert len(text.splitlines()) <= LONGEST
    tree = ast.parse(text)
    assert f"python examples/{path.name}" in ast.get_docstring(tree)
    names = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "nd"
    }
    assert names
    assert names <= set(nd.__all__)
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not {module for module in modules if module.startswith("neurondrift")}


def test_there_are_five_examples():
    assert [path.stem for path in PATHS] == [
        "act_on_a_group",
        "compare_checkpoints",
        "drift_callback",
        "own_score",
        "score_your_model",
    ]


def test_scores_become_groups_on_disk(folder, scored):
    top, only = nd.load_group(folder / "safety.parquet"), nd.load_group(folder / "safety_only.parquet")
    assert "tiny:llama: 768 neurons in 21 sites" in scored
    assert top.granularity == only.granularity == "neuron"
    assert len(top) == 21  # 1 % of a site of 16, 32 or 64 neurons is one
    assert f"safety.parquet: {len(top)} neurons, of which" in scored
    assert f"safety_only.parquet: {len(only)} neurons" in scored
    shared = int(re.search(r"of which (\d+) are", scored)[1])
    assert 0 < shared < len(top)  # safety and utility agree in part: neither the same scores nor unrelated ones
    rows = re.findall(r"^  (\S+) +(\d+) of (\d+)$", scored, re.M)
    assert len(rows) == 5
    assert {site: int(count) for site, count, _ in rows} == {site: len(only.members[site]) for site, _, _ in rows}
    shares = [int(count) / int(size) for _, count, size in rows]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] == max(only.mask(site).mean() for site in only.shapes)


def test_the_callback_in_a_trainer(folder, trained):
    table = snapshots(trained)
    assert list(table) == [0, 5, 10]
    assert table[0] == (0, 0, 0)
    assert all(0 < early < late for early, late in zip(table[5], table[10], strict=True))
    log = nd.DriftLog(folder / "drift").read(steps=[10])
    assert {site.rsplit(".", 1)[-1] for site in log["site"]} == set(LORA)
    assert table[10][1] == pytest.approx(log["relative"].mean(), abs=1e-6)
    assert "drift/safety/relative" in trained
    assert (folder / "adapter" / "adapter_model.safetensors").exists()
    assert not list((folder / "adapter").glob("*.bin"))  # no pickle


def test_the_callback_in_trl(tmp_path, folder, scored):
    pytest.importorskip("trl")
    printed = in_folder(tmp_path, "drift_callback.py", "--trl", "--group", str(folder / "safety.parquet"))
    table = snapshots(printed)
    assert list(table) == [0, 5, 10]
    assert all(0 == first < last for first, last in zip(table[0], table[10], strict=True))
    assert "mean_token_accuracy" in printed  # it was TRL's trainer
    assert "drift/safety/relative" in printed


def test_two_checkpoints_are_as_far_apart_as_the_callback_measured(folder, trained):
    printed = in_folder(folder, "compare_checkpoints.py")  # with tuned/, where training ended
    assert "9 of 21 sites have changed" in printed
    log = nd.DriftLog(folder / "drift").read(steps=[10])
    measured = log.groupby("site").agg(relative=("relative", "mean"), furthest=("relative", "max"))
    rows = re.findall(r"^(model\.\S+) +(\S+) +(\S+) +(\S+)$", printed, re.M)
    expected = measured.sort_values("relative", ascending=False).head(5)
    assert [site for site, *_ in rows] == list(expected.index)
    printed_values = np.array([[float(relative), float(furthest)] for _, relative, _, furthest in rows])
    assert printed_values == pytest.approx(expected.to_numpy(), rel=2e-3)
    moved = nd.load_group(folder / "moved.json")
    assert f"moved.json: the {len(moved)} neurons" in printed
    furthest = log.loc[log.groupby("site")["relative"].idxmax()]
    assert {site: rows.tolist() for site, rows in moved.members.items()} == {
        site: [row] for site, row in zip(furthest["site"], furthest["row"], strict=True)
    }


@pytest.mark.parametrize("act", ["prune", "rewind"])
def test_a_group_is_acted_on_and_given_back(folder, trained, act):
    printed = in_folder(folder, "act_on_a_group.py", *(["--adapter", "adapter"] if act == "rewind" else []))
    found = re.findall(r"^(.+?) +(\d+) of 32 refused, +(\d+) answers changed$", printed, re.M)
    table = pd.DataFrame(found, columns=["what", "refused", "changed"]).astype({"refused": int, "changed": int})
    group = nd.load_group(folder / "safety.parquet")
    reached = sum(len(rows) for site, rows in group.members.items() if act == "prune" or site.endswith(LORA))
    assert table["what"].tolist() == [
        "as it is",
        f"{act} {reached} of the group",
        f"{act} {reached} matched at random",
        "given back",
    ]
    assert table["changed"].iloc[0] == table["changed"].iloc[-1] == 0
    assert (table["changed"].iloc[1:3] > 0).all()
    assert table["refused"].iloc[0] == table["refused"].iloc[-1]


def test_a_score_of_ones_own_is_tested_on_a_plant(tmp_path):
    printed = in_folder(tmp_path, "own_score.py", "--small")
    rows = {
        cells[0]: cells
        for cells in ([c.strip() for c in row.split("|")[1:-1]] for row in printed.splitlines() if "|" in row)
    }
    headers = list(rows["score"])
    auroc, decoy = (
        {name: float(rows[name][headers.index(column)].partition(" ")[0]) for name in ("change", "size")}
        for column in ("AUROC within site (95 % over sites)", "decoy")
    )
    assert auroc["change"] > 0.8  # it finds what moved ...
    assert decoy["change"] > 0.8  # ... and cannot tell the decoy from it
    assert abs(auroc["size"] - 0.5) < 0.2
    assert list(nd.load_group(tmp_path / "plant" / "planted.parquet").members)
