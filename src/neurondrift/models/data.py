"""Prompts and responses: where they come from, and how they become token ids.

Owns data references, the chat template and the response mask; files and columns are in `text/`.
Knows nothing of scores, training or judges.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from neurondrift.base.errors import DataError
from neurondrift.models.text.columns import HOW_TO_NAME, KNOWN_NAMES, to_examples
from neurondrift.models.text.examples import Example as Example
from neurondrift.models.text.examples import Message as Message
from neurondrift.models.text.reading import Table, read_file, read_folder, read_hub, table_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class DataReference(BaseModel):
    """Where examples come from.

    `source` is `builtin:NAME`, a path to CSV, TSV, JSON, JSON Lines, Parquet or plain text, or to a
    folder of `datasets`, or `hf:NAME`. A bare string in the configuration stands for `{source = "..."}`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str
    prompt: str | None = Field(None, description="column of the prompt, where it has no usual name")
    response: str | None = Field(None, description="column of the response, where it has no usual name")
    split: str = Field("train", description="split of an hf: data set or of a folder")
    subset: str | None = Field(None, description="configuration name of an hf: data set")
    revision: str | None = Field(None, description="revision of an hf: data set")
    limit: int | None = Field(None, ge=1, description="use this many examples, drawn with `seed`")
    seed: int = Field(0, description="seed of that draw")
    turns: Literal["last", "all"] = Field(
        "last", description="of a conversation: its last answer is an example, or each of its answers is one"
    )

    @model_validator(mode="before")
    @classmethod
    def _from_string(cls, value: Any) -> Any:
        return {"source": value} if isinstance(value, str) else value

    @model_serializer(mode="wrap")
    def _without_last(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Fields that came after the first version are left out at their default: studies that stand keep theirs."""
        return {name: value for name, value in handler(self).items() if (name, value) != ("turns", "last")}


PromptKind = Literal["harmful", "ordinary", "borderline"]
logger = logging.getLogger(__name__)

_told: set[str] = set()  # tokenizers without a chat template that the user has heard of
IGNORED = -100  # label of a token that is no target, as in transformers

# name -> (file, split): the halves of a file never share a subject (see its "topic" or "category")
BUILTIN = {
    "refusals": ("refusals.jsonl", "train"),
    "refusals-heldout": ("refusals.jsonl", "eval"),
    "ordinary": ("ordinary.jsonl", "finetune"),
    "ordinary-align": ("ordinary.jsonl", "align"),
    "ordinary-heldout": ("ordinary.jsonl", "eval"),
    "borderline": ("borderline.jsonl", "eval"),
    "borderline-align": ("borderline.jsonl", "align"),
}

PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}### Response:\n{{ message['content'] }}{{ eos_token }}\n\n"
    "{% else %}### Instruction:\n{{ message['content'] }}\n\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}### Response:\n{% endif %}"
)


class Encoded(TypedDict):
    """Token ids of prompt and response, and labels: the ids of the response, -100 on the prompt."""

    input_ids: list[int]
    labels: list[int]


def load_examples(
    reference: str | DataReference,
    *,
    limit: int | None = None,
    seed: int = 0,
    require_response: bool = True,
    prompt_column: str | None = None,
    response_column: str | None = None,
    split: str = "train",
    subset: str | None = None,
    kind: PromptKind | None = None,
) -> list[Example]:
    """The examples that a reference names.

    Parameters
    ----------
    reference
        `builtin:NAME`; a path to CSV, TSV, JSON, JSON Lines (under either suffix), Parquet or TXT (a prompt a line),
        compressed or not, or to a folder that `datasets` has written; `hf:NAME` (a hub id or a local folder in the
        hub's layout, read by `datasets`); or a `DataReference`, whose own columns, limit, seed and split then count.
    limit
        Draw this many without replacement (in the order of the file); all where there are fewer.
    seed
        Seed of that draw.
    require_response
        Whether an example without a response is an error (for training and scoring) or fine (prompts only).
    prompt_column, response_column
        Columns, where they have no usual name.
    split, subset
        Split of an `hf:` set or a folder, and configuration of an `hf:` set.
    kind
        What the prompts are asked as: those that the set itself labels otherwise (the unsafe contrast prompts of
        XSTest, which are no borderline ones) are left out, with a warning. None: all are kept, with a warning.

    Returns
    -------
    Examples in the order of the file. Identifiers are unique: those that are not get `#2` and so on, with a warning.

    Raises
    ------
    DataError
        Missing or unreadable file, unknown set or columns, an empty set, a value that is no text (with its row), an
        example with an empty prompt or (where required) response, named by its id.
    """
    if isinstance(reference, str):
        columns = {"prompt": prompt_column, "response": response_column}
        reference = DataReference(source=reference, split=split, subset=subset, seed=seed, **columns)
    limit, source = reference.limit or limit, reference.source
    examples = to_examples(
        _table(reference),
        source,
        prompt=reference.prompt,
        response=reference.response,
        turns=reference.turns,
        answered=require_response,
        kind=kind,
    )
    if not examples:
        raise DataError("The data set is empty", received=source)
    for example in examples:
        if not example.prompt.strip():
            raise DataError(f"Example {example.id} of {source} has an empty prompt", fix="remove it from the set")
        if require_response and not example.response.strip():
            raise DataError(
                f"Example {example.id} of {source} has no response",
                fix=f"add one, remove the example, or name the right columns: {HOW_TO_NAME}",
            )
    if limit is not None and limit < len(examples):
        chosen = sorted(random.Random(reference.seed).sample(range(len(examples)), limit))
        examples = [examples[index] for index in chosen]
    return examples


def builtin_names() -> list[str]:
    """The built-in sets, as references."""
    return [f"builtin:{name}" for name in BUILTIN]


def is_local(reference: DataReference) -> bool:
    """Whether a set can be read without the network."""
    source = reference.source
    return not source.startswith("hf:") or Path(source.removeprefix("hf:")).expanduser().exists()


def _table(reference: DataReference) -> Table:
    """The rows that a reference names. Raises `DataError` where a part is asked for of what has no parts."""
    source = reference.source
    on_hub, path = source.startswith("hf:"), Path(source.removeprefix("hf:")).expanduser()
    if on_hub or path.is_dir():
        table = read_folder(path, reference.split) if path.is_dir() else None
        if table is not None:
            return table
        name = str(path) if path.is_dir() else source.removeprefix("hf:")
        return read_hub(name, split=reference.split, subset=reference.subset, revision=reference.revision)
    if reference.split != "train" or reference.subset:
        raise DataError(
            f"{source} has no splits and no subsets",
            received=", ".join(part for part in (reference.split, reference.subset) if part not in ("train", None)),
            allowed="--split and --subset (split = and subset = in the configuration) with hf:NAME or a folder",
        )
    if source.startswith("builtin:"):
        name = source.removeprefix("builtin:")
        if name not in BUILTIN:
            raise DataError("There is no such built-in data set", received=source, allowed=", ".join(builtin_names()))
        file, part = BUILTIN[name]
        text = (resources.files("neurondrift.models") / "datasets" / file).read_text(encoding="utf-8")
        return table_of([row for row in map(json.loads, text.strip().split("\n")) if row["split"] == part])
    if not path.is_file():
        raise DataError(
            "The data file does not exist",
            received=source,
            allowed="builtin:NAME, a path to CSV, TSV, JSON, JSON Lines or Parquet, a folder, or hf:NAME",
        )
    given = {name.strip().lower() for name in (reference.prompt, reference.response) if name}
    return read_file(path, known=KNOWN_NAMES | given)


def render_prompt(
    prompt: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    system: str | None = None,
    earlier: Sequence[Message] = (),
) -> str:
    """The text that a chat model sees for a user's prompt, up to where its answer begins.

    `earlier` are the turns before it; `system` stands for a system prompt among them.

    A tokenizer without a chat template gets `PLAIN_TEMPLATE` (### Instruction / ### Response), said once.
    """
    if not tokenizer.chat_template:
        name = str(getattr(tokenizer, "name_or_path", ""))
        if name not in _told:  # a study loads the tokenizer again at every step
            _told.add(name)
            logger.warning("%s has no chat template: '### Instruction / ### Response' is used", name or "The tokenizer")
        tokenizer.chat_template = PLAIN_TEMPLATE
    messages = [{"role": "system", "content": system}] if system else []
    messages += [message._asdict() for message in earlier if not (system and message.role == "system")]
    messages.append({"role": "user", "content": prompt})
    text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return text


def encode(examples: Iterable[Example], tokenizer: PreTrainedTokenizerBase, *, max_length: int = 512) -> list[Encoded]:
    """Token ids of each example, with the chat template, and the response mask as labels.

    Parameters
    ----------
    examples
        Prompts with responses.
    tokenizer
        Its chat template renders the prompt; its end-of-turn marker after the response is part of the labels.
    max_length
        Longer examples lose the end of their response.

    Returns
    -------
    One `{"input_ids", "labels"}` an example, in order, without padding; `labels` is -100 on the prompt.
    The response is tokenised apart from the prompt, so the prompt's ids are exactly those that generation uses.

    Raises
    ------
    DataError
        An example whose prompt alone fills `max_length` (nothing of the response would be left).
    """
    encoded: list[Encoded] = []
    for example in examples:
        prompt_text = render_prompt(example.prompt, tokenizer, earlier=example.messages)
        response_text = _response_text(example, tokenizer, prompt_text)
        prompt_ids: list[int] = tokenizer(prompt_text, add_special_tokens=False)["input_ids"]
        response_ids: list[int] = tokenizer(response_text, add_special_tokens=False)["input_ids"]
        if len(prompt_ids) >= max_length:
            raise DataError(
                f"Example {example.id}: its prompt alone fills max_length, so that nothing of the response is left",
                received=f"{len(prompt_ids)} prompt tokens, max_length {max_length}",
                fix="raise max_length or drop the example",
            )
        ids = (prompt_ids + response_ids)[:max_length]
        labels = ([IGNORED] * len(prompt_ids) + response_ids)[:max_length]
        encoded.append({"input_ids": ids, "labels": labels})
    return encoded


def _response_text(example: Example, tokenizer: PreTrainedTokenizerBase, prompt_text: str) -> str:
    """The response as the template would write it, up to and with the end-of-turn marker."""
    messages = [message._asdict() for message in example.messages]
    messages += [{"role": "user", "content": example.prompt}, {"role": "assistant", "content": example.response}]
    whole: str = tokenizer.apply_chat_template(messages, tokenize=False)
    if whole.startswith(prompt_text):
        return whole[len(prompt_text) :].rstrip("\n")
    return example.response + (tokenizer.eos_token or "")


def data_fingerprint(encoded: Sequence[Mapping[str, Any]]) -> str:
    """A short hash of token ids and labels, in order: the same data under the same tokenizer."""
    digest = hashlib.sha256()
    for row in encoded:
        digest.update(json.dumps([list(map(int, row["input_ids"])), list(map(int, row["labels"]))]).encode())
    return digest.hexdigest()[:16]
