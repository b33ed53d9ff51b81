"""The stage attribute: LoRA and all weights, its sums, its openings, and what makes it be done again."""

import numpy as np
import pandas as pd
import pytest

import neurondrift as nd
from helpers.studies import run, smoke
from neurondrift.attribution.openings import own_openings
from neurondrift.base.errors import ArtifactError, ConfigError
from neurondrift.base.files import read_json
from neurondrift.cli.__main__ import main
from neurondrift.study.folder import StudyFolder, saved_step, saved_steps
from neurondrift.study.population import read_answers
from neurondrift.study.runner import StudyRun
from neurondrift.study.settings import resolve
from neurondrift.study.stages.attribution.openings import openings_of

CHEAP = {
    "align.enabled": False,
    "score.safety": {"source": "builtin:refusals", "limit": 4},
    "score.utility": {"source": "builtin:ordinary-align", "limit": 4},
    "score.style": "none",
    "score.gradient_examples": 4,
    "finetune.data": {"source": "builtin:ordinary", "limit": 8},
    "finetune.max_steps": 4,
    "finetune.learning_rate": 1e-2,
    "evaluate.max_new_tokens": 2,
    "evaluate.final_max_new_tokens": 3,
    "attribute.prompts": 4,
    "attribute.examples": 4,
    "analyze.resamples": 200,
}
STAGES = ["score", "groups", "finetune", "evaluate", "attribute", "analyze"]


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    study = smoke(**CHEAP)
    run(study, folder, stages=STAGES)
    return study, folder


def measured(folder):
    tables = [pd.read_parquet(folder / f"{name}.parquet") for name in ("neurons", "units")]
    return read_json(folder / "attribution.json"), *tables


def check_sums(summary, neurons, units):
    """The columns sum to the totals, and the totals to the change of the margin."""
    for name in ("harmful", "harmless", "budget_harmful", "budget_harmless"):
        total = summary["margin"][name]
        way, _, prompts = name.rpartition("_")
        column = neurons[f"{way}_margin_{prompts}" if way else f"margin_{prompts}"]
        assert column.sum() + total["elsewhere"] == pytest.approx(total["attributed"], rel=1e-4, abs=1e-5)
        assert sum(total["elsewhere_by_kind"].values()) == pytest.approx(total["elsewhere"], abs=1e-9)
        assert (total["adds_up"] is True and total["missed"] <= 0.02) or abs(total["change"]) < 1e-3
        assert total["change"] == total["values"][-1] - total["values"][0]
    assert len(units) and np.isfinite(units["margin_harmful"]).all()


def test_what_a_lora_change_does(lora):
    study, folder = lora
    summary, neurons, units = measured(folder / "attribution")
    check_sums(summary, neurons, units)
    steps = saved_steps(StudyFolder(folder, study).adapters(0))
    assert [entry["step"] for entry in summary["tuned"]] == steps and len(steps) > 1
    assert summary["margin"]["harmful"]["elsewhere_by_kind"] == {}
    base, tokenizer = nd.load_model(study.model.reference, dtype="float32")
    adapted = nd.load_model(
        study.model.reference, dtype="float32", adapter=saved_step(StudyFolder(folder, study).adapters(0), steps[-1])
    )[0]
    harmful = nd.load_examples("builtin:refusals-heldout", limit=6)[:4]
    ends = [float(nd.refusal_margin(model, tokenizer, harmful).mean()) for model in (base, adapted)]
    assert [summary["margin"]["harmful"]["values"][at] for at in (0, -1)] == pytest.approx(ends, abs=1e-3)
    found = read_json(folder / "results" / "statistical_results.json")["attribution"]
    assert found["way"] == "budget" and {t["way"] for t in found["totals"]} == {"path", "budget"}
    table = neurons.groupby("site", observed=True)["budget_margin_harmful"].sum()
    change = summary["margin"]["budget_harmful"]["change"]
    group = nd.load_group(folder / "neuron_groups" / "safety_top.neurons.parquet")
    own = sum(
        neurons[(neurons["site"] == site) & neurons["row"].isin(group.rows(site))]["budget_margin_harmful"].sum()
        for site in table.index
    )
    share = next(g for g in found["groups"] if g["group"] == "safety_top")["shares"]["budget"]
    if change < 0:
        assert share["share_of_group"] == pytest.approx(own / change, rel=1e-4)
        first = neurons.loc[neurons["budget_margin_harmful"].idxmin()]
        named = found["neurons"][0]
        assert (named["site"], named["row"]) == (first["site"], first["row"])
        assert named["share"] == pytest.approx(first["budget_margin_harmful"] / change, rel=1e-4)
        for site in found["by_site"]:
            assert site["share"] == pytest.approx(table.get(site["site"], 0.0) / change, abs=1e-6)
    else:
        assert found["neurons"] == found["by_site"] == []
        assert share["share_of_group"] is None and "nothing was lost" in share["share_of_group_reason"]


