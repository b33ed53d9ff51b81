"""What prompts have in common is read once, and the rest of them in parts of like length: the same answers."""

import itertools

import pytest
import torch

from helpers.families import FAMILIES, build
from neurondrift.behaviour import generate as module
from neurondrift.behaviour.decoding import beginning as beginnings
from neurondrift.behaviour.decoding.beginning import Beginning, common_beginning, parts_of_like_length
from neurondrift.behaviour.evaluate import judge_answers
from neurondrift.behaviour.generate import answer
from neurondrift.behaviour.requests import Decoding, Request
from neurondrift.models.data import Example

HEAD = [5, 9, 13, 17, 21, 25, 29, 33, 37]


class Numbers:
    """A tokenizer of the families' 64 tokens: a text is its numbers."""

    pad_token_id, eos_token_id = 0, None

    def __call__(self, text, add_special_tokens=False):
        return {"input_ids": [int(part) for part in text.split()]}

    def decode(self, ids, skip_special_tokens=True):
        return " ".join(map(str, ids))


@pytest.fixture
def passes(monkeypatch):
    """The shapes of what goes through the model."""
    seen, step = [], module._Loop._step
    monkeypatch.setattr(
        module._Loop, "_step", lambda loop, ids, *rest: (seen.append(tuple(ids.shape)), step(loop, ids, *rest))[1]
    )
    return seen


@pytest.mark.parametrize("cost", [0, 3, 10_000])
@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_those_of_transformers_own_loop(family, cost, monkeypatch):
    """However prompts are divided: prompts of many lengths with one head, two of them the same, in batches of any size."""
    monkeypatch.setattr(beginnings, "PASS_CPU", cost)
    model = build(family)
    prompts = [[*HEAD, *range(40, 40 + length)] for length in (1, 4, 9, 2, 4, 12)]
    ends = model.generation_config.eos_token_id
    expected = []
    for ids in prompts:
        made = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=8, eos_token_id=ends, pad_token_id=0)
        expected.append(" ".join(map(str, made[0, len(ids) :].tolist())))
    requests = [Request(prompt="", text=" ".join(map(str, ids))) for ids in prompts]
    for batch_size in (6, 4, 1):
        found = answer(model, Numbers(), requests, decoding=Decoding(max_new_tokens=8), batch_size=batch_size)
        assert found == expected, batch_size


def test_all_batches_and_all_calls_share_one_reading_of_the_head(passes):
    model = build("llama")
    prompts = [[*HEAD, *range(40, 40 + length)] for length in (1, 2, 3, 4)]
    requests = [Request(prompt="", text=" ".join(map(str, ids))) for ids in prompts]
    whole = Beginning(tuple(HEAD))
    answer(model, Numbers(), requests[:1], decoding=Decoding(max_new_tokens=1))  # its kind has been asked
    passes.clear()
    apart = [
        answer(model, Numbers(), part, decoding=Decoding(max_new_tokens=2), batch_size=1, beginning=whole)
        for part in (requests[:2], requests[2:])
    ]
    assert [shape for shape in passes if shape[1] == len(HEAD)] == [(1, len(HEAD))]
    assert sum(rows * tokens for rows, tokens in passes) == len(HEAD) + (1 + 2 + 3 + 4) + 4
    assert [*apart[0], *apart[1]] == answer(model, Numbers(), requests, decoding=Decoding(max_new_tokens=2))


def test_sets_share_it_too_and_fill_a_batch_together(tiny, passes):
    model, tokenizer = tiny
    sets = {
        kind: [Example(prompt=f"{kind} {n}", response="", id=str(n)) for n in range(3)]
        for kind in ("harmful", "ordinary", "borderline")
    }
    generated = dict(system="Be kind and brief.", batch_size=6, whole=True)
    judge_answers(model, tokenizer, {"harmful": sets["harmful"][:1]}, max_new_tokens=1)  # its kind has been asked
    passes.clear()
    judge_answers(model, tokenizer, sets, max_new_tokens=1, **generated)
    assert sum(rows == 1 and tokens > 1 for rows, tokens in passes) == 1
    passes.clear()
    judge_answers(model, tokenizer, sets, max_new_tokens=3, **generated)
    assert {rows for rows, tokens in passes if tokens == 1} == {6, 3}


def test_the_beginning_leaves_each_prompt_a_token():
    assert common_beginning([HEAD, [*HEAD, 1]]).tokens == tuple(HEAD[:-1])
    assert common_beginning([HEAD, HEAD]).tokens == ()
    assert common_beginning([HEAD[:7], [*HEAD[:7], 1]]).tokens == ()


def test_prompts_are_divided_where_it_costs_least(monkeypatch):
    monkeypatch.setattr(beginnings, "PASS_CPU", 5)
    generator = torch.Generator().manual_seed(0)
    for count in range(1, 9):
        lengths = sorted(torch.randint(1, 20, (count,), generator=generator).tolist(), reverse=True)
        found = parts_of_like_length(lengths, torch.device("cpu"))
        assert [at for part in found for at in range(part.start, part.stop)] == list(range(count))

        def cost(parts, lengths=lengths):
            return sum(5 + (part.stop - part.start) * lengths[part.start] for part in parts)

        ways = []
        for cuts in itertools.product((False, True), repeat=count - 1):
            edges = [0, *(at + 1 for at, cut in enumerate(cuts) if cut), count]
            ways.append([slice(a, b) for a, b in itertools.pairwise(edges)])
        assert cost(found) == min(map(cost, ways))
