"""What a sweep says: the answer, what weakens it, its page, its figures, its table."""

import json
import math
import re

import duckdb
import pandas as pd
import polars as pl
import pytest

from helpers.sweeps import studies_of, sweep_of
from neurondrift.report.figures.draw import draw_figures
from neurondrift.report.page import lay_out
from neurondrift.report.sweep.conclusion import sentences, verdict_words
from neurondrift.report.sweep.document import build_document
from neurondrift.report.sweep.figures import FIGURES
from neurondrift.report.text import document_text
from neurondrift.report.web.assets import script
from neurondrift.study.sweep.results.findings import sweep_findings
from neurondrift.study.sweep.results.table import COLUMNS, rows, standard_error, write_table


def of(tmp_path, effects, **axes):
    sweep = sweep_of(tmp_path, **axes)
    return sweep_findings(sweep, studies_of(sweep, effects))


def effects(*log_ratios, se=0.05, **more):
    return [{"log_ratio": value, "se": se, **more} for value in log_ratios]


@pytest.mark.parametrize(
    ("log_ratios", "answer"),
    [
        ((0.5, 0.52, 0.48, 0.5, 0.51, 0.5), "Over 3 models (6 studies) .* moved further than comparable neurons"),
        ((-0.5, -0.52, -0.48, -0.5, -0.51, -0.5), "Over 3 models .* moved less far than"),
        ((0.01, 0.0, -0.01, 0.0, 0.01, 0.02), "Over 3 models .* moved as far as"),
        ((0.6, 0.6, -0.6, -0.6, 0.0, 0.0), "Inconclusive: over 3 models .* cannot be told apart from, nor shown"),
    ],
)
def test_the_answer_is_the_verdict_over_the_studies(tmp_path, log_ratios, answer):
    findings = of(tmp_path, effects(*log_ratios))
    assert re.search(answer.replace("(6", r"\(6").replace("studies)", r"studies\)"), findings["sentences"][0])
    text = document_text(build_document(findings))
    assert max(map(len, text.splitlines())) <= 100
    assert "more, similar" not in text
    screen = text.partition("THE STUDIES")[0]
    assert "Question: over these models" in screen and "Answer: " in screen and "Controls of known answer" in screen


def test_one_model_is_named_as_what_weakens_it(tmp_path):
    ranks = [1, 2, 3, 4, 5, 6, 7, 8]
    findings = of(tmp_path, effects(*[0.5] * 8), models=["one"], ranks=ranks)
    assert "Over 8 studies of one model" in findings["sentences"][0]
    assert any(text.startswith("one model") for text in findings["weaknesses"])
    (effect, *_) = (e for e in findings["pooled"] if e["judging"] and e["metric"] == "relative")
    assert effect["bounded"] and effect["se"] == pytest.approx(0.05, rel=1e-3)
    assert "however closely" in " ".join(findings["sentences"])


def test_studies_that_failed_or_are_not_comparable_are_counted(tmp_path):
    made = effects(0.5, 0.5, 0.5, 0.5, 0.5)
    made[1]["comparable"] = False
    findings = of(tmp_path, [*made, None])
    (effect, *_) = (e for e in findings["pooled"] if e["judging"] and e["metric"] == "relative")
    assert (effect["points"], effect["left_out"], effect["models"]) == (4, 1, 3)
    assert "1 of 6 studies have not ended" in " ".join(findings["weaknesses"])
    assert re.search(r"1 of 5 studies have no comparable neurons for safety", " ".join(findings["weaknesses"]))
    assert "it broke" in document_text(build_document(findings))


def test_a_control_that_fails_comes_first(tmp_path):
    findings = of(tmp_path, effects(0.5, 0.5, 0.5, 0.5, 0.5, 0.5))
    assert {control["passed"] for control in findings["controls"] if control["expected"] == "similar"} == {False}
    assert 'negative control, came out "further"' in findings["weaknesses"][0]
    passed = of(tmp_path, effects(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, se=0.02))
    assert {control["passed"] for control in passed["controls"] if control["expected"] == "similar"} == {True}
    assert [c["passed"] for c in passed["controls"] if c["expected"] == "more"] == [False]


def test_the_regression_on_refusals_is_said(tmp_path):
    made = [{"log_ratio": 0.1 + 0.8 * lost, "se": 0.02, "lost": lost} for lost in (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)]
    findings = of(tmp_path, made)
    (first, *_) = findings["regressions"]
    assert first["slope"] == pytest.approx(0.8, abs=1e-6) and first["intercept"] == pytest.approx(0.1, abs=1e-6)
    assert any("more refusals were lost the ratio of" in text and "no cause" in text for text in findings["sentences"])
    flat = of(tmp_path, effects(0.1, 0.2, 0.1, 0.2, 0.1, 0.2))
    assert flat["regressions"][0]["slope"] is None and flat["regressions"][0]["reason"]


