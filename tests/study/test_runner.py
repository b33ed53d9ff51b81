"""The whole study on the tiny model: all files, nothing done twice, resumption, mistakes."""

import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest

import neurondrift
from helpers.studies import run, smoke, stands
from neurondrift.base.errors import ArtifactError, ConfigError, DataError
from neurondrift.base.files import read_toml
from neurondrift.drift.log import DriftLog
from neurondrift.groups.group import load_group
from neurondrift.study.folder import StudyFolder, clean, record, version_of
from neurondrift.study.runner import STAGES
from neurondrift.study.settings import resolve


def test_every_promised_file_is_there(finished):
    folder, lines = finished
    assert [line.split()[0] for line in lines] == list(STAGES)
    for name in ("safety_top", "safety_set_difference", "utility_top", "random"):
        for granularity in ("neurons", "weights"):
            group = load_group(folder / "neuron_groups" / f"{name}.{granularity}.parquet")
            control = load_group(folder / "neuron_groups" / f"{name}.matched.{granularity}.parquet")
            assert len(group) == len(control) > 0
            assert len(group & control) == 0
        assert json.loads((folder / "neuron_groups" / f"{name}.neurons.json").read_text())
    assert DriftLog(folder / "drift").steps() == [0, 2, 4, 6]
    assert sorted(path.name for path in (folder / "behaviour").iterdir()) == [
        "before_alignment.parquet",
        "perplexity.parquet",
        "step=000000.parquet",
        "step=000002.parquet",
        "step=000004.parquet",
        "step=000006.parquet",
    ]
    results = folder / "results"
    assert (results / "drift_analysis_report.txt").read_text().strip()
    names = {path.name for path in (results / "figures").iterdir()}
    for figure in ("drift_over_training", "final_drift_distributions", "refusals_over_training"):
        assert {f"{figure}.png", f"{figure}.svg"} <= names
    study = read_toml(folder / "study.toml")
    assert study["record"]["versions"]["torch"]
    assert resolve(file=folder / "study.toml") == smoke()


def test_results_are_consistent_with_the_files(finished):
    folder, _ = finished
    results = json.loads((folder / "results" / "statistical_results.json").read_text())
    final = DriftLog(folder / "drift").read(steps=[6])
    for effect in results["analysis"]["effects"]:
        group = load_group(folder / "neuron_groups" / f"{effect['group']}.neurons.parquet")
        chosen = np.zeros(len(final), dtype=bool)
        for site in group.members:
            chosen |= ((final["site"] == site) & final["row"].isin(group.rows(site))).to_numpy()
        mean = final.loc[chosen, effect["metric"]].mean()
        assert effect["n_members"] == chosen.sum()
        assert effect["mean_members"]["value"] == pytest.approx(mean, rel=1e-6)
    rows = [row for row in results["trajectories"] if row["group"] == "safety_top" and row["metric"] == "relative"]
    assert [row["step"] for row in rows] == [0, 2, 4, 6]
    assert rows[0]["members"]["mean"] == 0
    assert {rate["n"] for rate in results["behaviour"]["rates"]} == {6}


def test_the_steps_that_are_compared_are_judged_alike(finished):
    """Answers before and after have one length and run to their end; those in between are short, and marked so."""
    folder, _ = finished
    behaviour = folder / "behaviour"
    steps = sorted(behaviour.glob("step=*.parquet"))
    assert len(steps) >= 3
    for path in [behaviour / "before_alignment.parquet", *steps]:
        table = pq.read_table(path, partitioning=None).to_pylist()
        inner = path in steps[1:-1]
        assert {(row["max_new_tokens"], row["whole"]) for row in table} == {(4, False) if inner else (6, True)}
    results = json.loads((folder / "results" / "statistical_results.json").read_text())
    (before, *between, after) = [rate for rate in results["behaviour"]["rates"] if rate["kind"] == "harmful"]
    assert [(rate["max_new_tokens"], rate["whole"]) for rate in (before, after)] == [(6, True)] * 2
    assert {(rate["max_new_tokens"], rate["whole"]) for rate in between} == {(4, False)}
    assert all(
        rate["refusals"] + rate["partial"] + rate["undecided"] <= rate["n"] for rate in (before, *between, after)
    )


