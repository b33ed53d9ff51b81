"""Files and folders of examples become rows: CSV, TSV, JSON, JSON Lines, Parquet, plain text, `datasets`.

Owns formats, encodings, compression, delimiters and headers. Knows nothing of what a column means.
"""

from __future__ import annotations

import contextlib
import csv
import io
import itertools
import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from neurondrift.base.errors import ArtifactError, DataError
from neurondrift.base.files import inside, read_json

DELIMITERS = (",", ";", "\t", "|")
SUFFIXES = ".csv, .tsv, .json, .jsonl, .parquet, .txt, each also as .gz; or a folder of `datasets`"
#: What a field of a CSV holds that stands for nothing: what pandas reads as missing, which is what pandas writes.
MISSING = frozenset(
    ["", "#N/A", "<NA>", "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null", "-nan", "-NaN", "<na>"]
)
#: Words that stand above a column of prompts that is alone in its file.
HEADERS_ALONE = frozenset(["text", "prompts", "requests", "request", "questions", "instructions", "goals", "behaviors"])
WRAPPERS = ("data", "examples", "rows", "instances", "train")  # {"data": [...]}
FIELD_LIMIT = 2**31 - 1  # characters; the csv module's own is 131,072
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bz2", b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
COMPRESSED_SUFFIXES = (".gz", ".bz2", ".xz", ".zst")
# the longer marks first: that of UTF-32 begins with that of UTF-16
BYTE_ORDER_MARKS = {
    b"\xff\xfe\x00\x00": "utf-32",
    b"\x00\x00\xfe\xff": "utf-32",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
    b"\xef\xbb\xbf": "utf-8-sig",
}


class Table(NamedTuple):
    """Rows, and the names of all their columns in the order in which they turn up; a row may lack some of them."""

    names: list[str]
    rows: Iterable[Mapping[str, Any]]


def table_of(rows: list[Mapping[str, Any]]) -> Table:
    """The table of rows, whose columns are all the keys that any of them has."""
    return Table(list(dict.fromkeys(name for row in rows for name in row)), rows)


def read_file(path: Path, *, known: Collection[str]) -> Table:
    """The rows of a file.

    Parameters
    ----------
    path
        Its suffix names the format, but for Parquet and compression, which are known by their first bytes.
    known
        Names of columns, in lower case, by which the header and the delimiter of a CSV are told.

    Raises
    ------
    DataError
        A format that is not known, a file that is cut off or not what its name says, a row that does not fit.
    """
    try:
        with open(path, "rb") as stream:
            head = stream.read(64)
        if head.startswith(b"version https://git-lfs"):
            raise DataError(
                "The data file is a pointer of Git LFS, not the file itself", received=str(path), fix="git lfs pull"
            )
        if head.startswith(b"PAR1") or path.suffix.lower() == ".parquet":
            import pyarrow.parquet as pq

            table = pq.read_table(path)
            return Table(table.column_names, table.to_pylist())
        suffix = _suffix(path)
        if suffix in (".csv", ".tsv", ".tab"):
            return _csv_table(_text(path), path, known=known, tabs=suffix != ".csv")
        if suffix == ".txt":
            return Table(["prompt"], [{"prompt": line} for line in _lines(_text(path)) if line.strip()])
        if suffix in (".json", ".jsonl", ".ndjson"):
            return table_of(_json_rows(_text(path), whole=suffix == ".json"))
    except (ValueError, KeyError, OSError, EOFError, RecursionError, csv.Error) as error:
        raise DataError(f"The data file cannot be read ({error})", received=str(path)) from error
    raise DataError("This kind of data file is not known", received=str(path), allowed=SUFFIXES)


def read_folder(folder: Path, split: str) -> Table | None:
    """The rows of a folder that `save_to_disk` of `datasets` has written; None where it is no such folder."""
    if not any((folder / name).is_file() for name in ("state.json", "dataset_dict.json")):
        return None
    import datasets

    _check_names(folder)
    try:
        loaded = datasets.load_from_disk(str(folder))
    except Exception as error:  # datasets raises many kinds for what is cut off; all are about the user's folder
        raise DataError(f"The data set cannot be loaded ({_said(error)})", received=str(folder)) from error
    if not isinstance(loaded, dict):  # one split, which may know its name
        loaded = {str(loaded.split or "train"): loaded, "train": loaded}
    if split not in loaded:
        raise DataError(f"{folder} has no split {split}", received=split, allowed=", ".join(loaded))
    return _of_datasets(loaded[split])


def read_hub(name: str, *, split: str, subset: str | None, revision: str | None) -> Table:
    """The rows of a set of the hub, or of a local folder in the hub's layout."""
    import datasets

    if Path(name).is_dir():
        _check_names(Path(name))
    try:
        loaded = datasets.load_dataset(name, subset, split=split, revision=revision)
    except Exception as error:  # datasets raises many kinds for "not there"; all are about the user's reference
        raise DataError(
            f"The data set cannot be loaded ({_said(error)})",
            received=f"hf:{name}, " + (f"subset {subset}, " if subset else "") + f"split {split}",
            fix="name the part that is meant: --split and --subset, or split = and subset = in the configuration",
        ) from error
    return _of_datasets(loaded)


