"""Thoughts: how reasoning models mark what they say to themselves, and what an answer says without it.

Owns the marks (`<think>`, `[THINK]`, `<reasoning>`, channels such as gpt-oss's) and what lies between them. Knows no
model and no judge. A closing mark whose opening stood in the prompt (DeepSeek-R1, QwQ) ends a thought too.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

# Names that nothing but a thought has: looked for at the start of every line. The others only open an answer.
_ALWAYS = {"think": "think", "thinking": "think", "thought": "think", "thoughts": "think"}
_FIRST = (
    "reasoning|reason|reflection|analysis|scratchpad|monologue|inner_monologue|inner_thoughts|internal_monologue"
    "|internal_reasoning|chain_of_thought|cot|rationale|deliberation"
)
_CLOSES = {"<": ">", "[": "]", "◁": "▷"}
_TAG = re.compile(
    rf"(?P<left>[<\[◁])(?P<slash>/?)(?:\w+:)?(?P<name>{'|'.join(_ALWAYS)}|{_FIRST})(?:\s[^<>\[\]◁▷\n]*)?(?P<right>[>\]▷])",
    re.IGNORECASE,
)
# Marks of one model family each: opening, closing.
_WORDS = {
    "thought": (r"<\|begin_of_thought\|>", r"<\|end_of_thought\|>"),  # OpenThinker, Sky-T1
    "THINKING": (r"<\|START_THINKING\|>", r"<\|END_THINKING\|>"),  # Command A
    "inner": (r"<\|inner_prefix\|>", r"<\|inner_suffix\|>"),  # Apertus
    "channel": (r"<\|channel>\s*(?:thought|analysis)\b", r"<channel\|>"),  # Gemma 4
    "unused": (r"<unused94>\s*thought\b", r"<unused95>"),  # MedGemma
}
_GRANITE = re.compile(
    r"\s*here(?:'s| is) my thought process:.*?(?P<end>here(?:'s| is) my response:|\Z)", re.IGNORECASE | re.DOTALL
)
# gpt-oss (the form "harmony"): <|channel|>analysis<|message|> ... <|end|><|start|>assistant<|channel|>final<|message|>
_CHANNEL = re.compile(r"<\|channel\|>\s*(?P<name>\w+)[^<]*(?:<\|constrain\|>[^<]*)?<\|message\|>")
_HARMONY = re.compile(r"\s*(?:<\|start\|>\s*assistant\s*)?<\|channel\|>")
_END_OF_MESSAGE = re.compile(r"<\|(?:end|return|call|start|channel)\|>")
_HARMONY_WORDS = {f"<|{name}|>" for name in ("channel", "message", "start", "end", "return", "call", "constrain")}
# The same once special tokens are gone: "analysisThe user asks ...assistantfinalHere is ..."
_BARE_CHANNEL = re.compile(r"\s*(?:analysis|commentary)(?=[^\W\d_]|[\"“'‘])")
_BARE_FINAL = re.compile(r"assistantfinal")
_WRAPPED = r"(?:<{0}(?:answer|response|output|final_answer|solution)>|<\|(?:{1}_of_solution|{2}_RESPONSE)\|>)"
_CUT_MARK = re.compile(r"\s*<(?:t|th|thi|thin|think\w{0,3}|tho|thou|thoug|though|thoughts?|\|\w{0,20}\|?)")
_ANSWER_OPENS = re.compile(r"\A\s*" + _WRAPPED.format("", "begin", "START"), re.IGNORECASE)
_ANSWER_CLOSES = re.compile(_WRAPPED.format("/", "end", "END") + r"\s*\Z", re.IGNORECASE)


class _Mark(NamedTuple):
    """Where a thought may begin or end."""

    start: int
    end: int
    family: str
    opens: bool
    always: bool  # counts at the start of any line, not of the answer alone


def spoken(answer: str) -> str | None:
    """What an answer says once its thoughts are cut off; None where it holds nothing else. Without thoughts, as it is.

    Nothing else: they never end, nothing with a letter or digit follows them, or a mark is all that there is of it.
    """
    if _CUT_MARK.fullmatch(answer):
        return None
    said = _without_thoughts(answer)
    return said if said == answer or (said and re.search(r"\w", said)) else None


def _without_thoughts(answer: str) -> str | None:
    """An answer without its thoughts; None where they never end."""
    if _HARMONY.match(answer):
        return _final_channel(answer)
    if begun := _BARE_CHANNEL.match(answer):
        parts = _BARE_FINAL.split(answer[begun.end() :])
        return parts[-1].strip() if len(parts) > 1 else None
    if begun := _GRANITE.match(answer):
        return answer[begun.end() :].strip() if begun["end"] else None
    kept: list[str] = []
    at, inside, thought = 0, "", False
    passed_over: Counter[str] = Counter()  # openings that are talked about, whose closings are too
    for mark in _marks(answer):
        if inside:
            if not mark.opens and mark.family == inside:
                at, inside = mark.end, ""
        elif mark.opens:
            before = "".join(kept) + answer[at : mark.start]
            if _begins_here(before, always=mark.always):
                kept.append(answer[at : mark.start])
                inside, thought = mark.family, True
            else:
                passed_over[mark.family] += 1
        elif passed_over[mark.family]:
            passed_over[mark.family] -= 1
        else:  # it began in the prompt, or within what seemed to be the answer
            kept, at, thought = [], mark.end, True
    if inside:
        return None
    if not thought:
        return answer
    rest = _ANSWER_OPENS.sub("", "".join([*kept, answer[at:]]))
    return _ANSWER_CLOSES.sub("", rest).strip()


def opened_at_end(prompt: str) -> str:
    """The mark with which a prompt's text ends, where it opens a thought for the model; else nothing."""
    for mark in _marks(prompt):
        if mark.opens and not prompt[mark.end :].strip():
            return prompt[mark.start :]
    channels = list(_CHANNEL.finditer(prompt))
    if channels and channels[-1]["name"] != "final" and not prompt[channels[-1].end() :].strip():
        return prompt[channels[-1].start() :]
    return ""


