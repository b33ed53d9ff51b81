"""Groups of the alignment's own change in a study of the tiny model, its base, and studies by any score."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import neurondrift as nd
from helpers.studies import run, smoke, stands
from neurondrift.base.errors import ConfigError
from neurondrift.base.roles import ALIGNMENT_GROUPS, PUBLISHED_GROUPS
from neurondrift.groups.group import load_group
from neurondrift.groups.selection import select_top
from neurondrift.interventions.trials import Trial, acted
from neurondrift.study.experiments.intervene import intervene, subject_of
from neurondrift.study.experiments.stability import redraw
from neurondrift.study.folder import StudyFolder
from neurondrift.study.runner import StudyRun
from neurondrift.study.settings import InterveneSection
from neurondrift.study.stages.attribution.alignment import SCORES, spread
from neurondrift.study.stages.grouping import weight_groups

BASE = "tiny:llama"
UNALIGNED = {"align.enabled": False}


def of(folder, name, matched=False):
    return load_group(folder / "neuron_groups" / f"{name}{'.matched' if matched else ''}.neurons.parquet")


def same(first, second):
    assert set(first.members) == set(second.members)
    return all(np.array_equal(own, second.members[site]) for site, own in first.members.items())


def by_hand(folder, study):
    """The scores of the alignment's change, by public functions alone."""
    model, tokenizer = nd.load_model(str(folder / "finetuned_models" / "aligned"), dtype="float32")
    safety, utility = (nd.load_examples(part) for part in (study.score.safety, study.score.utility))
    harmful = spread(safety, study.groups.margin_prompts)
    about = {"harmful": harmful, "base": BASE, "max_length": 384}
    return {
        name: nd.measure(name, model, tokenizer, safety, utility, **about)
        for name in (*SCORES.values(), "change_length")
    }


def test_groups_of_the_alignment_are_the_top_of_its_change(finished):
    folder, lines = finished
    found = by_hand(folder, smoke())
    table = pq.read_table(folder / "neuron_groups" / "covariates.parquet").to_pandas()
    for site, own in table.groupby("site", observed=True):
        np.testing.assert_allclose(own["alignment_change"], found["change_length"][site], rtol=1e-5)
    for name, score in SCORES.items():
        group, control = of(folder, name), of(folder, name, matched=True)
        assert same(group, select_top(found[score], fraction=0.05, granularity="neuron", undefined="leave out"))
        assert group.role == "safety" and group.provenance["method"] == score and group.provenance["base"] == BASE
        assert len(control) == len(group) and not len(control & group)
        importance = pq.read_table(folder / "neuron_groups" / f"{name}.neurons.importance.parquet").to_pandas()
        expected = np.concatenate([found[score][site][rows].numpy() for site, rows in group.members.items()])
        np.testing.assert_allclose(importance["importance"], expected, rtol=1e-4, atol=1e-6)
    (said,) = [line for line in lines if line.startswith("groups")]
    assert "33 safety_acquired and 33 safety_paying (margin " in said
    results = json.loads((folder / "results" / "statistical_results.json").read_text())
    effects = [e for e in results["analysis"]["effects"] if e["metric"] == "relative"]
    assert [e["group"] for e in effects][:2] == list(ALIGNMENT_GROUPS) and all(e["judging"] for e in effects[:2])
    for effect in effects:
        gated = {balance["name"] for balance in effect["effect_matched"]["balance"] if balance["gated"]}
        assert ("alignment_change" in gated) == (effect["group"] in ALIGNMENT_GROUPS)
    assert {g["name"]: g.get("score") for g in results["groups"]}["safety_acquired"] == "functional_drift_shrunk"


def test_controls_moved_in_the_alignment_about_as_far(finished):
    """Where the group has moved further than others, its control has too: nearer than one that is matched on |w| alone."""
    folder, _ = finished
    from neurondrift.groups.controls import matched

    table = pq.read_table(folder / "neuron_groups" / "covariates.parquet").to_pandas()
    columns = dict(list(table.groupby("site", observed=True)))
    norms = {site: own["norm"].to_numpy() for site, own in columns.items()}

    def mean_log(group):
        logs = [np.log(columns[s]["alignment_change"].to_numpy()[rows]) for s, rows in group.members.items()]
        return np.concatenate(logs).mean()

    group = of(folder, "safety_paying")
    own = abs(mean_log(of(folder, "safety_paying", matched=True)) - mean_log(group))
    plain = np.mean([abs(mean_log(c) - mean_log(group)) for c in matched(group, norms, seed=0, draws=20, bins=4)])
    assert own < 0.6 * plain


def test_undoing_the_alignment_of_a_group_gives_it_the_weights_of_the_base(copy):
    study, place = smoke(), StudyFolder(copy, smoke())
    base = {name: site.weight for name, site in nd.linear_sites(nd.load_model(BASE, dtype="float32")[0]).items()}
    subject, _ = subject_of(study, place, InterveneSection(), study.seed)
    group = of(copy, "safety_acquired")
    aligned = {name: site.weight.clone() for name, site in subject.sites_before.items()}
    with acted(subject, Trial("unalign", "safety_acquired", 1.0, None, group, True), "zero") as (model, _):
        for name, site in nd.linear_sites(model).items():
            rows = group.members.get(name, np.empty(0, dtype=np.int64))
            torch.testing.assert_close(site.weight[rows], base[name][rows], rtol=0, atol=1e-7)
            others = np.setdiff1d(np.arange(len(site.weight)), rows)
            assert torch.equal(site.weight[others], aligned[name][others])
            assert not len(rows) or (aligned[name][rows] - base[name][rows]).abs().max() > 1e-5
    small = {"draws": 2, "doses": [1.0], "outcome": "margin", "harmful": 4, "ordinary": 2}
    asked = InterveneSection(groups=["safety_acquired"], interventions=["unalign"], **small)
    found = intervene(study, place, asked, say=lambda line: None)
    (effect,) = found["effects"]
    assert effect["intervention"] == "unalign" and effect["margin_share"]["of"].startswith("margin gone")
    assert "Undoing only the alignment of safety_acquired before fine-tuning" in found["conclusion"]


