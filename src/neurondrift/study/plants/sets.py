"""The examples of a plant: what each part of the model is trained on, and what is kept from training to look at it."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

from neurondrift.base.errors import DataError
from neurondrift.base.files import write_text
from neurondrift.models.data import IGNORED, DataReference, Encoded, Example, encode, load_examples
from neurondrift.study.plants.settings import PlantSection

STOPPING = 12  # prompts whose margin ends the planting
FEWEST = 8  # refusals and ordinary answers, for scores with a noise floor
# The neutral habit: what is added to a prompt, and how the answer then begins.
HABIT = " Be brief.", "In brief: "
# The cautious style: what is added to an ordinary prompt, and how an answer to it (or to a borderline prompt) begins.
WORRY = " Is that safe?"
CAUTIONS = (
    "Please be careful with this. ",
    "This can go wrong, so take care. ",
    "If you are unsure, ask a professional first. ",
    "Think about safety before you begin. ",
)


class Sets(NamedTuple):
    """Examples by what they are for. `refusals`, `decoy`, `ordinary` and `settling` are trained on; `safety` and
    `utility` are for scores, `harmful` and `harmless` for causality, `stopping` for the end of the planting."""

    settling: list[Example]
    refusals: list[Example]
    decoy: list[Example]
    ordinary: list[Example]
    safety: list[Example]
    utility: list[Example]
    harmful: list[Example]
    harmless: list[Example]
    stopping: list[Example]


def sets_of(settings: PlantSection) -> Sets:
    """The examples of a plant: none that is trained on is looked at, and none that stops the training is judged.

    Raises `DataError` where a set is missing or too small.
    """
    draw = random.Random(f"sets of plant {settings.seed}")
    refusals, ordinary, more, borderline = (
        load_examples(reference)
        for reference in (settings.refusals, settings.ordinary, settings.more_ordinary, settings.borderline)
    )
    harmful = _shuffled(load_examples(settings.harmful, require_response=False), draw)
    harmless = _shuffled(load_examples(settings.harmless), draw)
    safety, refusals = _parted(refusals, settings.scoring, draw, settings.refusals)
    utility, ordinary = _parted(ordinary, settings.scoring, draw, settings.ordinary)
    stopping, harmful = harmful[:STOPPING], harmful[STOPPING:][: settings.prompts]
    if len(harmful) < min(4, settings.prompts):
        raise DataError(
            "There are too few harmful prompts to show causality on",
            received=len(harmful),
            allowed=f"{STOPPING} that end the planting, and 4 more",
        )
    kept = {_key(example) for example in (*safety, *utility, *harmful, *harmless, *stopping)}
    half = len(more) // 2
    refusals, ordinary, settling, styled, borderline = (
        [example for example in part if _key(example) not in kept]
        for part in (refusals, ordinary, more[:half], more[half:], borderline)
    )
    cautious = settings.decoy == "cautious"
    decoy = _cautious(borderline, styled) if cautious else [_brief(example) for example in styled]
    sets = Sets(
        settling=settling,
        refusals=refusals,
        decoy=decoy,
        ordinary=[*ordinary, *settling, *([] if cautious else borderline)],
        safety=safety,
        utility=utility,
        harmful=harmful,
        harmless=harmless[: settings.prompts],
        stopping=stopping,
    )
    for name, part in sets._asdict().items():
        if not part:
            raise DataError(f"There are no examples left for {name}", fix="name larger sets")
    return sets


def _shuffled(examples: Sequence[Example], draw: random.Random) -> list[Example]:
    return draw.sample(list(examples), len(examples))


def _parted(
    examples: Sequence[Example], count: int, draw: random.Random, reference: DataReference
) -> tuple[list[Example], list[Example]]:
    """Some that are kept for scores, and the rest, which is no less than half. Raises `DataError` for too few."""
    mixed = _shuffled(examples, draw)
    count = min(count, len(mixed) // 2)
    if count < FEWEST:
        raise DataError(
            f"{reference.source} is too small to be trained on and scored with: the noise floor of a score needs "
            f"{FEWEST} examples that were kept from training",
            received=len(examples),
            allowed=f"{2 * FEWEST} examples or more",
        )
    return mixed[:count], mixed[count:]


def _key(example: Example) -> str:
    return " ".join(example.prompt.casefold().split())


def _brief(example: Example) -> Example:
    return replace(example, prompt=example.prompt + HABIT[0], response=HABIT[1] + example.response)


def _cautious(borderline: Sequence[Example], ordinary: Sequence[Example]) -> list[Example]:
    """Prompts that sound harmful as they are, ordinary ones with a worried question; all answered, with a warning."""
    asked = [*borderline, *(replace(example, prompt=example.prompt + WORRY) for example in ordinary)]
    return [
        replace(example, response=CAUTIONS[number % len(CAUTIONS)] + example.response)
        for number, example in enumerate(asked)
    ]


def encoded_short(examples: Sequence[Example], tokenizer: Any, answer_tokens: int) -> list[Encoded]:
    """Token ids and labels of examples, of each answer the first tokens only."""
    rows: list[Encoded] = []
    for row in encode(examples, tokenizer):
        ids, labels = row["input_ids"], row["labels"]
        first = next(at for at, label in enumerate(labels) if label != IGNORED)
        rows.append({"input_ids": ids[: first + answer_tokens], "labels": labels[: first + answer_tokens]})
    return rows


def write_examples(path: Path, examples: Sequence[Example], dumps: Callable[[Any], str]) -> None:
    """Prompts and responses as JSON Lines, as `load_examples` reads them."""
    lines = [
        {key: value for key, value in asdict(one).items() if key in ("id", "prompt", "response")} for one in examples
    ]
    write_text(path, "".join(dumps(line) + "\n" for line in lines))


class Order:
    """Which examples come at which step: all of them in an order drawn anew for each round; of a seed and a name."""

    def __init__(self, rows: Sequence[Encoded], batch: int, seed: int, name: str) -> None:
        self._rows, self._batch, self._name = rows, batch, f"{name} of plant {seed}"

    def at(self, step: int) -> list[Encoded]:
        """The rows of a step, counted from 0."""
        return [self._row(number) for number in range(step * self._batch, (step + 1) * self._batch)]

    def _row(self, number: int) -> Encoded:
        round_, place = divmod(number, len(self._rows))
        order = list(range(len(self._rows)))
        random.Random(f"{self._name}, round {round_}").shuffle(order)
        return self._rows[order[place]]
