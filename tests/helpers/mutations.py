"""Inputs that nobody means, as strategies of hypothesis: bytes changed, values of the wrong kind, parts gone.

A kind is a strategy, which draws what is written and done, and a function, which does it in a folder.
"""

import bz2
import contextlib
import gzip
import json
import lzma
import shutil
import traceback
from functools import cache
from importlib import resources
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from neurondrift.base.errors import UserError

NASTY = st.sampled_from([
    None, True, False, 0, -1, 1, 2**31, 2**63, -(2**70), 10**400, 0.5, -0.0, 1e-320, 1e308, float("nan"), float("inf"),
    "", " ", "\0", "\x1b[31m", "‮", "😀", "é" * 300, "../../x", "/etc/passwd", "=1+1", "step=1", "a\nb", "\ud800",
])  # fmt: skip
LEAVES = (
    NASTY | st.text(max_size=8) | st.integers() | st.floats() | st.sampled_from(["hello", "Sure", "user", "random"])
)
KEYS = st.sampled_from(["", "source", "role", "content", "prompt", "id", "a"]) | st.text(max_size=3)
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3), max_leaves=6
)
RAW_TOML = st.sampled_from([
    "nan", "inf", "-inf", "1e999", '"\\u0000"', "[[]]", "9" * 30, "9" * 5000, "1979-05-27", "07:32:00", "'''", '"""',
    "[" * 2000, "0x", "0o7", "1__0", "{ source = 1 }", '{ source = "", limit = 0 }', "{ a.b = 1, a.b = 2 }", '"\\x"',
])  # fmt: skip
PLAUSIBLE = st.sampled_from([
    "auto", "cpu", "cuda:99", "tiny:llama", "hf:", "builtin:refusals", "builtin:none", "snip", "lora", "none", "all",
    "q_proj", "safety_top", "matched:safety_top", "matched:", "x.parquet", "~", "~nobody/x", "0,1", 1, 2, 0.1, 1e-9,
    {"source": "builtin:refusals"}, {"source": "builtin:refusals", "limit": 2}, ["q_proj"], [0, 1], [0.5, 1.0],
])  # fmt: skip


# --- bytes, JSON and tables that are changed ---


@st.composite
def edits(draw):
    """Changes of bytes, each a place (as a share of the length), a kind, a byte and a length."""
    one = st.tuples(
        st.floats(0, 1, exclude_max=True), st.integers(0, 4), st.integers(0, 255), st.sampled_from([1, 4, 64])
    )
    return draw(st.lists(one, min_size=1, max_size=5))


def edited(content, changes):
    """The bytes with some of them flipped, set, cut out, doubled or cut off."""
    content = bytearray(content)
    for share, kind, byte, length in changes:
        if not content:
            break
        at = int(share * len(content))
        if kind == 0:
            content[at] ^= 1 << byte % 8
        elif kind == 1:
            content[at] = byte
        elif kind == 2:
            del content[at : at + length]
        elif kind == 3:
            content[at:at] = content[at : at + length]
        else:
            del content[at:]
    return bytes(content)


@st.composite
def spoiled(draw, content):
    """A JSON value with one part of it replaced or gone."""
    if content and isinstance(content, dict | list) and draw(st.integers(0, 4)):
        keys = list(content) if isinstance(content, dict) else list(range(len(content)))
        key = draw(st.sampled_from(keys))
        items = content.items() if isinstance(content, dict) else enumerate(content)
        if draw(st.integers(0, 4)) == 0:
            parts = {name: entry for name, entry in items if name != key}
        else:
            changed = draw(spoiled(content[key]))
            parts = {name: changed if name == key else entry for name, entry in items}
        return parts if isinstance(content, dict) else list(parts.values())
    return draw(VALUES)


def as_json(content):
    return json.dumps(content, ensure_ascii=True).encode()


def changed_table(draw, found):
    """A table with a column gone, of another kind, of other values or of another name; or its metadata spoiled."""
    names = found.column_names
    name, kind = draw(st.sampled_from(names)), draw(st.integers(0, 6))
    at = names.index(name)
    if kind == 0:
        return found.drop_columns([name])
    if kind == 1:
        return found.set_column(at, name, pa.nulls(found.num_rows))
    if kind == 2:
        words = draw(st.lists(st.text(st.characters(codec="utf-8"), max_size=3), min_size=1, max_size=3))
        return found.set_column(at, name, pa.array([words[row % len(words)] for row in range(found.num_rows)]))
    if kind == 3:
        some = draw(st.lists(st.sampled_from([-1, 0, 5, 2**31 - 1, -(2**31)]), min_size=1, max_size=4))
        return found.set_column(at, name, pa.array(np.resize(some, found.num_rows), pa.int32()))
    if kind == 4:
        other = draw(st.sampled_from(["site", "row", "x", "", "step"]))
        return found.rename_columns([other if entry == name else entry for entry in names])
    if kind == 5:
        return found.slice(draw(st.integers(0, found.num_rows)), draw(st.integers(0, found.num_rows)))
    metadata = dict(found.schema.metadata or {})
    for key in [key for key in metadata if key.startswith(b"neurondrift")]:
        try:
            metadata[key] = as_json(draw(spoiled(json.loads(metadata[key]))))
        except ValueError:
            metadata[key] = b"{"
    return found.replace_schema_metadata(metadata)


