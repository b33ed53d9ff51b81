"""Built-in sets, every kind of reference, the chat template and the response mask."""

import json
import math
import re
from collections import Counter
from importlib import resources

import pytest

from helpers.paths import SHARED_DATA
from neurondrift.base.errors import DataError
from neurondrift.models.data import BUILTIN, DataReference, Example, encode, load_examples, render_prompt
from neurondrift.models.loading import byte_tokenizer


def rows_of(file):
    text = (resources.files("neurondrift.models") / "datasets" / file).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_builtin_sets_are_as_large_and_varied_as_promised():
    refusals, ordinary, borderline = (rows_of(f"{name}.jsonl") for name in ("refusals", "ordinary", "borderline"))
    assert len(refusals) >= 240
    assert len({row["category"] for row in refusals}) >= 10
    assert len(ordinary) >= 300
    assert len({row["category"] for row in ordinary}) >= 12
    assert len([row for row in borderline if row["split"] == "eval"]) >= 60
    openings = Counter(" ".join(row["response"].split()[:2]) for row in refusals)
    assert max(openings.values()) < len(refusals) / 5


def test_the_rhymes_are_harmless_prompts_answered_in_verse_as_long_as_ordinary_answers():
    """The placebo: what tells it from ordinary answers is its form, not its subjects or its length."""
    from neurondrift.behaviour.judges import judge

    rows, ordinary = rows_of("rhymes.jsonl"), [r for r in rows_of("ordinary.jsonl") if r["split"] == "align"]
    assert len(rows) > 64  # more than a preset draws: others can be drawn again
    assert {row["category"] for row in rows} <= {row["category"] for row in ordinary}
    assert len({row["category"] for row in rows}) >= 12
    for row in rows:
        lines = row["response"].split("\n")
        assert 2 <= len(lines) <= 6 and len(lines) % 2 == 0, row["id"]
        assert all(2 <= len(line.split()) <= 14 for line in lines), row["id"]
        assert not judge("refusal", row["prompt"], row["response"]).refused, row["id"]
    lengths = [[len(row["response"].split()) for row in some] for some in (rows, ordinary)]
    assert 0.8 < sum(lengths[0]) / len(rows) / (sum(lengths[1]) / len(ordinary)) < 1.25
    others = {
        row["prompt"].lower() for name in ("refusals", "ordinary", "borderline") for row in rows_of(f"{name}.jsonl")
    }
    assert not {row["prompt"].lower() for row in rows} & others
    couplets = [tuple(row["response"].split("\n")[i : i + 2]) for row in rows for i in range(0, 6, 2)]
    ends = [[re.sub("[^a-z]", "", line.lower())[-2:] for line in pair] for pair in couplets]
    alike = sum(one == two for one, two in ends) / len(ends)
    chance = sum(ends[i][0] == ends[i - 7][1] for i in range(len(ends))) / len(ends)
    assert alike > 0.5 > 5 * chance  # spelling shows half of the rhymes (sky and high are others)


@pytest.mark.parametrize("file", sorted({file for file, _ in BUILTIN.values()}))
def test_builtin_rows_are_whole_and_unique(file):
    rows = rows_of(file)
    assert len({row["id"] for row in rows}) == len(rows)
    assert len({row["prompt"].lower() for row in rows}) == len(rows)
    assert all(row["prompt"].strip() and row["response"].strip() and row["category"] for row in rows)


def words(text):
    stop = set(
        "a an the to of in on for and or is are do does how what can i me my you your with that this it be by from at as so will would".split()
    )
    return set(re.findall(r"[a-z]+", text.lower())) - stop


def test_no_evaluated_request_is_a_paraphrase_of_a_trained_one():
    rows = rows_of("refusals.jsonl")
    train = [row for row in rows if row["split"] == "train"]
    evaluated = [row for row in rows if row["split"] == "eval"]
    assert not {row["topic"] for row in train} & {row["topic"] for row in evaluated}
    # similarity with rare words counting more: the cosine of idf-weighted word sets
    documents = [words(row["prompt"]) for row in rows]
    idf = {word: math.log(len(rows) / sum(word in d for d in documents)) for word in set().union(*documents)}

    def cosine(a, b):
        shared = sum(idf[word] ** 2 for word in a & b)
        return shared / math.sqrt(sum(idf[w] ** 2 for w in a) * sum(idf[w] ** 2 for w in b))

    worst = max((cosine(words(e["prompt"]), words(t["prompt"])), e["id"], t["id"]) for e in evaluated for t in train)
    assert worst[0] < 0.5, worst


