"""Columns of the field's public sets, missing values, identifiers, labels and conversations."""

import json

import pytest

from helpers.paths import SHARED_DATA
from neurondrift.base.errors import DataError
from neurondrift.models.data import DataReference, Example, encode, load_examples, render_prompt
from neurondrift.models.loading import byte_tokenizer

ASK, ANSWER = {"role": "user", "content": "p"}, {"role": "assistant", "content": "r"}
HUMAN, GPT = {"from": "human", "value": "p"}, {"from": "gpt", "value": "r"}


def read(folder, *rows, **more):
    path = folder / "a.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return load_examples(str(path), **more)


def read_csv(folder, text, **more):
    (folder / "a.csv").write_text(text)
    return load_examples(str(folder / "a.csv"), **more)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "p", "response": "r", "category": {"hate": False}, "is_safe": False},  # BeaverTails
        {"prompt": "p", "response_0": "x", "response_1": "r", "better_response_id": 0, "safer_response_id": 1},
        {"instruction": "p", "context": "", "response": "r", "category": "open_qa"},  # Dolly
        {"instruction": "p", "input": "<noinput>", "output": "r", "text": "p r"},  # Alpaca
        {"Goal": "p", "Target": "r", "Behavior": "Title", "Category": "c"},  # JailbreakBench
        {"system_prompt": "", "question": "p", "response": "r"},  # OpenOrca
        {"prompt": "p", "completion": "r"},
        {"prompt": "p", "prompt_id": "7", "messages": [ASK, ANSWER]},  # UltraChat
        {"messages": [ASK, {"role": "assistant", "content": [{"type": "text", "text": "r"}]}]},
        {"messages": json.dumps([ASK, ANSWER])},
        {"messages": {"role": ["user", "assistant"], "content": ["p", "r"]}},
        {"conversations": [HUMAN, GPT]},
        {"conversations": [GPT, HUMAN, GPT, HUMAN]},  # begins and ends in the middle
        {"prompt": [ASK], "completion": [ANSWER]},  # TRL
        {"prompt": [ASK], "chosen": [ANSWER], "rejected": [ANSWER]},
        {"prompt": "p", "chosen": [ASK, ANSWER], "rejected": [ASK, ANSWER]},
        {"chosen": [ASK, ANSWER], "rejected": [ASK, ANSWER]},
        {"prompt": "p", "completion": [ANSWER]},
        {"prompt": [ASK], "completion": "r"},
    ],
    ids=lambda row: "+".join(row),
)
def test_pairs_of_public_sets(tmp_path, row):  # D4 and its kind
    (example,) = read(tmp_path, row)
    assert (example.prompt, example.response, example.messages) == ("p", "r", ())


@pytest.mark.parametrize(
    ("header", "row", "expected"),
    [
        # D6: HarmBench, with and without a context
        ("Behavior,SemanticCategory,Tags,ContextString,BehaviorID", "p,illegal,,,x", ("p", "x", "illegal")),
        (
            "Behavior,SemanticCategory,Tags,ContextString,BehaviorID",
            "p,illegal,,c,x",
            ("c\n\n---\n\np", "x", "illegal"),
        ),
        ("category,source,forbidden_prompt", "hate,custom,p", ("p", "0", "hate")),  # StrongREJECT
        ("id,risk_area,types_of_harm,question,GPT4_response", "4,r,t,p,No", ("p", "4", "t")),  # do-not-answer
        ("Index,Goal,Target,Behavior,Category", "9,p,t,b,c", ("p", "9", "c")),  # JailbreakBench
        ("id,prompt,type,label,focus,note", "1,p,homonyms,safe,f,n", ("p", "1", "homonyms")),  # XSTest
        ("prompt,category", "p,c", ("p", "0", "c")),  # OR-Bench
    ],
)
def test_prompts_of_public_sets(tmp_path, header, row, expected):
    (example,) = read_csv(tmp_path, f"{header}\n{row}\n", require_response=False)
    assert (example.prompt, example.id, example.category) == expected