def _check_names(folder: Path) -> None:
    """Raise `ArtifactError` where a folder of `datasets` names files that lie outside of it.

    Splits and Arrow files are named by what `save_to_disk` writes, data files and their folders by the head of a
    README.md in the hub's layout.
    """
    named: list[tuple[Path, Any]] = []
    for file in (folder / "dataset_dict.json", *folder.glob("state.json"), *folder.glob("*/state.json")):
        with contextlib.suppress(ArtifactError):  # damaged: datasets says so
            content = read_json(file)
            if isinstance(content, dict):
                named.append((file.parent, [content.get("splits"), content.get("_data_files")]))
    if (card := folder / "README.md").is_file():
        import yaml

        head = re.match(r"\s*---\s*\n(.*?)\n---", card.read_text("utf-8", errors="replace"), re.DOTALL)
        with contextlib.suppress(yaml.YAMLError):
            content = yaml.safe_load(head[1]) if head else None
            if isinstance(content, dict):
                named.append((folder, content.get("configs")))
    for place, content in named:
        for name in _strings(content):
            inside(place, name or ".")


def _strings(content: Any) -> Iterator[str]:
    """Every text within a JSON value, the keys of objects not among them."""
    if isinstance(content, str):
        yield content
    elif isinstance(content, dict | list):
        for entry in content.values() if isinstance(content, dict) else content:
            yield from _strings(entry)


def _of_datasets(loaded: Any) -> Table:
    """Columns of pictures and sounds are left out: to read them takes packages of their own."""
    unread = [name for name, kind in loaded.features.items() if type(kind).__name__ in ("Image", "Audio", "Video")]
    kept = loaded.remove_columns(unread)
    return Table(list(kept.column_names), _Rows(kept))


class _Rows:
    """The rows of a data set of `datasets`, which reads them when they are asked for: one that cannot be read, such as
    text that is no UTF-8, is an error with its number."""

    def __init__(self, loaded: Any) -> None:
        self.loaded = loaded

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        rows = iter(self.loaded)
        for number in itertools.count(1):
            try:
                row = next(rows)
            except StopIteration:
                return
            except (ValueError, OverflowError, OSError) as error:  # pyarrow's own are among these
                raise DataError(
                    f"Row {number} of the data set, or one near it, cannot be read ({_said(error)})",
                    fix="it is damaged: save or fetch it again",
                ) from error
            yield row


def _said(error: Exception) -> str:
    """The first three lines of a message on one, or the kind of an error that says nothing."""
    return " ".join(line.strip() for line in str(error).strip().splitlines()[:3]) or type(error).__name__


def _suffix(path: Path) -> str:
    """The suffix that names the format, that of the compression taken off."""
    name = path.name.lower()
    for suffix in COMPRESSED_SUFFIXES:
        name = name.removesuffix(suffix)
    return Path(name).suffix


def _text(path: Path) -> str:
    """The text of a file, decompressed and decoded as its first bytes say; UTF-8 without any mark."""
    content = path.read_bytes()
    kind = next((kind for mark, kind in COMPRESSED.items() if content.startswith(mark)), None)
    if kind is not None:
        content = _decompressed(content, kind)
    encoding = next((name for mark, name in BYTE_ORDER_MARKS.items() if content.startswith(mark)), None)
    if encoding is None:
        encoding = "utf-8"
        if b"\x00" in content[:64]:  # no text in UTF-8 holds it, and every second byte of English in UTF-16 is one
            encoding = "utf-16-le" if content[1:2] == b"\x00" else "utf-16-be"
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        raise DataError(
            f"The data file is not {encoding.removesuffix('-sig').upper()} at byte {error.start}",
            received=str(path),
            allowed="UTF-8, or UTF-16 with its byte order mark",
            fix="convert it, such as: iconv -f WINDOWS-1252 -t UTF-8",
        ) from error


def _decompressed(content: bytes, kind: str) -> bytes:
    import bz2
    import gzip
    import lzma
    import zlib

    try:
        if kind == "zstd":
            import pyarrow as pa

            with pa.input_stream(pa.py_buffer(content), compression="zstd") as stream:
                return bytes(stream.read())
        return {"gzip": gzip.decompress, "bz2": bz2.decompress, "xz": lzma.decompress}[kind](content)
    except (zlib.error, lzma.LZMAError, EOFError, ValueError, OSError) as error:
        raise ValueError(f"as {kind}: {error}") from error


def _lines(text: str) -> list[str]:
    """Lines end at line feeds and carriage returns alone: U+2028 and its like may stand within a text."""
    return re.split(r"\r\n|\n|\r", text)


# --- JSON ---


def _json_rows(text: str, *, whole: bool) -> list[Mapping[str, Any]]:
    """A list of objects, or an object a line; `whole`: a single object is a list's wrapper or else a row of text."""
    if text.lstrip().startswith("["):
        return _objects(json.loads(text))
    found: list[Any] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError as error:
            if found:
                raise ValueError(f"line {number}: {error.msg} at character {error.pos + 1}") from error
            return _objects(_unwrapped(json.loads(text)))  # one object over many lines
    return _objects(_unwrapped(found[0]) if whole and len(found) == 1 else found)


