"""Stages are objects: what the table says, and that optional stages are stages like any other."""

import re
from pathlib import Path

import pytest

from neurondrift.base.errors import ArtifactError, ConfigError
from neurondrift.base.files import read_json, read_toml, standing_inputs, write_json, write_manifest
from neurondrift.cli.__main__ import main
from neurondrift.study import runner
from neurondrift.study.folder import StudyFolder, saved_step, saved_steps
from neurondrift.study.runner import STAGES, TABLE, StudyRun
from neurondrift.study.settings import Study, resolve
from neurondrift.study.stages import reporting

CHEAP = {
    "align.enabled": False,
    "score.safety": {"source": "builtin:refusals", "limit": 4},
    "score.utility": {"source": "builtin:ordinary-align", "limit": 4},
    "score.max_length": 192,
    "finetune.data": {"source": "builtin:ordinary", "limit": 8},
    "finetune.max_length": 192,
    "evaluate.max_new_tokens": 2,
    "evaluate.final_max_new_tokens": 3,
    "analyze.resamples": 200,
}
FEW = ["--draws", "1", "--doses", "1", "--prompts", "2", "--ordinary", "1", "--tokens", "2"]
LOW = ["--rank", "2", "--utility-rank", "2", "--limit", "4", "--draws", "0"]

# The table


def test_the_runner_names_no_stage():
    text = Path(runner.__file__).read_text()
    for name in TABLE:
        assert not re.search(rf"\b{name}\b", text), name


def test_a_stage_reads_stages_above_it_and_has_its_section():
    names = list(TABLE)
    for place, (name, stage) in enumerate(TABLE.items()):
        assert name == stage.name
        assert set(stage.reads) <= set(names[:place])
        assert stage.section is None or stage.section in Study.model_fields
        assert stage.scratch_until is None or stage.scratch_until in names[place:]
    assert STAGES == ("align", "score", "groups", "finetune", "evaluate", "attribute", "analyze", "report")
    assert set(names) - set(STAGES) == {"intervene", "dose-response", "subspaces", "stability"}
    assert {"intervene", "subspaces"} <= set(names[: names.index("report")])


def test_a_study_that_stands_is_not_done_again_by_this_version(tmp_path):
    """The fingerprints of the preset as they are written since issue 20, from `groups` on since the groups of the
    alignment: others would do every study again."""
    run = StudyRun(resolve(preset="smoke"), tmp_path)
    seeds = {"finetune": 0, "evaluate": 0, "attribute": 0}
    assert {name: run.key(name, seeds.get(name)) for name in STAGES} == {
        "align": "2fc015cde6bd7396",
        "score": "706ba8f2bf2c7305",
        "groups": "dd8530d3d096c0b4",
        "finetune": "ee6b89fe43afbf9d",
        "evaluate": "18867a41a06e54b8",
        "attribute": "0ff5937d513ca9af",
        "analyze": "912d564b213cb310",
        "report": "7d7459fc4bb061d9",
    }


def test_what_changes_no_result_is_in_no_fingerprint(tmp_path):
    def key(name, **flags):
        return StudyRun(resolve(preset="smoke", flags=flags), tmp_path).key(name)

    assert key("score", **{"score.checkpoint_activations": True}) == key("score")
    assert key("intervene", **{"intervene.enabled": True}) == key("intervene")
    assert key("intervene", seeds=[0, 1]) == key("intervene")  # it acts on the first seed's model
    assert key("intervene", seeds=[0, 1], **{"intervene.seed": 1}) != key("intervene")
    assert key("subspaces", seeds=[0, 1]) != key("subspaces")
    assert key("intervene", **{"evaluate.judge": "keyword"}) != key("intervene")
    assert key("stability", **{"groups.top_fraction": 0.02}) != key("stability")


def test_steps_are_named_and_listed_in_one_place(tmp_path):
    assert saved_steps(tmp_path / "nowhere") == []
    for step in (12, 3):
        saved_step(tmp_path, step).mkdir()
        saved_step(tmp_path, step, ".parquet").touch()
    (tmp_path / "step=last").mkdir()
    assert saved_steps(tmp_path) == [3, 12] == saved_steps(tmp_path, ".parquet")
    assert saved_step(tmp_path, 3).name == "step=000003"


def test_a_manifest_stands_for_the_inputs_it_was_written_for(tmp_path):
    file, manifest = tmp_path / "made", tmp_path / "manifest.json"
    file.write_text("x")
    write_manifest(manifest, root=tmp_path, stage="s", inputs="abc", outputs=[file], details={})
    assert standing_inputs(manifest, root=tmp_path) == "abc"
    assert standing_inputs(manifest, root=tmp_path, only="abd") is None
    file.write_text("y")
    assert standing_inputs(manifest, root=tmp_path) is None
    assert standing_inputs(tmp_path / "nothing.json", root=tmp_path) is None


# Optional stages


