"""The command line in a process of its own: help, exit codes, several processes, the names that users know."""

import json

import numpy as np
import pytest

from helpers.processes import in_two_processes
from helpers.studies import command
from neurondrift.importance.scores import ScoreFile
from neurondrift.study.folder import StudyFolder, clean
from neurondrift.study.runner import STAGES
from neurondrift.study.settings import resolve


def test_help_is_light_and_names_every_command():
    done = command("--help")
    assert done.returncode == 0
    for name in (*STAGES, "run", "verify", "clean"):
        assert name in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--preset", "dmo"], "no such preset"),
        (["run", "--presett", "demo"], "Unknown option"),
        (["run", "--preset", "smoke", "--snip-top-k", "2"], "groups.top_fraction does not fit"),
        (["run", "--preset", "smoke", "--seeds", "a"], "--seeds takes whole numbers"),
        (["run", "--config", "nope.toml"], "does not exist"),
        (["frobnicate"], "frobnicate"),
        (["score", "--preset", "smoke"], "needs the stage align"),
        (["verify", "--preset", "smoke", "--model", "no/such-model"], "cannot be reached"),
        (["verify", "--preset", "smoke", "--data", "nope.csv"], "data file does not exist"),
    ],
)
def test_mistakes_exit_with_2_and_one_message(arguments, message, tmp_path):
    done = command(*arguments, "--output-dir", str(tmp_path)) if arguments[0] != "frobnicate" else command(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("neurondrift: ") == 1


def test_a_file_that_is_in_the_way(tmp_path):
    (tmp_path / "file").write_text("x")
    done = command("run", "--preset", "smoke", "--output-dir", str(tmp_path / "file"))
    assert done.returncode == 2
    assert "A file stands where a folder is needed" in done.stderr
    assert (tmp_path / "file").read_text() == "x"


def test_verify_says_what_it_found(tmp_path):
    done = command("verify", "--preset", "smoke", "--output-dir", str(tmp_path))
    assert done.returncode == 0, done.stderr
    for word in (
        "torch 2",
        "device",
        "memory",
        "disk",
        "/dev/shm",
        "tiny:llama",
        "builtin:refusals-heldout",
        "estimate",
        "ready",
    ):
        assert word in done.stdout


def test_verify_shows_the_first_examples_as_the_model_will_see_them(tmp_path):
    turns = [{"role": role, "content": text} for role, text in (("user", "a"), ("assistant", "b"), ("user", "c"))]
    row = {"messages": [*turns, {"role": "assistant", "content": "d\n" + "e" * 400}]}
    (tmp_path / "talk.jsonl").write_text(json.dumps(row))
    (tmp_path / "harmbench.csv").write_text("Behavior,ContextString\nDo it,\n")
    harmful = json.dumps(str(tmp_path / "harmbench.csv"))
    (tmp_path / "mine.toml").write_text(f'preset = "smoke"\n[evaluate]\nharmful = {harmful}\n')
    done = command(
        "verify",
        "--config",
        str(tmp_path / "mine.toml"),
        "--data",
        str(tmp_path / "talk.jsonl"),
        "--output-dir",
        str(tmp_path),
    )
    assert done.returncode == 0, done.stderr
    assert "talk.jsonl: 1 examples" in done.stdout
    assert "the first   '<|user|>a<|end|><|assistant|>b<|end|><|user|>c<|end|><|assistant|>' -> 'd\\neee" in done.stdout
    assert "the first   '<|user|>Do it<|end|><|assistant|>'" in done.stdout
    assert max(map(len, done.stdout.splitlines())) < 600


def test_drift_and_groups_made_elsewhere_are_analysed(finished, tmp_path):
    folder, _ = finished
    groups = [folder / "neuron_groups" / f"{name}.neurons.parquet" for name in ("safety_top", "utility_top", "random")]
    flags = [flag for file in groups for flag in ("--group", str(file))]
    done = command(
        "analyze", "--drift", str(folder / "drift"), *flags, "--preset", "smoke", "--output-dir", str(tmp_path)
    )
    assert done.returncode == 0, done.stderr
    here = json.loads((tmp_path / "results" / "statistical_results.json").read_text())["analysis"]["effects"]
    there = json.loads((folder / "results" / "statistical_results.json").read_text())["analysis"]["effects"]
    g = {(effect["group"], effect["metric"]): effect["g"]["value"] for effect in there}
    assert len(here) == 9
    assert all(effect["g"]["value"] == g[effect["group"], effect["metric"]] for effect in here)
    assert (tmp_path / "results" / "drift_analysis_report.txt").exists()
    done = command("analyze", "--drift", str(folder / "drift"), "--output-dir", str(tmp_path))
    assert done.returncode == 2
    assert "--drift and --group together" in done.stderr


def test_scoring_in_two_processes(tmp_path):
    def launched(*arguments):
        return in_two_processes("neurondrift.cli", *arguments)

    unaligned = tmp_path / "unaligned.toml"
    unaligned.write_text('preset = "smoke"\n[align]\nenabled = false\n')
    scores = {}
    for way in ("one", "two"):
        folder = tmp_path / way
        done = (command if way == "one" else launched)("score", "--config", str(unaligned), "--output-dir", str(folder))
        assert done.returncode == 0, done.stderr[-2000:]
        of_study = StudyFolder(folder, resolve(file=unaligned))
        scores[way] = {p: ScoreFile(of_study.score_file(p)) for p in ("safety", "utility", "style", "gradient")}
    assert done.stdout.count("million weights") == 1
    for purpose, one in scores["one"].items():
        two = scores["two"][purpose]
        assert one.header["data"] == two.header["data"]
        for name, values in one.items():
            assert values.ndim == (1 if purpose in ("style", "gradient") else 2)
            np.testing.assert_allclose(two[name], values, rtol=1e-4, atol=1e-6 * values.max())
    clean(tmp_path / "one"), clean(tmp_path / "two")


def test_the_names_that_users_know(copy):
    for script in ("identify_neuron_groups.py", "finetune_with_tracking.py", "analyze_drift.py"):
        done = command("--output-dir", str(copy), script=script)
        assert done.returncode == 0, done.stderr
    assert "stands" in done.stdout
