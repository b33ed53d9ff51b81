"""The types of the findings are what the files hold: every key, required or not, down to the last number."""

import copy
import json
import subprocess
import sys
import types
from collections.abc import Mapping
from typing import Any, Literal, NotRequired, Union, get_args, get_origin, get_type_hints, is_typeddict

import numpy as np
import pytest

from helpers.paths import REPOSITORY
from helpers.results import make_results
from neurondrift.report.findings.interventions import Interventions
from neurondrift.report.findings.statistical import Analysis, Findings, WeightRow, findings_of
from neurondrift.report.findings.subspaces import Subspaces
from neurondrift.report.reading import sentences_of, weaknesses_of
from neurondrift.report.text import render_text
from neurondrift.statistics.design.shares import ShareVerdict
from neurondrift.statistics.null import CauseVerdict, Direction, Standing
from neurondrift.statistics.results import Cluster, ComparisonName, Expected, Incomparable, Verdict
from neurondrift.statistics.weaknesses import WeaknessKind

EXAMPLE = REPOSITORY / "docs" / "example"
#: What the types name without importing it.
ENUMERATIONS = {
    "Verdict": Verdict,
    "WeaknessKind": WeaknessKind,
    "CauseVerdict": CauseVerdict,
    "Direction": Direction,
    "Standing": Standing,
    "Cluster": Cluster,
    "ComparisonName": ComparisonName,
    "Expected": Expected,
    "Incomparable": Incomparable,
    "ShareVerdict": ShareVerdict,
}


def misfits(value: Any, form: Any, at: str = "") -> list[str]:
    """Where a value is not of a type: places, each with what is wrong there."""
    if form is Any:
        return []
    origin, inner = get_origin(form), get_args(form)
    if origin is NotRequired:
        return misfits(value, inner[0], at)
    if origin in (Union, types.UnionType):
        each = [misfits(value, part, at) for part in inner]
        return min(each, key=len)
    if origin is Literal:
        return [] if value in inner else [f"{at}: {value!r} is none of {inner}"]
    if is_typeddict(form):
        if not isinstance(value, dict):
            return [f"{at}: {type(value).__name__} is no {form.__name__}"]
        hints = get_type_hints(form, localns=ENUMERATIONS, include_extras=True)
        optional = {name for name, hint in hints.items() if get_origin(hint) is NotRequired} | form.__optional_keys__
        wrong = [f"{at}/{name}: missing" for name in hints if name not in value and name not in optional]
        wrong += [
            f"{at}/{name}: not in {form.__name__}"
            for name in value
            if name not in hints and name.removesuffix("_reason") not in hints
        ]
        return wrong + [
            w for name, hint in hints.items() if name in value for w in misfits(value[name], hint, f"{at}/{name}")
        ]
    if origin is not None and issubclass(origin, Mapping):
        return [w for name, part in value.items() for w in misfits(part, inner[1], f"{at}/{name}")]
    if origin is not None:
        return [w for index, part in enumerate(value) for w in misfits(part, inner[0], f"{at}/{index}")]
    number = form is float and isinstance(value, int) and not isinstance(value, bool)
    return [] if isinstance(value, form) or number else [f"{at}: {value!r} is no {form.__name__}"]


@pytest.mark.parametrize("seeds", [1, 3])
def test_the_fixture_of_the_report_is_of_the_types(seeds):
    assert misfits(make_results(seeds), Findings) == []


@pytest.mark.parametrize(
    ("name", "form"),
    [("statistical_results.json", Findings), ("interventions.json", Interventions), ("subspaces.json", Subspaces)],
)
def test_the_example_is_of_the_types(name, form):
    file = EXAMPLE / name
    if not file.exists():
        pytest.skip(f"docs/example has no {name}")
    assert misfits(json.loads(file.read_text()), form) == []


def test_a_missing_an_unknown_and_a_wrong_value_are_found():
    results = make_results(1)
    analysis = results["analysis"]
    del analysis["effects"][0]["g"]["ci95"]
    analysis["effects"][1]["colour"] = "red"
    analysis["effects"][2]["verdict"] = "perhaps"
    analysis["contrasts"][0]["p"] = "small"
    assert [place.partition(":")[0] for place in misfits(analysis, Analysis)] == [
        "/effects/0/g/ci95",
        "/effects/1/colour",
        "/effects/2/verdict",
        "/contrasts/0/p",
    ]


def test_findings_are_made_of_their_parts_in_the_order_of_the_file():
    results = make_results(1)
    parts = {name: results[name] for name in ("analysis", "trajectories", "distributions", "groups", "weights")}
    made = findings_of(results["study"], **parts, behaviour=results["behaviour"])
    assert made == results
    assert list(made) == [
        "schema_version",
        "study",
        "analysis",
        "trajectories",
        "distributions",
        "groups",
        "weights",
        "behaviour",
    ]


