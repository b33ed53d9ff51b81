"""Mistakes of the user's, told apart from faults of ours.

A `UserError` is shown as one message and ends a command with exit code 2; any other exception is a
fault and keeps its traceback (exit code 1). Library callers may catch `UserError` as a whole or one kind.
"""

from __future__ import annotations


class UserError(Exception):
    """Something that the user can put right.

    Parameters
    ----------
    what
        What is wrong, as a full sentence without the final full stop.
    received
        The value that was passed, shown with `repr`; omitted when None.
    allowed
        What would have been accepted, in words.
    fix
        What to do next, in words.
    """

    def __init__(self, what: str, *, received: object = None, allowed: str = "", fix: str = "") -> None:
        self.what, self.received, self.allowed, self.fix = what, received, allowed, fix
        parts = [f"{what}."]
        if received is not None:
            parts.append(f"Received: {received!r}.")
        if allowed:
            parts.append(f"Allowed: {allowed}.")
        if fix:
            parts.append(f"What to do: {fix}.")
        super().__init__(" ".join(parts))


class ConfigError(UserError):
    """A setting, preset, key or flag that does not fit."""


class DataError(UserError):
    """A data set, example or prompt that cannot be used."""


class ModelError(UserError):
    """A model, tokenizer or module that cannot be used."""


class GroupError(UserError):
    """A group that is empty, foreign or cannot be matched."""


class FreezeError(UserError):
    """Weights that cannot be held exactly while training, or that moved although they were to be held."""


class ArtifactError(UserError):
    """A file that is missing, truncated, foreign or in the way."""


class ResourceError(UserError):
    """Not enough disk, memory or device."""