def parquet(draw, file):
    """The bytes of a Parquet file spoiled as bytes or as a table."""
    if draw(st.booleans()):
        return edited(file.read_bytes(), draw(edits()))
    return table_bytes(changed_table(draw, pq.read_table(file, partitioning=None)))


def table_bytes(table):
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return sink.getvalue().to_pybytes()


# --- configurations ---


def toml_value(value):
    """A value in TOML; what TOML does not know (null) is a word that it does not know either."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{toml_value(str(key))} = {toml_value(entry)}" for key, entry in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml_value, value)) + "]"
    if isinstance(value, str):
        return (
            json.dumps(value, ensure_ascii=True)
            if value.isascii()
            else '"' + value.replace("\\", "").replace('"', "") + '"'
        )
    return "null" if value is None else repr(value)


@cache
def presets():
    folder = resources.files("neurondrift.study") / "presets"
    return sorted(entry.read_text("utf-8") for entry in folder.iterdir() if entry.name.endswith(".toml"))


@cache
def fields():
    """Every table of the configuration with the names of its settings; "" holds those above the tables."""
    from neurondrift.study.settings import Study

    found = {"": list(Study.model_fields)}
    for name, field in Study.model_fields.items():
        if hasattr(field.annotation, "model_fields"):
            found[name] = list(field.annotation.model_fields)
    return found


@st.composite
def configurations(draw):
    """The bytes of a configuration: a preset with lines changed, settings of any value, or bytes changed."""
    text = draw(st.sampled_from(presets()))
    kind = draw(st.integers(0, 4))
    if kind == 0:
        return edited(text.encode(), draw(edits()))
    written = st.builds(toml_value, PLAUSIBLE | VALUES) | RAW_TOML
    lines = text.splitlines()
    if kind in (1, 2):
        for _ in range(draw(st.integers(1, 4))):
            at = draw(st.integers(0, len(lines) - 1))
            name, equals, _ = lines[at].partition("=")
            change = draw(st.integers(0, 3))
            if change < 2 and equals:
                lines[at] = f"{name}= {draw(written)}"
            elif change == 2:
                lines[at:at] = [draw(st.sampled_from(lines))]
            elif len(lines) > 1:
                del lines[at]
        return "\n".join(lines).encode("utf-8", "surrogatepass")
    tables = draw(st.lists(st.sampled_from(sorted(fields())), min_size=1, max_size=3, unique=True))
    rows = [] if draw(st.booleans()) else ['name = "x"', '[model]\nreference = "tiny:llama"']
    for table in sorted(tables):  # what stands above the tables comes first
        names = draw(st.lists(st.sampled_from(fields()[table]), min_size=1, max_size=4, unique=True))
        entries = [f"{name} = {draw(written)}" for name in names]
        rows = [*entries, *rows] if table == "" else [*rows, f"[{table}]", *entries]
    return "\n".join(rows).encode("utf-8", "surrogatepass")


def use_configuration(content, folder):
    """Resolve a configuration, write it, and make a study's keys of it; then let it stand in a folder of a run."""
    from neurondrift.study.runner import STAGES, StudyRun
    from neurondrift.study.settings import resolve

    file = folder / "c.toml"
    file.write_bytes(content)
    standing = folder / "standing"
    standing.mkdir(exist_ok=True)
    (standing / "study.toml").write_bytes(content)
    with contextlib.suppress(UserError):
        StudyRun(resolve(preset="smoke"), standing)
    study = resolve(file=file)
    study.to_toml()
    run = StudyRun(study, folder / "none")
    for name in STAGES:
        run.steps(name)


# --- groups ---


