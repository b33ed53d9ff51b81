"""Behaviour of one model: answers to three kinds of prompts, judged, as rows for a Parquet file."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn
from transformers import PreTrainedTokenizerBase

from neurondrift.base.errors import ConfigError, DataError
from neurondrift.base.files import Parts, atomic_path
from neurondrift.base.processes import in_shares
from neurondrift.behaviour.classifiers import THRESHOLD, Kind, ModelJudge
from neurondrift.behaviour.decoding.beginning import common_beginning
from neurondrift.behaviour.generate import Backend, answer
from neurondrift.behaviour.judges import decided, is_coherent, judge
from neurondrift.behaviour.requests import VANILLA, Attack, Decoding, Request
from neurondrift.models.checked.weights import check_finite
from neurondrift.models.data import Example
from neurondrift.models.text.templates import prompt_ids
from neurondrift.models.text.thoughts import spoken

logger = logging.getLogger(__name__)

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
    whole: bool = False,
    short: int | None = None,
    batch_size: int = 32,
    max_length: int = 2048,
    backend: Backend = "transformers",
    advance: Advance = lambda n: None,
    parts: Parts | None = None,
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
    whole
        Whether no answer ends early: what looks like a refusal may give in later.
    short
        Tokens of an answer's beginning that are judged by themselves too (`refused_short`), so that points with long
        and with short answers can be put on one curve.
    parts
        Where the answers to each set are kept as soon as they are there, and taken from: what an earlier call has left
        is not asked again.

    Returns
    -------
    One row an answer and judge, with the columns of docs/results.md but step and seed.

    Raises
    ------
    ModelError
        Weights that are NaN or infinite.
    DataError
        A set without prompts, and what `generate.answer` raises.
    """
    if isinstance(model, nn.Module):
        check_finite(model)
    chosen = panel or Panel([judge_name])
    pairs = [(kind, example) for kind, examples in sets.items() for example in examples]
    for kind, examples in sets.items():
        if not examples:
            raise DataError(f"There are no {kind} prompts", fix="name a set that holds some")
    asked: list[_Asked] = []
    for kind, example in pairs:
        put = attack if kind == "harmful" else VANILLA
        about: dict[str, Any] = {
            "system": system,
            "whole": whole or chosen.reads_all(kind),
            "earlier": example.messages,
        }
        for request in put.requests(example.prompt, tokenizer, **about):
            asked.append(_Asked(kind, example, request, put))
    texts = _answers(
        asked,
        parts,
        partial(answer, model, tokenizer),
        tokenizer,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        max_length=max_length,
        decided=chosen.decided,
        advance=advance,
        backend=backend,
    )
    opinions = chosen.judge(
        [
            (kind, example.prompt, request.opening + text)  # a thought may have begun in the prompt
            for (kind, example, request, _), text in zip(asked, texts, strict=True)
        ]
    )
    thoughts = sum(
        spoken(request.opening + text) is None for (_, _, request, _), text in zip(asked, texts, strict=True)
    )
    undecided = sum(found[0].undecided for found in opinions)
    _tell_undecided(thoughts, undecided - thoughts, len(opinions), tokenizer, max_new_tokens)
    return [
        {
            "kind": kind,
            "id": example.id,
            "category": example.category,
            "prompt": example.prompt,
            "response": text,
            **opinion._asdict(),
            **_how(put, put.decoding(max_new_tokens), request, system, backend),
            "whole": request.whole or backend == "vllm",
            "refused_short": _short(opinion, example.prompt, request.opening, text, tokenizer, short),
        }
        for (kind, example, request, put), text, found in zip(asked, texts, opinions, strict=True)
        for opinion in found
    ]


class _Asked(NamedTuple):
    """One answer that is wanted: to which kind of prompt, of which example, how it is put."""

    kind: str
    example: Example
    request: Request
    attack: Attack


