"""Our decoding loop: against plain decoding without cache, batch or padding; in every family; sampled answers."""

import pytest
import torch

from helpers import every_class
from helpers.families import FAMILIES, build
from neurondrift.base.errors import ConfigError, DataError
from neurondrift.behaviour import generate as module
from neurondrift.behaviour.decoding.draws import draw
from neurondrift.behaviour.generate import answer, generate
from neurondrift.behaviour.requests import Decoding, Request, render
from neurondrift.models.data import PLAIN_TEMPLATE, render_prompt
from neurondrift.models.loading import byte_tokenizer, load_model

PROMPTS = ["Hi", "Tell me a long story about a dragon, please", "What is 2 + 2?", "Name three rivers", "Why?"]


class Numbers:
    """A tokenizer of the families' 64 tokens: a text is its numbers."""

    pad_token_id, eos_token_id = 0, None

    def __call__(self, text, add_special_tokens=False):
        return {"input_ids": [int(part) for part in text.split()]}

    def decode(self, ids, skip_special_tokens=True):
        return " ".join(map(str, ids))


def plainly(model, ids, count):
    """Greedy tokens with no cache, no padding and no batch."""
    ids = torch.tensor([ids])
    start = ids.shape[1]
    with torch.no_grad():
        for _ in range(count):
            token = model(input_ids=ids, use_cache=False).logits[0, -1].argmax()
            ids = torch.cat([ids, token.view(1, 1)], dim=1)
            if int(token) == model.generation_config.eos_token_id:
                break
    return ids[0, start:].tolist()


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


@pytest.mark.parametrize("loop", ["even", "own", "alone"])
@pytest.mark.parametrize(
    "decoding",
    [Decoding(max_new_tokens=20), Decoding(max_new_tokens=20, temperature=1.0, seed=3), Decoding(max_new_tokens=1)],
    ids=["greedy", "sampled", "one token"],
)
@pytest.mark.parametrize("decided", [None, lambda prompt, text: prompt == PROMPTS[1]], ids=["whole", "decided"])
def test_all_ways_of_decoding_give_the_same_answers(loop, decoding, decided, tiny, monkeypatch):
    """Padded batches, batches of one length, and transformers' own loop, which models with a state of their own need."""
    model, tokenizer = tiny
    requests = [Request(prompt=prompt, text=render(prompt, tokenizer)) for prompt in (*PROMPTS, "How?")]
    expected = answer(model, tokenizer, requests, decoding=decoding, batch_size=3, decided=decided)
    monkeypatch.setattr(module._Loop, "_find_loop", lambda self: loop)
    before = model.generation_config
    assert answer(model, tokenizer, requests, decoding=decoding, batch_size=3, decided=decided) == expected
    assert model.generation_config is before


def test_penalties_of_the_models_own_settings_are_not_applied_by_its_own_loop(tiny, monkeypatch):
    model, tokenizer = tiny
    expected = generate(model, tokenizer, PROMPTS, max_new_tokens=12)
    monkeypatch.setattr(module._Loop, "_find_loop", lambda self: "own")
    monkeypatch.setattr(model.generation_config, "repetition_penalty", 50.0)
    monkeypatch.setattr(model.generation_config, "max_length", 3)
    assert generate(model, tokenizer, PROMPTS, max_new_tokens=12) == expected


@pytest.mark.parametrize(
    ("kind", "name", "loop"),
    [
        ("llama", "LlamaForCausalLM", "padded"),
        ("git", "GitForCausalLM", "even"),
        ("kosmos-2.5", "Kosmos2_5ForConditionalGeneration", "even"),
        ("mamba2", "Mamba2ForCausalLM", "own"),
        ("rwkv", "RwkvForCausalLM", "alone"),
    ],
)
def test_how_a_model_is_decoded_is_found_by_asking_it(kind, name, loop):
    model = every_class.build(kind, name)
    assert module._Loop(model, Numbers(), Decoding(max_new_tokens=2), None).loop == loop


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_decodes_as_without_cache_and_batch(family):
    """Prompts of different lengths that share their first 9 tokens, one of them twice; one batch, and batches of two."""
    model = build(family)
    head = [5, 9, 13, 17, 21, 25, 29, 33, 37]
    prompts = [[*head, *range(40, 40 + length)] for length in (1, 4, 9, 2, 4)]
    requests = [Request(prompt="", text=" ".join(map(str, ids))) for ids in prompts]
    expected = [" ".join(map(str, plainly(model, ids, 10))) for ids in prompts]
    for batch_size in (5, 2):
        found = answer(model, Numbers(), requests, decoding=Decoding(max_new_tokens=10), batch_size=batch_size)
        assert found == expected


