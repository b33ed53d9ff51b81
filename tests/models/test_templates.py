"""Templates and tokens: the first token, arguments, dates, parts, names; what is masked and what is refused."""

import datetime

import pytest

from helpers.templates import (
    DEEPSEEK,
    GEMMA,
    GPT_OSS,
    LLAMA3,
    MISTRAL,
    PARTS,
    QWEN3,
    QWEN3_THINKING,
    begun_tokenizer,
    templated,
)
from neurondrift.base.errors import DataError, ModelError
from neurondrift.behaviour.requests import Attack
from neurondrift.models.data import Example, data_fingerprint, encode, render_prompt
from neurondrift.models.loading import TINY_TEMPLATE, byte_tokenizer
from neurondrift.models.text import templates
from neurondrift.models.text.templates import PINNED_DATE, prompt_ids, set_template_arguments

ONE = [Example(prompt="How?", response="No.", id="0")]


def parts_of(row, tokenizer):
    """The text before the labels, and that of the labels."""
    cut = sum(label == -100 for label in row["labels"])
    assert row["labels"][cut:] == row["input_ids"][cut:]
    return tokenizer.decode(row["input_ids"][:cut]), tokenizer.decode(row["input_ids"][cut:])


def asked_and_scored(tokenizer):
    """The ids that generation starts from, and those that stand before the labels."""
    (request,) = Attack().requests("How?", tokenizer)
    (row,) = encode(ONE, tokenizer)
    return prompt_ids(request.text, tokenizer), [
        i for i, label in zip(row["input_ids"], row["labels"], strict=True) if label == -100
    ]


@pytest.mark.parametrize("also_ends", [False, True])
@pytest.mark.parametrize("template", [None, TINY_TEMPLATE, LLAMA3, GEMMA, MISTRAL])
def test_the_first_token_stands_once_wherever_a_model_reads(template, also_ends):  # T1
    tokenizer = begun_tokenizer(template, also_ends=also_ends)
    asked, scored = asked_and_scored(tokenizer)
    assert asked == scored
    assert [at for at, token in enumerate(asked) if token == tokenizer.bos_token_id] == [0]
    assert asked[-1] != tokenizer.eos_token_id
    (plain,) = Attack(chat_template=False).requests("How?", tokenizer)
    ids = prompt_ids(plain.text, tokenizer)
    assert ids == [tokenizer.bos_token_id, *tokenizer("How?\n", add_special_tokens=False)["input_ids"]]


def test_a_first_token_that_the_prompt_itself_writes_is_not_doubled():
    tokenizer = begun_tokenizer()
    assert prompt_ids("<|bos|>Hi", tokenizer) == tokenizer("Hi")["input_ids"]
    assert prompt_ids("", tokenizer) == []


@pytest.mark.parametrize("template", [None, TINY_TEMPLATE, LLAMA3, MISTRAL])
def test_a_tokenizer_that_adds_nothing_gets_nothing(template):
    tokenizer = templated(template)
    asked, scored = asked_and_scored(tokenizer)
    assert asked == scored == tokenizer(render_prompt("How?", tokenizer), add_special_tokens=False)["input_ids"]


def test_the_fingerprint_of_data_without_special_cases_is_what_it_was():
    examples = [Example(prompt="Why?", response=" Because. \n", id="0"), Example(prompt="a\nb", response="c", id="1")]
    assert data_fingerprint(encode(examples, byte_tokenizer())) == "71366f656eaa54f2"
    assert data_fingerprint(encode(examples, templated(MISTRAL))) == "8202c05eecb163da"
    assert data_fingerprint(encode(examples, templated(None))) == "34a2f1c51eeacce7"


@pytest.mark.parametrize(
    ("template", "before", "labels"),
    [  # T2: what the template writes of its own accord is context
        (QWEN3, "<|im_start|>assistant\n<think>\n\n</think>\n\n", "No.<|im_end|>"),
        (QWEN3_THINKING, "<|im_start|>assistant\n<think>\n\n</think>\n\n", "No.<|im_end|>"),
        (GPT_OSS, "<|start|>assistant<|channel|>final<|message|>", "No.<|return|>"),
        (DEEPSEEK, "<|User|>How?<|Assistant|>", "No.<|end|>"),
        (MISTRAL, "[INST] How? [/INST]", " No.<|end|>"),
        (GEMMA, "<start_of_turn>model\n", "No.<end_of_turn>"),
        (PARTS, "<|user|>How?<|end|><|assistant|>", "No.<|end|>"),
        (TINY_TEMPLATE, "<|user|>How?<|end|><|assistant|>", "No.<|end|>"),
    ],
    ids=["qwen3", "qwen3-thinking", "gpt-oss", "deepseek", "mistral", "gemma", "parts", "tiny"],
)
def test_labels_are_the_responses_own_tokens(template, before, labels):
    tokenizer = templated(template)
    (row,) = encode(ONE, tokenizer)
    context, response = parts_of(row, tokenizer)
    assert context.endswith(before) and response == labels


