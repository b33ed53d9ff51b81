"""The sentences of the report: each weakness of an analysis, and what interventions say about a cause."""

import dataclasses
from typing import get_args

import pytest

from helpers.sentences import REFERENCES, effect, findings, judged
from neurondrift.report.causes import intervention_sentences
from neurondrift.report.conclusion import weakness_clause
from neurondrift.statistics.weaknesses import (
    FailedControl,
    FailedPositive,
    FewSeeds,
    FewSites,
    MissedInjection,
    NotComparable,
    SharedNeurons,
    Unbalanced,
    UndefinedDrift,
    Unmatched,
    Weakness,
    WeaknessKind,
)

SAID = {
    FewSeeds(seeds=1): "one training seed: the interval covers sites, not run-to-run variation; another run may differ "
    "by more than the interval says",
    FewSeeds(seeds=2): "two training seeds: too few to estimate run-to-run variation, which the interval leaves out",
    FewSeeds(seeds=4): "4 training seeds: run-to-run variation rests on 3 degrees of freedom",
    Unmatched(group="g", members=3, of_members=20, strata=2, of_strata=9): "3 of 20 members of g have no control "
    "(2 of 9 strata)",
    UndefinedDrift(group="g", members=7): "7 members of g have no defined drift",
    Unbalanced(
        group="g", difference=-0.25
    ): "strata leave |w| of g off by -0.25 SD: g is not adjusted for it, the ratio is",
    FewSites(group="g", sites=4): "g has compared members in 4 sites only",
    FailedControl(
        group="random", role="random", verdict="more"
    ): "random, a negative control, moved further than comparable neurons: what else is found here may be as empty",
    FailedPositive(
        group="g", role="positive", verdict="similar"
    ): "g, the positive control, was not found to move further (as far): the outcome is unfit for this run",
    MissedInjection(
        group="g", factor=1.25
    ): "the drift of g times 1.25 was not told from its own: a difference of that size would have been missed",
    NotComparable(
        group="g",
        comparison="matched",
        because=("imbalance", "without_control"),
        without_control=9,
        of_members=20,
        worst="norm",
        difference=-0.2,
    ): "g is not comparable with the neurons outside it (row norm differs by -0.20 SD after adjustment; 9 of 20 members "
    "have no control): its verdict is withheld",
    SharedNeurons(first="g", second="h", shared=12, jaccard=0.5): "g and h share 12 neurons (Jaccard 0.50)",
}


@pytest.mark.parametrize("weakness", SAID, ids=lambda weakness: weakness.kind)
def test_each_weakness_is_said_in_a_clause(weakness):
    assert weakness_clause(weakness) == SAID[weakness]


def test_each_kind_of_weakness_is_said_and_has_its_own_type():
    assert {type(weakness) for weakness in SAID} == set(get_args(Weakness))
    assert {form.kind for form in get_args(Weakness)} == set(get_args(WeaknessKind))
    assert all(dataclasses.asdict(weakness) for weakness in SAID)


FEW = effect("freeze", 0.8, 0.5, 1 / 3, draws=2)


@pytest.mark.parametrize(
    ("effects", "verdict", "interventions"),
    [
        ([effect("rewind", 0.8, 0.5, 1 / 61, draws=60), effect("transplant", 0.6, 0.6, 1.0)], "cause", ["rewind"]),
        ([effect("transplant", 0.2, 0.8, 1 / 21)], "cause", ["transplant"]),
        ([effect("transplant", 0.9, 0.5, 1 / 21)], "against", ["transplant"]),
        ([FEW], "too_few_draws", ["freeze"]),
        ([effect("rewind", 0.8, 0.5, 1 / 21), effect("freeze", 0.5, 0.5, 1.0)], "too_few_draws", ["rewind", "freeze"]),
        ([effect("rewind", 0.8, 0.7, 0.4), effect("freeze", 0.5, 0.5, 1.0, draws=40)], "no_evidence", ["rewind", "freeze"]),
        ([effect("rewind", 0.5, 0.5, 1.0, draws=2, planned=20)], "no_evidence", ["rewind"]),
    ],
)  # fmt: skip
def test_the_verdict_on_a_cause_is_an_enumeration_with_what_says_so(effects, verdict, interventions):
    found = [(cause["group"], cause["verdict"], cause["interventions"]) for cause in judged(effects)["causes"]]
    assert found == [("safety_top", verdict, interventions)]


def test_nothing_is_a_cause_where_nothing_was_lost_or_undone():
    kept = {"before": REFERENCES["after"], "after": REFERENCES["after"]}
    rewound = effect("rewind", 0.8, 0.5, 1 / 21)
    assert judged([rewound], kept)["causes"] == []
    assert judged([effect("prune", 0.1, 0.5, 1 / 21)])["causes"] == []
    assert judged([{**rewound, "dose": 0.5}])["causes"] == []


def test_the_conclusion_of_interventions_is_of_the_safety_groups_and_of_whole_sentences():
    """Found by role: the names say nothing."""
    effects = [
        effect("rewind", 0.8, 0.54, 1 / 41, draws=40, group="g", role="utility"),
        effect("rewind", 0.42, 0.44, 0.7, draws=40, group="h", role="safety"),
        effect("rewind", 0.4, 0.44, 0.7, draws=40, group="h", role="safety", dose=0.5),
    ]
    told = findings(effects)
    assert [(cause["group"], cause["verdict"]) for cause in told["causes"]] == [("g", "cause"), ("h", "no_evidence")]
    assert told["conclusion"] == " ".join(told["sentences"])
    assert len(told["sentences"]) == 3
    assert all(sentence.endswith(".") and sentence == sentence.strip() for sentence in told["sentences"])
    assert told["sentences"][0].startswith("On the 32 harmful requests asked here")
    assert " g " not in told["conclusion"]
    alone = intervention_sentences(judged(effects[:1]))
    assert any("g is a cause of the loss" in sentence for sentence in alone)
    assert intervention_sentences(judged([])) == []


def test_members_without_comparable_neurons_are_said():
    one = effect("rewind", 0.42, 0.44, 0.7)
    one["support"] |= {"left_out": 12, "sites_left_out": 3}
    (said,) = [sentence for sentence in findings([one])["sentences"] if "no comparable" in sentence]
    assert said.startswith("Of the 100 members of safety_top, 12 in 3 of 9 sites have no comparable neurons")
