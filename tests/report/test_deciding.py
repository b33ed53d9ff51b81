"""H1, H2 or undecided: the sentence of every case that the rule knows, in text and page alike."""

import copy
import re

import pytest

from helpers.change import JUDGING, patched, with_change
from neurondrift.report.change.deciding import decision, percent, returned, signed_percent
from neurondrift.report.change.tables import answer_tables, margin_tables, section
from neurondrift.report.document import build_document
from neurondrift.report.figures.over_training import refusals_over_training
from neurondrift.report.page import render_page
from neurondrift.report.text import render_text


def told(results):
    found = decision(results)
    return found.hypothesis, found.sentences[0]


@pytest.mark.parametrize("seeds", [1, 3])
def test_more_of_the_loss_than_comparable_neurons_is_h1(seeds):
    results = with_change(seeds)
    hypothesis, first = told(results)
    assert hypothesis == "H1" and first.startswith("H1 (fragile safety) is supported: the safety groups carry more")
    clauses = decision(results).sentences[1:]
    for name, clause in zip(JUDGING, clauses, strict=True):
        share = next(g for g in results["attribution"]["groups"] if g["group"] == name)["shares"]["budget"]
        assert clause.startswith(f"{name}, {percent(share['share_of_neurons'])} of the neurons, carries")
        assert signed_percent(share["share"]) in clause and signed_percent(share["expected"]) in clause
        assert clause.endswith("more, beyond the band.")
    results["interventions"] = patched("not")
    assert told(results)[0] == "H1"  # whatever patching says


@pytest.mark.parametrize(
    ("standing", "found", "hypothesis", "words"),
    [
        ("not", 0.4, "H2", "H2 (pathway creation) is supported: the safety groups carry no more"),
        ("small", None, "H2", "their original activations bring no refusals back"),
        ("opposite", None, "H2", "their original activations bring no refusals back"),
        ("stands_out", 0.4, "undecided", "bring refusals back"),
        ("not", None, "undecided", "might have been missed"),
        ("too_few_draws", 0.4, "undecided", "might have been missed"),
        ("stopped", None, "undecided", "might have been missed"),
        ("undefined", None, "undecided", "might have been missed"),
    ],
)
def test_no_more_of_the_loss_is_h2_only_with_patching(standing, found, hypothesis, words):
    results = with_change(times=1.0)
    results["interventions"] = patched(standing, found=found)
    assert told(results)[0] == hypothesis and words in told(results)[1]


def test_without_patching_no_more_of_the_loss_is_undecided():
    results = with_change(times=1.0)
    assert told(results)[0] == "undecided" and "neurondrift intervene --intervention patch" in told(results)[1]
    results["interventions"] = patched("not", groups=JUDGING[:1])
    assert f"original activations of {JUDGING[1]} bring refusals back was not measured" in told(results)[1]
    results["interventions"] = patched("not") | {"model_fingerprint": "of another model"}
    assert told(results)[0] == "undecided"
    assert returned(None) == "missing"


def test_groups_that_differ_wide_intervals_and_what_is_not_comparable_are_undecided():
    differ = with_change(safety_set_difference=3.0, safety_residual=1.0)
    assert told(differ) == (
        "undecided",
        "Undecided between H1 and H2: the groups differ: only safety_set_difference carries more, beyond the band.",
    )
    wide = with_change(times=1.2, noise=8.0)
    assert told(wide)[0] == "undecided" and "the intervals are too wide" in told(wide)[1]
    assert "would be called more with 80 % power from a share of +" in told(wide)[1]
    gated = copy.deepcopy(with_change())
    for group in gated["attribution"]["groups"]:
        if group["group"] == JUDGING[0]:
            group["shares"]["budget"] |= {"comparable": False, "not_comparable_because": ["imbalance"]}
    hypothesis, _first = told(gated)
    assert hypothesis == "H1" and f"{JUDGING[0].capitalize()} cannot be judged" in decision(gated).sentences[-1]
    for group in gated["attribution"]["groups"]:
        group["shares"]["budget"]["comparable"] = False
    assert told(gated)[0] == "undecided" and "for want of comparable neurons" in told(gated)[1]
    assert "not comparable" in render_text(gated)


def test_without_a_loss_or_a_measure_there_is_nothing_to_decide():
    results = with_change()
    none = copy.deepcopy(results)
    none["behaviour"]["margin_changes"][0] |= {"change": -0.1, "ci95": [-0.5, 0.3]}
    assert told(none)[0] == "undecided" and "no refusal margin was lost that can be told from none" in told(none)[1]
    gained = with_change(mean=1.0)
    gained["behaviour"]["margin_changes"] = []  # an older evaluation
    assert told(gained)[0] == "undecided" and "none was lost" in told(gained)[1]
    apart = copy.deepcopy(results)
    for total in apart["attribution"]["totals"]:
        total |= {"missed": 0.4, "adds_up": False}
    assert told(apart)[0] == "undecided" and "they miss 40% of the lost margin" in told(apart)[1]
    near = copy.deepcopy(results)
    for total in near["attribution"]["totals"]:
        total |= {"missed": 0.05, "adds_up": False}
    assert told(near)[0] == "H1" and "The parts miss 5.0 %" in decision(near).sentences[-1].replace("5.0%", "5.0 %")
    del results["attribution"]
    assert told(results)[0] == "undecided" and "was not measured (neurondrift attribute)" in told(results)[1]


@pytest.mark.parametrize("seeds", [1, 3])
def test_text_and_page_say_the_same_and_show_the_tables(seeds):
    results = with_change(seeds)
    text, page = render_text(results), render_page(results, [])
    assert max(map(len, text.splitlines())) <= 100
    first = decision(results).sentences[0]
    for shown in (text, re.sub(r"<[^>]+>", " ", page)):
        squeezed = re.sub(r"\s+", " ", shown)
        assert f"H1 or H2: {first}" in squeezed
        assert all(re.sub(r"\s+", " ", sentence) in squeezed for sentence in decision(results).sentences)
    assert "H1 or H2: " in "\n".join(text.splitlines()[:20])
    outputs, shares = answer_tables(results)
    assert {row[0].rstrip("*") for row in shares.rows} >= set(JUDGING) and "random" not in {r[0] for r in shares.rows}
    for name in JUDGING:
        share = next(g for g in results["attribution"]["groups"] if g["group"] == name)["shares"]["budget"]
        row = next(row for row in shares.rows if row[0] == f"{name}*")
        assert row[2] == signed_percent(share["share"]) and row[5] == "more, beyond the band"
        assert any(row[0] == f"{name}*" for row in outputs.rows)
    titles = [block.title for block in section(results).blocks if hasattr(block, "title")]
    assert len(titles) == 5 and "saved steps" in titles[1] and "straight way" in titles[2]
    assert build_document(results).answer.blocks[1].text.startswith("Answer: ")


def test_the_margin_stands_beside_the_refusals():
    results = with_change(3)
    tables = margin_tables(results)
    assert len(tables) == 3 and tables[0].headers == ("step", "harmful", "ordinary")
    assert tables[0].rows[0][:2] == ("before alignment", "-2.00 [-2.50, -1.50]")
    assert tables[0].rows[1] == ("0", "+3.00 [+2.50, +4.00]", "+3.00 [+2.50, +4.00]")
    assert tables[0].title in render_text(results)
    assert [ax.get_ylabel() for ax in refusals_over_training(results).axes][1] == "nats"
    del results["behaviour"]["margins"], results["behaviour"]["margins_before_alignment"]
    assert margin_tables(results) == [] and len(refusals_over_training(results).axes) == 2
