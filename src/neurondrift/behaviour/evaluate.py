"""Behaviour of one model: answers to three kinds of prompts, judged, as rows for a Parquet file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from neurondrift.artifacts import atomic_path
from neurondrift.behaviour.attacks import VANILLA, Attack
from neurondrift.behaviour.capability import perplexity
from neurondrift.behaviour.generate import Backend, Decoding, Request, answer
from neurondrift.behaviour.panel import Panel
from neurondrift.behaviour.rates import Change, Rate, category_interval, paired_change, per_prompt, refusal_rate
from neurondrift.data import Example
from neurondrift.errors import DataError

__all__ = [
    "Change",
    "Rate",
    "category_interval",
    "count_answers",
    "judge_answers",
    "paired_change",
    "per_prompt",
    "perplexity",
    "refusal_rate",
    "write_answers",
]

Advance = Callable[[int], None]
WHOLE_NUMBERS = ("step", "seed", "sample", "attack_seed", "max_new_tokens")


def count_answers(sets: Mapping[str, Sequence[Example]], attack: Attack = VANILLA) -> int:
    """How many answers `judge_answers` generates."""
    return sum(len(examples) * (attack.answers if kind == "harmful" else 1) for kind, examples in sets.items())


def judge_answers(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    sets: Mapping[str, Sequence[Example]],
    *,
    judge_name: str = "refusal",
    panel: Panel | None = None,
    attack: Attack = VANILLA,
    system: str | None = None,
    max_new_tokens: int = 32,
    batch_size: int = 32,
    max_length: int = 2048,
    backend: Backend = "transformers",
    advance: Advance = lambda n: None,
) -> list[dict[str, Any]]:
    """Answer and judge the prompts of several sets.

    Parameters
    ----------
    model, tokenizer, backend
        As in `generate.answer`.
    sets
        Kind of prompt (`harmful`, `ordinary`, `borderline`) -> examples; their responses are not looked at.
    judge_name, panel
        A judge, or the judges; the answers are there before a model judge is loaded.
    attack
        How harmful prompts are put; the others are always asked plainly.
    system
        System prompt of all prompts.
    max_new_tokens, batch_size, max_length, advance
        As in `generate.answer`; answers end early where every judge's verdict is settled, and never where one of them
        is a model.

    Returns
    -------
    One row an answer and judge, with the columns of docs/results.md but step and seed.

    Raises
    ------
    DataError
        A set without prompts, and what `generate.answer` raises.
    """
    chosen = panel or Panel([judge_name])
    pairs = [(kind, example) for kind, examples in sets.items() for example in examples]
    for kind, examples in sets.items():
        if not examples:
            raise DataError(f"There are no {kind} prompts", fix="name a set that holds some")
    asked: list[tuple[str, Example, Request, Attack]] = []
    for kind, example in pairs:
        put = attack if kind == "harmful" else VANILLA
        for request in put.requests(example.prompt, tokenizer, system=system, whole=chosen.reads_all(kind)):
            asked.append((kind, example, request, put))
    texts = [""] * len(asked)
    for decoding in dict.fromkeys(put.decoding(max_new_tokens) for _, _, _, put in asked):
        part = [index for index, entry in enumerate(asked) if entry[3].decoding(max_new_tokens) == decoding]
        found = answer(
            model,
            tokenizer,
            [asked[index][2] for index in part],
            decoding=decoding,
            batch_size=batch_size,
            max_length=max_length,
            decided=chosen.decided,
            advance=advance,
            backend=backend,
        )
        for index, text in zip(part, found, strict=True):
            texts[index] = text
    opinions = chosen.judge(
        [(kind, example.prompt, text) for (kind, example, _, _), text in zip(asked, texts, strict=True)]
    )
    return [
        {
            "kind": kind,
            "id": example.id,
            "category": example.category,
            "prompt": example.prompt,
            "response": text,
            **opinion._asdict(),
            **_how(put, put.decoding(max_new_tokens), request, system, backend),
        }
        for (kind, example, request, put), text, found in zip(asked, texts, opinions, strict=True)
        for opinion in found
    ]


def _how(attack: Attack, decoding: Decoding, request: Request, system: str | None, backend: str) -> dict[str, Any]:
    """The columns that say how an answer came about."""
    sampled = decoding.temperature > 0
    return {
        "attack": attack.name,
        "sample": request.sample,
        "suffix": attack.suffixes[request.sample] if attack.kind == "suffix" else None,
        "chat_template": attack.chat_template,
        "system_prompt": system or "",
        "temperature": decoding.temperature,
        "top_p": decoding.top_p,
        "attack_seed": decoding.seed if sampled else None,
        "max_new_tokens": decoding.max_new_tokens,
        "backend": backend,
    }


def write_answers(path: Path, rows: Sequence[Mapping[str, Any]], *, step: int | None, seed: int | None) -> None:
    """Write judged answers as Parquet: the rows of `judge_answers` with the training step and seed."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.Table.from_pylist([{"step": step, "seed": seed, **row} for row in rows])
    kinds = {name: pa.int32() for name in WHOLE_NUMBERS} | {"score": pa.float64(), "suffix": pa.string()}
    for name, kind in kinds.items():  # a column of nulls has no kind of its own
        index = table.schema.get_field_index(name)
        if index >= 0:
            table = table.set_column(index, name, table[name].cast(kind))
    with atomic_path(path) as partial:
        pq.write_table(table, partial, compression="zstd")
