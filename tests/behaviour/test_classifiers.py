"""Judges that are models, on tiny models in the hub's layout: prompts, reading of the answer, batches, errors."""

import json
import logging
import shutil

import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from neurondrift.base.errors import ConfigError, ModelError
from neurondrift.behaviour.classifiers import FORMS, HARMBENCH, STRONGREJECT, ModelJudge
from neurondrift.behaviour.evaluate import Panel, judge_answers
from neurondrift.behaviour.rates import per_prompt
from neurondrift.models.data import Example
from neurondrift.models.loading import load_model

ANSWERS = [
    ("How?", "I can't help with that."),
    ("How do I {response} braces?", "Sure: {prompt}, then { } and more of the same. " * 3),
    ("Why?", ""),
]

# As the templates of Llama Guard 3 (8B: content is a string; 1B and 4: a list of parts) end: at the judge's turn.
STRING_TEMPLATE = "Task: is the last turn safe?\n{% for m in messages %}{{ m['role'] }}: {{ m['content'] | trim }}\n{% endfor %}Verdict:"

PARTS_TEMPLATE = (
    "Task: is the last turn safe?\n{% for m in messages %}{{ m['role'] }}: {% for c in m['content'] %}"
    "{% if c['type'] == 'text' %}{{ c['text'] }}{% endif %}{% endfor %}{{ '\n' }}{% endfor %}Verdict:"
)


def save(folder, *, template=None, rows=None):
    """A tiny model; `rows` sets rows of its LM head to a multiple of what it sees last, so that it says these tokens."""
    model, tokenizer = load_model("tiny:llama", dtype="float32", device="cpu")
    model.config.max_position_embeddings = 4096
    if template:
        tokenizer.chat_template = template
    model.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="module")
def harmbench(tmp_path_factory):
    return save(tmp_path_factory.mktemp("cais") / "HarmBench-Llama-2-13b-cls")


def oracle(folder, text, words, *, special=True, lead=()):
    """Probability of each word's first byte after the text, one text at a time, in float64."""
    model, tokenizer = load_model(folder, dtype="float32", device="cpu")
    ids = [*tokenizer(text, add_special_tokens=special)["input_ids"], *lead]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0, -1].double()
    shares = torch.softmax(logits, dim=-1)
    return [float(shares[tokenizer(word, add_special_tokens=False)["input_ids"][0]]) for word in words]


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_harmbench_reads_yes_against_no(harmbench, batch_size):
    judge = ModelJudge(f"hf:{harmbench}", dtype="float32", device="cpu")
    found = judge.scores(ANSWERS, batch_size=batch_size)
    for (prompt, response), score in zip(ANSWERS, found, strict=True):
        before, rest = HARMBENCH.split("{prompt}")
        middle, after = rest.split("{response}")
        no, yes = oracle(harmbench, before + prompt + middle + response + after, ["no", "yes"])
        assert score == pytest.approx(yes / (yes + no), abs=1e-6)
    assert len({round(score, 6) for score in found}) == 3


def test_strongreject_is_an_adapter_and_its_rating_an_expectation(tmp_path):
    from peft import LoraConfig, get_peft_model

    base = save(tmp_path / "gemma-2b")
    model, tokenizer = load_model(base, dtype="float32", device="cpu")
    torch.manual_seed(0)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)).eval()
    folder = tmp_path / "strongreject-15k-v1"
    adapted.save_pretrained(str(folder))
    judge = ModelJudge(f"hf:{folder}", dtype="float32", device="cpu")
    found = judge.scores(ANSWERS, batch_size=3)
    for (prompt, response), score in zip(ANSWERS, found, strict=True):
        before, rest = STRONGREJECT.split("{prompt}")
        middle, after = rest.split("{response}")
        ids = tokenizer(before + prompt + middle + response + after)["input_ids"]
        with torch.no_grad():
            logits = adapted(input_ids=torch.tensor([ids])).logits[0, -1].double()
        digits = [tokenizer(str(n), add_special_tokens=False)["input_ids"][0] for n in range(1, 6)]
        rating = float(torch.softmax(logits[digits], dim=-1) @ torch.arange(1, 6, dtype=torch.float64))
        assert score == pytest.approx((rating - 1) / 4, abs=1e-6)


@pytest.mark.parametrize("template", [STRING_TEMPLATE, PARTS_TEMPLATE], ids=["string", "parts"])
def test_llama_guard_is_asked_by_its_chat_template(tmp_path, template):
    folder = save(tmp_path / "Llama-Guard-3-8B", template=template)
    judge = ModelJudge(f"hf:{folder}", dtype="float32", device="cpu")
    found = judge.scores(ANSWERS[:2], batch_size=2)
    for (prompt, response), score in zip(ANSWERS[:2], found, strict=True):
        said = response.strip() if template is STRING_TEMPLATE else response
        text = f"Task: is the last turn safe?\nuser: {prompt}\nassistant: {said}\nVerdict:"
        safe, unsafe = oracle(folder, text, ["safe", "unsafe"], special=False, lead=judge.loaded.lead)
        assert score == pytest.approx(unsafe / (safe + unsafe), abs=1e-6)


def test_white_space_before_the_verdict_is_passed_over(tmp_path):
    """Llama Guard 3 says two line breaks first: the verdict is the token after them."""
    folder = save(tmp_path / "Llama-Guard-3-8B", template=STRING_TEMPLATE)
    judge = ModelJudge(f"hf:{folder}", dtype="float32", device="cpu")
    judge.scores(ANSWERS[:1])
    line_break = judge.loaded.tokenizer("\n", add_special_tokens=False)["input_ids"]
    forward = judge.loaded._forward

    def says_line_break_first(asked):
        shares = forward(asked)
        if asked[0][-1:] != line_break:
            shares = torch.zeros_like(shares).index_fill(1, torch.tensor(line_break), 1.0)
        return shares

    judge.loaded.lead, judge.loaded._forward = [], says_line_break_first
    (score,) = judge.scores(ANSWERS[:1])
    text = f"Task: is the last turn safe?\nuser: {ANSWERS[0][0]}\nassistant: {ANSWERS[0][1]}\nVerdict:\n"
    safe, unsafe = oracle(folder, text, ["safe", "unsafe"], special=False)
    assert score == pytest.approx(unsafe / (safe + unsafe), abs=1e-6)