def test_no_answer_of_a_model_is_in_the_report(finished):
    import pyarrow.parquet as pq

    folder, _ = finished
    report = (folder / "results" / "drift_analysis_report.txt").read_text() + (
        folder / "results" / "report.html"
    ).read_text()
    for file in (folder / "behaviour").glob("step=*.parquet"):
        for row in pq.read_table(file, partitioning=None).to_pylist():
            assert len(row["response"]) < 4 or row["response"] not in report


def test_the_same_seed_gives_the_same_groups_and_drift_bit_for_bit(finished, tmp_path):
    folder, _ = finished
    run(smoke(), tmp_path, stages=["align", "score", "groups", "finetune"])
    for file in sorted((folder / "neuron_groups").iterdir()):
        assert (tmp_path / "neuron_groups" / file.name).read_bytes() == file.read_bytes(), file.name
    assert DriftLog(tmp_path / "drift").table().equals(DriftLog(folder / "drift").table())


def test_a_finished_study_is_left_alone(copy):
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*") if path.is_file() and path.name != "study.toml"}
    lines = run(smoke(), copy)
    assert stands(lines) == list(STAGES)
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_only_what_a_change_touches_is_done_again(copy):
    lines = run(smoke(**{"analyze.smallest_effect": 0.3}), copy)
    assert stands(lines) == ["align", "score", "groups", "finetune", "evaluate", "attribute"]
    assert "0.3" in (copy / "results" / "drift_analysis_report.txt").read_text()


def test_a_damaged_file_is_made_again(copy):
    file = copy / "results" / "statistical_results.json"
    good = json.loads(file.read_text())
    file.write_text("{}")
    lines = run(smoke(), copy)
    assert stands(lines) == ["align", "score", "groups", "finetune", "evaluate", "attribute", "report"]
    again = json.loads(file.read_text())
    for content in (good, again):
        content["study"].pop("created")
    assert again == good


def test_force_does_a_stage_again(copy):
    lines = run(smoke(), copy, force=["analyze"])
    assert "analyze" not in stands(lines)
    with pytest.raises(ConfigError, match="no such stage.*'analyse'"):
        run(smoke(), copy, force=["analyse"])


def test_a_killed_training_goes_on_from_its_checkpoint(finished, copy, monkeypatch):
    from neurondrift.drift.callback import DriftCallback

    (copy / ".neurondrift" / "finetune.seed=0.json").unlink()
    shutil.rmtree(copy / "finetuned_models" / "lora")
    shutil.rmtree(copy / "drift")
    original = DriftCallback.on_step_end

    def killed_at_5(self, args, state, control, **kwargs):
        original(self, args, state, control, **kwargs)
        if state.global_step == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(DriftCallback, "on_step_end", killed_at_5)
    with pytest.raises(KeyboardInterrupt):
        run(smoke(), copy, stages=["finetune"])
    assert (copy / "finetuned_models" / "lora" / "trainer" / "checkpoint-4").is_dir()
    seen = []

    def watch(self, args, state, control, **kwargs):
        seen.append(state.global_step)
        original(self, args, state, control, **kwargs)

    monkeypatch.setattr(DriftCallback, "on_step_end", watch)
    run(smoke(), copy, stages=["finetune"])
    assert seen == [5, 6]
    assert DriftLog(copy / "drift").table().equals(DriftLog(finished[0] / "drift").table())


