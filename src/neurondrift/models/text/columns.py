"""What the columns of the field's public sets mean: rows become examples.

Owns names of columns, missing values, identifiers, and labels that say whether a prompt is harmful.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from neurondrift.base.errors import DataError
from neurondrift.models.text.conversations import (
    Exchange,
    Turns,
    exchanges,
    is_missing,
    messages_of,
    pairs_of,
    text_of,
)
from neurondrift.models.text.examples import Example, Message
from neurondrift.models.text.reading import MISSING, Table

logger = logging.getLogger(__name__)

_told: set[str] = set()  # what the user has heard already


class Layout(NamedTuple):
    """Columns that belong together, in lower case: a prompt, its response, and what is put to the prompt."""

    prompt: str
    response: str | None = None
    extra: str | None = None


#: First match wins. A response that is alone with its prompt, then conversations, then prompts by themselves.
LAYOUTS = (
    Layout("prompt", "response"),  # BeaverTails, PKU-SafeRLHF-QA
    Layout("instruction", "output", extra="input"),  # Alpaca
    Layout("instruction", "output"),
    Layout("instruction", "response", extra="context"),  # Dolly
    Layout("instruction", "response"),
    Layout("goal", "target"),  # AdvBench, JailbreakBench
    Layout("prompt", "completion"),  # TRL, XSTest's answers
    Layout("prompt", "chosen"),  # TRL's preferences
    Layout("prompt", "safer_response_id"),  # PKU-SafeRLHF: the number of the response that is taken
    Layout("question", "answer"),
    Layout("question", "response"),
    Layout("query", "response"),
    Layout("input", "output"),
    Layout("inputs", "targets"),
    Layout("messages"),
    Layout("conversations"),  # ShareGPT
    Layout("conversation"),
    Layout("chosen"),
    Layout("prompt"),  # XSTest, OR-Bench
    Layout("instruction"),
    Layout("goal"),
    Layout("behavior", extra="contextstring"),  # HarmBench
    Layout("behavior"),
    Layout("forbidden_prompt"),  # StrongREJECT
    Layout("question"),  # do-not-answer
    Layout("prompt_text"),  # AILuminate
    Layout("query"),
    Layout("turns"),  # SORRY-Bench
)
#: Before this column's prompt, the context; after any other's, what is put to it.
CONTEXT_FIRST = "contextstring"
#: What Alpaca's rows say where nothing is put to the instruction, beside the words for missing values.
NO_INPUT = MISSING | {"<noinput>", "<no input>", "<No input>", "noinput", "no input", "No input"}
RESPONSE_OF = "safer_response_id"
IDENTIFIERS = ("id", "id_v2", "behaviorid", "prompt_id", "question_id", "release_prompt_id", "uid", "index")
CATEGORIES = ("category", "type", "semanticcategory", "types_of_harm", "risk_area", "harm_area", "hazard")
#: Column -> what it says of a harmful prompt, and of a harmless one. Other words say nothing here.
LABELS = {"label": ("unsafe", "safe"), "prompt_harm_label": ("harmful", "unharmful")}
HOW_TO_NAME = (
    "--prompt-column NAME and --response-column NAME (SET=NAME for one of several sets), "
    "or prompt = and response = of the set in the configuration"
)
KNOWN_NAMES = frozenset(name for layout in LAYOUTS for name in layout if name)


class Columns(NamedTuple):
    """The columns of one table, as they are written there; None for those that it lacks."""

    prompt: str
    response: str | None
    extra: str | None
    context_first: bool
    by_number: bool  # `response` holds the number of the column that does
    system: str | None
    history: str | None
    identifiers: tuple[str, ...]
    categories: tuple[str, ...]


def to_examples(
    table: Table,
    reference: str,
    *,
    prompt: str | None = None,
    response: str | None = None,
    turns: Turns = "last",
    answered: bool = True,
    kind: str | None = None,
) -> list[Example]:
    """The examples of a table.

    Parameters
    ----------
    table
        Rows and the names of their columns.
    reference
        Where they come from, for messages.
    prompt, response
        Columns, where they have no usual name.
    turns
        Whether a conversation is its last exchange or all of them.
    answered
        Whether responses are wanted: what a user says last is then left out where nothing answers it.
    kind
        `harmful`, `ordinary` or `borderline`: prompts that are labelled otherwise are left out, and that is said.

    Raises
    ------
    DataError
        Columns that are not there or not known, and a value that is no text, with its row.
    """
    columns: Columns | None = None
    found: list[Example] = []
    labels: list[bool | None] = []
    for index, row in enumerate(table.rows):
        if columns is None:
            columns = choose(table.names, reference, prompt, response)
        try:
            made = list(_of_row(row, columns, index, turns=turns, answered=answered))
        except ValueError as error:
            raise DataError(
                f"Row {index + 1} of {reference} {error}", fix="mend or remove the row, or name another column"
            ) from error
        found += made
        labels += [is_harmful(row)] * len(made)
    if columns is not None and columns.by_number:
        _say(f"{reference}: of two responses, the one that {columns.response} names is taken")
    return with_own_ids(_of_kind(found, labels, kind, reference), reference)


def choose(names: Sequence[str], reference: str, prompt: str | None, response: str | None) -> Columns:
    """Which columns are what. Raises `DataError` where a given one is not there, or where none is known."""
    written = {name.strip().lower(): name for name in reversed(names)}
    given = [_given(name, names, written, reference) for name in (prompt, response)]
    # the responses that go with a named prompt first; then the rest of the set whose prompt it is
    order = sorted(LAYOUTS, key=lambda layout: (layout.response is None, layout.prompt != (given[0] or "").lower()))
    for layout in order if given[0] else LAYOUTS:
        chosen = [own or (written.get(name) if name else None) for own, name in zip(given, layout, strict=False)]
        extra = written.get(layout.extra) if layout.extra else None
        if chosen[0] is None or (layout.response and chosen[1] is None) or (layout.extra and extra is None):
            continue
        if len({chosen[0], chosen[1], extra} - {None}) < 3 - [chosen[1], extra].count(None):
            continue  # one column would be two things
        by_number = chosen[1] is not None and chosen[1] == written.get(RESPONSE_OF)
        if by_number and not {"response_0", "response_1"} <= written.keys():
            continue
        conversation = layout.prompt in ("messages", "conversations", "conversation")
        return Columns(
            prompt=chosen[0],
            response=chosen[1],
            extra=extra,
            context_first=layout.extra == CONTEXT_FIRST,
            by_number=by_number,
            system=written.get("system_prompt") or (written.get("system") if conversation else None),
            history=written.get("history"),
            identifiers=tuple(written[name] for name in IDENTIFIERS if name in written),
            categories=tuple(written[name] for name in CATEGORIES if name in written),
        )
    raise DataError(
        f"The columns of {reference} are not recognised",
        received=", ".join(names),
        allowed="prompt/response, instruction/input/output, goal/target, question/answer, messages, conversations, "
        "Behavior, forbidden_prompt and others of public sets",
        fix=f"name them: {HOW_TO_NAME}",
    )


def _given(name: str | None, names: Sequence[str], written: Mapping[str, str], reference: str) -> str | None:
    if name is None or name in names:
        return name
    if name.strip().lower() in written:
        return written[name.strip().lower()]
    raise DataError(
        f"{reference} has no column {name}", received=name, allowed=", ".join(names), fix=f"name them: {HOW_TO_NAME}"
    )


def _of_row(row: Mapping[str, Any], columns: Columns, index: int, *, turns: Turns, answered: bool) -> Iterator[Example]:
    """The examples of one row: one, or (of a conversation all of whose turns count) one for each of its answers."""
    identifier = next((_plain(row[name]) for name in columns.identifiers if not is_missing(row.get(name))), "")
    category = next((_plain(row[name]) for name in columns.categories if not is_missing(row.get(name))), "")
    said = _conversation(row, columns)
    made = [_single(row, columns, answered)] if said is None else exchanges(said, turns=turns, answered=answered)
    system = text_of(row.get(columns.system), columns.system) if columns.system else ""
    before = [Message("system", system)] if system.strip() else []
    before += pairs_of(row.get(columns.history), columns.history) if columns.history else []
    for number, (earlier, prompt, response) in enumerate(made or [Exchange((), "", "")], start=1):
        yield Example(
            prompt=prompt,
            response=response,
            id=(identifier or str(index)) + (f"/{number}" if len(made) > 1 else ""),
            category=category,
            messages=(*before, *earlier),
        )


def _single(row: Mapping[str, Any], columns: Columns, answered: bool) -> Exchange:
    """The prompt and the response of a row that is no conversation; no text is no response where none is wanted."""
    prompt = text_of(row.get(columns.prompt), columns.prompt)
    if columns.extra:
        extra = text_of(row.get(columns.extra), columns.extra)
        if extra.strip() not in NO_INPUT:
            # HarmBench's own form of a behaviour with its context (baselines/direct_request of its code)
            prompt = f"{extra}\n\n---\n\n{prompt}" if columns.context_first else f"{prompt}\n\n{extra}"
    prompt, chat_response = _without_llama2_markup(prompt)
    try:
        response = text_of(*_response(row, columns)) if columns.response else ""
    except ValueError:
        if answered:
            raise
        response = ""
    return Exchange((), prompt, response or chat_response)


def _response(row: Mapping[str, Any], columns: Columns) -> tuple[Any, str]:
    """The value of the response and its column; by number, the column that the number names."""
    assert columns.response is not None
    value: Any = row.get(columns.response)
    if not columns.by_number or is_missing(value):
        return value, columns.response
    try:
        name = f"response_{int(value)}"
    except (TypeError, ValueError):
        raise ValueError(f"has no number in {columns.response}, but {value!r}") from None
    return row.get(name), name


def _conversation(row: Mapping[str, Any], columns: Columns) -> list[Message] | None:
    """The turns of a row, whether they lie in one column or in that of the prompt and that of the response."""
    said = messages_of(row.get(columns.prompt), columns.prompt)
    if columns.response is None:
        return said
    value, name = _response(row, columns)
    answer = messages_of(value, name)
    if said is None and answer is None:
        return None
    if answer and any(message.role == "user" for message in answer):
        return answer  # the whole conversation, as preferences are often kept
    if said is None:
        said = [Message("user", _single(row, columns._replace(response=None), answered=True).prompt)]
    if answer is None:
        text = text_of(value, name)
        answer = [Message("assistant", text)] if text.strip() else []
    return [*said, *answer]


def is_harmful(row: Mapping[str, Any]) -> bool | None:
    """Whether a row's own label says that its prompt is harmful; None where it has none.

    XSTest's contrast prompts are the unsafe ones; older copies of it tell them by their type alone.
    """
    for name, value in row.items():
        words = LABELS.get(name.lower()) if isinstance(value, str) else None
        if words is not None and value.strip().lower() in words:
            return bool(value.strip().lower() == words[0])
    kind = row.get("type")
    return True if isinstance(kind, str) and kind.startswith("contrast_") else None


def _of_kind(examples: list[Example], labels: Sequence[bool | None], kind: str | None, reference: str) -> list[Example]:
    """The examples that are labelled as the kind of prompt that is asked for, or not at all; the rest is said."""
    unsafe = sum(label is True for label in labels)
    if kind is None:
        if 0 < unsafe < len(labels):
            _say(f"{reference}: {unsafe} of {len(labels)} prompts are labelled as unsafe, and are kept")
        return examples
    kept = [e for e, label in zip(examples, labels, strict=True) if label is None or label == (kind == "harmful")]
    if len(kept) < len(examples):
        word = "safe" if kind == "harmful" else "unsafe"
        share = f"{len(examples) - len(kept)} of {len(examples)} prompts"
        _say(f"{reference}: {share} are labelled as {word}, and are left out of the {kind} ones")
        if not kept:
            raise DataError(f"All prompts of {reference} are labelled as {word}, and {kind} ones are asked for")
    return kept


def with_own_ids(examples: list[Example], reference: str) -> list[Example]:
    """The examples, of those with an identifier that stood before given one of their own: `ID#2` and so on."""
    taken = {example.id for example in examples}
    if len(taken) == len(examples):
        return examples
    seen: dict[str, int] = {}
    result, changed = [], 0
    for example in examples:
        number = seen.get(example.id, 0) + 1
        if number > 1:
            while (own := f"{example.id}#{number}") in taken:
                number += 1
            taken.add(own)
            changed += 1
            result.append(replace(example, id=own))
        else:
            result.append(example)
        seen[example.id] = number
    _say(f"{reference}: {changed} identifiers are not unique; #2 and so on was put to those that come later")
    return result


def _say(text: str) -> None:
    if text not in _told:  # a study reads its sets again at every stage
        _told.add(text)
        logger.warning("%s", text)


def _plain(value: Any) -> str:
    """An identifier or a category in words: the names of what is true in an object, whole numbers without a point."""
    if isinstance(value, Mapping):
        return ", ".join(str(name) for name, flag in value.items() if flag is True)
    if isinstance(value, list):
        return ", ".join(map(_plain, value))
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _without_llama2_markup(prompt: str) -> tuple[str, str]:
    """Strip `[INST] ... [/INST]` as the files of Wei et al. carry it: the chat template puts it back."""
    match = re.fullmatch(r"\s*(?:<s>)?\s*\[INST\]\s*(.*?)\s*\[/INST\]\s*(.*?)\s*", prompt, flags=re.DOTALL)
    return (match[1], match[2]) if match else (prompt, "")
