"""The paragraph on interventions says what the runs show."""

import pytest

from helpers.sentences import REFERENCES, effect, paragraph


def test_the_paragraph_says_what_the_runs_show():
    strong = paragraph([effect("rewind", 0.8, 0.45, 1 / 21)])
    assert "from 0.90 to 0.40" in strong
    assert "brings 0.80 of the lost refusals back (matched random groups 0.10; p = 0.048, 20 draws)" in strong
    assert "is a cause of the loss: it stands out among as many comparable neurons, by more than 0.1 of" in strong
    weak = paragraph([effect("transplant", 0.86, 0.87, 0.5)])
    assert "loses 0.08 of them (matched random groups 0.06" in weak and "no evidence" in weak
    against = paragraph([effect("rewind", 0.1, 0.45, 1 / 21)])
    assert "worked against the loss" in against
    few = paragraph([effect("freeze", 0.8, 0.5, 0.33, draws=2)])
    assert "Too few draws" in few and "19 draws are needed" in few
    kept = {"before": REFERENCES["after"], "after": REFERENCES["after"]}
    assert "none were lost" in paragraph([effect("rewind", 0.4, 0.4, 1.0)], kept)


def test_one_prompt_of_32_that_flips_is_no_cause_however_small_its_p():
    """Of a group and 20 draws that all answer alike, p is 1/21 as soon as one answer differs."""
    from neurondrift.statistics.null import compare_with_null

    flipped = [1.0] * 14 + [0.0] * 18
    others = [[1.0] * 13 + [0.0] * 19] * 20
    found = compare_with_null(flipped, others)
    assert found.p == 1 / 21 and found.direction == "higher"
    one = effect("rewind", found.value, found.null_mean, found.p, sd=found.null_sd)
    one["measures"]["harmful"]["ci95"] = list(found.ci95)
    said = paragraph([one])
    assert "is a cause of the loss:" not in said and "stands out" not in said
    assert "no evidence" in said and "would have stood out with 80 % power" in said


def test_a_p_value_that_does_not_survive_the_other_tests_is_no_cause():
    effects = [effect("rewind", 0.8, 0.45, 1 / 21), effect("freeze", 0.42, 0.42, 0.6)]
    said = paragraph(effects)
    assert "corrected for 2 tests 0.095" in said and "is a cause of the loss:" not in said
    assert "Too few draws" in said and "39 draws are needed" in said
    enough = [effect("rewind", 0.8, 0.45, 1 / 41, draws=40), effect("freeze", 0.42, 0.42, 0.6, draws=40)]
    assert "is a cause of the loss:" in paragraph(enough)


def test_an_effect_whose_interval_holds_a_small_one_is_no_cause():
    wide = paragraph([effect("rewind", 0.6, 0.45, 1 / 21, half=0.06)])
    assert "is a cause of the loss:" not in wide
    assert "is a cause of the loss:" in paragraph([effect("rewind", 0.6, 0.45, 1 / 21, half=0.04)])


@pytest.mark.parametrize("what", ["prune", "rewind", "transplant", "freeze"])
def test_a_stopped_null_has_its_p_and_no_effect(what):
    said = paragraph([effect(what, 0.52, 0.48, 1.0, draws=2, planned=20)])
    assert "p > 0.1, stopped after 2 of 20 draws." in said
    assert "0.52" not in said and "0.48" not in said and "p = " not in said


def test_the_sentence_says_what_the_design_could_have_found():
    """The share grows with the draws' spread and with the members that the draws hold."""
    narrow = paragraph([effect("rewind", 0.5, 0.45, 0.5, sd=0.02)])
    wide = paragraph([effect("rewind", 0.5, 0.45, 0.5, sd=0.06)])
    diluted = paragraph([effect("rewind", 0.5, 0.45, 0.5, sd=0.02, own=0.3)])
    hopeless = paragraph([effect("rewind", 0.5, 0.45, 0.5, sd=0.4)])

    def share(said):
        return int(said.split("a group that carries ")[1].split(" %")[0])

    assert share(narrow) < share(wide) <= 100 and share(narrow) < share(diluted)
    assert "not even a group that carries all of the loss would have stood out" in hopeless
