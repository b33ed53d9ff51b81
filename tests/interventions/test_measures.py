"""What a run is measured by: the rows, what is lacking of them and joins later, and what the primary outcome says."""

import math
from contextlib import nullcontext

import numpy as np
import pytest

import neurondrift as nd
from helpers.adapters import random_lora
from helpers.attribution import TOKENIZER, with_bytes
from helpers.groups import some
from neurondrift.interventions import trials
from neurondrift.interventions.acting.contexts import Applied
from neurondrift.interventions.measures import Bench, joined, lacking, margins_of, measure, primary_value
from neurondrift.interventions.outcomes import scale_of, summarise
from neurondrift.interventions.runs import RunLog
from neurondrift.models.data import Example
from neurondrift.models.sites import linear_sites, magnitudes_of
from neurondrift.statistics.null import prompt_error, smallest_found, smallest_shift


def examples(kind, count):
    return [Example(id=f"{kind}{k}", prompt=f"Tell me: {kind} {k}", response="Yes, it is so.") for k in range(count)]


def bench(outcome):
    sets = {"harmful": examples("h", 3), "ordinary": examples("o", 2)}
    return Bench(sets=sets, answers=examples("a", 2), judging={"max_new_tokens": 4, "batch_size": 4}, outcome=outcome)


def test_each_outcome_measures_its_own_and_later_ones_join():
    model = with_bytes("llama")
    both, margin, refusals = (bench(outcome) for outcome in ("both", "margin", "refusals"))
    margins = margins_of(model, TOKENIZER, both)
    assert margins_of(model, TOKENIZER, refusals) == {}
    whole = measure(model, TOKENIZER, both, whole=True, margins=margins)
    assert [(row["kind"], row["id"]) for row in whole] == [
        (kind, f"{kind[0]}{k}")
        for kind, count in (("harmful", 3), ("ordinary", 2), ("answers", 2))
        for k in range(count)
    ]
    first = measure(model, TOKENIZER, refusals, whole=True, margins={})
    assert all(row["margin"] is None for row in first)
    assert lacking(first, both, whole=True, is_draw=True) == ["margin"]
    assert lacking(first, refusals, whole=True, is_draw=True) == []
    more = measure(model, TOKENIZER, both, whole=True, margins=margins, parts=["margin"])
    assert all(row["refused"] is None for row in more)
    assert joined(first, more) == whole
    assert lacking(more, margin, whole=True, is_draw=True) == []  # held-out answers of the group alone
    assert lacking(more, margin, whole=True, is_draw=False) == ["answers"]
    expected = nd.refusal_margin(model, TOKENIZER, [e.prompt for e in both.sets["harmful"]])
    assert primary_value(whole, both) == pytest.approx(float(expected.double().mean()), abs=1e-5)
    assert primary_value(whole, refusals) in (0, 1 / 3, 2 / 3, 1) or math.isnan(primary_value(whole, refusals))
    twice = [{"kind": "harmful", "id": "same", "margin": None, "refused": flag} for flag in (True, False)]
    later = [{"kind": "harmful", "id": "same", "margin": value, "refused": None} for value in (1.0, 2.0)]
    assert [(row["refused"], row["margin"]) for row in joined(twice, later)] == [(True, 1.0), (False, 2.0)]


def run_of(tmp_path, monkeypatch, outcome):
    """Interventions whose margins and refusals are made up: the group brings 3 of 4 lost nats back, its draws none."""
    model = random_lora("llama")
    group = some(model, "neuron", fraction=0.1)
    made = []

    def acted(subject, trial, mode):
        made.append(trial)
        return nullcontext((model, Applied(1, 1, 0)))

    def made_up(of, tokenizer, bench, *, whole, margins, parts):
        trial = made[-1]
        noise = 0.01 * (trial.draw or 0)
        margin = {"before": 2.0, "after": -2.0}.get(trial.intervention, 1.0 if trial.draw is None else -2.0 + noise)
        count = 4 if trial.intervention == "before" else 2
        rows = []
        for kind, size in (("harmful", 5), ("ordinary", 3)) if whole else (("harmful", 5),):
            for k in range(size):
                row = dict.fromkeys(("refused", "coherent", "undecided", "margin", "loss", "tokens"))
                if "refusals" in parts:
                    row |= {"refused": k < count and kind == "harmful", "coherent": True, "undecided": False}
                if "margin" in parts:
                    row["margin"] = margin + 0.1 * k if kind == "harmful" else -5.0 + noise * k
                rows.append(row | {"kind": kind, "id": str(k)})
        if "answers" in parts:
            rows.append(dict.fromkeys(rows[0]) | {"kind": "answers", "id": "a", "loss": 1.0, "tokens": 3})
        return rows

    monkeypatch.setattr(trials, "acted", acted)
    monkeypatch.setattr(trials, "measure", made_up)
    monkeypatch.setattr(trials, "margins_of", lambda *_: {})
    planned = trials.plan(
        {"g": group},
        interventions=["rewind", "patch"],
        doses=[1.0],
        draws=trials.Draws(whole=39),
        magnitudes=magnitudes_of(linear_sites(model), "neuron"),
        bins=2,
        seed=0,
        importance={},
    )
    subject = trials.Subject(before=model, after=model, tokenizer=None)
    log = RunLog(tmp_path / "runs.parquet")
    results = trials.run_trials(planned, subject, Bench(sets={}, answers=[], outcome=outcome), log, inputs="")
    found = summarise(results, trials.facts_of(planned), asked=outcome, resamples=200)
    return found, len(made)