def test_prompts_that_share_a_beginning_are_computed_once(tiny, monkeypatch):
    model, tokenizer = tiny
    generate(model, tokenizer, PROMPTS[:1], max_new_tokens=1)  # what kind of model it is has been asked
    seen = []
    step = module._Loop._step
    monkeypatch.setattr(
        module._Loop, "_step", lambda loop, ids, *rest: (seen.append(tuple(ids.shape)), step(loop, ids, *rest))[1]
    )
    texts = ["The same beginning, and one", "The same beginning, and two", "The same beginning, and two"]
    found = answer(
        model, tokenizer, [Request(prompt="", text=text) for text in texts], decoding=Decoding(max_new_tokens=3)
    )
    assert seen == [(1, 24), (2, 3), (3, 1), (3, 1)]
    assert found[1] == found[2]


def test_finished_rows_leave_the_batch(tiny, monkeypatch):
    model, tokenizer = tiny
    rows = []
    step = module._Loop._step
    monkeypatch.setattr(
        module._Loop, "_step", lambda loop, ids, *rest: (rows.append(len(ids)), step(loop, ids, *rest))[1]
    )
    whole = generate(model, tokenizer, PROMPTS, max_new_tokens=20)
    rows.clear()
    cut = generate(model, tokenizer, PROMPTS, max_new_tokens=20, decided=lambda prompt, text: prompt != PROMPTS[2])
    assert rows[-1] == 1
    assert cut[2] == whole[2]
    assert all(a.startswith(b.rstrip("\ufffd")) for a, b in zip(whole, cut, strict=True))


def test_an_answer_that_is_wanted_whole_does_not_end_early(tiny):
    model, tokenizer = tiny
    text = render("Hi", tokenizer)
    requests = [Request(prompt="Hi", text=text, whole=whole) for whole in (True, False)]
    long, short = answer(
        model, tokenizer, requests, decoding=Decoding(max_new_tokens=30), decided=lambda prompt, text: True
    )
    assert len(short) < len(long)


def test_an_adapter_is_decoded_unmerged(tiny):
    from peft import LoraConfig, get_peft_model

    model, tokenizer = load_model("tiny:llama", dtype="float32", device="cpu")
    before = generate(model, tokenizer, PROMPTS, max_new_tokens=12)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)).eval()
    batched = generate(adapted, tokenizer, PROMPTS, max_new_tokens=12)
    assert batched != before
    assert batched == [generate(adapted, tokenizer, [prompt], max_new_tokens=12)[0] for prompt in PROMPTS]
    with adapted.disable_adapter():
        assert generate(adapted, tokenizer, PROMPTS, max_new_tokens=12) == before


def test_samples_do_not_depend_on_the_batch_but_on_seed_and_number(tiny):
    model, tokenizer = tiny
    requests = [
        Request(prompt=prompt, text=render(prompt, tokenizer), sample=number) for prompt in PROMPTS for number in (0, 1)
    ]
    decoding = Decoding(max_new_tokens=12, temperature=1.0, top_p=0.9, seed=3)
    together = answer(model, tokenizer, requests, decoding=decoding, batch_size=10)
    assert together == answer(model, tokenizer, requests, decoding=decoding, batch_size=3)
    assert together[::2] != together[1::2]
    other = Decoding(max_new_tokens=12, temperature=1.0, top_p=0.9, seed=4)
    assert together != answer(model, tokenizer, requests, decoding=other, batch_size=10)