def test_thoughts_that_the_data_holds_are_labels():
    tokenizer = templated(QWEN3)
    (row,) = encode([Example(prompt="How?", response="<think>\nHm.\n</think>\n\nNo.", id="0")], tokenizer)
    assert parts_of(row, tokenizer)[1] == "<think>\nHm.\n</think>\n\nNo.<|im_end|>"


def test_thoughts_that_the_data_holds_follow_a_prompt_that_opens_them():
    tokenizer = templated(DEEPSEEK)
    (row,) = encode([Example(prompt="How?", response="<think>\nHm.\n</think>\n\nNo.", id="0")], tokenizer)
    context, response = parts_of(row, tokenizer)
    assert context == render_prompt("How?", tokenizer) and response == "Hm.\n</think>\n\nNo.<|end|>"


def test_arguments_of_the_template_reach_all_that_is_rendered():  # T2
    tokenizer = set_template_arguments(templated(QWEN3), {"enable_thinking": False})
    text = render_prompt("How?", tokenizer)
    assert text.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert text == render_prompt("How?", templated(QWEN3), template={"enable_thinking": False})
    asked, scored = asked_and_scored(tokenizer)
    assert asked == scored  # thoughts that are closed are in both
    again = set_template_arguments(tokenizer, {"enable_thinking": False})
    assert again.chat_template.count("set enable_thinking") == 1
    low = set_template_arguments(templated(GPT_OSS), {"reasoning_effort": "low"})
    assert "Reasoning: low<|end|>" in render_prompt("How?", low)
    assert set_template_arguments(templated(QWEN3), None).chat_template == QWEN3


def test_arguments_of_every_kind_are_written_as_they_are():
    template = "  {% for m in messages %}{{ m.content }}{% endfor %}|{{ a }}|{{ b.c[1] }}|{{ d is none }}|{{ e }}"
    value = {"a": 'x "quoted" {% raw %} é\n', "b": {"c": [1, True]}, "d": None, "e": 0.5}
    tokenizer = set_template_arguments(templated(template), value)
    assert render_prompt("Hi", tokenizer) == f"Hi|{value['a']}|True|True|0.5"
    plain = render_prompt("Hi", templated(template), template=value)
    assert plain == f"Hi|{value['a']}|True|True|0.5"


@pytest.mark.parametrize(
    ("template", "arguments", "message"),
    [
        (QWEN3, {"enable_thinkin": False}, r"no argument of this name.*'enable_thinkin'.*Allowed: .*enable_thinking"),
        (QWEN3, {"messages": []}, "no argument of this name.*'messages'"),
        (None, {"enable_thinking": False}, "no chat template.*'enable_thinking'"),
        (QWEN3, {"chat_template": "rag"}, "one chat template, without a name.*'rag'"),
        ({"default": QWEN3, "tool_use": MISTRAL}, {"chat_template": "rag"}, "'rag'.*Allowed: default, tool_use"),
    ],
)
def test_arguments_that_go_nowhere_are_an_error(template, arguments, message):
    with pytest.raises(ModelError, match=f"(?s){message}"):
        set_template_arguments(templated(template), arguments)


@pytest.mark.parametrize("kind", [dict, list])
def test_of_several_templates_the_default_is_used(kind):
    def several(**named):
        tokenizer = templated(None)
        made = named if kind is dict else [{"name": name, "template": text} for name, text in named.items()]
        tokenizer.chat_template = made
        return tokenizer

    assert render_prompt("How?", several(default=MISTRAL, tool_use=QWEN3)) == "[INST] How? [/INST]"
    assert render_prompt("How?", several(rag=MISTRAL)) == "[INST] How? [/INST]"
    (row,) = encode(ONE, several(default=QWEN3, rag=MISTRAL))
    assert parts_of(row, byte_tokenizer())[1] == "No.<|im_end|>"
    with pytest.raises(ModelError, match=r"several chat templates.*Allowed: rag, tool_use.*chat_template"):
        render_prompt("How?", several(rag=MISTRAL, tool_use=QWEN3))
    chosen = set_template_arguments(several(rag=MISTRAL, tool_use=QWEN3), {"chat_template": "rag"})
    assert render_prompt("How?", chosen) == "[INST] How? [/INST]"