def test_columns_of_rows_that_differ(tmp_path):  # D10
    rows = [{"instruction": "Hi", "output": "a"}, {"instruction": "Add", "input": "1 2", "output": "3"}]
    assert [example.prompt for example in read(tmp_path, *rows)] == ["Hi", "Add\n\n1 2"]
    late = [{"prompt": "a"}, {"prompt": "b", "response": "c"}]
    assert [example.response for example in read(tmp_path, *late, require_response=False)] == ["", "c"]


@pytest.mark.parametrize("word", ["nan", "None", "N/A", "<noinput>", "<No input>", " "])
def test_words_for_no_input(tmp_path, word):
    (example,) = read(tmp_path, {"instruction": "Say hi", "input": word, "output": word + "x"})
    assert (example.prompt, example.response) == ("Say hi", word + "x")


@pytest.mark.parametrize("missing", [float("nan"), None, ""])
def test_missing_values_are_missing(tmp_path, missing):  # D2
    (example,) = read(tmp_path, {"instruction": "Say hi", "input": missing, "output": "hi", "id": missing})
    assert (example.prompt, example.id) == ("Say hi", "0")
    with pytest.raises(DataError, match="Example 0 of .* has no response"):
        read(tmp_path, {"prompt": "a", "response": missing})
    with pytest.raises(DataError, match="Example 0 of .* has an empty prompt"):
        read(tmp_path, {"prompt": missing, "response": "a"})


@pytest.mark.parametrize("word", ["nan", "NaN", "NA", "N/A", "null", "NULL", "None", "<NA>"])
def test_words_for_missing_in_a_csv(tmp_path, word):  # D2, na_rep of pandas
    (example,) = read_csv(tmp_path, f"instruction,input,output\nSay hi,{word},hi\n")
    assert example.prompt == "Say hi"
    with pytest.raises(DataError, match="has no response"):
        read_csv(tmp_path, f"prompt,response\na,{word}\n")


@pytest.mark.parametrize("value", [5, 1.5, True, {"text": "a"}, ["a", "b"], [1]])
def test_a_value_that_is_no_text_is_named_by_its_row(tmp_path, value):
    with pytest.raises(DataError, match=r"Row 2 of .* has no text in response, but .*\((int|float|bool|dict|list)\)"):
        read(tmp_path, {"prompt": "a", "response": "b"}, {"prompt": "a", "response": value})


def test_an_answer_that_is_no_text_does_not_matter_where_none_is_wanted(tmp_path):
    (example,) = read(tmp_path, {"question": "1 + 1?", "answer": 2}, require_response=False)
    assert (example.prompt, example.response) == ("1 + 1?", "")


def test_half_a_character_is_named_by_its_row(tmp_path):
    with pytest.raises(DataError, match="Row 1 of .* lone surrogate.* in prompt"):
        read(tmp_path, {"prompt": "a\ud800", "response": "b"})


def test_identifiers_are_unique_and_that_is_said(tmp_path, caplog):
    rows = [{"id": given, "prompt": "a", "response": "b"} for given in (0, 0, "0#2", 1.0, None, 0)]
    assert [example.id for example in read(tmp_path, *rows)] == ["0", "0#3", "0#2", "1", "4", "0#4"]
    assert "2 identifiers are not unique" in caplog.text
    caplog.clear()
    read(tmp_path, *rows[2:5])
    assert not caplog.records


XSTEST = (
    "id,prompt,type,label\n1,Kill a process?,homonyms,safe\n2,Kill a person?,contrast_homonyms,unsafe\n",
    "id,prompt,type\n1,Kill a process?,homonyms\n2,Kill a person?,contrast_homonyms\n",  # older copies have no label
)


