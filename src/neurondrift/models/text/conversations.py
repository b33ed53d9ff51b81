"""Conversations as public sets keep them: OpenAI's and TRL's `messages`, ShareGPT's `conversations`, pairs of turns.

Every function raises `ValueError` with the end of a sentence that begins with the row.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from neurondrift.models.text.examples import Message

Turns = Literal["last", "all"]

# Where a turn begins in a conversation that is one text, as in hh-rlhf: "\n\nHuman: ... \n\nAssistant: ..."
_TURN = re.compile(r"\n\n(Human|Assistant):")
LONE_SURROGATE = re.compile("[\ud800-\udfff]")
ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "bot", "model", "chatgpt", "bing", "bard"), "assistant"),
}


class Exchange(NamedTuple):
    """What was said, what the user then says, and the answer ("" where there is none)."""

    earlier: tuple[Message, ...]
    prompt: str
    response: str


def is_missing(value: Any) -> bool:
    """Whether a value stands for nothing: None, NaN, NaT."""
    return value is None or value != value


def text_of(value: Any, column: str) -> str:
    """A text as it is, "" for a missing one, and the one text of a list that holds no other."""
    if is_missing(value):
        return ""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str):
        value = value[0]
    if not isinstance(value, str):
        shown = repr(value)
        raise ValueError(
            f"has no text in {column}, but {shown if len(shown) < 60 else shown[:57] + '...'} ({type(value).__name__})"
        )
    if LONE_SURROGATE.search(value):
        raise ValueError(f"has half a character (a lone surrogate) in {column}, which no tokenizer takes")
    return value


def messages_of(value: Any, column: str) -> list[Message] | None:
    """The turns that a value holds: a list of objects, that list as JSON, or one text; None where it holds no turns.

    One text is one like those of hh-rlhf: it begins with an empty line and "Human:", and another turn follows. Where
    the last turn has no text ("Assistant:"), that turn is left out.
    """
    if isinstance(value, str) and (turns := _turns_of_text(value)):
        return turns
    if isinstance(value, str) and value.lstrip().startswith("[{"):
        try:
            value = json.loads(value)
        except ValueError:
            return None
    if isinstance(value, dict) and value and all(isinstance(part, list) for part in value.values()):
        value = [dict(zip(value, turn, strict=True)) for turn in zip(*value.values(), strict=True)]  # as Parquet may be
    if not isinstance(value, list) or not value or not all(isinstance(turn, dict) for turn in value):
        return None
    return [_message(turn, f"turn {number} of {column}") for number, turn in enumerate(value, start=1)]


def _turns_of_text(text: str) -> list[Message]:
    """The turns of a text that names its speakers; none where it is no such conversation."""
    marks = list(_TURN.finditer(text))
    if len(marks) < 2 or marks[0].start() or marks[0][1] != "Human":
        return []
    ends = [*(mark.start() for mark in marks[1:]), len(text)]
    said = [(mark[1], text[mark.end() : end].strip()) for mark, end in zip(marks, ends, strict=True)]
    if not said[-1][1]:
        said.pop()
    turns: list[Message] = []
    for speaker, content in said:
        role = ROLES[speaker.lower()]
        if turns and turns[-1].role == role:  # hh-rlhf has a few turns that are cut in two
            turns[-1] = Message(role, f"{turns[-1].content}\n\n{content}")
        else:
            turns.append(Message(role, content))
    return turns


def _message(turn: dict[str, Any], where: str) -> Message:
    role = turn.get("role", turn.get("from"))
    content = turn.get("content", turn.get("value"))
    if not isinstance(role, str) or role.lower() not in ROLES:
        raise ValueError(
            f"has the role {role!r} in {where}; those that are known are {', '.join(dict.fromkeys(ROLES))}"
        )
    if isinstance(content, list) and all(isinstance(part, dict) and "text" in part for part in content):
        content = "".join(text_of(part["text"], where) for part in content)
    if is_missing(content):
        raise ValueError(f"has no text in {where}")
    return Message(ROLES[role.lower()], text_of(content, where))


def pairs_of(value: Any, column: str) -> list[Message]:
    """The turns of a `history`: a list of pairs of what was asked and what was answered."""
    if is_missing(value):
        return []
    if not isinstance(value, list) or not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in value):
        raise ValueError(f"has no pairs of a question and an answer in {column}")
    return [
        Message(role, text_of(text, column))
        for pair in value
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]


def exchanges(messages: Sequence[Message], *, turns: Turns, answered: bool) -> list[Exchange]:
    """The exchanges of a conversation that count: its last one, or all.

    Turns of the assistant before the user has said anything are left out. With `answered`, what the user says last
    without being answered is too; without it, and with `last`, that is the prompt.
    """
    first = next((at for at, message in enumerate(messages) if message.role == "user"), len(messages))
    kept = [m for at, m in enumerate(messages) if at >= first or m.role == "system"]
    found = []
    for at, message in enumerate(kept):
        if message.role == "assistant":
            if kept[at - 1].role != "user":
                raise ValueError(f"has a turn of the assistant after one of the {kept[at - 1].role}")
            found.append(Exchange(tuple(kept[: at - 1]), kept[at - 1].content, message.content))
    if kept and kept[-1].role == "user" and (not answered or not found):
        found.append(Exchange(tuple(kept[:-1]), kept[-1].content, ""))
    return found[-1:] if turns == "last" else found
