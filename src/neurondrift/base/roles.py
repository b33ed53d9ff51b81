"""What a group is to a study: safety, utility, chance, or another group's control; and what can be done to it."""

from __future__ import annotations

from typing import Literal, get_args

Role = Literal["safety", "utility", "random", "control", "negative", "positive"]
ROLES: tuple[Role, ...] = get_args(Role)
#: Groups that are expected to drift as far as comparable neurons: chance chose them (`random`, `control`), or a rule
#: that has nothing to do with safety (`negative`).
NEGATIVE_CONTROLS: tuple[Role, ...] = ("random", "control", "negative")
#: Groups that are expected to drift further than comparable neurons, whatever becomes of safety.
POSITIVE_CONTROLS: tuple[Role, ...] = ("positive",)
#: Groups that judge nothing: controls of either kind.
CONTROLS: tuple[Role, ...] = (*NEGATIVE_CONTROLS, *POSITIVE_CONTROLS)

#: The groups that a study makes, and what each is to it, in the order in which they are told of. Those of the
#: alignment's own change come first, which are there where the model from before it is known.
GROUP_ROLES: dict[str, Role] = {
    "safety_acquired": "safety",
    "safety_paying": "safety",
    "safety_top": "safety",
    "safety_set_difference": "safety",
    "utility_top": "utility",
    "random": "random",
    "safety_residual": "safety",
    "utility_set_difference": "negative",
    "style_set_difference": "negative",
    "gradient_top": "positive",
}
GROUP_NAMES = tuple(GROUP_ROLES)
#: Made of neurons, of single weights and of hidden units; all others of neurons only.
PUBLISHED_GROUPS = ("safety_top", "safety_set_difference", "utility_top", "random")
#: Safety groups that Wei et al. (arXiv 2402.05162) made.
WEI_GROUPS = ("safety_top", "safety_set_difference")
#: Groups by what the alignment changed, and by what its change did. They moved once, so that their controls are matched
#: on that too.
ALIGNMENT_GROUPS = ("safety_acquired", "safety_paying")
#: Safety groups that are reported and judge nothing: most members of the top share are those of utility's as well.
JUDGES_NOTHING = ("safety_top",)

#: In the order in which they are run and shown: freezing takes the measured adapter off the model, and comes last.
Intervention = Literal["prune", "unalign", "rewind", "transplant", "patch", "patch_back", "freeze"]
INTERVENTIONS: tuple[Intervention, ...] = get_args(Intervention)
#: Those that take something from the model before fine-tuning.
TAKING: tuple[Intervention, ...] = ("prune", "unalign")


def group_names(granularity: str) -> tuple[str, ...]:
    """The groups that a study makes of neurons; of weights and hidden units the published ones."""
    return GROUP_NAMES if granularity == "neuron" else PUBLISHED_GROUPS


def judges(name: str, role: Role | None) -> bool:
    """Whether a group of this name and role is one that the answer rests on."""
    return role == "safety" and name not in JUDGES_NOTHING


def role_of_name(name: str) -> Role | None:
    """The role that a group's name tells of, where nothing else does: in files of older versions, and for callers that
    have names only.

    This is the one place where a part of a name decides anything.
    """
    if name.endswith(".matched"):
        return "control"
    if name in GROUP_ROLES:
        return GROUP_ROLES[name]
    if "safety" in name:
        return "safety"
    return "utility" if "utility" in name else None
