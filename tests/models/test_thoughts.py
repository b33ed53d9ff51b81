"""What an answer says without its thoughts, in the marks of many models."""

import pytest

from helpers.templates import DEEPSEEK, GPT_OSS, HARMONY, QWEN3, QWEN3_THINKING, begun_tokenizer, templated
from neurondrift.models.data import render_prompt
from neurondrift.models.loading import byte_tokenizer
from neurondrift.models.text.thoughts import decoded, marking_tokens, opened_at_end, spoken

PAIRS = [
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<Thought>", "</Thought>"),
    ("<reasoning>", "</reasoning>"),
    ("<analysis>", "</analysis>"),
    ("<scratchpad>", "</scratchpad>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("◁think▷", "◁/think▷"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|inner_prefix|>", "<|inner_suffix|>"),
    ("<|channel>thought\n", "<channel|>"),
    ("<unused94>thought\n", "<unused95>"),
    ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"),
    ("<|start|>assistant<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"),
    ("analysis", "assistantfinal"),
    ("Here is my thought process:", "Here is my response:"),
]


@pytest.mark.parametrize(("opens", "closes"), PAIRS)
def test_thoughts_are_cut_off(opens, closes):  # T2
    thought = "I won't refuse.\nI'm sorry to overthink."
    assert spoken(f"{opens}{thought}{closes}\n\nSure! Here is how.\n") == "Sure! Here is how."
    assert spoken(f"\n{opens}\n{closes}Sure!" if opens != "analysis" else "analysisA.assistantfinalSure!") == "Sure!"
    assert spoken(f"{opens}{thought}") is None


@pytest.mark.parametrize(("opens", "closes"), [pair for pair in PAIRS if "channel|>" not in pair[0]][:-2])
def test_a_thought_that_began_in_the_prompt_ends_too(opens, closes):
    assert spoken(f"A question. I won't refuse.{closes} Sure!") == "Sure!"


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "I can't help with that.",
        "Use the `<think>` tag, and close it with `</think>`.",
        "Put your thoughts between <think> and </think>, please.",
        "Analysis of the case:\n<report>\n<analysis>\nNone\n</analysis>\n</report>",
        "```xml\n<think>\n</think>\n```",
        "analysis of variance is a test",
        "Here is my response: no.",
        "[think] about it",
        "I think that 1 < 2 > 0.",
    ],
)
def test_answers_without_thoughts_stay_as_they_are(answer):
    assert spoken(answer) == answer


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("<think>a <think> b</think> Sure", "Sure"),
        ("<think>a<think>b</think>c</think>Sure", "Sure"),
        ("<think>a</think>\n<think>b</think>Sure", "Sure"),
        ("Sure.\n<think>more?</think>\nDone.", "Sure.\n\nDone."),
        ("Sure.\n<think>more?", None),
        ("<think>a</thinking>Sure", "Sure"),
        ("<think></think>", None),
        ("<think>a</think>\n\n<", None),
        ("<thin", None),
        ("Let me see. <think>a", None),
        ("I see. <think>a</think> Sure", "I see.  Sure"),
        ("<think>a</think><answer>Sure</answer>", "Sure"),
        ("<|begin_of_thought|>a<|end_of_thought|>\n<|begin_of_solution|>Sure<|end_of_solution|>", "Sure"),
        (
            "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>commentary to=f<|message|>{}<|call|>",
            None,
        ),
        ("<|channel|>final<|message|>Sure<|return|>", "Sure"),
        ("<|channel|>analysis", None),
    ],
)
def test_thoughts_in_other_orders(answer, said):
    assert spoken(answer) == said


def test_prompts_that_open_a_thought():
    assert opened_at_end(render_prompt("How?", templated(DEEPSEEK))) == "<think>\n"
    assert opened_at_end(render_prompt("How?", templated(QWEN3_THINKING))) == "<think>\n"
    for closed in (QWEN3, GPT_OSS):
        assert opened_at_end(render_prompt("What is <think>?", templated(closed))) == ""
    assert opened_at_end(render_prompt("How?", templated(QWEN3), template={"enable_thinking": False})) == ""
    assert opened_at_end("<|start|>assistant<|channel|>analysis<|message|>") == "<|channel|>analysis<|message|>"
    assert opened_at_end("<|start|>assistant<|channel|>final<|message|>") == ""


def test_special_tokens_that_mark_thoughts_are_kept():
    tokenizer = begun_tokenizer(special=HARMONY)
    text = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Sure.<|return|>"
    ids = tokenizer(text)["input_ids"]
    assert decoded(tokenizer, ids, marking_tokens(tokenizer)) == text
    mistral = begun_tokenizer(special=["[THINK]", "[/THINK]"])
    ids = mistral("[THINK]Hm.[/THINK]Sure.<|end|>")["input_ids"]
    assert decoded(mistral, ids, marking_tokens(mistral)) == "[THINK]Hm.[/THINK]Sure."
    plain = byte_tokenizer()
    assert marking_tokens(plain) == {}
    assert decoded(plain, plain("Sure.<|end|>")["input_ids"], {}) == "Sure."
