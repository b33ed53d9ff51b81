"""`neurondrift attribute` on a Trainer's checkpoints and on two adapters, and what it says of mistakes."""

import json

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from peft import LoraConfig, get_peft_model

import neurondrift as nd
from helpers.attribution import moved
from neurondrift.cli.__main__ import main
from neurondrift.models.data import encode

SETS = ["--safety", "builtin:refusals", "--utility", "builtin:ordinary", "--limit", "4", "--max-length", "900"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("attribute") / "base"
    model, tokenizer = nd.load_model("tiny:llama", dtype="float32")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def run(*arguments):
    main(["attribute", *map(str, arguments), *SETS])


def adapter(base, folder, seed):
    """A saved LoRA adapter of the base with factors that are not zero."""
    model, _ = nd.load_model(base, dtype="float32")
    torch.manual_seed(seed)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "up_proj", "down_proj"]))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    adapted.save_pretrained(folder)
    return adapted.eval()


def test_checkpoints_of_a_training(base, tmp_path, capsys):
    model, tokenizer = nd.load_model(base, dtype="float32")
    for step, scale in ((10, 0.002), (20, 0.004)):
        moved(model, scale).save_pretrained(tmp_path / "run" / f"checkpoint-{step}")
    out = tmp_path / "out"
    run(base, tmp_path / "run", "--output-dir", out, "--dtype", "float32", "--batch-size", 3)
    told = capsys.readouterr().out
    assert "budget_harmful" in told and "hidden units" in told
    summary = json.loads((out / "attribution.json").read_text())
    assert [entry["step"] for entry in summary["tuned"]] == [10, 20]
    neurons, units = (pd.read_parquet(out / f"{name}.parquet") for name in ("neurons", "units"))
    sites = nd.linear_sites(model)
    assert len(neurons) == sum(site.shape[0] for site in sites.values())
    assert list(neurons["site"].unique()) == list(sites) and len(units) == 3 * 64
    for name in ("harmful", "harmless"):
        for prefix in ("", "budget_"):
            found = summary["margin"][prefix + name]
            column = neurons[f"{prefix}margin_{name}"].sum()
            assert column + found["elsewhere"] == pytest.approx(found["attributed"], abs=1e-4)
            assert found["attributed"] == pytest.approx(found["change"], rel=0.02, abs=2e-4)
    safety, utility = (nd.load_examples(f"builtin:{name}", limit=4) for name in ("refusals", "ordinary"))
    last = type(model).from_pretrained(tmp_path / "run" / "checkpoint-20").eval()
    expected = nd.refusal_margin(last, tokenizer, safety).mean()
    assert summary["margin"]["harmful"]["values"][-1] == pytest.approx(float(expected), abs=1e-3)
    encoded = [encode(part, tokenizer, max_length=900) for part in (safety, utility)]
    drift = nd.functional_drift(last, *encoded, initial=base).rows["model.layers.1.mlp.up_proj"]
    table = neurons[neurons["site"] == "model.layers.1.mlp.up_proj"]
    np.testing.assert_allclose(table["drift_log_ratio"], drift.log_ratio, atol=2e-2)
    np.testing.assert_allclose(table["provenance_directional"], -table["provenance_safety"], atol=1e-7)


def test_two_adapters_of_one_model(base, tmp_path):
    first, second = (adapter(base, tmp_path / f"adapter{seed}", seed) for seed in (1, 2))
    _, tokenizer = nd.load_model(base)
    out = tmp_path / "out"
    run(tmp_path / "adapter1", tmp_path / "adapter2", "--output-dir", out, "--dtype", "float32")
    summary = json.loads((out / "attribution.json").read_text())
    safety = nd.load_examples("builtin:refusals", limit=4)
    ends = [float(nd.refusal_margin(model, tokenizer, safety).mean()) for model in (first, second)]
    assert summary["margin"]["harmful"]["values"] == pytest.approx(ends, abs=1e-3)
    assert "budget_harmful" not in summary["margin"] and summary["unmoved_sites"] == 12
    assert set(pd.read_parquet(out / "neurons.parquet")["site"].str.rpartition(".")[2]) == {
        "q_proj",
        "up_proj",
        "down_proj",
    }


def test_sets_are_read_as_the_flags_say(base, tmp_path):
    adapter(base, tmp_path / "adapter", 1)
    rows = pd.DataFrame([{"q": x.prompt, "a": x.response, "n": "?"} for x in nd.load_examples("builtin:refusals")[:4]])
    rows.to_csv(tmp_path / "own.csv", index=False)
    rows.rename(columns={"q": "prompt", "a": "response"}).to_csv(tmp_path / "usual.csv", index=False)
    folder = datasets.DatasetDict(
        {"held": datasets.Dataset.from_pandas(rows), "train": datasets.Dataset.from_pandas(rows[:1])}
    )
    folder.save_to_disk(tmp_path / "folder")
    own = ["--safety", tmp_path / "own.csv", "--harmful", tmp_path / "folder", "--split", "harmful=held"]
    columns = [
        part
        for name in ("safety", "harmful")
        for part in ("--prompt-column", f"{name}=q", "--response-column", f"{name}=a")
    ]
    asked = {}
    for name, given in (("usual", ["--safety", tmp_path / "usual.csv"]), ("own", [*own, *columns])):
        words = [base, tmp_path / "adapter", *SETS[2:], *given, "--output-dir", tmp_path / name, "--dtype", "float32"]
        main(["attribute", *map(str, words), "--points", "1", "--tolerance", "inf"])
        asked[name] = json.loads((tmp_path / name / "attribution.json").read_text())
    assert asked["own"]["asked"] == asked["usual"]["asked"] and asked["own"]["margin"] == asked["usual"]["margin"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "nothing to compare"),
        (["/nowhere"], "no such folder"),
        (["BASE", "--limit", "0"], "--limit"),
        (["BASE", "--tolerance", "0"], "--tolerance"),
        (["BASE", "--openings", "xx"], "no list of openings"),
        (["BASE", "--harmful", "missing.csv"], "does not exist"),
        (["BASE", "--split", "test"], "has no splits"),
        (["BASE", "--prompt-column", "harmless=q"], "SET one of safety, utility, harmful, harmless"),
    ],
)
def test_mistakes_end_with_one_message(base, tmp_path, capsys, more, message):
    with pytest.raises(SystemExit) as ended:
        given = [str(base) if word == "BASE" else word for word in more]
        main(["attribute", str(base), *SETS, *given, "--output-dir", str(tmp_path / "out")])
    told = capsys.readouterr().err
    assert ended.value.code == 2 and message in told and "Traceback" not in told
    assert not (tmp_path / "out" / "attribution.json").exists()
