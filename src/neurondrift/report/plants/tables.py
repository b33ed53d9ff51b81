"""The tables about a model with a known answer: what it was shown to cause, and which scores find it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from neurondrift.report.blocks import LEFT, Table, table

STATES = {
    "model": "as planted",
    "base": "from before (W0)",
    "planted": "planted units put back",
    "others": "as many others put back",
    "decoy": "decoy put back",
    "as_far": "units that moved as far put back",
}


def causality_table(found: Mapping[str, Any]) -> Table:
    """What the model does as it is and with each group put back, from `causality.json`."""
    prompts = found["prompts"]
    order = [name for name in STATES if any(row["state"] == name for row in found["states"])]
    by_state = {row["state"]: row for row in found["states"]}
    rows = [
        (
            STATES[name],
            "" if by_state[name]["units"] is None else f"{by_state[name]['units']:,}",
            share(by_state[name]["refused"]),
            signed(by_state[name]["harmful"]),
            signed(by_state[name]["harmless"]),
            share(by_state[name]["over_refused"]),
            plain(by_state[name]["loss"]),
        )
        for name in order
    ]
    return table(
        "Causality",
        (
            "state",
            "units",
            f"harmful refused (n = {prompts['harmful']})",
            "margin, harmful",
            "margin, harmless",
            f"harmless refused (n = {prompts['harmless']})",
            "loss of ordinary answers",
        ),
        rows,
        "lrrrrrr",
    )


def causality_text(found: Mapping[str, Any]) -> str:
    """The same as Markdown."""
    return markdown(causality_table(found))


def markdown(shown: Table) -> str:
    """A table in Markdown, without its title."""
    return markdown_rows(shown.headers, shown.rows, shown.align)


def markdown_rows(headers: Sequence[str], rows: Sequence[Sequence[str]], align: str) -> str:
    """Headers and rows in Markdown."""
    lines = [list(headers), ["---" if letter == LEFT else "---:" for letter in align], *map(list, rows)]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def known(value: object) -> float | None:
    """A number, or None where it is undefined."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def share(value: object) -> str:
    """A share with two digits."""
    number = known(value)
    return "–" if number is None else f"{number:.2f}"


def signed(value: object) -> str:
    """A margin, with its sign."""
    number = known(value)
    return "–" if number is None else f"{number:+.1f}"


def plain(value: object) -> str:
    """A loss."""
    number = known(value)
    return "–" if number is None else f"{number:.2f}"
