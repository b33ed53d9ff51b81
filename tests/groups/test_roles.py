"""The role of a group: written by what makes it, kept in its file, read from a name only where nothing else says it."""

import ast
import re
from pathlib import Path

import numpy as np
import pytest

import neurondrift
from helpers.paths import REPOSITORY
from neurondrift.base.roles import ROLES, role_of_name
from neurondrift.groups.controls import matched
from neurondrift.groups.doses import dose_of
from neurondrift.groups.group import Group, load_group, role_of
from neurondrift.groups.selection import random_group, select_top, set_difference

SHAPES = {"a": (40, 6), "b": (30, 6)}
SCORES = {site: np.random.default_rng(0).random(shape).astype(np.float32) for site, shape in SHAPES.items()}
OTHERS = {site: np.random.default_rng(1).random(shape).astype(np.float32) for site, shape in SHAPES.items()}


def made() -> dict[str, Group]:
    of = {"fraction": 0.1, "granularity": "neuron"}
    safety = select_top(SCORES, **of, provenance={"role": "safety"})
    norms = {site: np.linalg.norm(scores, axis=1) for site, scores in SCORES.items()}
    importance = {site: np.arange(len(rows), dtype=np.float32) for site, rows in safety.members.items()}
    return {
        "safety": safety,
        "difference": set_difference(SCORES, OTHERS, p=0.1, q=0.2, granularity="neuron", provenance={"role": "safety"}),
        "utility": select_top(OTHERS, **of, provenance={"role": "utility"}),
        "random": random_group(SHAPES, **of, seed=0),
        "control": matched(safety, norms, seed=0)[0],
        "dose": dose_of(safety, importance, 0.5),
        "own": select_top(SCORES, **of),
        "union": safety | random_group(SHAPES, **of, seed=0),
    }


ROLE_OF_MADE = dict(
    zip(made(), ("safety", "safety", "utility", "random", "control", "safety", None, None), strict=True)
)


@pytest.mark.parametrize(("name", "role"), ROLE_OF_MADE.items())
def test_what_makes_a_group_says_its_role_and_a_file_keeps_it(name, role, tmp_path):
    group = made()[name]
    assert group.role == role
    group.save(tmp_path / "misleading_safety.parquet")
    assert load_group(tmp_path / "misleading_safety.parquet").role == role


def test_members_do_not_depend_on_the_role():
    one, two = (select_top(SCORES, fraction=0.1, provenance={"role": role}) for role in ("safety", "utility"))
    assert all(np.array_equal(one.members[site], two.members[site]) for site in SHAPES)


@pytest.mark.parametrize(
    ("provenance", "name", "role"),
    [
        ({"role": "utility"}, "safety_top", "utility"),  # what is written holds, whatever the name
        ({"role": None}, "safety_top", None),
        ({"role": "heroine"}, "safety_top", None),
        ({"rule": "matched"}, "safety_top", "control"),  # older files: the rule, then the name
        ({"rule": "random"}, "chance", "random"),
        ({"rule": "top"}, "safety_top", "safety"),
        ({"source": "safety.json"}, "safety", "safety"),
        ({}, "utility_top", "utility"),
        ({}, "random", "random"),
        ({}, "random_weights", None),
        ({}, "safety_top.matched", "control"),
        ({}, "utility_set_difference", "negative"),  # a study's own names are known whole
        ({}, "style_set_difference", "negative"),
        ({}, "gradient_top", "positive"),
        ({}, "gradient_top.matched", "control"),
        ({}, "mine", None),
    ],
)
def test_a_name_is_asked_only_where_the_provenance_is_silent(provenance, name, role):
    group = Group(granularity="neuron", members={"a": np.array([1])}, provenance=provenance)
    assert role_of(group, name) == role


def test_the_roles_are_those_that_the_document_names():
    document = (REPOSITORY / "docs" / "results.md").read_text()
    assert all(f"`{role}`" in document for role in ROLES)
    assert role_of_name("") is None


def test_no_part_of_a_name_decides_anything_anywhere_else():
    """No source file but base/roles.py looks for "safety" or "utility" inside a string, or at its ends for a role."""
    wrong = []
    for path in Path(neurondrift.__file__).parent.rglob("*.py"):
        if path.name == "roles.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            text = ast.unparse(node) if isinstance(node, ast.Compare | ast.Call) else ""
            if re.match(r"'(safety|utility)' (not )?in \w*(group|name|label|effect)", text) or re.match(
                r".*\.(startswith|endswith)\('?\.?(safety|utility|random|matched)\b", text
            ):
                wrong.append((path.name, text))
    assert not wrong