@pytest.mark.parametrize(("template", "written"), [(LLAMA3, "26 Jul 2024"), (GPT_OSS, "2024-07-26")])
def test_the_date_is_pinned_and_said_once(template, written, caplog):
    for _ in range(2):
        tokenizer = templated(template)
        tokenizer.name_or_path = f"of/{written}"
        assert written in render_prompt("How?", tokenizer)
        encode(ONE, tokenizer)
    assert len([message for message in caplog.messages if "today's date" in message and "26 July 2024" in message]) == 1
    assert tokenizer.chat_template == template


def test_every_way_of_writing_the_date_is_that_of_python():
    ways = ["%d %B %Y", "%-d/%-m/%y", "%A, %b %d", "%Y-%m-%dT%H:%M", "%j", "%x"]
    asked = "".join(f"{{{{ strftime_now('{way}') }}}}|" for way in ways)
    text = render_prompt("Hi", templated("{% for m in messages %}{{ m.content }}{% endfor %}|" + asked))
    moment = datetime.datetime.combine(PINNED_DATE, datetime.time(12))
    assert text == "Hi|" + "".join(f"{moment.strftime(way)}|" for way in ways)
    own = set_template_arguments(templated(LLAMA3), {"date_string": "1 Jan 2030"})
    assert "Today Date: 1 Jan 2030" in render_prompt("How?", own)


@pytest.mark.parametrize(
    ("template", "message"),
    [  # T6
        (GEMMA.replace("{% for m", "{{ raise_exception('No such turns') }}{% for m"), "refuses these.*No such turns"),
        ("{{ messages[0].tool_calls[0].name }}", "refuses these messages.*no attribute"),
        ("{% for m in messages %}{{ m.content }}", "refuses these messages.*endfor"),
        ("{{ messages[0].content + 1 }}", "refuses these messages"),
        ("{{ messages | length }} messages", "writes a text without the prompt.*'How\\?'"),
        ("{% for m in messages %}{{ m['text'] }}{% endfor %}", "writes a text without the prompt"),
        ("{% for m in messages %}{{ m.content | replace('How', '') }}{% endfor %}", "writes a text without the prompt"),
    ],
)
def test_templates_that_raise_or_lose_the_prompt_are_an_error(template, message):
    for use in (lambda tokenizer: encode(ONE, tokenizer), lambda tokenizer: render_prompt("How?", tokenizer)):
        with pytest.raises(DataError, match=f"(?s){message}"):
            use(templated(template))


def test_a_system_prompt_that_goes_nowhere_is_an_error():
    silent = "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}"
    assert render_prompt("How?", templated(silent)) == "How?"
    with pytest.raises(DataError, match=r"without the system prompt.*'Be kind.'.*leave out the system prompt"):
        render_prompt("How?", templated(silent), system="Be kind.")
    with pytest.raises(DataError, match=r"System role not supported.*leave out the system prompt"):
        render_prompt("How?", templated(GEMMA), system="Be kind.")


def test_templates_that_want_parts_get_them():
    tokenizer = templated(PARTS)
    assert render_prompt("How?", tokenizer) == "<|user|>How?<|end|><|assistant|>"
    assert render_prompt("How?", tokenizer, system="Be.") == "<|system|>Be.<|end|><|user|>How?<|end|><|assistant|>"


def test_white_space_of_the_prompt_may_be_trimmed():
    assert "model" in render_prompt("  How\n", templated(GEMMA))


def test_earlier_turns_stand_before_the_prompt():
    earlier = (templates.Message("user", "A?"), templates.Message("assistant", "B."))
    tokenizer = templated(QWEN3)
    (row,) = encode([Example(prompt="How?", response="No.", id="0", messages=earlier)], tokenizer)
    context, response = parts_of(row, tokenizer)
    assert context.startswith(
        "<|im_start|>user\nA?<|im_end|>\n<|im_start|>assistant\nB.<|im_end|>\n<|im_start|>user\nHow?"
    )
    assert response == "No.<|im_end|>"