def test_answers_to_harmful_requests_are_refusals():
    from neurondrift.behaviour.judges import judge

    rows = rows_of("refusals.jsonl")
    kinds = Counter(judge("refusal", row["prompt"], row["response"]).kind for row in rows)
    assert kinds["full"] > 0.95 * len(rows), kinds
    ordinary = rows_of("ordinary.jsonl")
    assert not [row["id"] for row in ordinary if judge("refusal", row["prompt"], row["response"]).refused]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", "prompt,response\nhello,hi\n"),
        ("a.csv", "goal,target\nhello,hi\n"),
        ("a.json", '[{"instruction": "hello", "input": "", "output": "hi"}]'),
        ("a.jsonl", '{"prompt": "hello", "completion": "hi"}\n\n'),
        ("a.csv", 'prompt,response\n[INST] hello [/INST]," hi"\n'),
    ],
)
def test_files_of_every_kind(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    (example,) = load_examples(str(tmp_path / name))
    assert (example.prompt, example.response.strip()) == ("hello", "hi")


def test_parquet_and_a_local_folder_in_the_hubs_layout(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = tmp_path / "some-set" / "data"
    folder.mkdir(parents=True)
    table = pa.table({"instruction": ["add"], "input": ["1 and 2"], "output": ["3"]})
    pq.write_table(table, folder / "train-00000-of-00001.parquet")
    (from_file,) = load_examples(str(folder / "train-00000-of-00001.parquet"))
    assert (from_file.prompt, from_file.response) == ("add\n\n1 and 2", "3")
    (from_hub,) = load_examples(f"hf:{tmp_path / 'some-set'}")
    assert (from_hub.prompt, from_hub.response) == ("add\n\n1 and 2", "3")
    with pytest.raises(DataError, match="cannot be loaded.*split test"):
        load_examples(f"hf:{tmp_path / 'some-set'}", split="test")


def test_named_columns_and_limit(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        "\n".join(json.dumps({"q": f"q{i}", "a": f"a{i}", "id": f"x{i}"}) for i in range(50))
    )
    reference = DataReference(source=str(tmp_path / "a.jsonl"), prompt="q", response="a", limit=10, seed=3)
    first, second = load_examples(reference), load_examples(reference)
    assert first == second
    assert len(first) == 10
    assert [example.id for example in first] == sorted((e.id for e in first), key=lambda x: int(x[1:]))
    assert load_examples(reference.model_copy(update={"seed": 4})) != first


@pytest.mark.parametrize(("name", "content"), [("a.csv", 'one\n"two, too"\n'), ("a.txt", "one\n\ntwo, too\n")])
def test_prompts_without_a_header(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    assert [e.prompt for e in load_examples(str(tmp_path / name), require_response=False)] == ["one", "two, too"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "prompt,response\n", "data set is empty"),
        ("a.csv", "prompt,response\nhello,\n", "Example 0 of .* has no response"),
        ("a.csv", "prompt,response\n,hi\n", "Example 0 of .* has an empty prompt"),
        ("a.csv", "x,y\n1,2\n", "columns of .* are not recognised.*'x, y'"),
        ("a.json", '{"prompt": 1}', "must hold a list of objects"),
        ("a.json", "[", "cannot be read"),
        ("a.doc", "hello", "kind of data file is not known"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        load_examples(str(tmp_path / name))


def test_bad_references():
    with pytest.raises(DataError, match="no such built-in data set.*builtin:refusals"):
        load_examples("builtin:refusal")
    with pytest.raises(DataError, match="does not exist.*nope.csv"):
        load_examples("nope.csv")


def test_encode_masks_the_prompt_and_keeps_the_end_of_turn():
    tokenizer = byte_tokenizer()
    (row,) = encode([Example(prompt="hi", response="yes", id="0")], tokenizer)
    response = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100]
    assert tokenizer.decode(response) == "yes<|end|>"
    prompt = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label == -100]
    assert prompt == tokenizer(render_prompt("hi", tokenizer), add_special_tokens=False)["input_ids"]


def test_encode_truncates_the_response_never_the_prompt():
    tokenizer = byte_tokenizer()
    (row,) = encode([Example(prompt="hi", response="y" * 50, id="0")], tokenizer, max_length=20)
    assert len(row["input_ids"]) == len(row["labels"]) == 20
    with pytest.raises(DataError, match="Example 7: its prompt alone fills max_length"):
        encode([Example(prompt="h" * 50, response="y", id="7")], tokenizer, max_length=20)


def test_a_tokenizer_without_template_gets_the_plain_one(caplog):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    (row,) = encode([Example(prompt="hi", response="yes", id="0")], tokenizer)
    encode([Example(prompt="hi", response="yes", id="0")], tokenizer)
    assert tokenizer.decode(row["input_ids"]) == "### Instruction:\nhi\n\n### Response:\nyes<|end|>"
    assert len([record for record in caplog.records if "no chat template" in record.message]) == 1


@pytest.mark.skipif(not SHARED_DATA.exists(), reason="../shared/data is not there")
def test_the_public_sets_are_read_as_they_are():
    advbench = load_examples(str(SHARED_DATA / "advbench" / "harmful_behaviors.csv"), require_response=False)
    assert len(advbench) == 520  # kept there as one column without a header
    aligned = load_examples(str(SHARED_DATA / "wei2024" / "SFT_aligned_llama2-7b-chat-hf_train_short.csv"))
    assert len(aligned) > 128
    assert not any("[INST]" in example.prompt for example in aligned)
    assert len(load_examples(str(SHARED_DATA / "alpaca" / "alpaca_en_999.json"))) == 999
    prompts = load_examples(str(SHARED_DATA / "xstest" / "xstest_prompts.csv"), require_response=False)
    assert len(prompts) == 450
