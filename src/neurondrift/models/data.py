"""Prompts and responses: where they come from.

Owns data references; files and columns, and how examples become token ids, are in `text/`, whose names are offered
here too. Knows nothing of scores, training or judges.
"""

from __future__ import annotations

import json
import random
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    WrapSerializer,
    model_serializer,
    model_validator,
)

from neurondrift.base.errors import DataError
from neurondrift.models.text.columns import HOW_TO_NAME, KNOWN_NAMES, to_examples, with_own_ids
from neurondrift.models.text.examples import Example as Example
from neurondrift.models.text.examples import Message as Message
from neurondrift.models.text.reading import Table, read_file, read_folder, read_hub, table_of
from neurondrift.models.text.templates import IGNORED as IGNORED
from neurondrift.models.text.templates import PLAIN_TEMPLATE as PLAIN_TEMPLATE
from neurondrift.models.text.templates import Encoded as Encoded
from neurondrift.models.text.templates import data_fingerprint as data_fingerprint
from neurondrift.models.text.templates import encode as encode
from neurondrift.models.text.templates import name_of as name_of
from neurondrift.models.text.templates import render_prompt as render_prompt


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
    mix: DataReference | None = Field(None, description="another set that is mixed in")
    share: float | None = Field(None, gt=0, lt=1, description="the part of all examples that comes from it")

    @model_validator(mode="before")
    @classmethod
    def _from_string(cls, value: Any) -> Any:
        return {"source": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _share_of_a_mix(self) -> DataReference:
        if (self.mix is None) != (self.share is None):
            raise ValueError("mix and share go together: the set that is mixed in, and its part of all, such as 0.1")
        return self

    @model_serializer(mode="wrap")
    def _without_last(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Fields that came after the first version are left out at their default: studies that stand keep theirs."""
        unsaid = [("turns", "last"), ("mix", None), ("share", None)]
        return {name: value for name, value in handler(self).items() if (name, value) not in unsaid}

    @property
    def title(self) -> str:
        """The source, and what is mixed in: `builtin:ordinary with 10 % builtin:refusals`."""
        return self.source if self.mix is None else f"{self.source} with {100 * (self.share or 0):g} % {self.mix.title}"


#: A data set that may be left out, as "none": TOML has no null, and a setting that is left out is its default.
DataOrNone = Annotated[
    DataReference | None,
    BeforeValidator(lambda value: None if value == "none" else value),
    WrapSerializer(lambda value, handler: "none" if value is None else handler(value)),
]
PromptKind = Literal["harmful", "ordinary", "borderline"]
# name -> (file, split): the halves of a file never share a subject (see its "topic" or "category")
BUILTIN = {
    "refusals": ("refusals.jsonl", "train"),
    "refusals-heldout": ("refusals.jsonl", "eval"),
    "ordinary": ("ordinary.jsonl", "finetune"),
    "ordinary-align": ("ordinary.jsonl", "align"),
    "ordinary-heldout": ("ordinary.jsonl", "eval"),
    "borderline": ("borderline.jsonl", "eval"),
    "borderline-align": ("borderline.jsonl", "align"),
    "rhymes": ("rhymes.jsonl", "align"),
}


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
        example with an empty prompt or (where required) response, named by its id; too few examples to mix in.

    Notes
    -----
    Of a reference with a `mix` the share m / (n + m) nearest to its `share` comes from that set: m of its examples and
    n of the others, drawn and placed among them by the reference's seed. A limit counts both.
    """
    if isinstance(reference, str):
        columns = {"prompt": prompt_column, "response": response_column}
        reference = DataReference(source=reference, split=split, subset=subset, seed=seed, **columns)
    limit = reference.limit or limit
    if reference.mix is None or reference.share is None:
        return _drawn(_examples(reference, require_response, kind), limit, reference.seed)
    others, mixed = (_examples(each, require_response, kind) for each in (reference, reference.mix))
    mixed = _drawn(mixed, reference.mix.limit, reference.mix.seed)
    if limit is not None and limit < len(others) + round(len(others) * reference.share / (1 - reference.share)):
        others = _drawn(others, max(1, limit - max(1, round(limit * reference.share))), reference.seed)
    needed = max(1, round(len(others) * reference.share / (1 - reference.share)))
    if len(mixed) < needed:
        raise DataError(
            f"{reference.mix.title} has too few examples to be {reference.share:g} of all",
            received=f"{len(mixed)} of them, beside {len(others)} of {reference.source}",
            allowed=f"at least {needed}",
            fix="lower the share, or limit the other set",
        )
    return _placed(others, _drawn(mixed, needed, reference.seed), reference)


def _placed(others: list[Example], mixed: list[Example], reference: DataReference) -> list[Example]:
    """Both in their orders, at places drawn by the reference's seed, with identifiers that are unique."""
    count = len(others) + len(mixed)
    places = set(random.Random(reference.seed).sample(range(count), len(mixed)))
    first, second = iter(others), iter(mixed)
    examples = [next(second) if place in places else next(first) for place in range(count)]
    return with_own_ids(examples, reference.title)


def _drawn(examples: list[Example], count: int | None, seed: int) -> list[Example]:
    """So many without replacement, in their order; all where there are no more."""
    if count is None or count >= len(examples):
        return examples
    return [examples[index] for index in sorted(random.Random(seed).sample(range(len(examples)), count))]


def _examples(reference: DataReference, require_response: bool, kind: PromptKind | None) -> list[Example]:
    """All that a reference names, without what is mixed in, each with a prompt and, where required, a response."""
    source = reference.source
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
    return examples


def builtin_names() -> list[str]:
    """The built-in sets, as references."""
    return [f"builtin:{name}" for name in BUILTIN]


def is_local(reference: DataReference) -> bool:
    """Whether a set can be read without the network."""
    source = reference.source
    own = not source.startswith("hf:") or Path(source.removeprefix("hf:")).expanduser().exists()
    return own and (reference.mix is None or is_local(reference.mix))


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