def marking_tokens(tokenizer: Any) -> dict[int, str]:
    """Special tokens that mark thoughts: id -> text. Decoding without special tokens would lose them."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = {number: token.content for number, token in added.items() if token.special}
    marks = {number: text for number, text in special.items() if any(True for _ in _marks(text)) or _begins(text)}
    if any(text == "<|channel|>" for text in special.values()):
        marks |= {number: text for number, text in special.items() if text in _HARMONY_WORDS}
    return marks


def decoded(tokenizer: Any, ids: Sequence[int], marks: dict[int, str]) -> str:
    """The text of an answer without special tokens, but for those that mark thoughts (where there are any)."""
    if not any(number in marks for number in ids):
        return str(tokenizer.decode(ids, skip_special_tokens=True))
    pieces: list[str] = []
    run: list[int] = []
    for number in ids:
        if number in marks:
            pieces += [tokenizer.decode(run, skip_special_tokens=True) if run else "", marks[number]]
            run = []
        else:
            run.append(number)
    return "".join([*pieces, tokenizer.decode(run, skip_special_tokens=True) if run else ""])


def _marks(text: str) -> Iterator[_Mark]:
    """Every mark of a text, in order, but for those in backticks."""
    found = []
    for match in _TAG.finditer(text):
        name = match["name"]
        if _CLOSES[match["left"]] != match["right"] or (match["left"] == "[" and not name.isupper()):
            continue
        family = match["left"] + _ALWAYS.get(name.lower(), name.lower())
        found.append(_Mark(match.start(), match.end(), family, not match["slash"], name.lower() in _ALWAYS))
    for family, patterns in _WORDS.items():
        for opens, pattern in zip((True, False), patterns, strict=True):
            found += [_Mark(m.start(), m.end(), family, opens, True) for m in re.finditer(pattern, text)]
    for mark in sorted(found):
        if text[mark.start - 1 : mark.start] != "`" and text[mark.end : mark.end + 1] != "`":
            yield mark


def _begins(text: str) -> bool:
    """Whether a token by itself is the first or last of a mark that has more words in it."""
    return text in ("<|channel>", "<channel|>", "<unused94>", "<unused95>")


def _begins_here(before: str, *, always: bool) -> bool:
    """Whether a mark after this text opens a thought: one that begins no text, line or sentence is talked about."""
    if not before.strip():
        return True
    if always and re.search(r"[.!?]\s+\Z", before):
        return True
    last_line = before.rpartition("\n")[2]
    return always and "\n" in before and not last_line.strip() and before.count("```") % 2 == 0


def _final_channel(answer: str) -> str | None:
    """What is said in the channel `final`; None where it has not begun."""
    said = []
    for match in _CHANNEL.finditer(answer):
        if match["name"] == "final":
            said.append(_END_OF_MESSAGE.split(answer[match.end() :], maxsplit=1)[0].strip())
    return "\n".join(said) if said else None
