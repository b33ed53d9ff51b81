"""The table of what a study took, beside what was foretold."""

import sys

from helpers.paths import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "docs"))
from costs import foretold, in_short, table

SAID = (
    "estimate 43m28s, 19.2 GB of memory (attribute), 16.4 GB of disk score 10m42s, groups 1h02m, evaluate 9m09s, "
    "analyze, report 20.0s"
)


def attempt(stage, seconds, peak):
    return {"stage": stage, "seconds": seconds, "peak_gb": peak, "ended": peak is not None}


def test_what_verify_says_is_read_stage_by_stage():
    assert foretold(SAID) == {
        "estimate": 2608,
        "score": 642,
        "groups": 3720,
        "evaluate": 549,
        "analyze, report": 20,
    }


def test_stages_are_added_up_and_what_was_not_foretold_stands_apart():
    tries = [
        attempt("score", 642, 16),
        attempt("analyze", 10, 1),
        attempt("report", 20, 2),
    ]
    costs = {"foretold": SAID, "attempts": [attempt("score", 100, None), *tries], "busy": {"score": 1284}}
    costs["attempts"].append(attempt("intervene", 1000, 8))
    assert table(costs)[2:] == [
        "| score | 642 | 642 | 1.00 | 16.0 | 1,284 (2.00 ×) |",
        "| analyze, report | 30 | 20 | 1.50 | 2.0 |  |",
        "| **sum** | 672 | 2,608 | 0.26 | 16.0 |  |",
        "| score, broken off | 100 | – | – | – |  |",
        "| intervene | 1,000 | – | – | 8.0 |  |",
        "| **all** | 1,772 | – | – | 16.0 |  |",
    ]
    assert not any("**all**" in line for line in table(costs | {"attempts": tries, "busy": {}}))


def test_all_of_it_in_a_sentence():
    costs = {"attempts": [attempt("score", 90, None), attempt("score", 3600, 15.6)]}
    costs["machine"] = {"cores": 2, "processor": "AMD EPYC, with avx512_bf16"}
    assert in_short(costs) == "It took 62 min and 16 GB on 2 cores (AMD EPYC, with avx512_bf16)."