def test_scores_go_once_the_groups_stand_unless_kept(finished, tmp_path):
    assert not StudyFolder(finished[0], smoke()).scratch.exists()
    study = smoke(**{"align.enabled": False})
    run(study, tmp_path, stages=["score", "groups"], keep_scores=True)
    assert StudyFolder(tmp_path, study).score_file("utility").exists()
    assert stands(run(study, tmp_path, stages=["score", "groups"])) == ["score", "groups"]
    assert not StudyFolder(tmp_path, study).scratch.exists()
    assert stands(run(study, tmp_path, stages=["score", "groups"])) == ["score", "groups"]


def test_stages_need_the_stages_before_them(tmp_path):
    with pytest.raises(ArtifactError, match="stage groups needs the stage score.*neurondrift score"):
        run(smoke(**{"align.enabled": False}), tmp_path, stages=["groups"])
    assert not (tmp_path / "neuron_groups").exists()


def test_another_study_is_not_overwritten(copy):
    before = (copy / "study.toml").read_bytes()
    with pytest.raises(ConfigError, match=r"holds another study: smoke of tiny:llama.*choose another --output-dir"):
        run(resolve(preset="demo"), copy)
    assert (copy / "study.toml").read_bytes() == before


def test_bad_data_stops_before_anything_is_written(tmp_path):
    (tmp_path / "bad.csv").write_text("prompt,response\nhello,\n")
    with pytest.raises(DataError, match="Example 0 .* has no response"):
        run(smoke(**{"align.enabled": False, "score.safety": str(tmp_path / "bad.csv")}), tmp_path / "out")
    assert not (tmp_path / "out" / "neuron_groups").exists()


def test_seeds_share_scores_and_groups(copy):
    lines = run(smoke(seeds=[0, 1]), copy)
    assert stands(lines)[:5] == ["align", "score", "groups", "finetune", "evaluate"]
    first, second = DriftLog(copy / "drift"), DriftLog(copy / "replicates" / "seed=1" / "drift")
    assert first.steps() == second.steps()
    assert not first.read(steps=[6]).equals(second.read(steps=[6]))
    results = json.loads((copy / "results" / "statistical_results.json").read_text())
    assert results["study"]["seeds"] == [0, 1]


def test_it_says_what_each_stage_was_computed_in(copy):
    """As each stage recorded it where it ran, not as this machine would compute it now."""
    here = "float32 on cpu"  # as the preset smoke asks for
    results = copy / "results" / "statistical_results.json"
    stages = ("align", "score", "finetune", "evaluate", "attribute")
    assert json.loads(results.read_text())["study"]["arithmetic"] == dict.fromkeys(stages, here)
    manifest = copy / ".neurondrift" / "finetune.seed=0.json"
    written = json.loads(manifest.read_text())
    written["details"]["arithmetic"] = "float16 on cuda"
    manifest.write_text(json.dumps(written))
    run(smoke(seeds=[0, 1]), copy)
    assert json.loads(results.read_text())["study"]["arithmetic"]["finetune"] == f"float16 on cuda; {here}"


def test_full_fine_tuning_runs_too(copy):
    lines = run(smoke(**{"finetune.method": "full"}), copy)
    assert stands(lines) == ["align", "score", "groups"]
    drift = DriftLog(copy / "drift")
    assert len(drift.initial()) == 3 * (32 + 16 + 16 + 32 + 64 + 64 + 32)
    assert (drift.read(steps=[6])["l2"] > 0).all()


def test_clean_removes_scratch_then_everything(copy):
    run(smoke(), copy, stages=["score"], force=["score"])
    assert StudyFolder(copy, smoke()).score_file("safety").exists()
    assert clean(copy)
    assert clean(copy) == []
    assert (copy / "results").is_dir()
    clean(copy, everything=True)
    assert list(copy.iterdir()) == []
    with pytest.raises(ArtifactError, match="no study in this folder"):
        clean(copy, everything=True)


def test_a_package_that_is_not_installed_has_no_version():
    """A checkout that is only on the path, beside packages that are not installed either."""
    assert version_of("no-such-package") == "not installed"
    assert record()["versions"]["neurondrift"] == neurondrift.__version__
