"""A study in several processes is that of one process: one batch, the same answers, killed and gone on with in any number."""

import json
import os
import signal
import time

import pytest

from helpers.alike import differences
from helpers.distributed_training import CASES, CUT, train
from helpers.processes import children, in_two_processes, launch
from helpers.studies import SETTINGS, run, smoke
from neurondrift.base.errors import ConfigError, FreezeError
from neurondrift.drift.log import DriftLog
from neurondrift.study.runner import StudyRun

MORE = {
    "stability.enabled": True,
    "stability.draws": 2,
    "intervene.enabled": True,
    "intervene.interventions": ["rewind", "freeze"],
    "intervene.groups": ["safety_top"],
    "intervene.draws": 2,
    "intervene.freeze_draws": 1,
    "intervene.doses": [1.0],
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    for case in CASES:
        train(case, folder / "one")
    for case in ("llama", "full"):
        train(case, folder / "killed-in-one", kill=True)
    done = in_two_processes("helpers.distributed_training", folder)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == "done\n"
    for case in ("llama", "full"):
        train(case, folder / "killed-in-two")
    return folder


def check_alike(one, two):
    assert differences(one, two, tolerance=1e-5) == []
    drift, other = (DriftLog(each / "drift").read(columns=["site", "row", "relative"]) for each in (one, two))
    moved = drift[drift["step"] == drift["step"].max()]["relative"]
    assert (moved > 1e-4).any()
    assert drift.shape == other.shape


@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_on_one_batch(trained, case):
    """The last adapter (or model) and every snapshot of the drift, with and without a group that is held still."""
    check_alike(trained / "one" / case, trained / "ddp" / case)


@pytest.mark.parametrize("case", CUT)
def test_a_model_that_is_cut_is_trained_as_one_that_is_whole(trained, case):
    check_alike(trained / "one" / case, trained / "fsdp2" / case)


@pytest.mark.parametrize("case", ["llama", "full"])
@pytest.mark.parametrize("way", ["killed-in-one", "killed-in-two"])
def test_training_goes_on_in_another_number_of_processes(trained, case, way):
    """LoRA in processes that each have the model, all weights in processes that cut it."""
    check_alike(trained / "one" / case, trained / way / case)


def test_processes_share_what_there_is_to_do(trained):
    both = [json.loads((trained / f"shares.{number}.json").read_text()) for number in (0, 1)]
    for found in both:
        assert found["shares"] == [{"third": number / 3, "nothing": None, "text": "ü"} for number in range(5)]
        assert found["one item"] == [{"third": 1 / 3, "nothing": None, "text": "ü"}]
        assert (found["first"], found["gathered"], found["alone"]) == (0, [0, 1], [1.5])
    assert [found["mistake"] for found in both] == ["StoppedElsewhere", "ValueError"]
    assert [found["failed"] for found in both] == ["ValueError", "StoppedElsewhere"]


def test_a_study_that_is_killed_in_two_processes_ends_as_in_one(copy, tmp_path):
    """One of two is killed while it trains: a message, and a folder that goes on; what they then answer, attribute,
    intervene in and draw again together is what one process does."""
    settings = tmp_path / "study.toml"
    settings.write_text(smoke(**MORE).to_toml())
    command = ("-m", "neurondrift.cli", "run", "--config", settings, "--output-dir", tmp_path / "two")
    process = launch(*command)
    while not (tmp_path / "two" / "drift" / "step=000002").exists():
        assert process.poll() is None, process.communicate()[1][-3000:]
        time.sleep(0.01)
    os.kill(children(process)[1], signal.SIGKILL)
    _, told = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "Another process of this launch has ended" in told or "Signal 9 (SIGKILL)" in told
    done = launch(*command)
    out, told = done.communicate(timeout=600)
    assert done.returncode == 0, told[-3000:]
    assert [line.split()[0] for line in out.splitlines() if line.endswith("stands")] == ["align", "score", "groups"]
    assert out.count("stability ") == 1
    run(smoke(**MORE), copy)
    found = differences(copy, tmp_path / "two", tolerance=3e-5)
    assert found == []


def test_what_several_processes_cannot_do_is_said_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "5")
    monkeypatch.setenv("RANK", "0")

    def refused(match, **settings):
        with pytest.raises(ConfigError, match=match):
            StudyRun(smoke(**settings), tmp_path / "study").run()
        assert not (tmp_path / "study").exists()

    refused("more processes than rows in a batch.*5 processes.*4 or fewer.*align.batch_size")
    wide = {"align.batch_size": 8, "finetune.batch_size": 8}
    refused(
        "more processes than safety examples.*score.safety",
        **wide,
        **{"score.safety": {"source": "builtin:refusals", "limit": 3}},
    )
    cut = wide | {"parallel.strategy": "fsdp2"}
    refused("FSDP2 cannot do what finetune.freeze asks for", **cut, **{"finetune.freeze": "safety_top"})
    refused("FSDP2 cannot do what align.method asks for", **cut, **{"align.method": "lora"})
    refused("need the whole model", **cut, **{"score.method": "path_attribution"})
    refused("parallel.strategy does not fit", **{"parallel.strategy": "zero3"})


def test_a_group_is_not_held_in_a_model_that_is_cut(tmp_path):
    with pytest.raises(FreezeError, match="cut among processes"):
        train("frozen", tmp_path, "fsdp2")


def test_settings_of_processes_are_in_no_fingerprint(tmp_path):
    runs = [StudyRun(smoke(**more), tmp_path) for more in ({}, {"parallel.strategy": "fsdp2"})]
    assert [[run.key(name) for name in ("align", "score", "finetune")] for run in runs[:1]] == [
        [run.key(name) for name in ("align", "score", "finetune")] for run in runs[1:]
    ]
    assert "parallel" not in smoke().to_toml()
    assert SETTINGS
