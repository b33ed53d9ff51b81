"""The training that the stage finetune and the trials of `freeze` share, on the tiny model."""

import numpy as np
import pytest
import torch

import neurondrift as nd
from neurondrift.models.sites import linear_sites
from neurondrift.study.experiments.intervene import subject_of
from neurondrift.study.folder import StudyFolder, saved_step
from neurondrift.study.settings import InterveneSection, resolve
from neurondrift.study.stages.finetuning import finetune_study, load_trainee
from neurondrift.study.training import detach_adapter

STEPS = 2


def study_of(root, **flags):
    chosen = {"align.enabled": False, "finetune.max_steps": STEPS, "finetune.learning_rate": 0.01, **flags}
    study = resolve(preset="smoke", flags=chosen)
    return study, StudyFolder(root, study)


def some_rows(model):
    generator = np.random.default_rng(0)
    scores = {name: generator.random(site.shape).astype(np.float32) for name, site in linear_sites(model).items()}
    return nd.select_top(
        scores, fraction=0.2, granularity="neuron", provenance={"model": linear_sites(model).fingerprint}
    )


def adapter_of(model):
    return {name: value.clone() for name, value in model.state_dict().items() if ".lora_" in name}


def test_what_is_kept_does_not_change_the_training(tmp_path):
    study, folder = study_of(tmp_path)
    trainee = load_trainee(study, folder)
    results = []
    for keep_in in (tmp_path / "kept", None):
        trained, log, frozen = finetune_study(study, trainee, 0, keep_in=keep_in, save_at=[STEPS] if keep_in else [])
        results.append((adapter_of(trained), [entry["loss"] for entry in log]))
        assert frozen is None
        assert detach_adapter(trained) is trainee.model
    (kept, kept_losses), (scratch, scratch_losses) = results
    assert kept_losses == scratch_losses
    assert kept.keys() == scratch.keys() and all(torch.equal(kept[name], scratch[name]) for name in kept)
    assert any(value.any() for name, value in kept.items() if ".lora_B" in name)
    assert saved_step(tmp_path / "kept", STEPS).is_dir() and (tmp_path / "kept" / "trainer").is_dir()
    assert {entry.name for entry in tmp_path.iterdir()} == {"kept"}


def test_a_frozen_group_is_reported(tmp_path):
    study, folder = study_of(tmp_path)
    trainee = load_trainee(study, folder)
    group = some_rows(trainee.model)
    report = finetune_study(study, trainee, 0, freeze=group).frozen
    assert (report.members, report.outside) == (len(group), 0)
    assert 0 < report.moved <= report.others


def test_freeze_trains_a_whole_model_again(tmp_path):
    """Full fine-tuning has no adapter: every site is trained, and each run starts from the base on disk."""
    base, tokenizer = nd.load_model("tiny:llama", dtype="float32")
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    study, folder = study_of(
        tmp_path,
        **{"model.reference": str(tmp_path / "base"), "finetune.method": "full", "finetune.scheduler": "linear"},
    )
    finetune_study(study, load_trainee(study, folder), 0, keep_in=folder.adapters(0), save_at=[STEPS])
    subject, _ = subject_of(study, folder, InterveneSection(), 0)
    group, before = some_rows(base), linear_sites(base)
    runs = []
    for _ in range(2):
        with subject.train_frozen(group) as (trained, applied):
            assert (applied.members, applied.acted_on, applied.outside) == (len(group), len(group), 0)
            after = linear_sites(trained)
            for name, rows in group.members.items():
                assert torch.equal(after[name].weight[rows], before[name].weight[rows])
            assert not all(torch.equal(after[name].weight, before[name].weight) for name in before)
            runs.append({name: site.weight.clone() for name, site in after.items()})
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in before)


def test_freeze_of_an_adapter_starts_from_the_base_that_is_loaded(tmp_path, monkeypatch):
    study, folder = study_of(tmp_path)
    trainee = load_trainee(study, folder)
    trained = finetune_study(study, trainee, 0, keep_in=folder.adapters(0), save_at=[STEPS]).model
    group = some_rows(detach_adapter(trained))
    subject, _ = subject_of(study, folder, InterveneSection(), 0)
    base = subject.after.get_base_model()
    monkeypatch.setattr("neurondrift.study.experiments.intervene.load_trainee", pytest.fail)
    monkeypatch.setattr("neurondrift.study.stages.finetuning.load_base", pytest.fail)
    for _ in range(2):
        with subject.train_frozen(group) as (again, _):
            assert again.get_base_model() is base
        assert not any(".lora_" in name for name, _ in base.named_parameters())
    with pytest.raises(KeyboardInterrupt), subject.train_frozen(group):
        raise KeyboardInterrupt
    assert not any(".lora_" in name for name, _ in base.named_parameters())
