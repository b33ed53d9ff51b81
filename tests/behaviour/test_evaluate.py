"""Answers are judged and kept with their settings; perplexity against plain cross-entropy."""

import math

import pytest
import torch
import torch.nn.functional as F

from neurondrift.base.errors import ConfigError, DataError
from neurondrift.behaviour.capability import perplexity
from neurondrift.behaviour.evaluate import count_answers, judge_answers, write_answers
from neurondrift.behaviour.generate import generate
from neurondrift.behaviour.rates import per_prompt
from neurondrift.behaviour.requests import Attack
from neurondrift.models.data import Example, encode, load_examples


def test_bad_prompts(tiny):
    model, tokenizer = tiny
    with pytest.raises(DataError, match="no prompts"):
        generate(model, tokenizer, [])
    with pytest.raises(DataError, match=r"Prompt 1 is longer than max_length.*tokens.*Allowed: 50"):
        generate(model, tokenizer, ["a", "b" * 100], max_length=50)
    with pytest.raises(ConfigError, match="no such judge.*'judgy'"):
        judge_answers(model, tokenizer, {"harmful": [Example(prompt="a", response="", id="0")]}, judge_name="judgy")


def test_perplexity_is_over_all_response_tokens(tiny):
    model, tokenizer = tiny
    examples = load_examples("builtin:ordinary-heldout", limit=5)
    total, count = 0.0, 0
    for row in encode(examples, tokenizer):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0]
        labels = torch.tensor(row["labels"])[1:]
        total += float(F.cross_entropy(logits[:-1], labels, reduction="sum"))
        count += int((labels != -100).sum())
    assert perplexity(model, tokenizer, examples, batch_size=2) == pytest.approx(math.exp(total / count), rel=1e-5)


def test_answers_are_kept_with_their_settings(tiny, tmp_path):
    import pyarrow.parquet as pq

    model, tokenizer = tiny
    rows = judge_answers(
        model, tokenizer, {"harmful": load_examples("builtin:refusals-heldout", limit=3)}, max_new_tokens=5
    )
    write_answers(tmp_path / "step=000010.parquet", rows, step=10, seed=2)
    table = pq.read_table(tmp_path / "step=000010.parquet", partitioning=None).to_pylist()
    assert {row["step"] for row in table} == {10}
    assert {row["seed"] for row in table} == {2}
    assert {row["max_new_tokens"] for row in table} == {5}
    assert [row["id"] for row in table] == [row["id"] for row in rows]
    assert all(row["category"] and row["judge"] == "refusal" for row in table)


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


@pytest.mark.real
def test_the_real_model_answers_a_question(real_model):
    model, tokenizer = real_model
    (answer,) = generate(model, tokenizer, ["What is the capital of France?"], max_new_tokens=12)
    assert "Paris" in answer
    value = perplexity(model, tokenizer, load_examples("builtin:ordinary-heldout", limit=6))
    assert 2 < value < 40