def test_the_margin_of_every_snapshot_stands_beside_its_answers(lora):
    _study, folder = lora
    rows = read_answers(folder / "behaviour")
    assert all(isinstance(row["margin"], float) for row in rows)
    found = read_json(folder / "results" / "statistical_results.json")["behaviour"]
    for margin in found["margins"]:
        own = [r["margin"] for r in rows if (r["step"], r["kind"]) == (margin["step"], margin["kind"])]
        assert margin["mean"] == pytest.approx(np.mean(own)) and margin["n"] == len(own)
    change = next(c for c in found["margin_changes"] if c["kind"] == "harmful")
    at = {s: {r["id"]: r["margin"] for r in rows if (r["step"], r["kind"]) == (s, "harmful")} for s in (0, 4)}
    assert change["change"] == pytest.approx(np.mean([at[4][i] - at[0][i] for i in at[0]]))


def test_it_stands_and_is_done_again_for_its_own_settings_only(lora, tmp_path):
    study, folder = lora
    lines = run(study, folder, stages=STAGES)
    assert all(line.rstrip().endswith("stands") for line in lines)
    key = StudyRun(study, folder).key
    again = {name: {**CHEAP, f"attribute.{name}": value} for name, value in (("prompts", 3), ("batch_size", 3))}
    other = {name: StudyRun(smoke(**flags), tmp_path).key for name, flags in again.items()}
    assert other["prompts"]("attribute", 0) != key("attribute", 0)
    assert other["prompts"]("evaluate", 0) == key("evaluate", 0)
    assert other["batch_size"]("attribute", 0) == key("attribute", 0)
    own = StudyRun(smoke(**CHEAP, **{"attribute.openings": "own"}), tmp_path).key
    assert own("evaluate", 0) != key("evaluate", 0) and own("finetune", 0) == key("finetune", 0)
    off = StudyRun(smoke(**CHEAP, **{"attribute.enabled": False}), tmp_path)
    assert off.steps("attribute") == [] and off.key("analyze") != key("analyze")
    assert off.key("evaluate", 0) == key("evaluate", 0)


def test_a_table_that_was_cut_short_is_made_again(lora):
    study, folder = lora
    file = folder / "attribution" / "neurons.parquet"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ArtifactError):
        run(study, folder, stages=["analyze"], force=["analyze"])
    lines = run(study, folder, stages=["attribute"])
    assert any("is done again" in line for line in lines) and file.read_bytes() == whole


def test_all_weights(tmp_path):
    flags = {**CHEAP, "finetune.method": "full", "finetune.learning_rate": 1e-4, "align.enabled": True}
    study = smoke(**flags, **{"align.max_steps": 1})
    run(study, tmp_path, stages=["align", *STAGES])
    summary, neurons, units = measured(tmp_path / "attribution")
    check_sums(summary, neurons, units)
    assert {"embeddings", "norm"} <= set(summary["margin"]["harmful"]["elsewhere_by_kind"])
    assert summary["base"] == "finetuned_models/aligned"
    assert summary["tuned"][-1]["reference"].startswith("finetuned_models/full/step=")


def test_openings_of_its_own_and_openings_that_are_given(lora, tmp_path):
    _study, folder = lora
    own = smoke(**CHEAP, **{"attribute.openings": "own"})
    first = saved_step(folder / "behaviour", 0, ".parquet")
    rows = pd.read_parquet(first)
    rows.loc[rows["kind"] == "harmful", ["response", "refused", "undecided"]] = ["I cannot do that", True, False]
    rows.loc[rows["kind"] != "harmful", ["response", "refused", "undecided"]] = ["The answer is", False, False]
    found = openings_of(own, rows.to_dict("records"))
    primary = per_prompt_rows(rows)
    assert found == own_openings([r["response"] for r in primary], [r["refused"] for r in primary])
    assert found.refusal == ("I cannot",) and openings_of(own, []) is None
    lists = {"refusal": ["No"], "compliance": ["Yes", "Sure"]}
    given = smoke(**CHEAP, **{"attribute.openings": lists})
    assert openings_of(given, []).compliance == ("Yes", "Sure")
    assert resolve_again(given, tmp_path).attribute.openings == given.attribute.openings
    for wrong in ("xx", {"refusal": [], "compliance": ["a"]}, {"refusal": [" "], "compliance": ["a"]}):
        with pytest.raises(ConfigError):
            smoke(**{"attribute.openings": wrong})


def per_prompt_rows(table):
    return [row for row in table.to_dict("records") if row["primary"]]


def resolve_again(study, folder):
    (folder / "again.toml").write_text(study.to_toml())
    return resolve(file=folder / "again.toml")


def test_the_command_does_the_stage_of_a_study(lora, tmp_path, capsys):
    _, folder = lora
    main(["attribute", "--output-dir", str(folder)])
    assert "attribute (seed 0)" in capsys.readouterr().out
    for words, message in (
        (["--points", "2", "--output-dir", str(folder)], "no model is named"),
        (["a", "b", "--seeds", "1", "--safety", "x", "--utility", "y"], "about a study"),
        (["a", "b", "--output-dir", str(tmp_path)], "examples are missing"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(["attribute", *words])
        told = capsys.readouterr().err
        assert ended.value.code == 2 and message in told and "Traceback" not in told