def test_the_margin_judges_and_refusals_stand_beside_it(tmp_path, monkeypatch):
    found, made = run_of(tmp_path, monkeypatch, "refusals")
    assert found["outcome"] == "refusals" and made == 82
    effect = found["effects"][1]
    assert effect["intervention"] == "patch"
    assert effect["standing"] == "not" and set(effect["measures"]) == {"harmful", "ordinary", "answers"}
    assert "margin" not in found["references"]["before"] and found["causes"][0]["verdict"] == "no_evidence"
    found, made = run_of(tmp_path, monkeypatch, "both")  # the runs that lie there are measured further
    assert found["outcome"] == "margin" and made == 82
    effect = found["effects"][1]
    assert effect["intervention"] == "patch"
    assert effect["standing"] == "stands_out" and effect["refusals_standing"] == "not"
    assert effect["measures"]["margin_harmful"]["p"] == effect["measures"]["margin_harmful"]["p_holm"] / 2 == 1 / 40
    assert effect["margin_share"]["group"] == pytest.approx(0.75)
    assert effect["margin_share"]["null"] == pytest.approx(
        0.195 / 4, abs=0.003
    )  # draws of the same members are one run
    assert effect["measures"]["answers"]["null_mean"] == 1.0
    assert effect["margin_harmful_minus_ordinary"]["value"] == pytest.approx(1.2 + 5.0)
    assert found["causes"] == [
        {"group": "g", "verdict": "cause", "interventions": ["rewind"]}
    ]  # patching: of no weights
    assert 0.1 < effect["found"]["share"] < 0.3 and effect["found"]["reason"] == ""
    again, made = run_of(tmp_path, monkeypatch, "margin")
    assert made == 0 and again["causes"] == found["causes"]
    effect = again["effects"][1]
    assert set(effect["measures"]) == {"margin_harmful", "margin_ordinary", "answers"} and "share" not in effect
    assert math.isnan(effect["measures"]["answers"]["null_mean"])
    assert "harmful" not in again["references"]["after"]


def test_files_of_earlier_versions_are_gone_on_from(tmp_path, monkeypatch):
    import pyarrow.parquet as pq

    run_of(tmp_path, monkeypatch, "refusals")
    table = pq.read_table(tmp_path / "runs.parquet")
    pq.write_table(table.drop_columns(["margin"]), tmp_path / "runs.parquet")
    assert run_of(tmp_path, monkeypatch, "refusals")[1] == 0


def test_the_smallest_effect_of_the_margin_is_a_share_of_what_was_lost():
    references = {"before": {"margin": {"harmful": 3.0}}, "after": {"margin": {"harmful": -2.0}}}
    scale = scale_of("margin", references, 0.1)
    assert (scale.lost, scale.smallest) == (5.0, 0.5)
    assert scale.ends("patch") == scale.ends("rewind") == (-2.0, 3.0)
    assert scale.ends("patch_back") == scale.ends("prune") == (3.0, -2.0)


def test_the_smallest_shift_is_found_as_often_as_it_says():
    """By simulation: groups of just that effect among normal draws stand out with a probability of about 0.8."""
    from neurondrift.statistics.null import empirical_p

    null_sd, error, draws, smallest, rng = 0.5, 0.2, 39, 0.5, np.random.default_rng(0)
    given = dict(null_sd=null_sd, prompt_se=error, draws=draws, tests=2, smallest_effect=smallest)
    size = smallest_shift(**given, most=10.0)
    hits = 0
    for _ in range(1000):
        null = rng.normal(0, null_sd, draws)
        value = size + rng.normal(0, math.hypot(null_sd, error))
        half = 1.96 * math.sqrt(error**2 + null_sd**2 / draws)
        hits += empirical_p(value, null) * 2 <= 0.05 and value - null.mean() - half > smallest
    assert 0.72 < hits / 1000 < 0.9
    assert smallest_shift(**given, most=size / 2) == math.inf
    assert math.isnan(smallest_shift(**given | {"draws": 5}, most=10.0))
    share = smallest_found(null_sd=0.05, n=10**9, draws=39, tests=1, smallest_effect=0.1)
    shift = smallest_shift(null_sd=0.05, prompt_se=0.0, draws=39, tests=1, smallest_effect=0.1, most=1.0)
    assert share == shift
    null = rng.normal(size=(30, 200)) + rng.normal(size=200)
    assert prompt_error(null) == pytest.approx(math.sqrt(29 / 30) / math.sqrt(200), rel=0.05)
    assert math.isnan(prompt_error(null[:1]))
