"""The report: the answer on the first screen, the numbers of the JSON, no leak of None."""

import re

import pytest

from helpers.results import bare, undefine
from neurondrift.report import wording
from neurondrift.report.blocks import Table
from neurondrift.report.conclusion import weakness_clause
from neurondrift.report.document import build_document
from neurondrift.report.page import render_page
from neurondrift.report.reading import metrics_of
from neurondrift.report.tables.answer import controls_table
from neurondrift.report.tables.drift import matched_table, unmatched_table, weight_table
from neurondrift.report.tables.ratios import balance_table, contrast_table, counts_table, ratio_table
from neurondrift.report.text import render_text
from neurondrift.statistics.weaknesses import FailedPositive

FIRST_SCREEN = 68

LEAK = re.compile(r"\b(nan|None|null|inf)\b")
#: A length of drift decides for neither hypothesis, and supports none.
CLAIM = re.compile(
    r"support\w*\s+(H1|H2|neither|hypothes)|\((H1|H2)[,)]|\b(H1|H2)\b[^.;]{0,40}\b(is|are|was)?\s*(support|confirm|true|shown)"
    r"|as H[12] |similar \(H2",
    re.I,
)


def at(results: dict, group: str, metric: str = "relative") -> dict:
    """One effect."""
    return next(e for e in results["analysis"]["effects"] if (e["group"], e["metric"]) == (group, metric))


def squeezed(results: dict) -> str:
    return re.sub(r"\s+", " ", render_text(results))


def test_the_first_screen_holds_the_verdicts_and_the_refusals(results: dict) -> None:
    first = "\n".join(render_text(results).splitlines()[:FIRST_SCREEN])
    told = re.sub(r"\s+", " ", first)
    for group in ("safety_set_difference", "safety_residual", "safety_top", "utility_top"):
        effect = at(results, group)
        line = next(line for line in first.splitlines() if re.match(rf"{group} +(safety|utility)", line))
        for comparison in ("effect_matched", "effect_norm"):
            assert wording.ratio_with_interval(effect[comparison]) in line
        judged = effect["effect_matched"]
        said = wording.verdict(judged)
        assert (said.upper() if effect["judging"] else said) in line
        assert f"{judged['n_compared']}/{judged['n_members'] - judged['n_compared']}" in line
        assert wording.ratio(judged["smallest_more"]) in line
    for seed in results["study"]["seeds"]:
        rates = [r for r in results["behaviour"]["rates"] if r["seed"] == seed and r["kind"] == "harmful"]
        assert f"{wording.rate(rates[0])} {wording.rate(rates[-1])}" in told
    assert "before the alignment step, harmful requests refused: 0.06" in told
    assert "under AdamW, do the neurons that keep it safe move further, as far, or less far than" in told
    assert "Lengths of drift alone do not decide between H1 (fragile safety) and H2 (pathway creation)" in told
    assert "Early and late layers apart: safety_set_difference first third" in told
    assert "3. " in first.split("Main caveats")[1]


def test_controls_of_known_answer_stand_on_the_first_screen(results: dict) -> None:
    table = controls_table(results)
    rows = {row[0]: row for row in table.rows}
    checks = {check["group"]: check for check in results["analysis"]["controls"]}
    assert set(checks) == {"random", "utility_set_difference", "style_set_difference", "gradient_top"}
    for name, check in checks.items():
        assert rows[name][1].startswith("positive" if name == "gradient_top" else "negative")
        assert rows[name][4] == {True: "passed", False: "FAILED", None: "open"}[check["passed"]]
    assert rows["gradient_top"][2] == "further"
    assert rows["safety_set_difference × 1.25"][4] == "passed"
    assert table.title in render_text(results)
    checks["random"]["passed"] = False
    checks["gradient_top"].update(passed=None, verdict="inconclusive")
    at(results, "safety_set_difference")["injected"]["found"] = False
    failed = {row[0] for row in controls_table(results).rows if row[4] == "FAILED"}
    assert failed == {"random", "gradient_top", "safety_set_difference × 1.25"}


@pytest.mark.parametrize("verdict", ["more", "similar", "protected", "inconclusive"])
def test_no_sentence_claims_a_hypothesis_by_lengths_alone(results: dict, verdict: str) -> None:
    for effect in results["analysis"]["effects"]:
        for comparison in ("effect_matched", "effect_norm"):
            effect[comparison] |= {"verdict": verdict, "comparable": True, "below_band": False}
        effect["verdict"] = verdict
    words = {"more": "further", "similar": "as far", "protected": "less far"}.get(verdict, verdict)
    answer = build_document(results).answer.blocks
    row = next(b for b in answer if isinstance(b, Table)).rows[0]
    assert row[:3] == ("safety_set_difference", "safety*", words.upper())
    for told in (squeezed(results), re.sub(r"<[^>]+>|\s+", " ", render_page(results, []))):
        assert not CLAIM.search(told), CLAIM.search(told)
        assert "Undecided" in told or verdict == "protected"
        assert "Cohen" in told and "cannot show" in told