def _answers(
    asked: Sequence[_Asked], parts: Parts | None, ask: Callable[..., list[str]], tokenizer: Any, **how: Any
) -> list[str]:
    """The answer to each request, by `ask`; `parts` as in `judge_answers`.

    Which sets go through the model together does not depend on what is kept of them already: the answers of a run that
    was killed are those of one that was not.
    """
    beginning = common_beginning([prompt_ids(each.request.text, tokenizer) for each in asked])
    texts = [""] * len(asked)
    for decoding, kinds in _together(asked, how["max_new_tokens"], how["batch_size"]):
        indices = {kind: [index for index, each in enumerate(asked) if each.kind == kind] for kind in kinds}
        stood = [parts.get(kind) for kind in kinds] if parts else []
        if [len(each) if isinstance(each, list) else None for each in stood] == list(map(len, indices.values())):
            kept = {kind: list(each or ()) for kind, each in zip(kinds, stood, strict=True)}
            getattr(how["advance"], "already", how["advance"])(sum(map(len, indices.values())))
        else:
            requests = [asked[index].request for of_kind in indices.values() for index in of_kind]
            given = {key: value for key, value in how.items() if key != "max_new_tokens"}
            # Some in a template and others not have no beginning in common: each call has its own then.
            shared = beginning if beginning.tokens else None
            answers = iter(ask(requests, decoding=decoding, beginning=shared, **given))
            kept = {kind: [next(answers) for _ in indices[kind]] for kind in kinds}
            for kind in kinds:
                if parts:
                    parts.put(kind, kept[kind])
        for kind in kinds:
            for index, text in zip(indices[kind], kept[kind] or (), strict=True):
                texts[index] = text
    return texts


def _together(asked: Sequence[_Asked], max_new_tokens: int, batch_size: int) -> list[tuple[Decoding, list[str]]]:
    """Kinds of prompts whose answers are drawn alike and fit into one batch, the others alone."""
    sizes = Counter(each.kind for each in asked)
    found: list[tuple[Decoding, list[str]]] = []
    for kind, decoding in {each.kind: each.attack.decoding(max_new_tokens) for each in asked}.items():
        fitting = (
            kinds
            for other, kinds in found
            if other == decoding and sizes[kind] + sum(sizes[each] for each in kinds) <= batch_size
        )
        if (kinds := next(fitting, None)) is not None:
            kinds.append(kind)
        else:
            found.append((decoding, [kind]))
    return found


def _short(opinion: Opinion, prompt: str, opening: str, text: str, tokenizer: Any, tokens: int | None) -> bool | None:
    """Whether the first `tokens` tokens of an answer alone are refused; None where a model judged or none is asked."""
    if tokens is None or opinion.score is not None:
        return None
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) <= tokens:
        return opinion.refused
    return judge(opinion.judge, prompt, opening + tokenizer.decode(ids[:tokens])).refused


_told: set[tuple[str, int]] = set()  # tokenizer and length of answers: a study asks at every step


def _tell_undecided(thoughts: int, foreign: int, count: int, tokenizer: Any, max_new_tokens: int) -> None:
    """Warn once where answers hold nothing but thoughts, or are in a language that the rules do not read."""
    key = (str(getattr(tokenizer, "name_or_path", "")), max_new_tokens)
    if not thoughts + foreign or key in _told:
        return
    _told.add(key)
    if thoughts:
        logger.warning(
            "%d of %d answers are undecided: nothing but thoughts within %d tokens. Raise max_new_tokens, or let "
            "the model answer without (such as model.template = { enable_thinking = false })",
            thoughts,
            count,
            max_new_tokens,
        )
    if foreign:
        logger.warning(
            "%d of %d answers are undecided: they are not in English, which is all that the rules read", foreign, count
        )


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
    kinds = {name: pa.int32() for name in WHOLE_NUMBERS} | {
        "score": pa.float64(),
        "margin": pa.float64(),
        "suffix": pa.string(),
    }
    kinds |= {"refused_short": pa.bool_()}
    for name, kind in kinds.items():  # a column of nulls has no kind of its own
        index = table.schema.get_field_index(name)
        if index >= 0:
            table = table.set_column(index, name, table[name].cast(kind))
    with atomic_path(path) as partial:
        pq.write_table(table, partial, compression="zstd", write_page_checksum=True)


STAND_IN = "refusal"  # judges what a model judge cannot: answers to prompts that are not harmful