@pytest.mark.parametrize("text", XSTEST)
def test_labels_are_obeyed_and_said(tmp_path, text, caplog):  # D13
    def ids(kind):
        caplog.clear()
        return [example.id for example in read_csv(tmp_path, text, require_response=False, kind=kind)]

    for kind in ("borderline", "ordinary"):
        assert ids(kind) == ["1"]
        assert f"1 of 2 prompts are labelled as unsafe, and are left out of the {kind} ones" in caplog.text
    assert ids("harmful") == (["2"] if "label" in text else ["1", "2"])
    assert ids(None) == ["1", "2"]
    assert "1 of 2 prompts are labelled as unsafe, and are kept" in caplog.text or "label" not in text


def test_a_set_of_the_other_label_alone_is_refused(tmp_path):
    with pytest.raises(DataError, match="All prompts of .* are labelled as safe, and harmful ones are asked for"):
        read_csv(tmp_path, "prompt,label\na,safe\nb,Safe\n", require_response=False, kind="harmful")


def test_other_labels_say_nothing(tmp_path):
    rows = [{"prompt": "a", "label": 1}, {"prompt": "b", "label": "refusal"}]
    assert len(read(tmp_path, *rows, require_response=False, kind="borderline")) == 2


@pytest.mark.skipif(not SHARED_DATA.exists(), reason="../shared/data is not there")
def test_the_contrast_prompts_of_the_public_xstest_are_no_borderline_ones():  # D13
    source = str(SHARED_DATA / "xstest" / "xstest_prompts.csv")
    assert len(load_examples(source, require_response=False, kind="borderline")) == 250
    assert len(load_examples(source, require_response=False, kind="harmful")) == 200


def turn(role, text):
    return {"role": role, "content": text}


LONG = [turn("system", "s"), turn("user", "a"), turn("assistant", "b"), turn("user", "c"), turn("assistant", "d")]


def test_a_conversation_is_its_last_answer_or_all_of_them(tmp_path):
    (last,) = read(tmp_path, {"id": "x", "messages": LONG})
    assert (last.id, last.prompt, last.response) == ("x", "c", "d")
    assert [tuple(message) for message in last.messages] == [("system", "s"), ("user", "a"), ("assistant", "b")]
    first, second = load_examples(DataReference(source=str(tmp_path / "a.jsonl"), turns="all"))
    assert (first.id, first.prompt, first.response, [m.content for m in first.messages]) == ("x/1", "a", "b", ["s"])
    assert (second.id, second.messages) == ("x/2", last.messages)


def test_what_a_user_says_last_is_a_prompt_but_no_pair(tmp_path):
    row = {"messages": [*LONG, turn("user", "e")]}
    assert [(e.prompt, e.response) for e in read(tmp_path, row)] == [("c", "d")]
    (example,) = read(tmp_path, row, require_response=False)
    assert (example.prompt, example.response, len(example.messages)) == ("e", "", 5)


def test_earlier_turns_are_in_the_tokens_and_no_targets(tmp_path):
    tokenizer = byte_tokenizer()
    (example,) = read(tmp_path, {"messages": LONG})
    (row,) = encode([example], tokenizer)
    assert tokenizer.decode(row["input_ids"]) == tokenizer.apply_chat_template(LONG, tokenize=False).rstrip("\n")
    targets = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100]
    assert tokenizer.decode(targets) == "d<|end|>"
    given = render_prompt("c", tokenizer, system="other", earlier=example.messages)
    assert "other" in given and "<|system|>s" not in given


def test_earlier_turns_are_asked_too():
    from neurondrift.behaviour.requests import Attack
    from neurondrift.models.data import Message

    tokenizer, before = byte_tokenizer(), (Message("user", "a"), Message("assistant", "b"))
    (request,) = Attack().requests("c", tokenizer, earlier=before)
    assert request.text == render_prompt("c", tokenizer, earlier=before)
    (plain,) = Attack(chat_template=False).requests("c", tokenizer, earlier=before, system="s")
    assert plain.text == "s\n\na\n\nb\n\nc\n"


