"""`finetune.report_to`: nothing by default, one message where a package is missing, and no part of the result."""

import importlib.util

import pytest

from helpers.studies import run, smoke
from neurondrift.base.errors import ConfigError
from neurondrift.study.runner import StudyRun
from neurondrift.study.stages.finetuning import TRACKERS


@pytest.mark.parametrize("tracker", TRACKERS)
def test_a_missing_package_is_one_message_before_any_work(tracker, tmp_path):
    if any(importlib.util.find_spec(package) for package in TRACKERS[tracker]):
        pytest.skip(f"{tracker} is installed")
    with pytest.raises(ConfigError, match=f"names {tracker}, whose package is not installed"):
        run(smoke(**{"finetune.report_to": [tracker]}), tmp_path / "study")
    assert not (tmp_path / "study" / "neuron_groups").exists()


def test_a_study_that_stands_needs_no_tracker(copy):
    lines = run(smoke(**{"finetune.report_to": ["trackio"]}), copy)
    assert all(line.rstrip().endswith("stands") for line in lines)


def test_trackers_are_in_no_fingerprint(tmp_path):
    plain, tracked = (StudyRun(smoke(**flags), tmp_path) for flags in ({}, {"finetune.report_to": ["wandb"]}))
    assert plain.key("finetune", 0) == tracked.key("finetune", 0)
    assert "report_to" not in plain.study.to_toml() and "report_to = [" in tracked.study.to_toml()


def test_an_unknown_tracker_is_refused():
    with pytest.raises(ConfigError, match=r"finetune\.report_to.*tensorboard"):
        smoke(**{"finetune.report_to": ["mlflow"]})


def test_tensorboard_follows_the_training(tmp_path):
    pytest.importorskip("tensorboard")
    run(smoke(**{"finetune.report_to": ["tensorboard"]}), tmp_path)
    assert list((tmp_path / "trackers").glob("events.*"))