@pytest.fixture(scope="module", autouse=True)
def without_figures():
    """Figures are drawn elsewhere: here one empty file stands for them."""

    def draw(results, folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "figure.svg").write_text("<svg/>")
        return [folder / "figure.svg"]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("neurondrift.report.figures.draw.draw_figures", draw)
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A small study that is done and was then asked for interventions and for the rank level."""
    folder = tmp_path_factory.mktemp("study")
    StudyRun(resolve(preset="smoke", flags=CHEAP), folder).run()
    main(["intervene", "--output-dir", str(folder), "--intervention", "rewind", *FEW])
    main(["subspaces", "--output-dir", str(folder), *LOW])
    return folder


def said(arguments, capsys):
    capsys.readouterr()
    main([str(argument) for argument in arguments])
    return capsys.readouterr().out


def test_after_an_experiment_every_stage_stands(finished, capsys):
    lines = said(["run", "--output-dir", finished], capsys).splitlines()
    shown = {line.split()[0]: line for line in lines[: len(STAGES) - 1]}
    assert set(shown) == set(STAGES) - {"align"}
    assert all(line.rstrip().endswith("stands") for line in shown.values())
    again = said(["intervene", "--output-dir", finished], capsys)
    assert re.search(r"^intervene +stands$", again, re.M) and re.search(r"^report +stands$", again, re.M)
    assert "random groups" in again and "the report: cat" in again
    assert "Share of the change of the weights" in said(["subspaces", "--output-dir", finished], capsys)


def test_what_was_asked_stands_in_the_studys_record(finished, capsys):
    record = read_toml(finished / "study.toml")
    assert record["intervene"] | {"draws": 1, "interventions": ["rewind"], "enabled": False} == record["intervene"]
    assert record["subspaces"] == {"rank": 2, "utility_rank": 2, "limit": 4, "draws": 0, "enabled": False}
    before = StudyRun(resolve(file=finished / "study.toml"), finished)
    other = StudyRun(resolve(preset="smoke", flags=CHEAP), finished)  # a configuration that says nothing of it
    assert other.study.intervene == before.study.intervene
    assert other.key("intervene") == before.key("intervene")


def test_the_report_and_the_one_with_responses_hold_all_findings(finished, capsys):
    said(["report", "--output-dir", finished, "--show-responses"], capsys)
    for name in ("drift_analysis_report.txt", "report_with_responses.txt"):
        text = (finished / "results" / name).read_text()
        assert "rewind" in text and "RANK LEVEL" in text, name
    for name in ("report.html", "report_with_responses.html"):
        assert "Rank level" in (finished / "results" / name).read_text()


def test_a_changed_setting_keeps_the_runs_that_still_count(finished, tmp_path, capsys):
    import shutil

    shutil.copytree(finished, tmp_path / "study")
    more = said(["intervene", "--output-dir", tmp_path / "study", "--draws", "2"], capsys)
    assert re.search(r"^rewind +6 runs, 2 made now", more, re.M), more
    assert re.search(r"^report +[\d.]+s", more, re.M)
    lines = said(["run", "--output-dir", tmp_path / "study"], capsys).splitlines()
    assert all(line.rstrip().endswith("stands") for line in lines[: len(STAGES) - 1])


def test_a_run_does_what_the_configuration_names(finished, tmp_path, capsys):
    import shutil

    folder = tmp_path / "study"
    shutil.copytree(finished, folder)
    text = (folder / "study.toml").read_text()
    head, table, rest = text.partition("[stability]")
    file = tmp_path / "mine.toml"
    file.write_text(head + table + rest.replace("enabled = false", "enabled = true").replace("draws = 4", "draws = 2"))
    lines = said(["run", "--config", file, "--output-dir", folder], capsys)
    assert re.search(r"^stability +[\d.]+s  2 draws$", lines, re.M), lines
    assert re.search(r"^report +[\d.]+s", lines, re.M)  # it takes the stability up
    assert read_json(folder / "results" / "stability.json")["draws"] == 2
    assert re.search(r"^stability +stands$", said(["run", "--output-dir", folder], capsys), re.M)


def test_findings_of_other_weights_are_marked(finished, tmp_path):
    import shutil

    folder = tmp_path / "study"
    shutil.copytree(finished, folder)
    study = resolve(file=folder / "study.toml")
    current = reporting.read_findings(StudyFolder(folder, study))
    fingerprint = current["study"]["model_fingerprint"]
    assert current["interventions"]["model_fingerprint"] == fingerprint
    assert current["subspaces"]["study"]["model_fingerprint"] == fingerprint
    step = saved_steps(StudyFolder(folder, study).adapters(0))[-1]
    (saved_step(StudyFolder(folder, study).adapters(0), step) / "adapter_model.safetensors").write_bytes(b"other")
    stale = reporting.read_findings(StudyFolder(folder, study))
    assert stale["interventions"]["model_fingerprint"] == reporting.OTHER_WEIGHTS
    assert stale["subspaces"]["study"]["model_fingerprint"] == reporting.OTHER_WEIGHTS
    ranks = current["subspaces"]
    del ranks["study"]["adapters"]  # as older versions wrote it
    write_json(folder / "results" / "subspaces.json", ranks)
    older = reporting.read_findings(StudyFolder(folder, study))
    assert older["subspaces"]["study"]["model_fingerprint"] == fingerprint


def test_an_experiment_needs_what_it_reads(tmp_path):
    study = resolve(preset="smoke", flags=CHEAP)
    with pytest.raises(ArtifactError, match="no fine-tuned model"):
        StudyRun(study, tmp_path).run(["intervene"])
    saved_step(StudyFolder(tmp_path, study).adapters(0), 2).mkdir(parents=True)
    with pytest.raises(ArtifactError, match="stage subspaces needs the stage finetune"):
        StudyRun(study, tmp_path).run(["subspaces"])
    with pytest.raises(ConfigError, match=r"intervene does not fit.*of no study"):
        resolve(preset="smoke", flags={"intervene.enabled": True, "intervene.adapter": "elsewhere"})
