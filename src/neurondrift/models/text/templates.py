"""Templates and tokens: how prompts and responses become what a model reads.

Owns the chat template (its choice, arguments, date and errors), the tokens that a tokenizer puts first, and the
response mask. Knows nothing of where examples come from, of scores, training or judges.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict, cast

from neurondrift.base.errors import DataError, ModelError
from neurondrift.models.text.examples import Example, Message
from neurondrift.models.text.thoughts import opened_at_end, spoken

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

IGNORED = -100  # label of a token that is no target, as in transformers

PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}### Response:\n{{ message['content'] }}{{ eos_token }}\n\n"
    "{% else %}### Instruction:\n{{ message['content'] }}\n\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}### Response:\n{% endif %}"
)

#: The day that a template is told where it asks for today's: results must not depend on when they were made. It is the
#: one that Llama 3's own template falls back on.
PINNED_DATE = datetime.date(2024, 7, 26)
_DIRECTIVES = "aAbBcdDeFgGhHIjklmMnpPrRsStTuUVwWxXyYzZ"

_RESERVED = ("messages", "add_generation_prompt", "tools", "documents")
_told: set[str] = set()  # what the user has heard of a tokenizer: a study loads it again at every step


class Encoded(TypedDict):
    """Token ids of prompt and response, and labels: the ids of the response, -100 on the prompt."""

    input_ids: list[int]
    labels: list[int]


class _Row(dict[str, list[int]]):
    """An encoded example that knows which one it is: no key, as collators make tensors of all keys."""

    def __init__(self, name: str, row: Encoded) -> None:
        super().__init__(row)  # type: ignore[arg-type]
        self.name = name


def name_of(row: Mapping[str, Any], index: int) -> str:
    """What a message calls an encoded example: its identifier, or (of rows made elsewhere) its number."""
    return row.name if isinstance(row, _Row) else str(index)


def render_prompt(
    prompt: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    system: str | None = None,
    earlier: Sequence[Message] = (),
    template: Mapping[str, Any] | None = None,
) -> str:
    """The text that a chat model sees for a user's prompt, up to where its answer begins.

    A tokenizer without a chat template gets `PLAIN_TEMPLATE` (### Instruction / ### Response), said once. `earlier` are
    the turns before the prompt; `system` stands for a system prompt among them. `template` holds further arguments of
    the template, such as `{"enable_thinking": False}`.

    Raises
    ------
    DataError
        The template refuses these messages, or writes a text without them.
    ModelError
        The tokenizer has several templates, none of which is the default.
    """
    before = [Message("system", system), *(m for m in earlier if m.role != "system")] if system else earlier
    messages = [*before, Message("user", prompt)]
    return chat_text(messages, tokenizer, add_generation_prompt=True, template=template)


def chat_text(
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    *,
    add_generation_prompt: bool = False,
    template: Mapping[str, Any] | None = None,
) -> str:
    """A conversation as the chat template writes it, with the pinned date; contents as text, or as parts if it must.

    Raises as `render_prompt` does; only what users and systems say must be found again in the text.
    """
    source = with_pinned_date(template_of(tokenizer), tokenizer)
    wanted = [message.content for message in messages if message.role != "assistant"]
    found: list[tuple[str, Exception | None]] = []  # what is missing, or why it was refused: of either form
    for in_parts in (False, True):
        put = [
            {"role": role, "content": [{"type": "text", "text": content}] if in_parts else content}
            for role, content in messages
        ]
        try:
            text: str = tokenizer.apply_chat_template(
                put,
                chat_template=source,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **(template or {}),
            )
        except Exception as error:  # templates are programs of others: they fail in every way
            found.append(("", error))
            continue
        written = _squeezed(text)
        lost = [content for content in wanted if _squeezed(content) not in written]
        if not lost and not (in_parts and "'type':" in written):  # a list that was not taken apart
            return text
        found.append((lost[0] if lost else wanted[-1], None))
    missing, refusal = found[0]
    roles = {message.role for message in messages}
    if refusal is None:
        part = "system prompt" if Message("system", missing) in messages else "prompt"
        raise DataError(
            f"The model's chat template writes a text without the {part}",
            received=missing[:60],
            fix="leave out the system prompt" if part == "system prompt" else "use another tokenizer or chat template",
        )
    raise DataError(
        f"The model's chat template refuses these messages ({_first_line(refusal)})",
        received=" and ".join(f"a {name}" for role, name in _ROLES.items() if role in roles),
        fix="leave out the system prompt" if "system" in roles else "use another tokenizer, or no chat template",
    ) from refusal


_ROLES = {"system": "system prompt", "user": "prompt", "assistant": "response"}


def _squeezed(text: str) -> str:
    """A text without white space, which templates trim."""
    return "".join(text.split())


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__


def template_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """The tokenizer's chat template; of several with names, `default`. One that has none gets `PLAIN_TEMPLATE`."""
    found: Any = tokenizer.chat_template
    if not found:
        _tell(tokenizer, "%s has no chat template: '### Instruction / ### Response' is used")
        tokenizer.chat_template = PLAIN_TEMPLATE
        return PLAIN_TEMPLATE
    return found if isinstance(found, str) else _named(found, "default")


def _named(templates: Any, name: str) -> str:
    """One of several templates: a mapping, or (in older files) a list of names and templates."""
    if isinstance(templates, str):
        raise ModelError("The tokenizer has one chat template, without a name", received=f"chat_template = {name!r}")
    known: dict[str, str] = (
        dict(templates) if isinstance(templates, Mapping) else {entry["name"]: entry["template"] for entry in templates}
    )
    if name not in known and name == "default" and len(known) == 1:
        return next(iter(known.values()))
    if name not in known:
        raise ModelError(
            "The tokenizer has several chat templates, and none of this name",
            received=name,
            allowed=", ".join(sorted(known)),
            fix="choose one: the template argument chat_template",
        )
    return known[name]


def set_template_arguments(tokenizer: Any, arguments: Mapping[str, Any] | None) -> Any:
    """Fix arguments of a tokenizer's chat template, such as `enable_thinking`, for all that is ever put into it.

    They are written at the head of the template itself: whoever renders it gets them, and a tokenizer that is saved
    keeps them. `chat_template` chooses one of several templates by its name.

    Raises `ModelError` where there is no template, or where it does not ask for an argument of that name.
    """
    if not arguments:
        return tokenizer
    left = dict(arguments)
    if not tokenizer.chat_template:
        raise ModelError(
            "Template arguments are given, and the tokenizer has no chat template", received=", ".join(left)
        )
    chosen = left.pop("chat_template", None)
    source = template_of(tokenizer) if chosen is None else _named(tokenizer.chat_template, str(chosen))
    for name in left:
        if name in _RESERVED or not re.search(rf"\b{re.escape(name)}\b", source):
            raise ModelError(
                "The chat template asks for no argument of this name", received=name, allowed=", ".join(_asked(source))
            )
    head = "".join(f"{{% set {name} = {_literal(value)} %}}" for name, value in left.items())
    if head and not source.startswith(head + "\n"):
        source = f"{head}\n{source}"  # Jinja drops the line break after a block
    tokenizer.chat_template = source
    return tokenizer


def _asked(source: str) -> list[str]:
    """Names that a template expects from outside, as far as it can be read."""
    import jinja2
    import jinja2.meta

    try:
        parsed = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(
            re.sub(r"\{%-?\s*(?:end)?generation\s*-?%\}", "", source)
        )
    except jinja2.TemplateError:
        return []
    ours = {*_RESERVED, "raise_exception", "strftime_now", "bos_token", "eos_token", "pad_token", "unk_token"}
    return sorted(jinja2.meta.find_undeclared_variables(parsed) - ours)


def _literal(value: Any) -> str:
    """A value of JSON's kinds as Jinja writes it."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{json.dumps(str(key))}: {_literal(one)}" for key, one in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return "none" if value is None else json.dumps(value)


def with_pinned_date(source: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The template with `strftime_now` of its own, which always tells the same day; said once where it tells any."""
    if "strftime_now" not in source:
        return source
    _tell(tokenizer, f"%s has a chat template that may print today's date: it is told {PINNED_DATE:%d %B %Y}")
    moment = datetime.datetime.combine(PINNED_DATE, datetime.time(12))
    steps = []
    for directive in _DIRECTIVES:
        told = moment.strftime(f"%{directive}")
        steps += [(f"%{directive}", told), (f"%-{directive}", told.lstrip("0 ") if told.strip().isdigit() else told)]
    replaced = " | ".join(f"replace({json.dumps(old)}, {json.dumps(new)})" for old, new in steps)
    return f"{{% macro strftime_now(format) %}}{{{{ format | {replaced} }}}}{{% endmacro %}}\n{source}"


def _tell(tokenizer: Any, message: str) -> None:
    """Warn once of each tokenizer."""
    name = str(getattr(tokenizer, "name_or_path", ""))
    if (key := f"{name}\0{message}") not in _told:
        _told.add(key)
        logger.warning(message, name or "The tokenizer")


def prompt_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of a text that a model goes on from: behind the tokens that its tokenizer puts first, never twice.

    Base models (Gemma, Llama) were trained with a token that begins every sequence, and are lost without it. Where the
    text begins with it already, because the chat template wrote it, none is added. What a tokenizer puts *behind* a
    text (an end of sequence) is left out: the answer follows.
    """
    bare: list[int] = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    whole: list[int] = list(tokenizer(text, add_special_tokens=True)["input_ids"])
    if not bare or len(whole) == len(bare):
        return bare
    starts = (at for at in range(len(whole) - len(bare) + 1) if whole[at : at + len(bare)] == bare)
    at = next(starts, None)
    if at is None:  # the text is cut into other tokens behind the first one
        special = set(tokenizer.all_special_ids)
        at = next((place for place, token in enumerate(whole) if token not in special), len(whole))
    head = whole[:at]
    written = tokenizer.bos_token and text.lstrip().startswith(str(tokenizer.bos_token))
    return bare if not head or bare[0] == head[0] or written else head + bare


def encode(
    examples: Iterable[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int = 512,
    template: Mapping[str, Any] | None = None,
) -> list[Encoded]:
    """Token ids of each example, with the chat template, and the response mask as labels.

    Parameters
    ----------
    examples
        Prompts with responses.
    tokenizer
        Its chat template renders the prompt; its end-of-turn marker after the response is part of the labels. The
        tokens that it puts first (BOS) come first, unless the template has written them.
    max_length
        Longer examples lose the end of their response.
    template
        Further arguments of the chat template, such as `{"enable_thinking": False}`.

    Returns
    -------
    One `{"input_ids", "labels"}` an example, in order, without padding; `labels` is -100 on the prompt.
    The response is tokenised apart from the prompt, so the prompt's ids are exactly those that generation uses; what
    the template itself writes between the two (an empty `<think></think>`, a channel's name) follows them, unlabelled.

    Raises
    ------
    DataError
        An example whose prompt alone fills `max_length` (nothing of the response would be left), or whose prompt the
        template refuses or leaves out.
    """
    encoded: list[Encoded] = []
    for example in examples:
        prompt_text, response_text = _turns(example, tokenizer, template)
        before = prompt_ids(prompt_text, tokenizer)
        response_ids: list[int] = tokenizer(response_text, add_special_tokens=False)["input_ids"]
        if len(before) >= max_length:
            raise DataError(
                f"Example {example.id}: its prompt alone fills max_length, so that nothing of the response is left",
                received=f"{len(before)} prompt tokens, max_length {max_length}",
                fix="raise max_length or drop the example",
            )
        ids = (before + response_ids)[:max_length]
        labels = ([IGNORED] * len(before) + response_ids)[:max_length]
        encoded.append(cast(Encoded, _Row(example.id, {"input_ids": ids, "labels": labels})))
    return encoded


class _Turns(NamedTuple):
    """What a model is given, and what it is to say: the response up to and with the end-of-turn marker."""

    before: str
    response: str


_STAND_IN = "Response7f3a9c"  # where the template puts a response is seen by this one


def _turns(example: Example, tokenizer: PreTrainedTokenizerBase, template: Mapping[str, Any] | None) -> _Turns:
    """The two parts of an example's text. They are the template's, split where the response's own words begin."""
    prompt_text = render_prompt(example.prompt, tokenizer, earlier=example.messages, template=template)

    def conversation(response: str) -> str:
        messages = [*example.messages, Message("user", example.prompt), Message("assistant", response)]
        return chat_text(messages, tokenizer, template=template)

    whole = conversation(example.response)
    follows = whole.startswith(prompt_text)
    rest = whole[len(prompt_text) :]
    if follows and rest.lstrip().startswith(example.response.strip()):
        return _Turns(prompt_text, rest.rstrip("\n"))
    opening = opened_at_end(prompt_text)
    if opening and not follows and spoken(example.response) != example.response:  # the template drops its thoughts
        own = example.response.strip().removeprefix(opening.strip()).lstrip("\n")
        return _Turns(prompt_text, own + (tokenizer.eos_token or ""))
    if follows or opening:  # something stands between: thoughts that are empty, or not begun
        before, found, _ = conversation(_STAND_IN).partition(_STAND_IN)
        if found and whole.startswith(before) and before.strip() != prompt_text.strip():
            return _Turns(before, whole[len(before) :].rstrip("\n"))
    if follows and _squeezed(example.response)[-20:] in _squeezed(rest):
        return _Turns(prompt_text, rest.rstrip("\n"))
    return _Turns(prompt_text, example.response + (tokenizer.eos_token or ""))


def data_fingerprint(encoded: Sequence[Mapping[str, Any]]) -> str:
    """A short hash of token ids and labels, in order: the same data under the same tokenizer."""
    digest = hashlib.sha256()
    for row in encoded:
        digest.update(json.dumps([list(map(int, row["input_ids"])), list(map(int, row["labels"]))]).encode())
    return digest.hexdigest()[:16]
