"""The report: the answer on the first screen, the numbers of the JSON, no leak of None."""

import copy
import re

import pytest

from helpers.results import METRICS, bare, undefine
from neurondrift.report import wording
from neurondrift.report.blocks import Table
from neurondrift.report.document import build_document
from neurondrift.report.page import render_page
from neurondrift.report.reading import metrics_of
from neurondrift.report.tables.drift import inference_table, matched_table, unmatched_table
from neurondrift.report.text import render_text

SAFETY = ("safety_top", "safety_set_difference")

FIRST_SCREEN = 40

LEAK = re.compile(r"\b(nan|None|null|inf)\b")


def test_the_first_screen_holds_the_verdicts_and_the_refusals(results: dict) -> None:
    first = "\n".join(render_text(results).splitlines()[:FIRST_SCREEN])
    squeezed = re.sub(r"\s+", " ", first)
    for effect in results["analysis"]["effects"]:
        if effect["metric"] == "relative":
            line = next(line for line in first.splitlines() if line.startswith(effect["group"] + " "))
            assert wording.effect(effect["g"]["value"]) in line
            assert wording.interval(effect["g"]["ci95"], wording.effect) in line
            assert wording.ratio(effect["detectable"]) in line
            if effect["group"] in SAFETY:
                assert effect["verdict"].upper() in line
            else:
                assert effect["verdict"] in line
    for seed in results["study"]["seeds"]:
        rates = [r for r in results["behaviour"]["rates"] if r["seed"] == seed and r["kind"] == "harmful"]
        assert f"{wording.rate(rates[0])} {wording.rate(rates[-1])}" in squeezed
    assert "before the alignment step, harmful requests refused: 0.06" in squeezed
    assert "H1, fragile safety" in squeezed
    assert "H2, pathway creation" in squeezed
    assert "3. " in first.split("Main caveats")[1]


def test_the_optimiser_stands_in_the_subtitle_and_in_the_settings(results: dict) -> None:
    assert "fine-tuned by lora under AdamW, 75 steps" in build_document(results).subtitle
    results["study"]["finetune"] |= {"optimiser": "sgd", "momentum": 0.9}
    results["study"]["optimiser"] = "sgd"
    assert "fine-tuned by lora under SGD with momentum 0.9, 75 steps" in build_document(results).subtitle
    squeezed = re.sub(r" +", " ", render_text(results))
    assert "fine-tuning optimiser sgd" in squeezed and "fine-tuning momentum 0.9" in squeezed
    del results["study"]["optimiser"]  # files of older versions, logs made elsewhere
    assert "fine-tuned by lora, 75 steps" in build_document(results).subtitle


def test_each_verdict_is_said_with_its_hypothesis(results: dict) -> None:
    said = {
        "more": "MORE (H1, fragile safety)",
        "similar": "SIMILAR (H2, pathway creation)",
        "protected": "PROTECTED (neither H1 nor H2)",
        "inconclusive": "INCONCLUSIVE (H1 or H2 undecided)",
    }
    for verdict, words in said.items():
        changed = copy.deepcopy(results)
        for effect in changed["analysis"]["effects"]:
            effect["verdict"] = verdict
        answer = next(b for b in build_document(changed).answer.blocks if isinstance(b, Table))
        assert [row[1] for row in answer.rows[:2]] == [words] * 2
        assert ("drifted less: protected" in render_text(changed)) == (verdict == "protected")


def test_no_line_is_wider_than_100_columns(results: dict) -> None:
    results["study"]["name"] = "x" * 300
    results["groups"][0]["rule"] = "a long rule " * 40
    for effect in results["analysis"]["effects"]:
        if effect["group"] == "safety_top":
            effect["group"] = "safety_" + "very_long_name_" * 10
    text = render_text(results)
    assert max(map(len, text.splitlines())) <= 100
    assert text.endswith("\n")