@st.composite
def group_files(draw, study):
    """The name and the bytes of a group file: one of the study's spoiled, or one made of any numbers."""
    files = sorted(file for file in (study / "neuron_groups").glob("*.parquet") if "importance" not in file.name)
    kind = draw(st.integers(0, 3))
    if kind == 0:
        plain = json.loads((study / "neuron_groups" / "random.neurons.json").read_text())
        content = as_json(draw(spoiled(plain) | VALUES))
        return "g.json", edited(content, draw(edits())) if draw(st.booleans()) else content
    if kind < 3:
        return "g.parquet", parquet(draw, draw(st.sampled_from(files)))
    count = draw(st.integers(0, 5))
    rows, columns = (draw(st.lists(st.integers(-2, 40) | st.none(), min_size=count, max_size=count)) for _ in range(2))
    sites = draw(st.lists(st.sampled_from(["a", "b", "model.layers.0.mlp.up_proj"]), min_size=count, max_size=count))
    header = {"format": 1, "granularity": draw(st.sampled_from(["neuron", "weight", "unit", "x"])),
              "shapes": {site: [draw(st.integers(-1, 40)), draw(st.integers(-1, 40))] for site in set(sites)},
              "provenance": {"rule": "x"}}  # fmt: skip
    header = draw(st.just(header) | spoiled(header))
    site = pa.array(sites, pa.string())
    table = pa.table({
        "site": site.dictionary_encode() if draw(st.booleans()) else site,
        "row": pa.array(rows, draw(st.sampled_from([pa.int32(), pa.int64(), pa.float64()]))),
        "col": pa.array(columns, pa.int32()),
    }).replace_schema_metadata({"neurondrift.group": json.dumps(header)})  # fmt: skip
    return "g.parquet", table_bytes(table)


def use_group(drawn, folder, study):
    """Read a group and put it to use."""
    from neurondrift.groups.group import load_group

    name, content = drawn
    whole = load_group(study / "neuron_groups" / "random.neurons.parquet")
    path = folder / name
    path.write_bytes(content)
    group = load_group(path)
    assert len(group) >= 0
    for save in ("out.parquet", "out.json"):
        with contextlib.suppress(UserError):
            group.save(folder / save)
    group.check_members(whole.shapes)
    group.check_model("x", whole.shapes)
    for site in group.shapes:
        group.rows(site), group.mask(site)
    _ = group | whole, group & whole, group.role


# --- drift logs ---


@st.composite
def drift_logs(draw, study):
    """A file of the study's drift log with its new bytes (None: gone), and a folder that is added."""
    good = study / "drift"
    name = draw(st.sampled_from(sorted(str(file.relative_to(good)) for file in good.rglob("*") if file.is_file())))
    file = good / name
    kind = draw(st.integers(0, 5))
    if kind == 0:
        content = None
    elif file.suffix == ".json":
        whole = file.read_bytes()
        content = as_json(draw(spoiled(json.loads(whole)))) if kind > 1 else edited(whole, draw(edits()))
    else:
        content = parquet(draw, file)
    odd = ["", "", "", "", "step=x", "step=99999999999999", "step=7", "step=٣", "step=-1", "step=000000.parquet"]
    return name, content, draw(st.sampled_from(odd))


def use_drift_log(drawn, folder, study):
    """Read a drift log in every way."""
    from neurondrift.drift.log import DriftLog
    from neurondrift.study.population import load_population

    name, content, odd = drawn
    bad = folder / "drift"
    shutil.rmtree(bad, ignore_errors=True)
    shutil.copytree(study / "drift", bad)
    if content is None:
        (bad / name).unlink()
    else:
        (bad / name).write_bytes(content)
    if odd:
        (bad / odd).mkdir()
    log, group = DriftLog(bad), study / "neuron_groups" / "random.neurons.parquet"
    for read in (
        log.steps, log.metadata, log.initial, log.read, log.weights, lambda: log.read(groups=[group]),
        lambda: log.read(columns=["l2"]), lambda: load_population({0: log}),
    ):  # fmt: skip
        with contextlib.suppress(UserError):
            read()


# --- data ---

COLUMNS = ["prompt", "response", "instruction", "input", "output", "goal", "target", "id", "category", "messages",
           "conversations", "chosen", "label", "turns", "contextstring", "behavior", "safer_response_id", "", "x",
           "PROMPT", " prompt "]  # fmt: skip
TURN = st.fixed_dictionaries(
    {},
    optional={"role": LEAVES, "content": VALUES, "from": st.sampled_from(["human", "gpt"]) | LEAVES, "value": VALUES},
)
COMPRESSIONS = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


@st.composite
def rows_of_data(draw):
    columns = draw(st.lists(st.sampled_from(COLUMNS), min_size=1, max_size=4, unique=True))
    cell = st.sampled_from(["hello", "Sure"]) | VALUES | st.lists(TURN, max_size=3)
    return columns, draw(st.lists(st.fixed_dictionaries({name: cell for name in columns}), max_size=4))


def text_of(value):
    return str(value).encode("utf-8", "replace").decode()