def test_what_a_study_fills_in_is_of_the_types():
    from neurondrift.statistics.design.population import Population
    from neurondrift.study.findings import behaviour, distributions

    rng = np.random.default_rng(0)
    site = np.repeat([0, 1], 20)
    people = Population(
        site=site,
        site_names=("a", "b"),
        module_type=("q_proj", "q_proj"),
        layer=(0, 1),
        row=np.tile(np.arange(20), 2),
        norm=rng.random(40),
        drift={metric: rng.random((1, 40)) for metric in ("l2", "relative", "cosine_distance")},
    )
    member = rng.random(40) < 0.3
    rows = [
        {"step": step, "kind": kind, "id": f"{kind}{i}", "refused": i > step, "coherent": True, "category": "x"}
        for step in (0, 2)
        for kind in ("harmful", "ordinary")
        for i in range(4)
    ]
    early = [{**row, "step": None} for row in rows if row["step"] == 0]
    made: Findings = {
        "distributions": distributions(people, {"safety_top": member}, {"safety_top": site}, [0]),
        "behaviour": behaviour(
            {0: rows},
            {0: {0: 9.0, 2: 8.0}},
            early,
            judge="refusal",
            attack="vanilla",
            system_prompt="",
            max_new_tokens=8,
        ),
    }
    assert misfits(made, Findings) == []
    told = made["behaviour"]
    assert [(r["step"], r["kind"], r["refusals"]) for r in told["rates"]] == [
        (0, "harmful", 3),
        (2, "harmful", 1),
        (0, "ordinary", 3),
        (2, "ordinary", 1),
    ]
    assert [(c["from_step"], c["to_step"], c["difference"]) for c in told["changes"]] == [(0, 2, -0.5)] * 2
    assert [r["kind"] for r in told["before_alignment"]] == ["harmful", "ordinary"]
    assert behaviour({0: []}, {}, [], judge="", attack="", system_prompt="", max_new_tokens=8) is None


def test_reading_findings_needs_nothing_that_computes():
    code = "import sys, neurondrift.report.page, neurondrift.report.text; print([m for m in ('numpy', 'torch') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_single_weights_have_the_fields_that_are_named():
    rows = json.loads((EXAMPLE / "statistical_results.json").read_text())["weights"]
    names = {name for row in rows for name in row if not name.endswith("_reason")}
    assert names == set(WeightRow.__annotations__)


# Sentences


def squeezed(results) -> str:
    return " ".join(render_text(results).split())


def test_the_first_sentence_is_the_answer_and_nothing_is_cut_at_a_full_stop():
    results = make_results(1)
    analysis = results["analysis"]
    assert analysis["conclusion"] == " ".join(analysis["sentences"])
    assert len(analysis["sentences"]) > 3
    analysis["sentences"][0] = "It moved further, p = 0.05 vs. 0.1, judged by safety_top v. 2."
    assert "Answer: It moved further, p = 0.05 vs. 0.1, judged by safety_top v. 2. Lengths" in squeezed(results)


def test_findings_of_an_older_version_are_answered_with_their_whole_conclusion():
    results = make_results(1)
    for added in ("sentences", "weakness_details"):
        del results["analysis"][added]
    conclusion = results["analysis"]["conclusion"]
    assert sentences_of(results) == [conclusion]
    assert f"Answer: {' '.join(conclusion.split())}" in squeezed(results)
    assert sentences_of({}) == []
    assert "Answer: none, drift was not analysed." in squeezed({})


def test_weaknesses_are_ordered_by_kind():
    results = make_results(1)
    analysis = results["analysis"]
    assert [detail["text"] for detail in analysis["weakness_details"]] == analysis["weaknesses"]
    kinds = [detail["kind"] for detail in analysis["weakness_details"]]
    assert kinds.index("not_comparable") < kinds.index("few_seeds") < kinds.index("overlap")
    assert analysis["weakness_details"][kinds.index("few_seeds")]["numbers"] == {"seeds": 1}
    misleading = copy.deepcopy(results)
    failed = {"kind": "negative_control", "text": "z", "numbers": {"group": "random", "verdict": "more"}}
    misleading["analysis"]["weaknesses"] = ["it is no negative control", "z"]
    misleading["analysis"]["weakness_details"] = [failed]
    assert weaknesses_of(misleading) == ("z", "it is no negative control")


def test_what_is_said_of_groups_that_judge_nothing_comes_last():
    results = make_results(3)
    analysis = results["analysis"]
    told = weaknesses_of(results)
    about = {d["text"]: d["numbers"].get("group") for d in analysis["weakness_details"]}
    judging = [about[text] in (None, *analysis["judging"]) for text in told]
    assert judging == sorted(judging, reverse=True) and not all(judging)