def _unwrapped(content: Any) -> Any:
    """The rows that one object holds: under one of the usual keys, or itself where it holds text."""
    if not isinstance(content, dict):
        return content
    lists = [content[name] for name in WRAPPERS if isinstance(content.get(name), list)]
    if len(lists) == 1:
        return lists[0]
    is_row = any(isinstance(value, str | list) for value in content.values())
    return [content] if is_row else content


def _objects(rows: Any) -> list[Mapping[str, Any]]:
    """Objects as they are; a list of texts is a list of prompts."""
    if isinstance(rows, list) and rows and all(isinstance(row, str) for row in rows):
        return [{"prompt": row} for row in rows]
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError("a JSON file must hold a list of objects, or an object a line")
    return rows


# --- CSV ---


class Record(NamedTuple):
    """The fields of a record, and the line of the file that it begins on."""

    line: int
    fields: list[str]


def _csv_table(text: str, path: Path, *, known: Collection[str], tabs: bool) -> Table:
    """Rows under their header; a file of one column without a header (as AdvBench is often kept) is all prompts."""
    skipped = 0
    given = re.match(r"sep=(.)\r?\n", text)  # Excel's own way to name the delimiter
    if given:
        text, skipped = text[given.end() :], 1
    delimiter = given[1] if given else "\t" if tabs else _delimiter(text, known)
    records = _records(text, delimiter, skipped)
    if not records:
        return Table([], [])
    header = [name.strip() for name in records[0].fields]
    named = [name for name in header if name.lower() in known]
    if not named and all(len(record.fields) == 1 for record in records):
        if header[0].lower() in HEADERS_ALONE:
            records = records[1:]
        return Table(["prompt"], [{"prompt": record.fields[0]} for record in records])
    names = _distinct(header)
    rows = []
    for record in records[1:]:
        if any(record.fields[len(names) :]):  # empty fields at the end are what Excel leaves
            raise DataError(
                f"Line {record.line} of {path} has {len(record.fields)} fields, and its header has {len(names)}",
                received=_shortened(delimiter.join(record.fields)),
                fix=f"put texts that hold the delimiter {delimiter!r} in double quotes",
            )
        rows.append({n: None if v in MISSING else v for n, v in zip(names, record.fields, strict=False)})
    return Table(names, rows)


def _delimiter(text: str, known: Collection[str]) -> str:
    """The delimiter under which the header names most known columns; else the one that gives even rows."""
    heads = {each: next(filter(None, Reader(text, each)), []) for each in DELIMITERS}
    scores = {each: sum(name.strip().lower() in known for name in head) for each, head in heads.items()}
    best = max(DELIMITERS, key=lambda each: scores[each])
    if scores[best]:
        return best
    counts = {each: _widths(text, each) for each in DELIMITERS}
    even = [each for each in DELIMITERS if len(counts[each]) == 1 and max(counts[each]) > 1]
    return even[0] if even and text.strip().count("\n") else ","


def _widths(text: str, delimiter: str) -> set[int]:
    """How many fields the first records have, blank lines left out."""
    found = zip(range(50), filter(None, Reader(text, delimiter)), strict=False)
    return {len(fields) for _, fields in found}


def _records(text: str, delimiter: str, skipped: int) -> list[Record]:
    """All records, quoted as RFC 4180 has it; else with backslashes; of tabs, else without any quotes."""
    ways: list[dict[str, Any]] = [{"strict": True}]
    if '\\"' in text:
        ways.append({"strict": True, "escapechar": "\\", "doublequote": False})
    if delimiter == "\t":
        ways.append({"quoting": csv.QUOTE_NONE})
    first: csv.Error | None = None
    for way in ways:
        begins = 1 + skipped
        try:
            reader, found = Reader(text, delimiter, **way), []
            for fields in reader:
                if any(field.strip() for field in fields):
                    found.append(Record(begins, fields))
                begins = 1 + skipped + reader.line_num
            return found
        except csv.Error as error:
            first = first or csv.Error(f"the record that begins on line {begins}: {error}")
    assert first is not None
    raise first


class Reader(Iterator[list[str]]):
    """`csv.reader` of a text, which takes fields of any length."""

    def __init__(self, text: str, delimiter: str, **way: Any) -> None:
        self._lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, **way)

    @property
    def line_num(self) -> int:
        return self._lines.line_num

    def __next__(self) -> list[str]:
        before = csv.field_size_limit(FIELD_LIMIT)  # the limit is the whole process's
        try:
            return next(self._lines)
        finally:
            csv.field_size_limit(before)


def _distinct(header: list[str]) -> list[str]:
    """Names as pandas tells columns of one name apart: `name`, `name.1`, `name.2`."""
    seen: dict[str, int] = {}
    names = []
    for name in header:
        number = seen.get(name, 0)
        seen[name] = number + 1
        names.append(f"{name}.{number}" if number else name)
    return names


def _shortened(text: str) -> str:
    return text if len(text) <= 80 else text[:77] + "..."
