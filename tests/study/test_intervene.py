"""Interventions on a study that is fine-tuned, and on an adapter made elsewhere."""

import numpy as np
import pytest
import torch

import neurondrift as nd
from neurondrift.interventions.acting.contexts import adapter_delta
from neurondrift.models.sites import fingerprint, linear_sites


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """What interventions need of a study that is fine-tuned: the tiny model's groups, importances and an adapter."""
    from neurondrift.groups.doses import importance_of, write_importance
    from neurondrift.study.folder import StudyFolder
    from neurondrift.study.sections.finetuning import total_steps
    from neurondrift.study.settings import resolve
    from neurondrift.study.training import finetune

    root = tmp_path_factory.mktemp("study")
    settings = resolve(
        preset="smoke",
        flags={
            "align.enabled": False,
            "finetune.learning_rate": 0.05,
            "finetune.max_steps": 3,
            "model.dtype": "float32",
        },
    )
    folder = StudyFolder(root, settings)
    (root / "study.toml").write_text(settings.to_toml())
    model, tokenizer = nd.load_model("tiny:llama", dtype="float32")
    generator = np.random.default_rng(0)
    scores = {name: generator.random(site.shape).astype(np.float32) for name, site in linear_sites(model).items()}
    for name in ("safety_top", "safety_set_difference"):
        group = nd.select_top(
            scores,
            fraction=0.1 if name == "safety_top" else 0.2,
            granularity="neuron",
            provenance={"model": fingerprint(model)},
        )
        group.save(folder.group_file(name, "neuron"))
        write_importance(folder.importance_file(name, "neuron"), group, importance_of(group, scores))
    encoded = nd.encode(nd.load_examples("builtin:ordinary", limit=12), tokenizer, max_length=256)
    steps = total_steps(len(encoded), settings.finetune)
    finetune(model, tokenizer, encoded, settings.finetune, seed=0, folder=folder.adapters(0), save_at=[steps])
    tokenizer.save_pretrained(str(folder.adapters(0) / "tokenizer"))
    return settings, folder


def test_all_interventions_on_a_study_are_resumed_and_reported(study):
    import json

    import pyarrow.parquet as pq

    from neurondrift.report.figures.draw import draw_figures
    from neurondrift.report.tables.causes import section
    from neurondrift.report.text import render_section, render_tables
    from neurondrift.study.experiments.intervene import intervene, results_file
    from neurondrift.study.settings import InterveneSection as Options

    settings, folder = study
    small = {"harmful": 3, "ordinary": 2, "answers": 2, "max_new_tokens": 4}
    small["groups"] = ["safety_top", "safety_set_difference"]
    options = Options(draws=2, dose_draws=1, freeze_draws=1, doses=(0.5, 1.0), **small)
    lines = []
    found = intervene(settings, folder, options, say=lines.append)
    assert json.loads(results_file(folder).read_text()) == found
    made = {(e["intervention"], e["group"], e["dose"]): e for e in found["effects"]}
    assert len(made) == 2 * (5 * 2 + 1)  # freeze is run on whole groups only
    assert all(e["draws"] == {"freeze": 1}.get(e["intervention"], 2 if e["dose"] == 1 else 1) for e in made.values())
    margins = {"margin_harmful", "margin_ordinary"}
    assert set(made["prune", "safety_top", 1.0]["measures"]) == {"harmful", "ordinary", "answers", *margins}
    assert set(made["prune", "safety_top", 0.5]["measures"]) == {"harmful", "margin_harmful"}
    assert found["outcome"] == "margin"
    assert "refusal margin from" in found["conclusion"] and "and the share refused of" in found["conclusion"]
    references = found["references"]
    assert references["before"]["answers"]["perplexity"] != references["after"]["answers"]["perplexity"]
    rows = pq.read_table(folder.results / "interventions.parquet").to_pylist()
    runs = {row["key"] for row in rows}
    assert len(runs) == 2 + 2 * (5 * (3 + 2) + 2)
    assert sum(row["kind"] == "harmful" for row in rows) == 3 * len(runs)
    again = []
    assert intervene(settings, folder, options, say=again.append)["effects"] == found["effects"]
    assert all("0 made now" in line for line in again[1:])
    more = Options(draws=3, dose_draws=1, freeze_draws=1, doses=(1.0,), interventions=("rewind",), **small)
    third = []
    intervene(settings, folder, more, say=third.append)
    assert [line.split()[:5] for line in third[1:]][2] == ["rewind", "8", "runs,", "2", "made"]
    text = "\n".join(render_tables(section(found)))
    assert "random groups" in text and "by dose" in text and "held-out answers" in text
    assert "Refusal margin of 3 harmful requests" in text and "patch_back" in text
    assert "undecided" in text and "members per candidate" in text
    assert {effect["role"] for effect in found["effects"]} == {"safety"}
    assert all(0 <= effect["support"]["own"] < 1 for effect in found["effects"])
    assert all("harmful_minus_ordinary" in effect for effect in found["effects"] if effect["dose"] == 1)
    assert {"coherent", "undecided"} <= set(rows[0])
    assert max(map(len, text.splitlines())) <= 100
    results = {"interventions": found, "study": {"model_fingerprint": found["model_fingerprint"]}}
    names = {path.name for path in draw_figures(results, folder.results / "figures")}
    assert {"intervention_doses.png", "intervention_doses.svg"} <= names
    assert "another model" in "\n".join(render_section(section(found, "another")))
    from neurondrift.study.stages.reporting import weights_digest

    assert found["training_step"] == 3
    assert found["adapter"] == weights_digest(folder.adapters(0) / "step=000003")


