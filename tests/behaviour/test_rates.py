"""Rates of answers: what counts, intervals and changes against scipy and a plain cluster bootstrap."""

import math

import numpy as np
import pytest
from scipy import stats

from neurondrift.behaviour.rates import category_interval, mean_of, paired_change, per_prompt, refusal_rate


def test_any_success_counts():
    def row(identifier, refused, coherent=True, judge="refusal", score=None):
        success = not refused and coherent
        return dict(
            kind="harmful", id=identifier, judge=judge, primary=judge == "refusal", refused=refused,
            success=success, coherent=coherent, score=score,
        )  # fmt: skip

    rows = [row("a", True), row("a", False), row("b", True), row("b", True)]
    rows += [row("c", True), row("c", False, coherent=False), row("a", True, judge="keyword", score=0.3)]
    assert [(r["id"], r["refused"], r["success"], r["answers"]) for r in per_prompt(rows)] == [
        ("a", False, True, 2),
        ("b", True, False, 2),
        ("c", False, False, 2),
    ]
    (keyword,) = per_prompt(rows, judge="keyword")
    assert (keyword["refused"], keyword["score"]) == (True, 0.3)
    old = [{"kind": "harmful", "id": "a", "refused": False, "coherent": True}]  # before there were attacks
    assert per_prompt(old)[0]["success"] is True


def test_refused_undecided_partial_and_the_rest_add_up():
    def row(identifier, verdict, coherent=True):
        refused, undecided = verdict == "full", verdict == "undecided"
        success = not refused and not undecided and coherent
        return dict(
            kind="harmful", id=identifier, verdict=verdict, refused=refused, undecided=undecided, success=success,
            coherent=coherent, refused_short=refused or identifier == "pair",
        )  # fmt: skip

    kinds = ["full", "partial", "none", "undecided"]
    rows = [row(f"{a}+{b}", kind) for a in kinds for b in kinds for kind in (a, b)]
    prompts = {found["id"]: found for found in per_prompt(rows)}
    for found in prompts.values():
        assert sum(bool(found[name]) for name in ("refused", "undecided", "partial")) <= 1
    of = {name: {key for key, found in prompts.items() if found[name]} for name in ("refused", "undecided", "partial")}
    assert of["refused"] == {"full+full"}
    assert of["undecided"] == {"full+undecided", "undecided+full", "undecided+undecided"}
    assert of["partial"] == {
        "full+partial", "partial+full", "partial+partial", "partial+undecided", "undecided+partial",
    }  # fmt: skip
    rate = refusal_rate([found["refused"] for found in prompts.values()])
    assert (rate.refusals, rate.n) == (1, 16)  # all that were asked are in the denominator
    (short,) = per_prompt([row("pair", "none"), row("pair", "full")])
    assert (short["refused"], short["refused_short"]) == (False, True)
    assert per_prompt([{"kind": "harmful", "id": "a", "refused": True, "coherent": True}])[0]["refused_short"] is True


def test_the_category_interval_is_a_cluster_bootstrap():
    rng = np.random.default_rng(1)
    shares = rng.uniform(0.2, 0.9, 12)
    categories = [f"c{c}" for c in range(12) for _ in range(10 + c)]
    marks = [bool(rng.random() < shares[int(c[1:])]) for c in categories]
    found = category_interval(marks, categories, resamples=20_000)
    counts = {c: [m for m, name in zip(marks, categories, strict=True) if name == c] for c in set(categories)}
    names = sorted(counts)
    means = []
    for _ in range(4000):
        drawn = rng.choice(names, len(names))
        pooled = np.concatenate([counts[name] for name in drawn])
        means.append(pooled.mean())
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(means, (0.025, 0.975))), abs=0.012)
    assert found == category_interval(marks, categories, resamples=20_000)
    wilson = 1.96 * math.sqrt(np.mean(marks) * (1 - np.mean(marks)) / len(marks))
    assert found.high - found.low > 2 * wilson  # what prompts of a category share widens it


@pytest.mark.parametrize(
    ("marks", "categories", "reason"),
    [
        ([True, False] * 4, list("aabbccdd"), "fewer than 5 categories"),
        ([True] * 6, list("abcdef"), "every category has the same share"),
        ([True, False] * 3, ["a", "b", "c", "d", "e", ""], "some prompts have no category"),
        ([], [], "fewer than 5 categories"),
    ],
)
def test_no_interval_over_categories_without_a_reason(marks, categories, reason):
    found = category_interval(marks, categories)
    assert math.isnan(found.low) and math.isnan(found.high)
    assert found.reason == reason


def test_wilson_interval():
    rate = refusal_rate([True] * 9 + [False])
    z = stats.norm.ppf(0.975)
    centre = (0.9 + z**2 / 20) / (1 + z**2 / 10)
    half = z / (1 + z**2 / 10) * math.sqrt(0.9 * 0.1 / 10 + z**2 / 400)
    assert (rate.rate, rate.refusals, rate.n) == (0.9, 9, 10)
    assert (rate.low, rate.high) == (pytest.approx(centre - half), pytest.approx(centre + half))
    assert math.isnan(refusal_rate([]).rate)


def test_paired_change_is_the_exact_mcnemar_test():
    before = {str(i): True for i in range(20)}
    after = {str(i): i >= 7 for i in range(19)} | {"other": True}
    change = paired_change(before, after)
    assert change.n == 19
    assert change.difference == pytest.approx(-7 / 19)
    assert change.p_mcnemar == pytest.approx(stats.binomtest(0, 7, 0.5).pvalue)
    assert math.isnan(paired_change({"a": True}, {"b": True}).p_mcnemar)


def test_the_share_refused_is_of_coherent_answers_and_the_others_are_counted():
    from neurondrift.behaviour.rates import coherent_rate, refusal_rate

    def row(refused, coherent=True, undecided=False):
        return {"refused": refused, "coherent": coherent, "undecided": undecided}

    rows = [row(True), row(False), row(True, coherent=False), row(False, undecided=True)]
    rows.append(row(False, coherent=False, undecided=True))
    found = coherent_rate(rows)
    assert found[:5] == refusal_rate([True, False])
    assert (found.asked, found.incoherent, found.undecided) == (5, 1, 2)
    assert found.n + found.incoherent + found.undecided == found.asked
    nothing = coherent_rate([row(True, coherent=False)])
    assert nothing.n == 0 and nothing.rate != nothing.rate


def test_a_mean_has_the_interval_of_students_t():
    values = np.random.default_rng(0).normal(-1.0, 2.0, 24)
    found = mean_of(values.tolist())
    low, high = stats.t.interval(0.95, 23, values.mean(), stats.sem(values))
    assert (found.mean, found.low, found.high) == pytest.approx((values.mean(), low, high)) and found.n == 24
    assert np.isnan(mean_of([1.0])[1:3]).all() and mean_of([1.0]).mean == 1.0 and np.isnan(mean_of([]).mean)
