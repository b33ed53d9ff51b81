"""Small sweeps of the tiny model: here and on Ray with a worker killed, shared stages, failures, going on."""

import io
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter

import pandas as pd
import pytest
from rich.console import Console

from helpers.paths import REPOSITORY
from helpers.studies import command
from neurondrift.base.files import read_json, sha256_of_value, write_json
from neurondrift.study.runner import StudyRun
from neurondrift.study.sweep.driver import run_sweep
from neurondrift.study.sweep.folder import SweepFolder, locate
from neurondrift.study.sweep.screen import Board
from neurondrift.study.sweep.settings import EngineSection
from neurondrift.study.sweep.sharing import SHARED, Store, plan

sys.path.insert(0, str(REPOSITORY / "benchmarks"))
import same_results

#: A stage's seconds, as its line in the log has them.
TOOK = r"(?:\d+h\d\dm|\d+m\d\ds|[\d.]+s)"
#: The first two share alignment and groups; the last has no data.
SWEEP = """name = "small"
preset = "smoke"
[settings]
evaluate.max_new_tokens = 4
evaluate.final_max_new_tokens = 6
[engine]
num_cpus = 1  # threads decide in which order sums are rounded, and a worker of Ray has as many as CPUs
[grid]
finetune.lora_r = [4, 8]
[[points]]
name = "broken"
finetune.data = "{missing}"
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweeps")
    path = folder / "small.toml"
    path.write_text(SWEEP.format(missing=folder / "missing.jsonl"))
    return path


@pytest.fixture(scope="module")
def local(file):
    """The sweep by the command, one point after the other."""
    root = file.parent / "local"
    return SweepFolder(root), command("sweep", str(file), "--output-dir", str(root))


def test_a_study_that_fails_stops_no_other_and_is_one_message(local):
    folder, done = local
    assert done.returncode == 2
    assert re.search(r"neurondrift: 1 of 3 points failed: broken.*missing\.jsonl", done.stderr)
    assert "Traceback" not in done.stderr
    assert [folder.status(name).state for name in ("lora_r-4", "lora_r-8", "broken")] == ["done", "done", "failed"]
    assert folder.status("broken").code == 2
    assert "The data file does not exist" in folder.log("broken").read_text()
    assert re.search(r"^lora_r-4 +done, ", done.stdout, re.M) and "FAILED: The data file" in done.stdout


def test_what_points_have_in_common_is_done_once(local):
    folder, _ = local
    logs = {name: folder.log(name).read_text() for name in ("lora_r-4", "lora_r-8")}
    did = {name: Counter(re.findall(rf"^(\w+)(?: \(seed \d\))? +{TOOK}  ", text, re.M)) for name, text in logs.items()}
    assert [did["lora_r-4"][stage] for stage in SHARED] == [1, 1, 1]
    assert [did["lora_r-8"][stage] for stage in SHARED] == [0, 0, 0]
    assert did["lora_r-4"]["finetune"] == did["lora_r-8"]["finetune"] == 1
    first, second = (folder.study(name) / "neuron_groups" / "covariates.parquet" for name in logs)
    assert os.path.samestat(first.stat(), second.stat())


def test_answers_before_fine_tuning_are_given_once(local, file):
    """Those that are kept are taken: altered ones are found again in a study whose evaluation is done anew."""
    folder, _ = local
    kept = sorted(folder.shared.glob("parts-evaluate-*/*.json"))
    assert [part.name for part in kept] == ["before_alignment.json", "step=000000.json"]
    name, written = "lora_r-8", {part: part.read_text() for part in kept}
    run = StudyRun(locate(file, folder.root)[0].point(name).study, folder.study(name), common=folder.shared)
    try:
        for part in kept:
            content = read_json(part)
            for row in content["value"]["answers"]:
                row["response"] = "as kept"
            write_json(part, content | {"sha256": sha256_of_value(content["value"])})
        run.run(["evaluate"], force=["evaluate"])
        files = sorted(run.folder.behaviour(0).glob("*.parquet"))
        answers = {file.stem: set(pd.read_parquet(file)["response"]) for file in files if file.stem != "perplexity"}
        assert answers.pop("before_alignment") == answers.pop("step=000000") == {"as kept"}
        assert answers and not any("as kept" in found for found in answers.values())
    finally:
        for part, text in written.items():
            part.write_text(text)
        run.run(force=["evaluate"])
    assert run.unfinished() == []


def test_the_studies_stand_by_themselves(local, file):
    folder, _ = local
    sweep, _ = locate(file, folder.root)
    for name in ("lora_r-4", "lora_r-8"):
        run = StudyRun(sweep.point(name).study, folder.study(name))
        assert run.unfinished() == []
    done = command("report", "--output-dir", str(folder.study("lora_r-8")))
    assert done.returncode == 0 and "stands" in done.stdout


def test_the_report_names_what_is_missing(local):
    folder, done = local
    text = folder.report.read_text()
    assert "2 of 3 studies, 1 model" in text
    assert "broken (failed)" in text
    assert f"The report: cat {folder.report}" in done.stdout
    frame = pd.read_parquet(folder.table)
    assert set(frame["point"]) == {"lora_r-4", "lora_r-8"} and set(frame["seed"]) == {0}
    assert (folder.results / "sweep_report.html").read_text().startswith("<!DOCTYPE html>")


def test_on_ray_with_a_worker_killed_the_studies_are_the_same_to_the_last_bit(local, file, capsys):
    pytest.importorskip("ray")
    here, _ = local
    sweep, folder = locate(file, file.parent / "ray")
    killed, said = [], []

    def kill():
        while not killed:
            status = folder.status("lora_r-8")
            if status.state == "running" and status.stage.startswith("finetune"):
                killed.append(status.process)
                os.kill(status.process, signal.SIGKILL)
            time.sleep(0.05)

    threading.Thread(target=kill, daemon=True).start()
    states = run_sweep(sweep, folder, engine=EngineSection(kind="ray", workers=2, num_cpus=1), say=said.append)
    assert [states[name].state for name in ("lora_r-4", "lora_r-8", "broken")] == ["done", "done", "failed"]
    assert killed and states["lora_r-8"].tries == 2
    assert any("its process died" in line and "goes on" in line for line in said)
    for name in ("lora_r-4", "lora_r-8"):
        assert same_results.main(here.study(name), folder.study(name)) == 0
        assert same_results.main(folder.study(name), here.study(name)) == 0
    logs = "".join(folder.log(name).read_text() for name in ("lora_r-4", "lora_r-8"))
    assert len(re.findall(rf"^align +{TOOK}  ", logs, re.M)) == 1  # made once, beside two workers


def test_going_on_does_what_is_left(local, file):
    """The same folder once its data is there: two points stand, one is done, and the answer is over three."""
    folder, _ = local
    (file.parent / "missing.jsonl").write_text(
        "".join(f'{{"prompt": "Say {n}.", "response": "It is {n} of them."}}\n' for n in range(24))
    )
    try:
        stood = folder.status("lora_r-4")
        done = command("sweep", str(folder.root))
        assert done.returncode == 0, done.stderr
        assert "2 of 3 points stand" in done.stdout
        assert folder.status("lora_r-4") == stood
        assert "3 of 3 studies" in folder.report.read_text()
    finally:
        (file.parent / "missing.jsonl").unlink()


def test_only_one_point_and_stopping_it(file):
    """Ctrl-C leaves a folder that goes on; no process is left behind."""
    root = file.parent / "only"
    arguments = [sys.executable, "-m", "neurondrift.cli", "sweep", str(file), "--output-dir", str(root), "--only", "1"]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    folder, deadline = SweepFolder(root), time.monotonic() + 300
    while not folder.status("lora_r-8").process and time.monotonic() < deadline:
        time.sleep(0.1)
    worker = folder.status("lora_r-8").process
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=120)
    assert process.returncode == 130 and "run the command again to go on" in told
    assert folder.status("lora_r-8").state == "stopped"
    assert folder.status("lora_r-4").state == "waiting"
    with pytest.raises(ProcessLookupError):
        os.kill(worker, 0)
    assert not (root / "points" / "lora_r-4").exists() and not folder.report.exists()


@pytest.fixture
def kept(finished, tmp_path):
    """A store that holds what a finished study made, and another study of the same settings that has nothing."""
    root, _ = finished
    from helpers.studies import smoke

    run, other = StudyRun(smoke(), root), StudyRun(smoke(), tmp_path / "other")
    steps = {name: next(iter(run.steps(name))) for name in ("align", "groups")}
    store = Store(tmp_path / "shared")
    for step in steps.values():
        store.give(run, step)
    return store, other, steps


def test_a_stage_that_is_taken_stands(kept):
    store, other, steps = kept
    for step in steps.values():
        assert store.holds(step.stage.name, step.inputs) and store.take(other, step)
    assert [other.is_done(step) for step in steps.values()] == [True, True]


def test_what_is_damaged_is_not_taken(kept):
    store, other, steps = kept
    step = steps["groups"]
    entry = store.entry(step.stage.name, step.inputs)
    file = next(entry.rglob("random.neurons.json"))
    text = file.read_text()
    file.unlink()  # a new file: the study's own, which is linked, stays
    file.write_text(text[:-3])
    assert not store.take(other, step)
    assert not entry.exists() and not other.is_done(step)
    assert not (other.folder.root / "neuron_groups").exists()


def test_one_study_changes_no_files_of_another(kept, finished):
    store, other, steps = kept
    for step in steps.values():
        store.take(other, step)
    before = (finished[0] / "neuron_groups" / "covariates.parquet").read_bytes()
    for old in (other.folder.root / "neuron_groups").iterdir():
        old.unlink()
    assert (finished[0] / "neuron_groups" / "covariates.parquet").read_bytes() == before
    assert store.take(other, steps["groups"]) and other.is_done(steps["groups"])


def test_scores_are_kept_only_for_points_that_go_on_to_other_groups(tmp_path):
    def stages(grid):
        path = tmp_path / "sweep.toml"
        path.write_text(f'preset = "smoke"\n[grid]\n{grid}\n')
        sweep, folder = locate(path, tmp_path / "out")
        found = plan(sweep, folder)
        return sorted(Counter(name for name, _ in found.kept).items())

    assert stages("finetune.lora_r = [4, 8]") == [("align", 1), ("groups", 1)]
    assert stages("groups.top_fraction = [0.05, 0.1]") == [("align", 1), ("score", 1)]
    assert stages("seeds = [0, 1]") == []
    assert stages('finetune.data = ["builtin:ordinary", "builtin:ordinary-align"]') == [("align", 1)]
    assert stages("finetune.lora_r = [4, 8]\nseeds = [0, 1]") == [("align", 2), ("groups", 2)]


def test_the_board_says_how_far_it_is():
    from neurondrift.study.sweep.folder import Status

    board = Board(["a", "b", "c", "d"], room=1)
    board.update(
        {
            "a": Status(state="done", seconds=60),
            "b": Status(state="running", stage="align", progress="1 of 4", began=time.time()),
        }
    )
    assert re.match(r"1 of 4 done, 1 at work; .* so far, about 3m00s left; b: align \(1 of 4\)", board.line())
    board.states["c"] = Status(state="failed", message="[/red] [Errno 2] no such file")  # no markup
    Console(file=(screen := io.StringIO()), width=120).print(board.table())
    assert "[/red] [Errno 2] no such file" in screen.getvalue()
    assert "left" not in Board(["a"], room=1).line()
