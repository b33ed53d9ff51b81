"""The answer with groups of the alignment's change: they come first, those of Wei et al. are told of by that name."""

import copy
import json

import pytest

from helpers.change import JUDGING, with_change
from neurondrift.base.roles import ALIGNMENT_GROUPS
from neurondrift.report.change.deciding import decision, decision_of_published
from neurondrift.report.tables import answer
from neurondrift.report.text import render_text


def with_alignment(results):
    """The findings with the last group that judges called as one of the alignment's, so that both kinds judge."""
    text = json.dumps(results, allow_nan=False).replace(f'"{JUDGING[1]}"', f'"{ALIGNMENT_GROUPS[0]}"')
    return json.loads(text)


def flat(results):
    return " ".join(render_text(results).split())


def test_the_decision_rests_on_groups_of_the_alignment_and_the_published_ones_are_told_beside_it():
    plain = with_change(**{JUDGING[0]: 1.0, JUDGING[1]: 3.0})
    assert decision(plain).hypothesis == "undecided" and decision_of_published(plain) is None
    both = with_alignment(plain)
    assert decision(both).hypothesis == "H1"
    assert decision(both).sentences[1].startswith(f"{ALIGNMENT_GROUPS[0]}, ")
    published = decision_of_published(both)
    assert published.hypothesis == "undecided" and JUDGING[0] in " ".join(published.sentences)
    text = flat(both)
    assert text.index("H1 or H2: H1 (fragile safety) is supported") < text.index(
        "By groups of what matters for refusals (those of Wei et al.: safety_top and safety_set_difference): Undecided"
    )


def test_what_groups_stand_on_is_told_with_what_was_measured_of_the_score(monkeypatch):
    results = with_alignment(with_change())
    assert answer.what_groups_stand_on(results) is None  # findings of an older version
    results = copy.deepcopy(results)
    scores = {ALIGNMENT_GROUPS[0]: "functional_drift_shrunk", "safety_top": "snip", JUDGING[0]: "snip"}
    for group in results["groups"]:
        if group["name"] in scores:
            group["score"] = scores[group["name"]]
    monkeypatch.setattr(answer, "scores_measured", dict)
    told = answer.what_groups_stand_on(results)
    assert "safety_acquired by functional drift shrunk" in told
    assert "safety_set_difference (of Wei et al.)" in told and "safety_top (of Wei et al.)" in told
    assert told.endswith("find weights into which refusals were trained has not been measured here.")
    assert told in flat(results)
    monkeypatch.setattr(answer, "scores_measured", lambda: {"snip": "did not find planted rows (AUROC 0.51)"})
    told = answer.what_groups_stand_on(results)
    assert "by snip, which did not find planted rows (AUROC 0.51)" in told
    assert "Whether functional drift shrunk find" in told


def test_the_table_of_scores_names_scores_of_the_registry_only():
    from neurondrift.attribution.measures.registry import MEASURES

    answer.scores_measured.cache_clear()
    assert set(answer.scores_measured()) <= set(MEASURES)


@pytest.mark.parametrize("judge", [ALIGNMENT_GROUPS, ALIGNMENT_GROUPS[:1]])
def test_the_first_sentence_is_of_the_groups_of_the_alignment(judge):
    import numpy as np

    from helpers.results import groups_of, population
    from neurondrift.report.conclusion import analysis_sentences
    from neurondrift.statistics.analysis import analyze

    rng = np.random.default_rng(0)
    people = population(1, rng)
    known = groups_of(people, rng)
    groups = {name: known[other] for name, other in zip(judge, JUDGING, strict=False)}
    groups |= {name: chosen for name, chosen in known.items() if name not in groups}
    first = analyze(people, groups, seed_labels=["0"], metrics=("relative",), resamples=200)
    said = analysis_sentences(first)[0]
    begins, _, rest = said.partition(
        " By groups of what matters for refusals (those of Wei et al.: safety_set_difference): "
    )
    assert all(name in begins for name in judge) and JUDGING[0] not in begins
    assert JUDGING[0] in rest and not any(name in rest for name in judge)
    plain = analyze(people, known, seed_labels=["0"], metrics=("relative",), resamples=200)
    assert "Wei et al." not in analysis_sentences(plain)[0]