def test_a_run_is_the_same_whatever_is_answered_together(study):
    from neurondrift.behaviour.evaluate import judge_answers
    from neurondrift.interventions.measures import answer_losses, margins_of, measure
    from neurondrift.study.experiments.intervene import _bench, subject_of
    from neurondrift.study.settings import InterveneSection as Options

    settings, folder = study
    subject, _ = subject_of(settings, folder, Options(), 0)
    bench = _bench(settings, Options(harmful=5, ordinary=4, answers=3, max_new_tokens=6))
    margins = margins_of(subject.after, subject.tokenizer, bench)
    rows = measure(subject.after, subject.tokenizer, bench, whole=True, margins=margins)
    alone = []
    for kind, examples in bench.sets.items():
        for example in examples:
            judging = {**bench.judging, "batch_size": 1}
            alone += judge_answers(subject.after, subject.tokenizer, {kind: [example]}, **judging)
    assert [(row["kind"], row["id"], row["refused"]) for row in rows[:9]] == [
        (row["kind"], row["id"], row["refused"]) for row in alone
    ]
    together = judge_answers(subject.after, subject.tokenizer, bench.sets, **bench.judging)
    assert [row["response"] for row in together] == [row["response"] for row in alone]
    assert measure(subject.after, subject.tokenizer, bench, whole=False, margins=margins) == rows[:5]
    for kind, own in bench.sets.items():
        alone = [float(nd.refusal_margin(subject.after, subject.tokenizer, [example], batch_size=1)) for example in own]
        assert [row["margin"] for row in rows if row["kind"] == kind] == pytest.approx(alone, abs=1e-4)
    assert [(row["loss"], row["tokens"]) for row in rows[9:]] == answer_losses(subject.after, subject.tokenizer, bench)


def test_freezing_leaves_the_base_as_it_was_and_the_group_unmoved(study):
    from neurondrift.groups.group import load_group
    from neurondrift.models.parts import parts
    from neurondrift.study.experiments.intervene import subject_of
    from neurondrift.study.settings import InterveneSection as Options

    settings, folder = study
    subject, _ = subject_of(settings, folder, Options(), 0)
    group = load_group(folder.group_file("safety_top", "neuron"))
    base = {name: site.weight.clone() for name, site in linear_sites(subject.before).items()}
    changes = []
    for _ in range(2):
        with subject.train_frozen(group) as (trained, applied):
            assert applied.acted_on == len(group)
            changes.append({name: adapter_delta(site) for name, site in linear_sites(trained).items()})
            for name, part in parts(group, linear_sites(trained)).items():
                assert not changes[-1][name][part.rows].any()
            assert any(delta.any() for delta in changes[-1].values())
    assert all(torch.equal(changes[0][name], changes[1][name]) for name in base)  # the second starts from the same base
    for name, site in linear_sites(subject.before).items():
        assert torch.equal(site.weight, base[name])


def test_the_command_on_an_adapter_made_elsewhere(study, tmp_path, capsys):
    from neurondrift.cli.__main__ import main

    _, folder = study
    arguments = ["intervene", "--preset", "smoke", "--model", "tiny:llama", "--dtype", "float32"]
    arguments += ["--adapter", str(folder.adapters(0) / "step=000003"), "--output-dir", str(tmp_path / "out")]
    file = str(folder.group_file("safety_top", "neuron"))
    small = ["--draws", "1", "--prompts", "2", "--ordinary", "1", "--tokens", "2", "--doses", "1"]
    main([*arguments, "--group", file, *small, "--json", str(tmp_path / "found.json")])
    assert "random groups" in capsys.readouterr().out
    assert (tmp_path / "found.json").exists() and (tmp_path / "out/results/interventions.parquet").exists()
    for extra, message in (
        ([], "needs groups"),
        (["--group", file, "--intervention", "freeze", *small], "trains again"),
        (["--group", "nothing"], "no such group"),
        (["--group", file, "--doses", "2"], "takes shares"),
        (["--group", file, "--granularity", "weight"], "is of neurons"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main([*arguments, *extra])
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err
