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


BOARD = (
    "score",
    "asks what",
    "needs",
    "AUROC within site (95 % over sites)",
    "against units that moved as far",
    "decoy",
    "average precision",
    "precision at k",
    "undefined",
)


QUESTIONS = {
    "matters": "matters for refusals",
    "trained": "was trained on refusals",
    "carries": "carries refusals",
    "nothing": "nothing of refusals",
}


def needs(row: Mapping[str, Any]) -> str:
    """What a score is taken from."""
    passes = {"nothing": "weights", "forward": "forward", "backward": "backward", "file": "a file"}
    found = passes.get(str(row.get("needs", "")), "")
    return f"base, {found}" if row.get("base") else found


def board_rows(board: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """A row for each score, of the scoreboard."""
    return [
        (
            str(row["score"]),
            QUESTIONS.get(str(row.get("question", "")), ""),
            needs(row),
            with_interval(row, "auroc"),
            share(row["as_far"]),
            share(row["decoy"]),
            share(row["average_precision"]),
            share(row["precision"]),
            f"{row['undefined']:,}" if row["undefined"] else "",
        )
        for row in board
    ]


def board_text(board: Sequence[Mapping[str, Any]]) -> str:
    """The scoreboard as Markdown."""
    return markdown_rows(BOARD, board_rows(board), "lllrrrrrr")


def with_interval(row: Mapping[str, Any], key: str) -> str:
    """A number with its interval over sites, where there is one."""
    low, high = known(row.get(f"{key}_low")), known(row.get(f"{key}_high"))
    number = known(row[key])
    if number is None:
        return "–"
    return f"{number:.3f}" if low is None or high is None else f"{number:.3f} ({low:.3f} to {high:.3f})"


def curve_table(curves: Sequence[Mapping[str, Any]], way: str) -> Table:
    """The margin with the units that rank first acted on, for each dose, and refusals at the planted number."""
    points = [one for one in curves if one["way"] == way]
    doses = sorted({one["dose"] for one in points})
    names = list(dict.fromkeys(one["score"] for one in points))
    rows = []
    for name in names:
        own = [one for one in points if one["score"] == name]
        asked = next((one for one in own if one["dose"] == 1.0), None)
        rows.append(
            (
                name,
                *(_at(own, dose) for dose in doses),
                "–" if asked is None else share(asked["refused"]),
                "–" if asked is None else plain(asked["loss"]),
                "–" if asked is None else share(asked.get("hit")),
            )
        )
    heads = [f"margin, {dose:g} × as many as planted" for dose in doses]
    return table(
        "Units that rank first, " + way,
        ("score", *heads, "harmful refused at 1 ×", "loss of ordinary answers", "of them planted"),
        rows,
        "l" + "r" * (len(doses) + 3),
    )


def _at(points: Sequence[Mapping[str, Any]], dose: float) -> str:
    values = [float(one["margin"]) for one in points if one["dose"] == dose]
    return signed(sum(values) / len(values)) if values else ""