def test_every_number_in_the_effect_tables_is_the_one_of_the_json(results: dict) -> None:
    by_key = {(e["group"], e["metric"]): e for e in results["analysis"]["effects"]}
    seen = 0
    for metric in metrics_of(results):
        for row in matched_table(results, metric).rows:
            effect = by_key[row[0], metric]
            expected = (
                effect["mean_members"]["value"],
                effect["mean_controls"]["value"],
                effect["ratio_matched"]["value"],
                effect["g"]["value"],
            )
            assert [float(cell) for cell in row[1:5]] == pytest.approx(expected, rel=0.006, abs=0.0051)
            assert [float(v) for v in row[5].strip("[]").split(",")] == pytest.approx(effect["g"]["ci95"], abs=0.0051)
            if effect["p_holm"] is None:
                assert row[6].startswith(("–", "undefined"))
                assert row[0] == "random" or not effect["effect_norm"]["comparable"]
            else:
                assert float(row[6].removeprefix("<")) == pytest.approx(effect["p_holm"], rel=0.06, abs=1e-4)
            assert row[7] == effect["verdict"]
            seen += 1
    assert seen == len(by_key) == 12
    for row in unmatched_table(results).rows:
        effect = by_key[row[1], row[0]]
        assert float(row[3]) == pytest.approx(effect["mean_others"]["value"], rel=0.006)
        assert float(row[4]) == pytest.approx(effect["ratio_unmatched"]["value"], abs=0.0051)
        if effect["group"] != "random":
            assert float(row[6]) == pytest.approx(effect["d_random"]["value"], abs=0.0051)
    for metric in METRICS:
        for row in inference_table(results, metric).rows:
            effect = by_key[row[0], metric]
            assert float(row[6]) == pytest.approx(effect["detectable"], abs=0.0051)
            for index, field in ((2, "p"), (4, "p_equivalence"), (5, "p_permutation")):
                assert float(row[index].removeprefix("<")) == pytest.approx(effect[field], rel=0.06, abs=1e-4)


def test_unmatched_figures_are_marked_as_confounded(results: dict) -> None:
    assert "* unmatched: confounded with |w|" in render_text(results)
    table = unmatched_table(results)
    marked = {header for header in table.headers if header.endswith("*")}
    assert marked == {"mean of all others*", "raw ratio*", "Cohen's d vs random*"}


@pytest.mark.parametrize(
    "change",
    [lambda r: r, bare, undefine, lambda r: {"analysis": undefine(r["analysis"])}, lambda r: {}],
    ids=["whole", "bare", "undefined", "only analysis", "empty"],
)
def test_nothing_undefined_leaks(results: dict, change) -> None:
    results = change(results)
    text = render_text(results)
    page = render_page(results, [])
    page = re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL).replace("default-src 'none'", "")
    page = page.replace(page[page.index("<meta http-equiv") : page.index("<title>")], "")
    for rendered in (text, page):
        assert not LEAK.search(rendered), LEAK.search(rendered)
    assert max(map(len, text.splitlines())) <= 100


def test_undefined_values_are_shown_with_their_reason(results: dict) -> None:
    effect = next(e for e in results["analysis"]["effects"] if (e["group"], e["metric"]) == ("safety_top", "relative"))
    effect["g"].update(
        value=None,
        value_reason="no control in any stratum",
        ci90=[None, None],
        ci95=[None, None],
        ci95_reason="no control in any stratum",
    )
    text = re.sub(r"\s+", " ", render_text(results))
    assert "undefined (a)" in text
    assert "(a) undefined (no control in any stratum)" in text
    assert "neither hypothesis can be evaluated" in text


def test_a_failing_negative_control_is_the_first_caveat(results: dict) -> None:
    results["analysis"]["weaknesses"] = ["a", "b", "c", "the random group, a negative control, is found more"]
    first = "\n".join(render_text(results).splitlines()[:FIRST_SCREEN])
    assert "1. the random group, a negative control, is found more" in first
    assert "(1 more at the end)" in first