def test_the_pattern_of_a_claim_finds_claims() -> None:
    for claim in (
        "The data support H2 (pathway creation)",
        "SIMILAR (H2, pathway creation)",
        "drifted more, as H1 (fragile safety) says",
        "H1 (they drift more): supported",
        "counts as the same (H2)",
    ):
        assert CLAIM.search(claim), claim


def test_a_difference_below_the_band_is_said(results: dict) -> None:
    found = at(results, "safety_set_difference")["effect_matched"]
    found |= {"verdict": "similar", "below_band": True, "comparable": True, "ratio": 1.07}
    assert wording.verdict(found) == "further, by less than the band"
    assert wording.verdict(found | {"ratio": 0.95}) == "less far, by less than the band"
    assert "FURTHER, BY LESS" in squeezed(results)


def test_what_is_not_comparable_is_said_with_its_reasons(results: dict) -> None:
    found = at(results, "safety_set_difference")["effect_matched"]
    found |= {
        "comparable": False,
        "verdict": "inconclusive",
        "not_comparable_because": ["imbalance", "without_control"],
        "n_compared": 90,
        "n_without_control": 10,
    }
    for each in found["balance"]:
        each["after"] = 0.3 if each["name"] == "utility_score" else 0.01
    told = squeezed(results)
    assert "NOT COMPARABLE" in told
    assert (
        "safety_set_difference is not comparable: utility score differs by +0.30 SD after adjustment; 10 of 100 members "
        "have no control" in told
    )
    assert "Neither hypothesis can be evaluated" in told


def test_what_varies_between_repetitions_is_said_with_the_agreement_of_redrawn_groups(results: dict) -> None:
    told = squeezed(results)
    assert "not the alignment run, the draw of calibration examples" in told
    assert "not measured (neurondrift stability)" in told
    figures = {"draws": 3, "pairs": 3, "members": 230.0, "jaccard": 0.41, "jaccard_low": 0.38, "jaccard_high": 0.44}
    figures |= {"overlap": 0.6, "chance_jaccard": 0.03, "chance_overlap": 0.06}
    results["stability"] = {
        "model_fingerprint": results["study"]["model_fingerprint"],
        "draws": 3,
        "pool": {"safety": 400},
        "examples": {"safety": 128},
        "groups": {"safety_set_difference": {"neuron": figures}},
    }
    told = squeezed(results)
    assert "(groups of re-drawn examples have a Jaccard of 0.41 for safety_set_difference)" in told
    assert "0.41 [0.38, 0.44] 0.03 0.60" in told
    results["stability"]["model_fingerprint"] = "another"
    assert "0.41" not in squeezed(results).split("WHAT VARIES")[1].split("DRIFT OVER TRAINING")[0]
    results["study"]["aligned_first"] = False
    assert "the alignment run" not in squeezed(results)


def test_findings_of_an_older_version_are_not_judged(results: dict) -> None:
    """Their verdicts rested on g, and their sentences named a hypothesis."""
    analysis = results["analysis"]
    for name in ("band", "comparison_that_judges", "judging", "controls"):
        del analysis[name]
    for effect in analysis["effects"]:
        for name in ("judging", "effect_norm", "effect_matched", "injected"):
            del effect[name]
    analysis["sentences"] = ["The data support H2 (pathway creation), judged by safety_top."]
    told = squeezed(results)
    assert "Answer: none by this version" in told and "run neurondrift analyze again" in told
    assert not CLAIM.search(told)


def test_strata_judge_where_no_other_covariate_is_known(results: dict) -> None:
    results["analysis"]["comparison_that_judges"] = "norm"
    for effect in results["analysis"]["effects"]:
        effect["effect_matched"] = None
    answer = next(b for b in build_document(results).answer.blocks if isinstance(b, Table))
    assert "norm only, which judges here" in answer.title
    assert not any(header.startswith("matched") for header in answer.headers)