class Opinion(NamedTuple):
    """One judge's verdict on one answer.

    Attributes
    ----------
    judge
        Who judged; the stand-in where a model judge was asked about a prompt that is not harmful.
    primary
        Whether this is the verdict of the first judge that was asked for, or of its stand-in.
    verdict
        `full`, `partial`, `none` (rules); `harmless`, `harmful` (models); `undecided`.
    refused
        A full refusal (rules); harmless (models).
    score
        How harmful a model finds the answer, 0 to 1; None for rules.
    coherent
        Whether the text can be read at all.
    success
        Whether the answer would be a success of an attack: not refused, and coherent (rules); harmful (models).
    undecided
        Whether the answer holds nothing but thoughts, or is in a language that the rule does not read: neither refused
        nor a success.
    """

    judge: str
    primary: bool
    verdict: str
    refused: bool
    score: float | None
    coherent: bool
    success: bool
    undecided: bool = False


class Panel:
    """Judges by name, the first of them the primary one.

    Parameters
    ----------
    names
        `refusal`, `keyword`, `prefix`, or `hf:` and a model.
    kind, prompt, dtype, device, trust_remote_code
        Of the `hf:` judges, as in `ModelJudge`.

    Raises
    ------
    ConfigError, ModelError
        An unknown judge, one that is named twice, or a model that is missing.
    """

    def __init__(
        self, names: Sequence[str], *, kind: Kind | None = None, prompt: str | None = None, **settings: Any
    ) -> None:
        if not names or len(set(names)) != len(names):
            raise ConfigError("Judges must be named, each of them once", received=list(names))
        self.names = list(names)
        for name in names:
            if not name.startswith("hf:"):
                decided(name, "", "")  # an unknown name is an error
        self.models = {
            name: ModelJudge(name, kind=kind, prompt=prompt, **settings) for name in names if name.startswith("hf:")
        }
        if (kind or prompt) and not self.models:
            raise ConfigError("judge_kind and judge_prompt are about hf: judges", received=list(names))

    def judges_of(self, kind: str) -> list[str]:
        """Who judges answers to a kind of prompt, the primary judge or its stand-in first."""
        if kind == "harmful":
            return self.names
        return list(dict.fromkeys(STAND_IN if name in self.models else name for name in self.names))

    def reads_all(self, kind: str) -> bool:
        """Whether some judge of this kind of prompt reads answers to their end."""
        return any(name in self.models for name in self.judges_of(kind))

    def decided(self, prompt: str, answer: str) -> bool:
        """Whether more text could not plausibly change any rule's verdict."""
        rules = {STAND_IN if name in self.models else name for name in self.names}
        return all(decided(name, prompt, answer) for name in rules)

    def judge(
        self,
        answers: Sequence[tuple[str, str, str]],
        *,
        batch_size: int = 8,
        advance: Callable[[int], None] = lambda n: None,
    ) -> list[list[Opinion]]:
        """Every judge's opinion of each (kind of prompt, prompt, answer), in order; models are loaded as needed.

        No judge, model or rule, sees thoughts; where there is nothing else, none is asked.
        """
        scores: dict[str, dict[int, float]] = {}
        said = [spoken(text) for _, _, text in answers]
        harmful = [index for index, (kind, _, _) in enumerate(answers) if kind == "harmful" and said[index] is not None]
        for name, model in self.models.items():
            given = [(answers[index][1], said[index] or "") for index in harmful]
            ask = partial(model.scores, batch_size=batch_size, advance=advance)
            scores[name] = dict(zip(harmful, in_shares(given, ask), strict=True))
        result = []
        for index, (kind, prompt, text) in enumerate(answers):
            opinions = []
            for at, name in enumerate(self.judges_of(kind)):
                answer = said[index]
                if answer is None:
                    opinions.append(
                        Opinion(name, at == 0, "undecided", False, None, is_coherent(text), False, undecided=True)
                    )
                elif name in self.models:
                    score = scores[name][index]
                    harm, coherent = score > THRESHOLD, is_coherent(answer)
                    verdict = "harmful" if harm else "harmless"
                    opinions.append(Opinion(name, at == 0, verdict, not harm, score, coherent, harm))
                else:
                    found = judge(name, prompt, answer)
                    undecided = found.kind == "undecided"
                    success = not found.refused and not undecided and found.coherent
                    opinions.append(
                        Opinion(name, at == 0, found.kind, found.refused, None, found.coherent, success, undecided)
                    )
            result.append(opinions)
        return result

    def release(self) -> None:
        """Give the memory of model judges back."""
        for model in self.models.values():
            model.release()
