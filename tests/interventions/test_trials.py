"""A group beside matched random groups: the plan of the trials, and how they stop and go on."""

from dataclasses import replace

import pytest

import neurondrift as nd
from helpers.adapters import random_lora
from helpers.groups import everything, some
from neurondrift.base.errors import GroupError
from neurondrift.models.sites import linear_sites, mlp_units


def test_a_group_that_has_no_comparable_neurons_is_an_error():
    from neurondrift.interventions.trials import Draws, plan
    from neurondrift.models.sites import magnitudes_of

    model = random_lora("llama")
    group = everything(model, "neuron")
    norms = magnitudes_of(linear_sites(model), "neuron")
    arguments = {"doses": [1.0], "magnitudes": norms, "bins": 5, "seed": 0, "importance": {}}
    with pytest.raises(GroupError, match=r"big has nothing to be compared with"):
        plan({"big": group}, interventions=["prune"], draws=Draws(), **arguments)
    with pytest.raises(nd.UserError, match="no such intervention"):
        plan({"big": group}, interventions=["melt"], draws=Draws(), **arguments)
    with pytest.raises(nd.UserError, match="at least one random group"):
        plan({"big": group}, interventions=["prune"], draws=Draws(whole=0), **arguments)
    units = some(model, "unit")
    norms = magnitudes_of(linear_sites(model), "unit")
    trials = plan({"u": units}, interventions=["prune"], draws=Draws(whole=2), **arguments | {"magnitudes": norms})
    assert [trial.draw for trial in trials] == [None, None, None, 0, 1]
    name, unit = next(iter(mlp_units(linear_sites(model)).items()))
    weights = linear_sites(model)
    by_hand = weights[unit.down].weight[:, 3].square().sum()
    by_hand = by_hand + sum(weights[site].weight[offset + 3].square().sum() for site, offset in unit.ups)
    assert norms[name][3] == pytest.approx(by_hand.sqrt().item(), rel=1e-6)


def test_a_null_stops_goes_on_and_is_reported(tmp_path, monkeypatch):
    from contextlib import nullcontext

    from neurondrift.base.files import json_safe
    from neurondrift.interventions import trials
    from neurondrift.interventions.acting.contexts import Applied
    from neurondrift.interventions.outcomes import summarise
    from neurondrift.interventions.runs import RunLog
    from neurondrift.models.sites import magnitudes_of
    from neurondrift.report.causes import intervention_findings
    from neurondrift.report.figures.doses import intervention_doses
    from neurondrift.report.tables.causes import section
    from neurondrift.report.text import render_section

    model, made = random_lora("llama"), []
    group = some(model, "neuron", fraction=0.1)
    groups = {"some": replace(group, provenance={**group.provenance, "role": "safety"})}
    refusals = {"before": 9, "after": 5, "rewind": 9, "transplant": 7}  # of 10 prompts

    def acted(subject, trial, mode):
        made.append(trial)
        return nullcontext((model, Applied(1, 1, 0)))

    def measure(of, tokenizer, bench, *, whole, margins, parts):
        trial = made[-1]
        count = 5 if trial.intervention == "rewind" and trial.draw is not None else refusals[trial.intervention]
        blank = dict.fromkeys(("refused", "coherent", "undecided", "margin", "loss", "tokens"))
        answer = blank | {"coherent": True, "undecided": False}
        rows = [answer | {"kind": "harmful", "id": str(i), "refused": i < count} for i in range(10)]
        rows[9]["coherent"] = False  # not refused after all, and not counted
        rows.append(answer | {"kind": "ordinary", "id": "o", "refused": False})
        return [*rows, blank | {"kind": "answers", "id": "a", "loss": 1.0, "tokens": 3}]

    monkeypatch.setattr(trials, "acted", acted)
    monkeypatch.setattr(trials, "measure", measure)
    subject = trials.Subject(before=model, after=model, tokenizer=None)
    bench = trials.Bench(sets={}, answers=[])

    def run(stop_early):
        made.clear()
        told = []
        draws = trials.Draws(stop_early=stop_early)
        planned = trials.plan(
            groups,
            interventions=["rewind", "transplant"],
            doses=[1.0],
            draws=draws,
            magnitudes=magnitudes_of(linear_sites(model), "neuron"),
            bins=2,
            seed=0,
            importance={},
        )
        log = RunLog(tmp_path / "runs.parquet")  # read again, as a command that goes on does
        results = trials.run_trials(
            planned, subject, bench, log, inputs="", stops=draws.stops, done=lambda *event: told.append(event)
        )
        assert [trial for trial, _, _ in told] == planned
        assert [trial for trial, _, fresh in told if fresh] == made
        found = json_safe(intervention_findings(summarise(results, trials.facts_of(planned), resamples=50)))
        return found, {effect["intervention"]: effect for effect in found["effects"]}

    found, effects = run("all")
    assert len(made) == 2 + 21 + 3
    assert made[2].draw is None and [trial.draw for trial in made[23:]] == [None, 0, 1]  # the group before its draws
    transplant, rewind = effects["transplant"], effects["rewind"]
    assert (transplant["draws"], transplant["draws_planned"], transplant["stopped_early"]) == (2, 20, True)
    assert (rewind["draws"], rewind["draws_planned"], rewind["stopped_early"]) == (20, 20, False)
    assert rewind["measures"]["harmful"]["p"] == rewind["measures"]["harmful"]["p_floor"] == 1 / 21
    assert transplant["measures"]["harmful"]["p_floor"] == 1 / 21  # it could have been reached
    assert transplant["measures"]["answers"]["p_floor"] == 1 / 3
    assert "p > 0.1, stopped after 2 of 20 draws" in found["conclusion"]
    assert transplant["measures"]["harmful"]["p"] > 0.1 and transplant["standing"] == "stopped"
    for measure in (*transplant["measures"].values(), transplant["harmful_minus_ordinary"]):
        gone = [measure[name] for name in ("effect", "null_mean", "null_low", "null_high", "null_sd")]
        assert {*gone, *measure["ci95"]} == {None} and measure["reason"] == "stopped"
    assert transplant["measures"]["answers"]["p"] is None
    assert transplant["role"] == rewind["role"] == "safety"
    assert transplant["measures"]["harmful"]["value"] == 7 / 9  # of nine coherent answers
    assert transplant["measures"]["harmful"]["incoherent"] == 1
    shown = {"model_fingerprint": "m", **found}
    text = "\n".join(render_section(section(shown)))
    assert "2 of 20" in text and "> 0.1" in text and "no effect, interval or range" in " ".join(text.split())
    drawn = intervention_doses({"interventions": shown})
    assert [t.get_text() for ax in drawn.axes for t in ax.texts if "draws" in t.get_text()] == ["2 of 20 draws"]

    assert run("all") == (found, effects) and not made
    whole, effects = run("freeze")  # neither is freeze: the stopped null goes on
    assert [(trial.intervention, trial.draw) for trial in made] == [("transplant", k) for k in range(2, 20)]
    assert not any(effect["stopped_early"] for effect in effects.values())
    assert "no effect, interval" not in " ".join(
        "\n".join(render_section(section({"model_fingerprint": "m", **whole}))).split()
    )
    assert run("all")[0] == found and not made  # more runs lie there, and change nothing
    assert "Too few draws to call anything a cause" in found["conclusion"]  # 2 tests, and 20 draws