def test_the_optimiser_stands_in_the_subtitle_and_in_the_settings(results: dict) -> None:
    assert "fine-tuned by lora under AdamW, 75 steps" in build_document(results).subtitle
    results["study"]["finetune"] |= {"optimiser": "sgd", "momentum": 0.9}
    results["study"]["optimiser"] = "sgd"
    assert "fine-tuned by lora under SGD with momentum 0.9, 75 steps" in build_document(results).subtitle
    squeezed = re.sub(r" +", " ", render_text(results))
    assert "fine-tuning optimiser sgd" in squeezed and "fine-tuning momentum 0.9" in squeezed
    del results["study"]["optimiser"]  # files of older versions, logs made elsewhere
    assert "fine-tuned by lora, 75 steps" in build_document(results).subtitle


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
    fields = {"matched": "effect_matched", "norm": "effect_norm"}
    seen = 0
    for metric in metrics_of(results):
        for row in ratio_table(results, metric).rows:
            found = by_key[row[0], metric][fields[row[1]]]
            assert row[2] == wording.verdict(found)
            value, limits = row[3].split(" ", 1)
            assert float(value) == pytest.approx(found["ratio"], abs=0.0051)
            for cell, field in ((limits, "ratio_ci95"), (row[4], "ratio_ci90")):
                assert [float(v) for v in cell.strip("[]").split(",")] == pytest.approx(found[field], abs=0.0051)
            if found["p_holm"] is None:
                assert row[6] == "–"
            else:
                assert float(row[6].removeprefix("<")) == pytest.approx(found["p_holm"], rel=0.06, abs=1e-4)
            for index, field in ((5, "p"), (7, "p_equivalence")):
                assert float(row[index].removeprefix("<")) == pytest.approx(found[field], rel=0.06, abs=1e-4)
            seen += 1
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
            assert float(row[6].removeprefix("<")) == pytest.approx(effect["p_permutation"], rel=0.06, abs=1e-4)
            assert float(row[7]) == pytest.approx(effect["detectable"], abs=0.0051)
    assert seen == 2 * len(by_key) == 48
    for row in unmatched_table(results).rows:
        effect = by_key[row[1], row[0]]
        assert float(row[3]) == pytest.approx(effect["mean_others"]["value"], rel=0.006)
        assert float(row[4]) == pytest.approx(effect["ratio_unmatched"]["value"], abs=0.0051)
        if effect["group"] != "random":
            assert float(row[6]) == pytest.approx(effect["d_random"]["value"], abs=0.0051)


def test_balance_and_counts_are_those_of_the_json(results: dict) -> None:
    effect = at(results, "safety_residual")["effect_matched"]
    row = next(row for row in counts_table(results).rows if row[:2] == ("safety_residual", "matched"))
    trimmed = effect["n_without_control"] / (effect["n_compared"] + effect["n_without_control"])
    assert row[2:7] == (
        f"{effect['n_members']}",
        f"{effect['n_compared']}",
        f"{effect['n_without_control']} ({trimmed:.2f})",
        f"{effect['n_undefined']}",
        f"{effect['sites']} ({effect['sites_left_out']})",
    )
    assert float(row[7].replace(",", "")) == pytest.approx(effect["effective_controls"], abs=0.51)
    told = {row[2]: row for row in balance_table(results).rows if row[:2] == ("safety_residual", "matched")}
    for each in effect["balance"]:
        row = told[wording.covariate(each["name"])]
        assert [float(cell) for cell in row[3:5]] == pytest.approx((each["before"], each["after"]), abs=0.0051)


def test_contrasts_say_how_many_members_they_leave_out(results: dict) -> None:
    contrast = next(c for c in results["analysis"]["contrasts"] if c["metric"] == "relative")
    row = contrast_table(results, "relative").rows[0]
    assert row[1] == f"{contrast['shared']}"
    assert row[2] == wording.ratio_with_interval(contrast)


def test_quotients_of_single_weights_are_medians(results: dict) -> None:
    for row in results["weights"]:
        row |= {"median_relative": 0.0015, "matched_median_relative": 0.0012, "ratio_relative": 1.25}
    rows = [row for row in weight_table(results).rows if "/" in row[3]]
    assert {row[3:7] for row in rows} == {("median |Δw|/|w₀|", "0.00150", "0.00120", "1.25")}
    assert "0.0213" not in render_text(results), "a mean of quotients with weights near 0"


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
    page = re.sub(r"<(style|script)>.*?</\1>", "", page, flags=re.DOTALL).replace("default-src 'none'", "")
    page = page.replace(page[page.index("<meta http-equiv") : page.index("<title>")], "")
    for rendered in (text, page):
        assert not LEAK.search(rendered), LEAK.search(rendered)
    assert max(map(len, text.splitlines())) <= 100


def test_undefined_values_are_shown_with_their_reason(results: dict) -> None:
    at(results, "safety_set_difference")["effect_matched"].update(
        comparable=True,
        ratio=None,
        ratio_reason="no control in any stratum",
        ratio_ci90=[None, None],
        ratio_ci90_reason="no control in any stratum",
        ratio_ci95=[None, None],
        ratio_ci95_reason="no control in any stratum",
    )
    text = squeezed(results)
    assert "undefined (a)" in text
    assert "(a) undefined (no control in any stratum)" in text
    assert "neither hypothesis can be evaluated (no control in any stratum)" in text


def test_a_failing_control_is_the_first_caveat(results: dict) -> None:
    positive = weakness_clause(FailedPositive(group="gradient_top", role="positive", verdict="similar"))
    details = results["analysis"]["weakness_details"] = [{"kind": "positive_control", "text": positive, "numbers": {}}]
    results["analysis"]["weaknesses"] = ["a", "b", "the random group, a negative control, is found more", positive]
    caveats = render_text(results).split("Main caveats (1 more at the end):")[1]
    first = " ".join(caveats.split())
    assert first.startswith(
        "1. gradient_top, the positive control, was not found to move further (as far): the outcome"
    )
    assert "is unfit for this run 2. the random group, a negative control, is found more 3. a" in first
    assert details
