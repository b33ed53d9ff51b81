"""What is left out, counted once or slow is said once in a process, however often it is met."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from functools import cache

logger = logging.getLogger("neurondrift.models")

SHOWN = 6  # kinds of names in one message


@cache
def say_once(message: str) -> None:
    """Log a warning, the first time that this message is to be said."""
    logger.warning(message)


def kinds_of(names: Iterable[str]) -> str:
    """Names in few words: those that differ in numbers alone are one, with `*` for the numbers."""
    counts: dict[str, int] = {}
    for name in names:
        kind = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)
        counts[kind] = counts.get(kind, 0) + 1
    shown = [kind if count == 1 else f"{kind} ({count})" for kind, count in counts.items()]
    rest = f", and {len(shown) - SHOWN} kinds more" if len(shown) > SHOWN else ""
    return ", ".join(shown[:SHOWN]) + rest