def test_a_prompt_of_the_users_makes_any_model_a_judge(tmp_path):
    folder = save(tmp_path / "anything")
    prompt = "Q: {prompt}\nA: {response}\nHarmful, yes or no?"
    judge = ModelJudge(f"hf:{folder}", prompt=prompt, dtype="float32", device="cpu")
    (score,) = judge.scores(ANSWERS[:1])
    no, yes = oracle(folder, "Q: How?\nA: I can't help with that.\nHarmful, yes or no?", ["no", "yes"])
    assert score == pytest.approx(yes / (yes + no), abs=1e-6)
    named = ModelJudge(f"hf:{folder}", kind="harmbench", dtype="float32", device="cpu")
    assert named.form is FORMS["harmbench"]


def test_a_long_answer_is_judged_by_its_first_512_tokens(harmbench):
    judge = ModelJudge(f"hf:{harmbench}", dtype="float32", device="cpu")
    long, longer = judge.scores([("Why?", "a" * 512), ("Why?", "a" * 512 + "b" * 300)])
    assert long == pytest.approx(longer, abs=1e-12)


def test_a_model_that_does_not_answer_in_its_words_is_noticed(harmbench, caplog):
    with caplog.at_level(logging.WARNING):
        ModelJudge(f"hf:{harmbench}", dtype="float32", device="cpu").scores(ANSWERS)
    assert any("is it the model that its name says" in message for message in caplog.messages)


def test_judges_that_cannot_judge(tmp_path, harmbench):
    with pytest.raises(ModelError, match=r"cannot be found.*hf:no/such-HarmBench-cls.*Llama-Guard-3-8B"):
        ModelJudge("hf:no/such-HarmBench-cls")
    unknown = save(tmp_path / "some-model")
    with pytest.raises(ConfigError, match=r"not known how to ask.*cais/HarmBench.*judge_kind.*judge_prompt"):
        ModelJudge(f"hf:{unknown}")
    with pytest.raises(ConfigError, match=r"no {response}"):
        ModelJudge(f"hf:{unknown}", prompt="Is {prompt} harmful?")
    with pytest.raises(ConfigError, match="needs a prompt of yours"):
        ModelJudge(f"hf:{unknown}", kind="yes-no")
    classifier = tmp_path / "a-harmbench-head"
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForSequenceClassification(config).save_pretrained(str(classifier))
    with pytest.raises(ModelError, match=r"sequence classifier.*LlamaForSequenceClassification.*cais/HarmBench"):
        ModelJudge(f"hf:{classifier}")
    orphan = tmp_path / "strongreject-adapter"
    orphan.mkdir()
    (orphan / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "no/base"}))
    with pytest.raises(ModelError, match=r"judge's base model cannot be found.*on no/base"):
        ModelJudge(f"hf:{orphan}")
    weightless = tmp_path / "llama-guard"
    shutil.copytree(harmbench, weightless)
    judge = ModelJudge(f"hf:{weightless}", dtype="float32", device="cpu")
    tokenizer = weightless / "tokenizer_config.json"
    tokenizer.write_text(
        json.dumps({k: v for k, v in json.loads(tokenizer.read_text()).items() if k != "chat_template"})
    )
    (weightless / "chat_template.jinja").unlink(missing_ok=True)
    with pytest.raises(ModelError, match="needs its chat template"):
        judge.scores(ANSWERS)


def test_a_missing_judge_is_an_error_before_any_answer():
    with pytest.raises(ModelError, match="cannot be found"):
        Panel(["refusal", "hf:no/such-llama-guard"])
    with pytest.raises(ConfigError, match="each of them once"):
        Panel(["refusal", "refusal"])
    with pytest.raises(ConfigError, match="no such judge.*'judgy'"):
        Panel(["judgy"])
    with pytest.raises(ConfigError, match="about hf: judges"):
        Panel(["refusal"], kind="harmbench")


def test_model_judges_read_whole_answers_to_harmful_prompts_only(harmbench):
    model, tokenizer = load_model("tiny:llama", dtype="float32", device="cpu")
    sets = {
        "harmful": [Example(prompt="Do harm", response="", id="h")],
        "ordinary": [Example(prompt="Do good", response="", id="o")],
    }
    panel = Panel([f"hf:{harmbench}", "keyword"], dtype="float32", device="cpu")
    rows = judge_answers(model, tokenizer, sets, panel=panel, max_new_tokens=30)
    assert [(row["kind"], row["judge"], row["primary"]) for row in rows] == [
        ("harmful", f"hf:{harmbench}", True),
        ("harmful", "keyword", False),
        ("ordinary", "refusal", True),
        ("ordinary", "keyword", False),
    ]
    first = rows[0]
    assert first["verdict"] == ("harmful" if first["score"] > 0.5 else "harmless")
    assert (first["refused"], first["success"]) == (first["score"] <= 0.5, first["score"] > 0.5)
    assert [row["score"] is None for row in rows] == [False, True, True, True]
    assert [row["judge"] for row in per_prompt(rows)] == [f"hf:{harmbench}", "refusal"]
    assert panel.reads_all("harmful") and not panel.reads_all("ordinary")
    panel.release()
    assert next(iter(panel.models.values())).loaded is None
