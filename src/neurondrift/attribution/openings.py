"""Openings of answers, of refusals and of compliance, and the tree of tokens that they form behind a prompt.

Owns the documented lists (package data), lists that are given or taken from a model's own answers, and which tokens a
model must be asked about to know the probability of them all. Knows no model.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any, NamedTuple

import torch

from neurondrift.base.errors import ConfigError, DataError

LANGUAGES = ("en",)
# What is taken from a model's own answers: so many words, of so many different openings of either kind.
OWN_WORDS, OWN_REFUSALS, OWN_OTHERS = 2, 12, 16


@dataclass(frozen=True, kw_only=True)
class Openings:
    """How refusals begin, and how other answers do: texts, in a fixed order."""

    refusal: tuple[str, ...]
    compliance: tuple[str, ...]

    def __post_init__(self) -> None:
        for kind, texts in (("refusal", self.refusal), ("compliance", self.compliance)):
            if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
                raise ConfigError(
                    f"There are no {kind} openings, or one is empty", received=list(texts), allowed="texts, one or more"
                )


def openings_for(language: str = "en") -> Openings:
    """The list of a language. Raises `ConfigError` where there is none."""
    if language not in LANGUAGES:
        raise ConfigError(
            "There is no list of openings for this language",
            received=language,
            allowed=", ".join(LANGUAGES),
            fix="give your own: Openings(refusal=..., compliance=...), or take them from the model's answers",
        )
    text = (resources.files("neurondrift.attribution") / "openings" / f"{language}.json").read_text(encoding="utf-8")
    found = json.loads(text)
    return Openings(refusal=tuple(found["refusal"]), compliance=tuple(found["compliance"]))


def own_openings(answers: Sequence[str], refused: Sequence[bool], *, words: int = OWN_WORDS) -> Openings:
    """The openings of a model's own answers: the first words of those that refuse and of those that do not.

    Parameters
    ----------
    answers
        What the model answered before it was changed, to harmful and to ordinary prompts.
    refused
        Of each, whether it is a refusal.
    words
        How many words an opening has.

    Returns
    -------
    The 12 most frequent openings of refusals and the 16 most frequent of other answers (the first to come where as
    many begin so); what opens both more refusals and other answers counts where it is more frequent.

    Raises
    ------
    DataError
        No refusal, or nothing but refusals.
    """
    counts = {True: Counter[str](), False: Counter[str]()}
    for answer, is_refusal in zip(answers, refused, strict=True):
        opening = " ".join(answer.split()[:words])
        if opening:
            counts[bool(is_refusal)][opening] += 1
    chosen = {}
    for kind, most in ((True, OWN_REFUSALS), (False, OWN_OTHERS)):
        other = counts[not kind]
        own = [t for t, n in counts[kind].most_common() if n > other[t] or (kind and n == other[t])]
        chosen[kind] = own[:most]
    if not chosen[True] or not chosen[False]:
        raise DataError(
            "The model's own answers hold no refusals, or nothing else: they have no openings of both kinds",
            received=f"{sum(map(bool, refused))} refusals of {len(answers)} answers",
            fix="use the documented list (openings=None)",
        )
    return Openings(refusal=tuple(chosen[True]), compliance=tuple(chosen[False]))


class Tree(NamedTuple):
    """The tokens of all openings as a tree behind a prompt.

    Node 0 is the prompt's last token; the others are the openings' inner tokens (all but the last of each), parents
    before children. `tokens` and `parents` are of nodes 1, 2, ...; `edges` are what is asked of a node: (node, token).
    `paths` `[openings, edges]`: which edges an opening is made of; `is_refusal` `[openings]`.
    """

    tokens: tuple[int, ...]
    parents: tuple[int, ...]
    edges: tuple[tuple[int, int], ...]
    paths: torch.Tensor
    is_refusal: torch.Tensor

    @property
    def inner(self) -> int:
        """How many nodes there are behind the prompt."""
        return len(self.tokens)

    def chain(self, node: int) -> list[int]:
        """The nodes from the first behind the prompt to this one."""
        chain: list[int] = []
        while node:
            chain.append(node)
            node = self.parents[node - 1]
        return chain[::-1]

    @property
    def leaves(self) -> list[int]:
        """Nodes without children: as many sequences hold all of the tree. At least one, which may be the prompt."""
        return [node for node in range(self.inner + 1) if node not in self.parents] or [0]


def tree_of(openings: Openings, tokenizer: Any) -> Tree:
    """The tree of openings in a tokenizer's tokens; texts are cut apart from the prompt, as responses are.

    An opening whose tokens begin with those of another of its kind is left out: the other's probability has its own.

    Raises
    ------
    ConfigError
        A refusal opening that begins with a compliance opening, or the reverse, or is the same.
    """
    kinds = []
    for texts in (openings.refusal, openings.compliance):
        ids = [tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
        kinds.append(_without_longer([tokens for tokens in ids if tokens]))
    for first, second in ((kinds[0], kinds[1]), (kinds[1], kinds[0])):
        for tokens in first:
            inside = next((other for other in second if tokens[: len(other)] == other), None)
            if inside is not None:
                raise ConfigError(
                    "An opening of one kind begins with an opening of the other kind",
                    received=tokenizer.decode(tokens),
                    allowed=f"no opening that begins with {tokenizer.decode(inside)!r}",
                )
    nodes: dict[tuple[int, ...], int] = {(): 0}
    tokens_of: list[int] = []
    parents: list[int] = []
    edges: dict[tuple[int, int], int] = {}
    rows: list[list[int]] = []
    sequences = [*kinds[0], *kinds[1]]
    for sequence in sequences:
        own = []
        for at, token in enumerate(sequence):
            node = nodes[sequence[:at]]
            own.append(edges.setdefault((node, token), len(edges)))
            if at < len(sequence) - 1 and sequence[: at + 1] not in nodes:
                nodes[sequence[: at + 1]] = len(nodes)
                tokens_of.append(token)
                parents.append(node)
        rows.append(own)
    paths = torch.zeros(len(sequences), len(edges))
    for row, own in enumerate(rows):
        paths[row, own] = 1
    is_refusal = torch.tensor([True] * len(kinds[0]) + [False] * len(kinds[1]))
    return Tree(tuple(tokens_of), tuple(parents), tuple(edges), paths, is_refusal)


def _without_longer(sequences: Iterable[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Each once, without those that begin with another one."""
    distinct = list(dict.fromkeys(sequences))
    return [one for one in distinct if not any(other != one and one[: len(other)] == other for other in distinct)]
