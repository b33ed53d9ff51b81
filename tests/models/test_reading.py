"""Files of examples as they are in the wild: delimiters, encodings, compression, JSON of every shape, folders."""

import bz2
import gzip
import json
import lzma

import pytest

from neurondrift.base.errors import DataError
from neurondrift.models.data import DataReference, load_examples

PAIR = [("hello, you", "hi")]


def pairs(path, **more):
    return [(example.prompt, example.response) for example in load_examples(str(path), **more)]


def written(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", 'prompt,response\n"hello, you",hi\n'),
        ("a.csv", "prompt;response\nhello, you;hi\n"),
        ("a.csv", "prompt\tresponse\nhello, you\thi\n"),
        ("a.csv", "prompt|response\nhello, you|hi\n"),
        ("a.csv", "sep=;\r\nprompt;response\r\nhello, you;hi\r\n"),
        ("a.csv", 'Prompt, Response\r\n"hello, you",hi\r\n\r\n'),
        ("a.csv", ',prompt,response\n0,"hello, you",hi\n'),  # as pandas writes its index
        ("a.csv", 'prompt,response\n"hello, you",hi,,\n,,\n'),  # as Excel leaves empty cells
        ("a.csv", 'response,id,prompt\nhi,1,"hello, you"\n'),
        ("a.tsv", "prompt\tresponse\nhello, you\thi\n"),
        ("a.tab", "prompt\tresponse\nhello, you\thi\n"),
        ("A.CSV", 'prompt,response\n"hello, you",hi\n'),
        ("a.json", '[{"prompt": "hello, you", "response": "hi"}]'),
        ("a.json", '{"prompt": "hello, you", "response": "hi"}\n'),  # D11: one line
        ("a.json", '{"version": 2, "data": [{"prompt": "hello, you", "response": "hi"}]}'),
        ("a.json", '{\n "data": [\n{"prompt": "hello, you", "response": "hi"}\n]\n}'),
        ("a.jsonl", '[\n{"prompt": "hello, you", "response": "hi"}\n]'),
        ("a.jsonl", '\n{"prompt": "hello, you", "response": "hi"}\r\n\r\n'),
        ("a.ndjson", '{"prompt": "hello, you", "response": "hi"}'),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le"])
def test_one_pair_in_every_form(tmp_path, name, content, encoding):
    assert pairs(written(tmp_path, name, content.encode(encoding))) == PAIR


@pytest.mark.parametrize(
    ("suffix", "compress"),
    [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress), ("", gzip.compress)],
)
def test_compressed_files_are_known_by_their_first_bytes(tmp_path, suffix, compress):
    whole = compress(b'prompt,response\n"hello, you",hi\n' * 20)
    assert pairs(written(tmp_path, f"a.csv{suffix}", compress(b'prompt,response\n"hello, you",hi\n'))) == PAIR
    with pytest.raises(DataError, match=r"cannot be read \(as (gzip|bz2|xz): .*b\.csv"):
        load_examples(str(written(tmp_path, f"b.csv{suffix}", whole[: len(whole) // 2])))


def test_json_lines_under_the_suffix_json(tmp_path):  # D11
    path = written(tmp_path, "a.json", '{"prompt": "a", "response": "b"}\n{"prompt": "c", "response": "d"}\n')
    assert pairs(path) == [("a", "b"), ("c", "d")]


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c"])
def test_lines_end_at_line_feeds_alone(tmp_path, mark):  # D1
    text = f"one{mark}two"
    lines = json.dumps({"prompt": text, "response": "x"}, ensure_ascii=False) + "\n"
    assert pairs(written(tmp_path, "a.jsonl", lines)) == [(text, "x")]
    assert pairs(written(tmp_path, "a.csv", f"prompt,response\n{text},x\n")) == [(text, "x")]
    assert pairs(written(tmp_path, "a.txt", f"{text}\r\nthree\n"), require_response=False) == [
        (text, ""),
        ("three", ""),
    ]


@pytest.mark.parametrize("length", [131_073, 200_000])
def test_long_fields_are_read(tmp_path, length):  # D5
    import csv

    before = csv.field_size_limit()
    long = "x" * length
    for content in (f'prompt,response\n"{long}",y\n', f"prompt;response\n{long};y\n"):
        assert pairs(written(tmp_path, "a.csv", content)) == [(long, "y")]
    assert csv.field_size_limit() == before  # it is the whole process's


@pytest.mark.parametrize(
    ("content", "message"),
    [
        # D8: commas that are not quoted
        ("goal,target\nWrite a poem, then a song, please,Sure\n", "Line 2 of .* has 4 fields, and its header has 2"),
        ('goal,target\n"two\nlines",a\n\nx,y,z\n', "Line 5 of .* has 3 fields"),
        ("goal;target\na;b;c\n", "Line 2 of .* has 3 fields.*delimiter ';'"),
        ("prompt\nKill a process, please\n", "Line 2 of .* has 2 fields, and its header has 1"),
        ('prompt,response\na,b\n"c,d\ne,f\n', "begins on line 3: unexpected end of data"),
    ],
)
def test_a_row_that_does_not_fit_its_header_is_named_by_its_line(tmp_path, content, message):
    with pytest.raises(DataError, match=message):
        load_examples(str(written(tmp_path, "a.csv", content)), require_response=False)


def test_quotes_with_backslashes_and_tabs_without_quoting(tmp_path):
    spark = 'prompt,response\n"he said \\"no\\", and left",b\n'
    assert pairs(written(tmp_path, "a.csv", spark)) == [('he said "no", and left', "b")]
    assert pairs(written(tmp_path, "a.tsv", 'prompt\tresponse\n"no" he said\tb\n')) == [('"no" he said', "b")]


@pytest.mark.parametrize("name", ["text", "prompts", "Prompt", "goal"])
def test_a_column_by_itself_with_a_header(tmp_path, name):
    path = written(tmp_path, "a.csv", f'{name}\none\n"two, too"\n')
    assert pairs(path, require_response=False) == [("one", ""), ("two, too", "")]


def test_names_that_are_given_tell_the_delimiter(tmp_path):
    path = written(tmp_path, "a.csv", "frage;antwort\nja, oder;nein\n")
    assert pairs(path, prompt_column="frage", response_column="Antwort") == [("ja, oder", "nein")]
    with pytest.raises(DataError, match="Received: 'frage, antwort'.*--prompt-column NAME.*prompt = and response ="):
        load_examples(str(path))


def test_a_list_of_texts_is_a_list_of_prompts(tmp_path):
    assert pairs(written(tmp_path, "a.json", '["a", "b"]'), require_response=False) == [("a", ""), ("b", "")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"prompt": "a", "response": "b"}\n\n{"prompt": \n', r"line 3: Expecting value at character 12"),
        ("a.jsonl", "[1, 2]", "list of objects"),
        ("a.json", "[" * 100_000, "cannot be read.*recursion"),
        ("a.csv", "prompt,response\nä,b\n".encode("latin-1"), "is not UTF-8 at byte 16.*iconv"),
        ("a.csv", "version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "pointer of Git LFS.*git lfs pull"),
        ("a.parquet", b"PAR1 cut off", "cannot be read"),
        ("a.csv", "", "data set is empty"),
        ("a.json", "", "data set is empty"),
    ],
)
def test_what_cannot_be_read_says_why(tmp_path, name, content, message):
    with pytest.raises(DataError, match=message):
        load_examples(str(written(tmp_path, name, content)))


@pytest.mark.parametrize("prefix", ["", "hf:"])
def test_folders_that_datasets_has_written(tmp_path, prefix):
    import datasets

    one, two = (datasets.Dataset.from_dict({"prompt": [text], "response": ["r"]}) for text in ("p", "q"))
    one.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": one, "test": two}).save_to_disk(str(tmp_path / "both"))
    assert pairs(f"{prefix}{tmp_path / 'one'}") == pairs(f"{prefix}{tmp_path / 'both'}") == [("p", "r")]
    assert pairs(f"{prefix}{tmp_path / 'both'}", split="test") == [("q", "r")]
    with pytest.raises(DataError, match="no split test.*Allowed: train"):
        load_examples(f"{prefix}{tmp_path / 'one'}", split="test")
    with pytest.raises(DataError, match="no split dev.*Allowed: train, test"):
        load_examples(f"{prefix}{tmp_path / 'both'}", split="dev")


def test_a_row_of_a_folder_that_is_no_text_is_named(tmp_path):
    import datasets

    datasets.Dataset.from_dict({"prompt": ["first", "sécond"], "response": ["r", "r"]}).save_to_disk(
        str(tmp_path / "set")
    )
    (file,) = (tmp_path / "set").glob("*.arrow")
    file.write_bytes(file.read_bytes().replace("sécond".encode(), b"s\xfc\xfccond"))
    with pytest.raises(DataError, match="Row [12] of the data set.*cannot be read.*0xfc"):
        load_examples(str(tmp_path / "set"))


def test_subsets_and_splits_of_a_folder_in_the_hubs_layout(tmp_path):
    for part in ("easy", "hard"):
        (tmp_path / "set" / part).mkdir(parents=True)
        for split in ("train", "test"):
            written(tmp_path / "set" / part, f"{split}.jsonl", json.dumps({"prompt": f"{part} {split}"}))
    header = [f"- config_name: {part}\n  data_dir: {part}" for part in ("easy", "hard")]
    written(tmp_path / "set", "README.md", "---\nconfigs:\n" + "\n".join(header) + "\n---\n")
    reference = f"hf:{tmp_path / 'set'}"
    assert pairs(reference, subset="hard", split="test", require_response=False) == [("hard test", "")]
    with pytest.raises(DataError, match="cannot be loaded .*easy.*hard.*--split and --subset"):
        load_examples(reference)


def test_parts_of_a_file_that_has_none_are_refused(tmp_path):
    path = written(tmp_path, "a.csv", "prompt,response\na,b\n")
    with pytest.raises(DataError, match="has no splits and no subsets.*Received: 'test'"):
        load_examples(DataReference(source=str(path), split="test"))
    with pytest.raises(DataError, match="has no splits and no subsets.*Received: 'x'"):
        load_examples("builtin:refusals", subset="x")
