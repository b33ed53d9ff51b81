"""What one run of an intervention is measured by: judged answers, the refusal margin, and the loss of held-out answers.

Owns the rows of a run, one a prompt, which outcomes they hold, and how what is lacking joins what is there.
Knows a model, prompts and a judge; no group and no null.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np
import torch

from neurondrift.attribution.margin import Margin
from neurondrift.attribution.openings import Openings
from neurondrift.behaviour.evaluate import judge_answers
from neurondrift.behaviour.rates import coherent_rate
from neurondrift.interventions.runs import Rows
from neurondrift.models.batches import batches_without_padding, token_losses
from neurondrift.models.data import Example, encode

#: What is asked for: the refusal margin, generated refusals, or both, of which the margin is the primary one.
Outcome = Literal["margin", "refusals", "both"]
#: One of them; or the loss of held-out answers, which stands beside either.
Part = Literal["margin", "refusals", "answers"]

MARKS = ("refused", "coherent", "undecided")  # of an answer, by its judge
MARGIN_ROWS = 16  # prompts that pass together, each with the tree of openings behind it

Margins: TypeAlias = Mapping[str, Margin]  # kind of prompt -> the margin of its prompts


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What every run is measured by.

    `sets`: kind of prompt (`harmful`, `ordinary`) -> examples; `answers`: examples whose responses' loss is measured;
    `judging`: arguments of `judge_answers`; `outcome`: whether answers are written and judged, the refusal margin is
    taken, or both; `openings` of the margin, None for the documented list.
    """

    sets: Mapping[str, Sequence[Example]]
    answers: Sequence[Example]
    judging: Mapping[str, Any] = field(default_factory=dict)
    max_length: int = 512
    outcome: Outcome = "refusals"
    openings: Openings | None = None

    @property
    def primary(self) -> Literal["margin", "refusals"]:
        """The outcome that decides: the margin wherever it is taken."""
        return "refusals" if self.outcome == "refusals" else "margin"

    def parts(self, *, whole: bool, is_draw: bool = False) -> list[Part]:
        """What a run is measured by: one on a whole group also by held-out answers, which cost more than the margin
        and are left out of random groups where it is all that is asked for."""
        of_prompts: list[Part] = ["margin", "refusals"] if self.outcome == "both" else [self.outcome]
        has_answers = whole and not (is_draw and self.outcome == "margin")
        return [*of_prompts, *(["answers"] if has_answers else [])]  # type: ignore[list-item]


def margins_of(model: Any, tokenizer: Any, bench: Bench) -> Margins:
    """The margin of each kind of prompt, made once for all runs of a model's architecture; empty where none is asked
    for."""
    if bench.outcome == "refusals":
        return {}
    return {kind: Margin(model, tokenizer, examples, bench.openings) for kind, examples in bench.sets.items()}


def lacking(rows: Rows, bench: Bench, *, whole: bool, is_draw: bool) -> list[Part]:
    """The parts that a run is to be measured by and is not yet."""
    asked = [row for row in rows if row["kind"] == "harmful"]
    known: set[Part] = {"answers"} if any(row["kind"] == "answers" for row in rows) else set()
    for part, column in (("margin", "margin"), ("refusals", "refused")):
        if asked and all(row.get(column) is not None for row in asked):
            known.add(part)  # type: ignore[arg-type]
    return [part for part in bench.parts(whole=whole, is_draw=is_draw) if part not in known]


def measure(
    model: Any, tokenizer: Any, bench: Bench, *, whole: bool, margins: Margins, parts: Collection[Part] | None = None
) -> Rows:
    """One row per prompt, and (where `whole`) one per held-out answer.

    Parameters
    ----------
    model, tokenizer
        As the intervention makes it; and its tokenizer.
    bench
        What is asked. Ordinary prompts and held-out answers are measured where `whole`.
    margins
        Of `margins_of`, from a model of the same architecture.
    parts
        What is measured now; None: all that the bench asks for.

    Returns
    -------
    Columns: kind (`harmful`, `ordinary`, `answers`), id, refused, coherent, undecided, margin (nats), loss (mean over
    the answer's tokens), tokens; what is not measured is None.
    """
    wanted = bench.parts(whole=whole) if parts is None else parts
    sets = bench.sets if whole else {"harmful": bench.sets["harmful"]}
    blank = dict.fromkeys(("kind", "id", *MARKS, "margin", "loss", "tokens"))
    found: list[Rows] = []
    if "refusals" in wanted:
        judged = judge_answers(model, tokenizer, sets, **bench.judging)
        found.append([blank | {n: row[n] for n in ("kind", "id")} | {n: bool(row[n]) for n in MARKS} for row in judged])
    if "margin" in wanted:
        values = {kind: margins[kind].quick_values(model, batch_size=MARGIN_ROWS).tolist() for kind in sets}
        found.append(
            [
                blank | {"kind": kind, "id": example.id, "margin": value}
                for kind, examples in sets.items()
                for example, value in zip(examples, values[kind], strict=True)
            ]
        )
    if "answers" in wanted:
        losses = answer_losses(model, tokenizer, bench)
        found.append(
            [
                blank | {"kind": "answers", "id": example.id, "loss": loss, "tokens": tokens}
                for example, (loss, tokens) in zip(bench.answers, losses, strict=True)
            ]
        )
    rows: Rows = []
    for more in found:
        rows = joined(rows, more)
    return rows


def joined(rows: Rows, more: Rows) -> Rows:
    """The rows of a run with those that were measured later: what is None is filled, prompt by prompt."""
    places = {key: dict(row) for key, row in zip(_keys(rows), rows, strict=True)}
    for key, row in zip(_keys(more), more, strict=True):
        own = places.setdefault(key, dict(row))
        own |= {name: value for name, value in row.items() if own.get(name) is None}
    order = ("harmful", "ordinary", "answers")
    return sorted(places.values(), key=lambda row: order.index(row["kind"]))


def _keys(rows: Rows) -> list[tuple[str, str, int]]:
    """Kind and id of each row, and how often they came before: two prompts may have one id."""
    seen: Counter[tuple[str, str]] = Counter()
    keys = []
    for row in rows:
        own = row["kind"], row["id"]
        keys.append((*own, seen[own]))
        seen[own] += 1
    return keys


def primary_value(rows: Rows, bench: Bench) -> float:
    """The primary outcome of a run on harmful prompts: the mean margin, or the share refused."""
    asked = [row for row in rows if row["kind"] == "harmful"]
    if bench.primary == "refusals":
        return coherent_rate(asked).rate
    return math.fsum(float(row["margin"]) for row in asked) / len(asked)


@torch.no_grad()
def answer_losses(model: Any, tokenizer: Any, bench: Bench) -> list[tuple[float, int]]:
    """Mean cross-entropy of each held-out answer and its number of tokens, in the order of `bench.answers`."""
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    encoded = encode(bench.answers, tokenizer, max_length=bench.max_length)
    batch_size = int(bench.judging.get("batch_size", 32))
    device = model.get_input_embeddings().weight.device
    sums, counts = np.zeros(len(encoded)), np.zeros(len(encoded), dtype=np.int64)
    for batch in batches_without_padding(model, encoded, batch_size=batch_size, pad_token_id=pad):
        losses_N, owners_N = token_losses(model, batch.to(device))
        numbers = np.array([int(name) for name in batch.names])[owners_N.cpu().numpy()]
        np.add.at(sums, numbers, losses_N.double().cpu().numpy())
        np.add.at(counts, numbers, 1)
    return [(float(total / count), int(count)) for total, count in zip(sums, counts, strict=True)]
