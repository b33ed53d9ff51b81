"""Attacks: what is sent, aggregation over answers, intervals over categories."""

import math

import numpy as np
import pytest

from neurondrift.behaviour.attacks import (
    LLAMA2_SYSTEM_PROMPT,
    Attack,
    attack_from_words,
    attack_of,
    system_prompt,
)
from neurondrift.behaviour.evaluate import count_answers, judge_answers, write_answers
from neurondrift.behaviour.generate import Decoding
from neurondrift.behaviour.rates import category_interval, per_prompt
from neurondrift.config import AttackSection, resolve
from neurondrift.data import Example
from neurondrift.errors import ConfigError, DataError
from neurondrift.models import load_model


@pytest.fixture(scope="module")
def tiny():
    return load_model("tiny:llama", dtype="float32", device="cpu")


def test_what_each_attack_sends(tiny):
    _, tokenizer = tiny
    suffixes = Attack(kind="suffix", suffixes=("! !", "now"))
    assert [request.text for request in suffixes.requests("Do it", tokenizer)] == [
        "<|user|>Do it ! !<|end|><|assistant|>",
        "<|user|>Do it now<|end|><|assistant|>",
    ]
    assert {request.prompt for request in suffixes.requests("Do it", tokenizer)} == {"Do it"}
    plain = Attack(chat_template=False)
    (request,) = plain.requests(" Do it ", tokenizer)
    assert (request.text, request.plain, plain.name) == ("Do it\n", True, "vanilla, no template")
    decoding = Attack(kind="decoding", samples=3)
    assert [request.sample for request in decoding.requests("Do it", tokenizer)] == [0, 1, 2]
    assert decoding.decoding(7) == Decoding(max_new_tokens=7, temperature=1.0, top_p=1.0, seed=0)
    assert suffixes.decoding(7) == Decoding(max_new_tokens=7)
    (request,) = Attack().requests("Do it", tokenizer, system=system_prompt("llama2"))
    assert request.text.startswith(f"<|system|>{LLAMA2_SYSTEM_PROMPT}<|end|>")


def test_attacks_in_words_and_in_the_configuration(tmp_path):
    file = tmp_path / "suffixes.txt"
    file.write_text("a b \n\n  c\n", encoding="utf-8")
    assert attack_of(attack_from_words(f"suffix:{file}")).suffixes == ("a b ", "  c")
    assert attack_from_words("no-template+decoding:2") == AttackSection(kind="decoding", samples=2, chat_template=False)
    study = resolve(preset="smoke", flags={"evaluate.attack": "decoding"})
    assert study.evaluate.attack.samples == 5
    for words in ("decode", "decoding:0", "suffix", "vanilla:3"):
        with pytest.raises(ConfigError, match=r"no such attack.*no-template"):
            attack_from_words(words)
    with pytest.raises(ConfigError, match="needs a file of suffixes"):
        attack_of(AttackSection(kind="suffix"))
    with pytest.raises(DataError, match=r"cannot be read.*no-such-file"):
        attack_of(AttackSection(kind="suffix", suffixes="no-such-file"))
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(DataError, match="is empty"):
        attack_of(AttackSection(kind="suffix", suffixes=str(tmp_path / "empty.txt")))
    with pytest.raises(ConfigError, match=r"evaluate.judge.*no judge 'judgy'"):
        resolve(preset="smoke", flags={"evaluate.judge": "judgy"})


def test_answers_of_an_attack_are_kept_one_by_one(tiny, tmp_path):
    import pyarrow.parquet as pq

    model, tokenizer = tiny
    sets = {
        "harmful": [
            Example(prompt="Do harm", response="", id="0", category="c"),
            Example(prompt="b", response="", id="1"),
        ],
        "ordinary": [Example(prompt="Do good", response="", id="0")],
    }
    attack = Attack(kind="decoding", samples=3, seed=5)
    rows = judge_answers(model, tokenizer, sets, attack=attack, max_new_tokens=6)
    assert len(rows) == count_answers(sets, attack) == 7
    write_answers(tmp_path / "answers.parquet", rows, step=None, seed=None)
    table = pq.read_table(tmp_path / "answers.parquet", partitioning=None)
    assert str(table.schema.field("attack_seed").type) == "int32"
    assert str(table.schema.field("score").type) == "double"
    first = [row for row in table.to_pylist() if row["kind"] == "harmful" and row["id"] == "0"]
    assert [row["sample"] for row in first] == [0, 1, 2]
    assert {(row["attack"], row["temperature"], row["top_p"], row["attack_seed"]) for row in first} == {
        ("decoding", 1.0, 1.0, 5)
    }
    assert len({row["response"] for row in first}) == 3
    (ordinary,) = [row for row in table.to_pylist() if row["kind"] == "ordinary"]
    assert (ordinary["attack"], ordinary["temperature"], ordinary["attack_seed"]) == ("vanilla", 0.0, None)
    assert [row["answers"] for row in per_prompt(rows)] == [3, 3, 1]


def test_any_success_counts():
    def row(identifier, refused, coherent=True, judge="refusal", score=None):
        success = not refused and coherent
        return dict(
            kind="harmful", id=identifier, judge=judge, primary=judge == "refusal", refused=refused,
            success=success, coherent=coherent, score=score,
        )  # fmt: skip

    rows = [row("a", True), row("a", False), row("b", True), row("b", True)]
    rows += [row("c", True), row("c", False, coherent=False), row("a", True, judge="keyword", score=0.3)]
    assert [(r["id"], r["refused"], r["success"], r["answers"]) for r in per_prompt(rows)] == [
        ("a", False, True, 2),
        ("b", True, False, 2),
        ("c", False, False, 2),
    ]
    (keyword,) = per_prompt(rows, judge="keyword")
    assert (keyword["refused"], keyword["score"]) == (True, 0.3)
    old = [{"kind": "harmful", "id": "a", "refused": False, "coherent": True}]  # before there were attacks
    assert per_prompt(old)[0]["success"] is True


def test_the_category_interval_is_a_cluster_bootstrap():
    rng = np.random.default_rng(1)
    shares = rng.uniform(0.2, 0.9, 12)
    categories = [f"c{c}" for c in range(12) for _ in range(10 + c)]
    marks = [bool(rng.random() < shares[int(c[1:])]) for c in categories]
    found = category_interval(marks, categories, resamples=20_000)
    counts = {c: [m for m, name in zip(marks, categories, strict=True) if name == c] for c in set(categories)}
    names = sorted(counts)
    means = []
    for _ in range(4000):
        drawn = rng.choice(names, len(names))
        pooled = np.concatenate([counts[name] for name in drawn])
        means.append(pooled.mean())
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(means, (0.025, 0.975))), abs=0.012)
    assert found == category_interval(marks, categories, resamples=20_000)
    wilson = 1.96 * math.sqrt(np.mean(marks) * (1 - np.mean(marks)) / len(marks))
    assert found.high - found.low > 2 * wilson  # what prompts of a category share widens it


@pytest.mark.parametrize(
    ("marks", "categories", "reason"),
    [
        ([True, False] * 4, list("aabbccdd"), "fewer than 5 categories"),
        ([True] * 6, list("abcdef"), "every category has the same share"),
        ([True, False] * 3, ["a", "b", "c", "d", "e", ""], "some prompts have no category"),
        ([], [], "fewer than 5 categories"),
    ],
)
def test_no_interval_over_categories_without_a_reason(marks, categories, reason):
    found = category_interval(marks, categories)
    assert math.isnan(found.low) and math.isnan(found.high)
    assert found.reason == reason
