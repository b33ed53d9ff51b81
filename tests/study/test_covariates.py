"""The placebo, the gradient and the covariates in a study of the tiny model: the same as by hand, and when made again."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest

import neurondrift as nd
from helpers.studies import run, smoke, stands
from neurondrift.base.errors import ArtifactError, ConfigError
from neurondrift.base.roles import GROUP_NAMES, GROUP_ROLES, PUBLISHED_GROUPS
from neurondrift.drift.log import DriftLog
from neurondrift.groups.group import load_group
from neurondrift.models.sites import linear_sites
from neurondrift.study.folder import StudyFolder
from neurondrift.study.population import load_population
from neurondrift.study.runner import StudyRun
from neurondrift.study.settings import resolve
from neurondrift.study.stages.grouping import neuron_groups
from neurondrift.study.stages.scoring import fine_tuning_examples

UNALIGNED = {"align.enabled": False}
ONLY_NEURONS = [name for name in GROUP_NAMES if name not in PUBLISHED_GROUPS]


def by_hand(folder):
    """Site -> utility scores and gradient scale of its neurons, with public functions alone."""
    study = smoke()
    model, tokenizer = nd.load_model(str(folder / "finetuned_models" / "aligned"), dtype="float32")
    utility = nd.encode(nd.load_examples(study.score.utility), tokenizer, max_length=384)
    gradient = nd.encode(fine_tuning_examples(study), tokenizer, max_length=384)
    return model, {
        "utility_score": nd.score(model, utility),
        "gradient_scale": nd.score(model, gradient, method="gradient"),
    }


def test_the_file_holds_what_public_functions_give(finished):
    folder, lines = finished
    table = pq.read_table(folder / "neuron_groups" / "covariates.parquet").to_pandas()
    model, expected = by_hand(folder)
    sites = linear_sites(model)
    assert list(table["site"].unique()) == list(sites)
    for site, own in table.groupby("site", observed=True):
        norms = sites[site].weight.double().norm(dim=1).numpy()
        np.testing.assert_allclose(own["norm"], norms, rtol=1e-6)
        np.testing.assert_allclose(own["gradient_scale"], expected["gradient_scale"][site].numpy(), rtol=1e-5)
        sums = expected["utility_score"][site].double().sum(dim=1).numpy()
        np.testing.assert_allclose(own["utility_score"], sums, rtol=1e-5)
    (said,) = [line for line in lines if line.startswith("score")]
    assert "style of 16 examples (builtin:rhymes); gradients of 16 fine-tuning examples" in said


def test_a_study_has_its_controls(finished):
    folder, _ = finished
    groups = neuron_groups(StudyFolder(folder, smoke()))
    assert tuple(groups) == GROUP_NAMES
    for name in ONLY_NEURONS:
        control = load_group(folder / "neuron_groups" / f"{name}.matched.neurons.parquet")
        assert groups[name].role == GROUP_ROLES[name] and control.role == "control"
        assert len(control) == len(groups[name]) > 0 and not len(control & groups[name])
        assert not (folder / "neuron_groups" / f"{name}.weights.parquet").exists()
        assert json.loads((folder / "neuron_groups" / f"{name}.neurons.json").read_text())
    counts = {site: len(own) for site, own in groups["safety_set_difference"].members.items()}
    assert {site: len(own) for site, own in groups["style_set_difference"].members.items()} == counts
    results = json.loads((folder / "results" / "statistical_results.json").read_text())
    effects = {effect["group"]: effect["role"] for effect in results["analysis"]["effects"]}
    assert effects == GROUP_ROLES
    assert results["study"]["score"]["examples"] == {"safety": 16, "utility": 16, "style": 16, "gradient": 16}


def test_the_population_has_the_covariates_of_its_neurons_and_none_without_the_file(finished, tmp_path):
    folder, _ = finished
    logs, file = {0: DriftLog(folder / "drift")}, folder / "neuron_groups" / "covariates.parquet"
    population, _ = load_population(logs, file)
    table = pq.read_table(file).to_pandas().set_index(["site", "row"])
    keys = [(population.site_names[site], row) for site, row in zip(population.site, population.row, strict=True)]
    assert set(population.covariates) == {"safety_score", "utility_score", "gradient_scale", "alignment_change"}
    for name, values in population.covariates.items():
        assert values.dtype == np.float64
        np.testing.assert_array_equal(values, table.loc[keys, name].to_numpy(dtype=np.float64))
    np.testing.assert_allclose(population.norm, table.loc[keys, "norm"], rtol=1e-6)
    assert load_population(logs)[0].covariates == {}


def test_covariates_of_another_model_or_of_too_few_sites_are_an_error(finished, tmp_path):
    folder, _ = finished
    logs, file = {0: DriftLog(folder / "drift")}, folder / "neuron_groups" / "covariates.parquet"
    table = pq.read_table(file)
    other = json.loads(table.schema.metadata[b"neurondrift.covariates"]) | {"model": "other"}
    pq.write_table(table.replace_schema_metadata({"neurondrift.covariates": json.dumps(other)}), tmp_path / "o.parquet")
    with pytest.raises(ArtifactError, match="covariates of neurons are of another model.*'other'"):
        load_population(logs, tmp_path / "o.parquet")
    pq.write_table(table.slice(0, table.num_rows - 1), tmp_path / "few.parquet")
    with pytest.raises(ArtifactError, match="covariates of neurons do not cover .*down_proj"):
        load_population(logs, tmp_path / "few.parquet")


def test_what_the_scores_depend_on_is_in_their_fingerprint(tmp_path):
    def key(name, **flags):
        return StudyRun(resolve(preset="smoke", flags=flags), tmp_path).key(name)

    (tmp_path / "mine.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    for flags in (
        {"finetune.data": "builtin:ordinary"},
        {"finetune.data": str(tmp_path / "mine.jsonl")},
        {"finetune.max_length": 100},
        {"score.style": "none"},
        {"score.style": {"source": "builtin:rhymes", "limit": 15}},
        {"score.gradient_examples": 15},
    ):
        for stage in ("score", "groups", "finetune", "analyze", "stability"):
            assert key(stage, **flags) != key(stage), (stage, flags)
    for flags in ({"finetune.learning_rate": 0.5}, {"finetune.lora_r": 2}):
        assert key("score", **flags) == key("score")
        assert key("finetune", **flags) != key("finetune")


def test_without_a_style_there_is_no_placebo_and_old_ones_go(finished, copy):
    for path in copy.rglob("study.toml"):  # a configuration file says "none", and so does what is written of it
        assert resolve(file=path).score.style is not None
    lines = run(smoke(**{"score.style": "none"}), copy, stages=["align", "score", "groups"])
    assert stands(lines) == ["align"]
    assert "style" not in lines[1] and "gradients of 16" in lines[1]
    assert resolve(file=copy / "study.toml").score.style is None
    assert not list((copy / "neuron_groups").glob("style_*"))
    assert tuple(neuron_groups(StudyFolder(copy, smoke()))) == tuple(n for n in GROUP_NAMES if n[:5] != "style")
    safety = load_group(copy / "neuron_groups" / "safety_residual.neurons.parquet")
    before = load_group(finished[0] / "neuron_groups" / "safety_residual.neurons.parquet")
    assert {site: own.tolist() for site, own in safety.members.items()} == {
        site: own.tolist() for site, own in before.members.items()
    }


@pytest.mark.parametrize("name", ONLY_NEURONS)
def test_groups_of_neurons_only_are_asked_for_as_such(name):
    assert resolve(preset="smoke", flags={"finetune.freeze": f"matched:{name}"}).finetune.freeze
    assert resolve(preset="smoke", flags={"intervene.groups": [name]}).intervene.groups == [name]
    with pytest.raises(ConfigError, match="finetune.freeze does not fit.*must be safety_top, .*random, matched"):
        resolve(preset="smoke", flags={"finetune.freeze": name, "finetune.freeze_granularity": "weight"})
    with pytest.raises(ConfigError, match=f"no such group: '{name}'; safety_top"):
        resolve(preset="smoke", flags={"intervene.groups": [name], "intervene.granularity": "unit"})


def test_fine_tuning_examples_are_drawn_from_the_whole_set():
    study = resolve(preset="demo")
    drawn = fine_tuning_examples(study)
    assert len(drawn) == 64 and drawn == fine_tuning_examples(study) != fine_tuning_examples(study, 1)
    everything = nd.load_examples(study.finetune.data)
    assert [example for example in everything if example in drawn] == drawn
    assert drawn != everything[:64]  # the set is sorted by subject
    few = resolve(preset="smoke", flags={"score.gradient_examples": 1000})
    assert len(fine_tuning_examples(few)) == 24