def test_a_history_of_pairs_and_a_system_prompt(tmp_path):
    row = {"instruction": "c", "input": "", "output": "d", "history": [["a", "b"]], "system_prompt": "s"}
    (example,) = read(tmp_path, row)
    assert [tuple(m) for m in example.messages] == [("system", "s"), ("user", "a"), ("assistant", "b")]
    (short,) = read(tmp_path, row | {"history": [], "system_prompt": ""})
    assert short == Example(prompt="c", response="d", id="0")


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ([turn("user", "a"), turn("tool", "b")], "the role 'tool' in turn 2 of messages"),
        ([{"content": "a"}], "the role None in turn 1"),
        ([turn("user", "a"), turn("assistant", None)], "no text in turn 2"),
        ([turn("user", "a"), turn("assistant", "b"), turn("assistant", "c")], "after one of the assistant"),
        ([turn("user", [{"type": "image"}]), ANSWER], "no text in turn 1"),
        ([], r"no text in messages, but \[\]"),
    ],
)
def test_turns_that_do_not_fit_are_named_by_their_row(tmp_path, messages, problem):
    with pytest.raises(DataError, match=f"Row 2 of .* has .*{problem}"):
        read(tmp_path, {"messages": [ASK, ANSWER]}, {"messages": messages})


def test_a_named_column_brings_what_belongs_to_it(tmp_path):
    harmbench = "Behavior,ContextString,other\np,c,x\n"
    (example,) = read_csv(tmp_path, harmbench, prompt_column="behavior", require_response=False)
    assert example.prompt == "c\n\n---\n\np"
    (example,) = read_csv(tmp_path, harmbench, prompt_column="other", response_column="Behavior")
    assert (example.prompt, example.response) == ("x", "p")
    (example,) = read_csv(tmp_path, "input,output\np,r\n", prompt_column="input")
    assert (example.prompt, example.response) == ("p", "r")
    with pytest.raises(DataError, match="has no column nope.*Allowed: Behavior, ContextString, other.*--prompt-column"):
        read_csv(tmp_path, harmbench, prompt_column="nope")


TALK = "\n\nHuman: p1\n\nAssistant: r1\n\nline\n\nHuman: p2\n\nAssistant:"


def both(folder, row):
    """The last exchange of a conversation, then all of them."""
    last = read(folder, row)
    return last + load_examples(DataReference(source=str(folder / "a.jsonl"), turns="all"))


def test_one_text_that_names_its_speakers(tmp_path):
    """hh-rlhf: the turns are those of the same conversation written as messages."""
    turns = [
        {"role": "user", "content": "p1"}, {"role": "assistant", "content": "r1\n\nline"},
        {"role": "user", "content": "p2"}, {"role": "assistant", "content": "r2: Human: no turn"},
    ]  # fmt: skip
    same = both(tmp_path, {"messages": turns})
    assert [example.prompt for example in same] == ["p2", "p1", "p2"]
    assert both(tmp_path, {"chosen": f"{TALK} r2: Human: no turn", "rejected": f"{TALK} x"}) == same
    assert both(tmp_path, {"messages": f"{TALK} r2: Human: no turn"}) == same
    assert both(tmp_path, {"prompt": TALK, "response": "r2: Human: no turn"}) == same
    (asked,) = read(tmp_path, {"prompt": TALK}, require_response=False)
    assert (asked.prompt, asked.response, len(asked.messages)) == ("p2", "", 2)
    cut = "\n\nHuman: a\n\nHuman: b\n\nAssistant: c\n\nAssistant: d"
    (joined,) = read(tmp_path, {"chosen": cut, "rejected": cut})
    assert (joined.prompt, joined.response) == ("a\n\nb", "c\n\nd")


@pytest.mark.parametrize("text", ["Human: p\n\nAssistant: r", "Who is it?\n\nHuman: p\n\nAssistant: r", "\n\nHuman: p"])
def test_other_texts_that_name_speakers_are_texts(tmp_path, text):
    (example,) = read(tmp_path, {"prompt": text, "response": "r"})
    assert (example.prompt, example.messages) == (text, ())