@st.composite
def data_files(draw):
    """The name and the bytes of a data file of any format, seldom what it should be; and how it is read."""
    suffix = draw(st.sampled_from([".csv", ".json", ".jsonl", ".ndjson", ".txt", ".parquet", ".tsv", ".doc", "folder"]))
    columns, rows = draw(rows_of_data())
    how = {
        "require_response": draw(st.booleans()),
        "limit": draw(st.sampled_from([None, None, 1, 10**9])),
        "prompt_column": draw(st.sampled_from([None, None, None, "prompt", "x", ""])),
        "kind": draw(st.sampled_from([None, None, "harmful", "borderline"])),
    }
    if suffix in (".parquet", "folder"):
        texts = draw(st.booleans())
        table = pa.table({"prompt": pa.array(["hello", None]), "response": pa.array(["Sure", "x"])})
        with contextlib.suppress(pa.ArrowException, OverflowError, UnicodeError, ValueError, TypeError):
            typed = pa.table(
                {name: pa.array([text_of(row[name]) if texts else row[name] for row in rows]) for name in columns}
            )
            table_bytes(typed)  # not every kind can be written
            table = typed
        if suffix == "folder":
            part = draw(st.sampled_from(["data-00000-of-00001.arrow", "state.json", "dataset_info.json"]))
            return "folder", (table, part, draw(edits())), how
        content = table_bytes(table)
    elif suffix == ".json":
        whole = st.just(rows) | st.builds(lambda key: {key: rows}, st.sampled_from(["data", "rows", "x"])) | VALUES
        content = as_json(draw(whole))
    elif suffix in (".jsonl", ".ndjson"):
        content = b"\n".join(as_json(draw(st.just(row) | VALUES)) for row in rows)
    else:
        quote, mark = draw(st.sampled_from(["", '"', "'"])), draw(st.sampled_from([",", ";", "\t", "|"]))
        lines = [
            mark.join(columns),
            *(mark.join(quote + text_of(cell) + quote for cell in row.values()) for row in rows),
        ]
        lines += draw(st.lists(st.text(st.characters(codec="utf-8"), max_size=9), max_size=1))
        encoding = draw(st.sampled_from(["utf-8", "utf-16", "utf-8-sig", "utf-32", "utf-16-le"]))
        content = draw(st.sampled_from(["\n", "\r\n", "\r"])).join(lines).encode(encoding)
    packed = draw(st.sampled_from(["", "", "", *COMPRESSIONS]))
    content = COMPRESSIONS[packed](content)
    if draw(st.integers(0, 3)) == 0:
        content = edited(content, draw(edits()))
    return f"data{suffix}{packed}", content, how


def use_data(drawn, folder):
    """Read a data file."""
    from neurondrift.models.data import load_examples

    name, content, how = drawn
    path = folder / name
    if name == "folder":
        import datasets

        table, part, changes = content
        shutil.rmtree(path, ignore_errors=True)
        datasets.disable_progress_bars()
        try:
            datasets.Dataset(table).save_to_disk(str(path))
        except Exception:  # not every table is a data set
            return
        part = path / part if (path / part).exists() else path / "state.json"  # one without rows has no Arrow file
        part.write_bytes(edited(part.read_bytes(), changes))
    else:
        path.write_bytes(content)
    examples = load_examples(str(path), **how)
    assert all(isinstance(example.prompt, str) and example.prompt.strip() for example in examples)
    assert all(isinstance(example.response, str) for example in examples)
    assert len({example.id for example in examples}) == len(examples)


# --- tries ---


KINDS = {
    "configuration files": lambda study: (configurations(), use_configuration),
    "group files": lambda study: (group_files(study), lambda drawn, folder: use_group(drawn, folder, study)),
    "drift logs": lambda study: (drift_logs(study), lambda drawn, folder: use_drift_log(drawn, folder, study)),
    "data files": lambda study: (data_files(), use_data),
}
HOW = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}


def expect_no_fault(kind, folder, study, count):
    """That many inputs of a kind, always the same: hypothesis shows the smallest that ends in anything but a message."""
    strategy, use = KINDS[kind](study)

    @settings(max_examples=count, derandomize=True, **HOW)
    @given(strategy)
    def holds(drawn):
        try:
            use(drawn, Path(folder))
        except UserError as error:
            str(error).encode("utf-8", "replace")

    holds()


def tries(kind, folder, count, number, study):
    """How many inputs of a kind there were, and the faults among them: the same for the same number."""
    strategy, use = KINDS[kind](study)
    tried, found = [], []

    @seed(number)
    @settings(max_examples=count, phases=[Phase.generate], **HOW)
    @given(strategy)
    def one(drawn):
        tried.append(1)
        try:
            use(drawn, Path(folder))
        except UserError as error:
            str(error).encode("utf-8", "replace")
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            found.append(
                f"{type(error).__name__}: {str(error)[:200]} ({where.filename}:{where.lineno}) of {drawn!r:.300}"
            )

    one()
    return len(tried), found