def test_draws_follow_the_probabilities():
    shares = torch.tensor([[0.1, 0.0, 0.6, 0.3]]).repeat(40_000, 1)
    uniform = torch.rand(40_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    counts = torch.bincount(draw(shares, uniform), minlength=4) / 40_000
    assert torch.allclose(counts, shares[0], atol=0.01)
    nucleus = torch.bincount(draw(shares, uniform, top_p=0.7), minlength=4) / 40_000
    assert torch.allclose(nucleus, torch.tensor([0.0, 0.0, 2 / 3, 1 / 3]), atol=0.01)
    assert draw(shares[:1], torch.tensor([0.9999999999])).item() == 3
    assert draw(shares[:1], torch.tensor([0.0])).item() == 0


def test_plain_text_stands_outside_the_template(tiny):
    _, tokenizer = tiny
    assert render(" How? ", tokenizer, chat_template=False) == "How?\n"
    assert render("How?", tokenizer, system="Be kind.") == "<|system|>Be kind.<|end|><|user|>How?<|end|><|assistant|>"


def test_a_template_without_system_prompt_is_a_clear_error():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('System role not supported') if messages[0]['role'] == 'system' }}"
    with pytest.raises(DataError, match=r"template refuses.*System role not supported.*leave out the system prompt"):
        render("How?", tokenizer, system="Be kind.")


def test_no_chat_template_is_said_once(tiny, caplog):
    model, _ = tiny
    for _ in range(2):  # as in a study, which loads the tokenizer again at every step
        tokenizer = byte_tokenizer()
        tokenizer.chat_template, tokenizer.name_or_path = None, "a/base-model"
        generate(model, tokenizer, PROMPTS[:2], max_new_tokens=2)
        assert tokenizer.chat_template == PLAIN_TEMPLATE
    assert sum("has no chat template" in message for message in caplog.messages) == 1


def test_prompts_that_cannot_be_asked(tiny):
    model, tokenizer = tiny
    with pytest.raises(DataError, match="no prompts"):
        answer(model, tokenizer, [], decoding=Decoding())
    with pytest.raises(DataError, match="prompt is empty"):
        answer(model, tokenizer, [Request(prompt="x", text="")], decoding=Decoding())
    with pytest.raises(DataError, match=r"longer than max_length.*1100 tokens.*Allowed: '?1014.*context is 1024"):
        answer(model, tokenizer, [Request(prompt="x", text="y" * 1100)], decoding=Decoding(max_new_tokens=10))
    with pytest.raises(ConfigError, match=r"no such backend.*'jax'.*transformers, vllm"):
        answer(model, tokenizer, [Request(prompt="x", text="y")], decoding=Decoding(), backend="jax")


def test_vllm_that_is_not_installed_is_a_clear_error(tmp_path, capsys):
    from neurondrift.base.errors import ConfigError
    from neurondrift.behaviour.vllm_backend import VllmModel

    with pytest.raises(ConfigError, match=r"needs vLLM.*neurondrift\[vllm\]"):
        VllmModel("a/model")


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize(("kind", "name"), [("mamba2", "Mamba2ForCausalLM"), ("rwkv", "RwkvForCausalLM")])
def test_a_state_that_is_no_cache_of_keys_and_values(kind, name, batch_size):
    """F2, F8: answers as transformers gives them, one prompt at a time."""
    model = every_class.build(kind, name)
    prompts = [[5, 9, 13], [7, 8, 9, 10, 11, 12], [6, 20, 30]]
    requests = [Request(prompt="", text=" ".join(map(str, ids))) for ids in prompts]
    found = answer(model, Numbers(), requests, decoding=Decoding(max_new_tokens=6), batch_size=batch_size)
    ends = model.generation_config.eos_token_id
    for ids, text in zip(prompts, found, strict=True):
        alone = model.generate(
            torch.tensor([ids]), do_sample=False, max_new_tokens=6, eos_token_id=ends, pad_token_id=0
        )
        assert text == " ".join(map(str, alone[0, len(ids) :].tolist()))
    drawn = Decoding(max_new_tokens=6, temperature=1.0, seed=3)
    texts = {size: answer(model, Numbers(), requests, decoding=drawn, batch_size=size) for size in (1, 3)}
    assert texts[1] == texts[3]


def test_a_cache_that_a_model_leaves_empty_is_not_used(monkeypatch):
    model = build("llama")
    forward = type(model).forward

    def swallowing(self, input_ids, attention_mask=None, position_ids=None, past_key_values=None, **more):
        return forward(
            self, input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False
        )

    monkeypatch.setattr(module, "_LOOPS", {})
    monkeypatch.setattr(type(model), "forward", swallowing)
    assert module._Loop(model, Numbers(), Decoding(max_new_tokens=2), None).loop == "alone"