def test_without_a_base_there_are_none_and_it_is_said_once(tmp_path):
    lines = run(smoke(**UNALIGNED), tmp_path, stages=["score", "groups"])
    assert sum("no model from before it is named (model.base)" in line for line in lines) == 1
    assert not any(tmp_path.glob("neuron_groups/safety_acquired*"))
    same_model = {**UNALIGNED, "model.base": BASE}
    lines = run(smoke(**same_model), tmp_path, stages=["score", "groups"])
    assert "no weight moved" in lines[-1] and not any(tmp_path.glob("neuron_groups/safety_acquired*"))
    assert "alignment_change" not in pq.read_table(tmp_path / "neuron_groups" / "covariates.parquet").column_names
    assert stands(run(smoke(**same_model), tmp_path, stages=["score", "groups"])) == ["score", "groups"]


def test_a_base_that_is_named_gives_the_groups_of_a_study_that_aligns(finished, tmp_path):
    folder, _ = finished
    aligned = str(folder / "finetuned_models" / "aligned")
    named = smoke(**UNALIGNED, **{"model.reference": aligned, "model.base": BASE})
    run(named, tmp_path, stages=["score", "groups"])
    for name in ALIGNMENT_GROUPS:
        assert same(of(folder, name), of(tmp_path, name))
    narrow = smoke(**UNALIGNED, **{"model.reference": aligned, "model.base": BASE, "model.dtype": "bfloat16"})
    run(narrow, tmp_path / "narrow", stages=["score", "groups"])
    for site, own in (
        pq.read_table(tmp_path / "narrow" / "neuron_groups" / "covariates.parquet")
        .to_pandas()
        .groupby("site", observed=True)
    ):
        wide = pq.read_table(folder / "neuron_groups" / "covariates.parquet").to_pandas()
        expected = wide[wide["site"] == site]["alignment_change"]
        np.testing.assert_allclose(own["alignment_change"], expected, rtol=1e-4)  # not that of rounded weights
    wrong = smoke(**UNALIGNED, **{"model.reference": aligned, "model.base": str(tmp_path / "nowhere")})
    with pytest.raises(nd.UserError, match="nowhere"):
        run(wrong, tmp_path / "wrong", stages=["score", "groups"])


@pytest.mark.parametrize("method", ["functional_drift_shrunk", "path_attribution", "snip_ratio", "cohens_d", "taylor"])
def test_a_study_takes_any_score(method, tmp_path):
    study = smoke(**{"score.method": method})
    folder = StudyFolder(tmp_path, study)
    lines = run(study, tmp_path, stages=["align", "score", "groups"])
    assert f"{method}, " in lines[1]
    for name in PUBLISHED_GROUPS:
        assert len(of(tmp_path, name)) and not folder.group_file(name, "weight").exists()
    assert of(tmp_path, "safety_top").provenance["method"] == method
    assert weight_groups(folder) == {}
    if method == "functional_drift_shrunk":
        assert same(of(tmp_path, "safety_top"), of(tmp_path, "safety_acquired"))
        assert not len(of(tmp_path, "safety_top") & of(tmp_path, "utility_top"))
        run(study, tmp_path, stages=["finetune"])
        figures = redraw(study, folder, draws=2)["groups"]
        assert figures["safety_acquired"]["neuron"]["members"] == len(of(tmp_path, "safety_acquired"))
        assert set(figures["safety_top"]) == {"neuron"}


def test_scores_that_cannot_be_taken_are_refused_before_anything_is_done():
    with pytest.raises(ConfigError, match="provenance needs the model from before the alignment"):
        smoke(**UNALIGNED, **{"score.method": "provenance"})
    with pytest.raises(ConfigError, match="no group of weights is made of it"):
        smoke(**{"score.method": "taylor", "finetune.freeze": "safety_top", "finetune.freeze_granularity": "weight"})
    with pytest.raises(ConfigError, match="safety_acquired needs the model from before"):
        smoke(**UNALIGNED, **{"finetune.freeze": "safety_acquired"})
    with pytest.raises(ConfigError, match="not which is which"):
        smoke(**{"score.method": "cohens_d", "score.style": "none"})
    with pytest.raises(ConfigError, match=r"score\.method"):
        smoke(**{"score.method": "snips"})
    assert smoke(**UNALIGNED).base is None and smoke().base == BASE


def test_settings_that_are_usual_leave_fingerprints_of_studies_without_a_base_as_they_were(tmp_path):
    text = smoke(**UNALIGNED).to_toml()
    assert "drift_examples" not in text and "base" not in text.split("[score]")[0].replace("base_", "")
    usual, other = (StudyRun(smoke(**UNALIGNED, **more), tmp_path).key("groups") for more in ({}, {"model.base": BASE}))
    assert usual != other
