"""`neurondrift diff` on a Trainer's checkpoints, and `analyze` of what it made."""

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from helpers.families import build, save
from helpers.training import trainer
from neurondrift.cli.__main__ import main
from neurondrift.drift.log import DriftLog
from neurondrift.groups.selection import random_group
from neurondrift.models.disk.checkpoints import Checkpoint
from neurondrift.models.sites import fingerprint, linear_sites


@pytest.mark.parametrize("full", [False, True], ids=["adapters", "full"])
def test_a_trainers_checkpoints_are_what_the_callback_measured(full, tmp_path, capsys):
    from neurondrift.drift.callback import DriftCallback
    from neurondrift.models.disk.initial import CheckpointWeights

    model = build("llama")
    save(model, tmp_path / "base")
    torch.manual_seed(0)
    initial = CheckpointWeights(tmp_path / "base", linear_sites(model)) if full else None
    if not full:
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "up_proj"]))
    callback = DriftCallback(tmp_path / "callback", every=2, initial=initial)
    trainer(model, tmp_path / "run", callback, steps=4, save=2).train()
    out = tmp_path / "diff"
    main(["diff", str(tmp_path / "base"), str(tmp_path / "run"), "--output-dir", str(out), "--threads", "2"])
    told, measured, found = capsys.readouterr().out, callback.log, DriftLog(out)
    assert found.steps() == [2, 4]
    one, two = measured.read(steps=[2, 4]), found.read(steps=[2, 4])
    assert one["site"].tolist() == two["site"].tolist()
    for metric in ("l2", "relative", "cosine_distance"):
        np.testing.assert_allclose(two[metric], one[metric], rtol=1e-5, atol=1e-12)
    assert measured.metadata()["model"] == found.metadata()["model"]
    assert "checkpoint-2" in told and "all neurons" in told and "middle third" in told

    group = random_group(
        {n: s.shape for n, s in linear_sites(model).items()}, fraction=0.2, seed=0, granularity="neuron"
    )
    group.provenance["model"] = fingerprint(model) if not full else Checkpoint(tmp_path / "base", "").fingerprint()
    group.save(tmp_path / "some.parquet")
    results = tmp_path / "results"
    main(["analyze", "--drift", str(out), "--group", str(tmp_path / "some.parquet"), "--output-dir", str(results)])
    report = (results / "results" / "drift_analysis_report.txt").read_text()
    assert "some" in report
