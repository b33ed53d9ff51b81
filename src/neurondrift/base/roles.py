"""What a group is to a study: about safety, about utility, drawn at random, or the control of another group."""

from __future__ import annotations

from typing import Literal, get_args

Role = Literal["safety", "utility", "random", "control"]
ROLES: tuple[Role, ...] = get_args(Role)
#: Groups that only chance chose: they are expected to drift as far as comparable neurons.
NEGATIVE_CONTROLS: tuple[Role, ...] = ("random", "control")


def role_of_name(name: str) -> Role | None:
    """The role that a group's name tells of, where nothing else does: in files of older versions, and for callers that
    have names only.

    This is the one place where a part of a name decides anything.
    """
    if name.endswith(".matched"):
        return "control"
    if "safety" in name:
        return "safety"
    if name == "random":
        return "random"
    return "utility" if "utility" in name else None
