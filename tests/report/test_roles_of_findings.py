"""The report takes a group's role from the findings, and from its name where older findings have none."""

import pytest

from neurondrift.report.figures.style import OTHER_MARKS, SAFETY_MARKS, group_marks
from neurondrift.report.reading import effects_of, group_order, roles_of
from neurondrift.report.wording import is_negative_control, is_safety


def results(**roles):
    effects = [
        {"group": name, "metric": "relative"} | ({} if role == "old" else {"role": role})
        for name, role in roles.items()
    ]
    return {"analysis": {"primary_metric": "relative", "metrics": ["relative"], "effects": effects}}


@pytest.mark.parametrize(
    ("roles", "order"),
    [
        ({"chance": "random", "other": None, "mine": "safety"}, ["mine", "other", "chance"]),
        (
            {"safety_top": None, "random": "safety", "twin": "control", "b": "utility"},
            ["random", "safety_top", "b", "twin"],
        ),
        ({"random": "old", "utility_top": "old", "safety_top": "old"}, ["safety_top", "utility_top", "random"]),
    ],
)
def test_groups_come_in_the_order_of_their_roles(roles, order):
    found = results(**roles)
    assert [effect["group"] for effect in effects_of(found)] == order
    assert sorted(roles, key=group_order(found)) == order


def test_a_group_that_the_analysis_does_not_hold_is_known_by_its_name():
    roles = roles_of(results(mine="safety"))
    assert (roles["mine"], roles["safety_top"], roles["all"]) == ("safety", "safety", None)


def test_records_say_their_role_themselves():
    assert is_safety({"group": "x", "role": "safety"})
    assert is_safety({"group": "safety_top"})
    assert not is_safety({"group": "safety_top", "role": None})
    assert is_negative_control({"group": "x", "role": "control"})
    assert is_negative_control({"group": "random"})
    assert not is_negative_control({"group": "random", "role": "utility"})


def test_warm_marks_are_those_of_safety_groups():
    marks = group_marks(["a", "b", "c"], {"a": None, "b": "safety", "c": "safety"})
    assert marks == {"a": OTHER_MARKS[0], "b": SAFETY_MARKS[0], "c": SAFETY_MARKS[1]}