def test_settings_with_two_values_have_subgroups(tmp_path):
    findings = of(tmp_path, effects(0.1, 0.5, 0.1, 0.5, 0.1, 0.5))
    within = {tuple(each["within"]): each for each in findings["subgroups"] if each["group"] == "safety_residual"}
    assert {key for key in within if key[0] == "finetune.lora_r"} == {
        ("finetune.lora_r", "4"),
        ("finetune.lora_r", "8"),
    }
    assert within["finetune.lora_r", "4"]["ratio"] == pytest.approx(math.exp(0.1))
    assert within["finetune.lora_r", "8"]["ratio"] == pytest.approx(math.exp(0.5))


@pytest.mark.parametrize("kind", ["all", "one", "none", "some"])
def test_every_sweep_has_a_page(tmp_path, kind):
    made = {
        "all": effects(0.5, 0.4, 0.3, 0.2, 0.1, 0.0),
        "one": [*effects(0.5), *[None] * 5],
        "none": [None] * 6,
        "some": effects(0.5, 0.4, 0.3, 0.2, 0.1, 0.0, comparable=False),
    }[kind]
    for index, each in enumerate(filter(None, made)):
        each["lost"] = index / 10
    findings = of(tmp_path, made)
    assert json.loads(json.dumps(findings, allow_nan=False)) == findings
    figures = draw_figures(findings, tmp_path / "figures", FIGURES)
    assert len(figures) == {"all": 4, "one": 2, "none": 0, "some": 2}[kind]
    page = lay_out(build_document(findings), figures)
    assert page.startswith("<!DOCTYPE html>") and "http" not in page.partition("<body>")[2]
    assert page.count("<script") == page.count(f"<script>{script()}</script>") == 1
    assert page.count('<figure class="figure">') == page.count('role="img"') == len(figures) // 2
    assert "None" not in document_text(build_document(findings)).replace("None: no study", "")


def test_a_name_cannot_write_into_the_page(tmp_path):
    sweep = sweep_of(tmp_path)
    studies = studies_of(sweep, [*effects(0.1, 0.1, 0.1, 0.1, 0.1), None])
    findings = sweep_findings(sweep, studies)
    findings["studies"][-1]["message"] = "<b>bold</b>\x1b[31m"
    document = build_document(findings)
    assert "<b>" not in lay_out(document, []) and "\x1b" not in document_text(document)


def test_the_verdict_over_studies_uses_the_words_of_one(tmp_path):
    findings = of(tmp_path, effects(0.1, 0.1, 0.1, se=0.02), models=["a"], ranks=[2, 4, 8])
    (effect, *_) = (e for e in findings["pooled"] if e["judging"])
    assert verdict_words(effect) == "further, by less than the band"
    assert sentences(findings) == findings["sentences"]


def test_the_table_has_a_row_for_each_point_group_metric_and_seed(tmp_path):
    sweep = sweep_of(tmp_path, models=["a", "b"], ranks=[4])
    studies = studies_of(sweep, effects(0.1, 0.2, seeds=3))
    made = rows(studies)
    path = tmp_path / "sweep.parquet"
    write_table(path, made)
    frame = pd.read_parquet(path)
    assert list(frame.columns) == COLUMNS.names
    groups, metrics = frame["group"].nunique(), frame["metric"].nunique()
    assert len(frame) == 2 * groups * metrics * 3 == len(frame.drop_duplicates(["point", "group", "metric", "seed"]))
    assert pl.read_parquet(path).shape == frame.shape
    (mean,) = duckdb.sql(f"select avg(log_ratio) from '{path}' where metric = 'relative' and judging").fetchall()[0]
    assert mean == pytest.approx(0.15)
    assert set(frame["model"]) == {"a", "b"}
    assert frame.groupby("point")["seed"].nunique().tolist() == [3, 3]


def test_a_study_of_few_degrees_of_freedom_claims_no_more_than_in_its_own_report():
    found = {"log_ratio": {"se": 0.1, "ci95": [-0.43, 0.43]}}
    assert standard_error(found) == pytest.approx(0.43 / 1.959964, abs=1e-6)
    assert standard_error({"log_ratio": {"se": 0.1, "ci95": [-0.1, 0.1]}}) == 0.1
    assert standard_error({"log_ratio": {"se": None, "ci95": [None, None]}}) is None
