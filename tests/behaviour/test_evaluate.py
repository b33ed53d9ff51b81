"""Generation against one prompt at a time, perplexity against plain cross-entropy, intervals against statsmodels."""

import math

import pytest
import torch
import torch.nn.functional as F
from scipy import stats

from neurondrift.behaviour.evaluate import judge_answers, paired_change, perplexity, refusal_rate, write_answers
from neurondrift.behaviour.generate import generate
from neurondrift.data import Example, encode, load_examples, render_prompt
from neurondrift.errors import ConfigError, DataError
from neurondrift.models import load_model


@pytest.fixture(scope="module")
def tiny():
    return load_model("tiny:llama", dtype="float32", device="cpu")


PROMPTS = ["Hi", "Tell me a long story about a dragon, please", "What is 2 + 2?", "Name three rivers", "Why?"]


def one_at_a_time(model, tokenizer, prompt, count):
    """Greedy decoding with no cache, no padding and no batch."""
    ids = tokenizer(render_prompt(prompt, tokenizer), add_special_tokens=False, return_tensors="pt")["input_ids"]
    start = ids.shape[1]
    with torch.no_grad():
        for _ in range(count):
            token = model(input_ids=ids, use_cache=False).logits[0, -1].argmax()
            ids = torch.cat([ids, token.view(1, 1)], dim=1)
            if token == tokenizer.eos_token_id:
                break
    return tokenizer.decode(ids[0, start:], skip_special_tokens=True).strip()


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_batched_answers_equal_those_one_at_a_time(tiny, batch_size):
    model, tokenizer = tiny
    answers = generate(model, tokenizer, PROMPTS, max_new_tokens=12, batch_size=batch_size)
    assert answers == [one_at_a_time(model, tokenizer, prompt, 12) for prompt in PROMPTS]


def test_an_answer_ends_when_it_is_decided(tiny):
    model, tokenizer = tiny
    whole = generate(model, tokenizer, PROMPTS, max_new_tokens=40)
    cut = generate(model, tokenizer, PROMPTS, max_new_tokens=40, decided=lambda prompt, answer: prompt == PROMPTS[1])
    assert len(cut[1]) < len(whole[1])
    assert whole[1].startswith(cut[1].rstrip("\ufffd"))  # bytes of a character may be cut apart
    assert [c for i, c in enumerate(cut) if i != 1] == [w for i, w in enumerate(whole) if i != 1]


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


def test_wilson_interval():
    rate = refusal_rate([True] * 9 + [False])
    z = stats.norm.ppf(0.975)
    centre = (0.9 + z**2 / 20) / (1 + z**2 / 10)
    half = z / (1 + z**2 / 10) * math.sqrt(0.9 * 0.1 / 10 + z**2 / 400)
    assert (rate.rate, rate.refusals, rate.n) == (0.9, 9, 10)
    assert (rate.low, rate.high) == (pytest.approx(centre - half), pytest.approx(centre + half))
    assert math.isnan(refusal_rate([]).rate)


def test_paired_change_is_the_exact_mcnemar_test():
    before = {str(i): True for i in range(20)}
    after = {str(i): i >= 7 for i in range(19)} | {"other": True}
    change = paired_change(before, after)
    assert change.n == 19
    assert change.difference == pytest.approx(-7 / 19)
    assert change.p_mcnemar == pytest.approx(stats.binomtest(0, 7, 0.5).pvalue)
    assert math.isnan(paired_change({"a": True}, {"b": True}).p_mcnemar)


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


@pytest.mark.real
def test_the_real_model_answers_a_question(real_model):
    model, tokenizer = real_model
    (answer,) = generate(model, tokenizer, ["What is the capital of France?"], max_new_tokens=12)
    assert "Paris" in answer
    value = perplexity(model, tokenizer, load_examples("builtin:ordinary-heldout", limit=6))
    assert 2 < value < 40
