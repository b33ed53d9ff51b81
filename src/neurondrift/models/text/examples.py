"""An example: a prompt, the response that goes with it, and what was said before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Message(NamedTuple):
    """One turn of a conversation; `role` is `system`, `user` or `assistant`."""

    role: str
    content: str


@dataclass(frozen=True, kw_only=True)
class Example:
    """One prompt with the response that goes with it (empty where a set holds prompts only).

    Of a conversation, `prompt` and `response` are one turn of the user and the answer to it; `messages` are the turns
    before that, the system prompt of the conversation included.
    """

    prompt: str
    response: str
    id: str
    category: str = ""
    messages: tuple[Message, ...] = ()
