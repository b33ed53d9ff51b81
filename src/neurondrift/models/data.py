"""Prompts and responses: where they come from, and how they become token ids.

Owns data references, the column names of the field's data sets, the chat template and the response mask.
Knows nothing of scores, training or judges.
"""

from __future__ import annotations

import csv
import hashlib
import json
import logging
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from pydantic import BaseModel, ConfigDict, Field, model_validator

from neurondrift.base.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class DataReference(BaseModel):
    """Where examples come from.

    `source` is `builtin:NAME`, a path to CSV, JSON, JSONL or Parquet, or `hf:NAME`. A bare string in the
    configuration stands for `{source = "..."}`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str
    prompt: str | None = Field(None, description="column of the prompt, where it has no usual name")
    response: str | None = Field(None, description="column of the response, where it has no usual name")
    split: str = Field("train", description="split of an hf: data set")
    subset: str | None = Field(None, description="configuration name of an hf: data set")
    revision: str | None = Field(None, description="revision of an hf: data set")
    limit: int | None = Field(None, ge=1, description="use this many examples, drawn with `seed`")
    seed: int = Field(0, description="seed of that draw")

    @model_validator(mode="before")
    @classmethod
    def _from_string(cls, value: Any) -> Any:
        return {"source": value} if isinstance(value, str) else value


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

# column names in use, first match wins: (prompt, input appended to the prompt, response)
KNOWN_COLUMNS = [
    ("prompt", None, "response"),
    ("instruction", "input", "output"),
    ("instruction", None, "output"),
    ("instruction", "context", "response"),
    ("goal", None, "target"),
    ("prompt", None, "completion"),
    ("question", None, "answer"),
    ("prompt", None, None),
    ("instruction", None, None),
    ("goal", None, None),
]

PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}### Response:\n{{ message['content'] }}{{ eos_token }}\n\n"
    "{% else %}### Instruction:\n{{ message['content'] }}\n\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}### Response:\n{% endif %}"
)


@dataclass(frozen=True, kw_only=True)
class Example:
    """One prompt with the response that goes with it (empty where a set holds prompts only)."""

    prompt: str
    response: str
    id: str
    category: str = ""


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
) -> list[Example]:
    """The examples that a reference names.

    Parameters
    ----------
    reference
        `builtin:NAME`; a path to CSV, JSON (a list of objects), JSONL, Parquet or TXT (a prompt a line); `hf:NAME`
        (a hub id or a local folder in the hub's layout, read by `datasets`); or a `DataReference`, whose own
        columns, limit, seed and split then count.
    limit
        Draw this many without replacement (in the order of the file); all where there are fewer.
    seed
        Seed of that draw.
    require_response
        Whether an example without a response is an error (for training and scoring) or fine (prompts only).
    prompt_column, response_column
        Columns, where they have no usual name.
    split
        Split of an `hf:` set.

    Raises
    ------
    DataError
        Missing or unreadable file, unknown set or columns, an empty set, an example with an empty prompt or
        (where required) response, named by its id.
    """
    subset = revision = None
    if not isinstance(reference, str):
        limit, seed, split = reference.limit or limit, reference.seed, reference.split
        prompt_column, response_column = reference.prompt, reference.response
        subset, revision = reference.subset, reference.revision
        reference = reference.source
    rows = _rows(reference, split=split, subset=subset, revision=revision)
    examples = _to_examples(rows, reference, prompt_column, response_column)
    if not examples:
        raise DataError("The data set is empty", received=reference)
    for example in examples:
        if not example.prompt.strip():
            raise DataError(f"Example {example.id} of {reference} has an empty prompt", fix="remove it from the set")
        if require_response and not example.response.strip():
            raise DataError(
                f"Example {example.id} of {reference} has no response",
                fix="add one, remove the example, or name the right column with response = ...",
            )
    if limit is not None and limit < len(examples):
        chosen = sorted(random.Random(seed).sample(range(len(examples)), limit))
        examples = [examples[index] for index in chosen]
    return examples


def builtin_names() -> list[str]:
    """The built-in sets, as references."""
    return [f"builtin:{name}" for name in BUILTIN]


def check_reachable(reference: DataReference) -> str:
    """What can be said of a reference without reading a large set: used by `neurondrift verify`.

    Raises `DataError` where a built-in name or a file does not exist or does not parse.
    """
    if reference.source.startswith("hf:"):
        folder = Path(reference.source.removeprefix("hf:"))
        return "local folder" if folder.exists() else "on the hub (not checked)"
    return f"{len(load_examples(reference, require_response=False))} examples"


def _rows(reference: str, *, split: str, subset: str | None, revision: str | None) -> Iterable[Mapping[str, Any]]:
    if reference.startswith("builtin:"):
        name = reference.removeprefix("builtin:")
        if name not in BUILTIN:
            raise DataError(
                "There is no such built-in data set", received=reference, allowed=", ".join(builtin_names())
            )
        file, part = BUILTIN[name]
        text = (resources.files("neurondrift.models") / "datasets" / file).read_text(encoding="utf-8")
        return [row for row in map(json.loads, text.splitlines()) if row["split"] == part]
    if reference.startswith("hf:"):
        return _hub_rows(reference.removeprefix("hf:"), split, subset, revision)
    path = Path(reference).expanduser()
    if not path.is_file():
        raise DataError(
            "The data file does not exist",
            received=reference,
            allowed="builtin:NAME, a path to CSV, JSON, JSONL or Parquet, or hf:NAME",
        )
    try:
        rows = _file_rows(path)
    except (ValueError, KeyError, OSError, csv.Error, RecursionError) as error:
        raise DataError(f"The data file cannot be read ({error})", received=reference) from error
    wrong = next((number for number, row in enumerate(rows) if not isinstance(row, Mapping)), None)
    if wrong is not None:
        raise DataError(
            f"Row {wrong} of the data file is no object", received=reference, allowed='rows such as {"prompt": "..."}'
        )
    return rows


def _file_rows(path: Path) -> list[Mapping[str, Any]]:
    suffix = path.suffix.lower()
    if suffix == ".csv":
        with open(path, newline="", encoding="utf-8-sig") as stream:
            return _csv_rows(list(csv.reader(stream)))
    if suffix == ".txt":
        return [{"prompt": line} for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if suffix == ".json":
        rows = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise ValueError("a JSON file must hold a list of objects")
        return rows
    if suffix == ".parquet":
        import pyarrow.parquet as pq

        table: list[Mapping[str, Any]] = pq.read_table(path).to_pylist()
        return table
    raise DataError(
        "This kind of data file is not known", received=str(path), allowed=".csv, .json, .jsonl, .parquet, .txt"
    )


def _csv_rows(lines: list[list[str]]) -> list[Mapping[str, Any]]:
    """Rows under their header; a file of one column without a header (as AdvBench is often kept) is all prompts."""
    if not lines:
        return []
    header, *rest = lines
    prompt_names = {prompt for prompt, _, _ in KNOWN_COLUMNS}
    if all(len(line) == 1 for line in lines) and header[0] not in prompt_names:
        return [{"prompt": line[0]} for line in lines]
    return [dict(zip(header, line, strict=False)) for line in rest if line]


def _hub_rows(name: str, split: str, subset: str | None, revision: str | None) -> Iterable[Mapping[str, Any]]:
    import datasets

    try:
        loaded = datasets.load_dataset(name, subset, split=split, revision=revision)
    except Exception as error:  # datasets raises many kinds for "not there"; all are about the user's reference
        message = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(f"The data set cannot be loaded ({message})", received=f"hf:{name}, split {split}") from error
    rows: Iterable[Mapping[str, Any]] = loaded
    return rows


def _to_examples(
    rows: Iterable[Mapping[str, Any]], reference: str, prompt_column: str | None, response_column: str | None
) -> list[Example]:
    examples: list[Example] = []
    columns: tuple[str, str | None, str | None] | None = None
    for index, row in enumerate(rows):
        if columns is None:
            columns = _columns(list(row), reference, prompt_column, response_column)
        prompt_key, input_key, response_key = columns
        prompt = str(row.get(prompt_key) or "")
        if input_key and str(row.get(input_key) or "").strip():
            prompt = f"{prompt}\n\n{row[input_key]}"
        prompt, chat_response = _without_llama2_markup(prompt)
        response = str(row.get(response_key) or "") if response_key else ""
        identifier = str(row.get("id") or row.get("id_v2") or index)
        category = str(row.get("category") or row.get("type") or "")
        examples.append(Example(prompt=prompt, response=response or chat_response, id=identifier, category=category))
    return examples


def _columns(
    names: list[str], reference: str, prompt_column: str | None, response_column: str | None
) -> tuple[str, str | None, str | None]:
    for given in (prompt_column, response_column):
        if given is not None and given not in names:
            raise DataError(f"{reference} has no column {given}", received=given, allowed=", ".join(names))
    for prompt, extra, response in KNOWN_COLUMNS:
        prompt, response = prompt_column or prompt, response_column or response
        if all(name is None or name in names for name in (prompt, extra, response)):
            return prompt, extra, response
    raise DataError(
        f"The columns of {reference} are not recognised",
        received=", ".join(names),
        allowed="prompt/response, instruction/input/output, goal/target, or prompt = and response = in the config",
    )


def _without_llama2_markup(prompt: str) -> tuple[str, str]:
    """Strip `[INST] ... [/INST]` as the files of Wei et al. carry it: the chat template puts it back."""
    match = re.fullmatch(r"\s*(?:<s>)?\s*\[INST\]\s*(.*?)\s*\[/INST\]\s*(.*?)\s*", prompt, flags=re.DOTALL)
    return (match[1], match[2]) if match else (prompt, "")


def render_prompt(prompt: str, tokenizer: PreTrainedTokenizerBase, *, system: str | None = None) -> str:
    """The text that a chat model sees for a user's prompt, up to where its answer begins.

    A tokenizer without a chat template gets `PLAIN_TEMPLATE` (### Instruction / ### Response), said once.
    """
    if not tokenizer.chat_template:
        name = str(getattr(tokenizer, "name_or_path", ""))
        if name not in _told:  # a study loads the tokenizer again at every step
            _told.add(name)
            logger.warning("%s has no chat template: '### Instruction / ### Response' is used", name or "The tokenizer")
        tokenizer.chat_template = PLAIN_TEMPLATE
    messages = [{"role": "system", "content": system}] if system else []
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
        prompt_text = render_prompt(example.prompt, tokenizer)
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
    messages = [{"role": "user", "content": example.prompt}, {"role": "assistant", "content": example.response}]
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
