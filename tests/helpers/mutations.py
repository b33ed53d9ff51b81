"""Inputs that nobody means, made by seeded random numbers: bytes changed, tokens changed, values of the wrong kind."""

import contextlib
import json
import random
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from neurondrift.base.errors import UserError

NASTY = [
    None, True, False, 0, -1, 1, 2**31, 2**63, -(2**70), 10**400, 0.5, -0.0, 1e-320, 1e308, float("nan"), float("inf"),
    "", " ", "\0", "\x1b[31m", "‮", "😀", "é" * 300, "../../x", "/etc/passwd", "=1+1", "step=1", "a\nb", "\ud800",
    [], [[]], {}, {"": {}}, [None], [1, "a"], {"source": []},
]  # fmt: skip
TOML = [
    "nan", "inf", "-inf", "-1", "0", "1e999", "true", '""', '"\\u0000"', '"\\u001b[2J"', "[]", "{}", "[[]]", "9" * 30,
    "9" * 5000, '["q_proj", 1]', "1979-05-27", "{ source = 1 }", '{ source = "" }', '"../../x"', "'''", "[" * 2000,
    "0x", '"tiny:llama"', '{ source = "builtin:refusals", limit = 0 }', "0.1", "3", '"hf:"', '"none"', "[0, 0]",
]  # fmt: skip


def changed_bytes(content, rng):
    """The same bytes with some of them flipped, cut out, doubled or cut off."""
    content = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 5])):
        if not content:
            break
        at = rng.randrange(len(content))
        kind = rng.randrange(5)
        if kind == 0:
            content[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            content[at] = rng.randrange(256)
        elif kind == 2:
            del content[at : at + rng.choice([1, 4, 64])]
        elif kind == 3:
            content[at:at] = content[at : at + rng.choice([1, 4, 64])]
        else:
            del content[at:]
    return bytes(content)


def toml(text, rng):
    """A configuration with lines and values changed; sometimes its bytes."""
    if rng.random() < 0.2:
        return changed_bytes(text.encode(), rng)
    lines = text.splitlines()
    for _ in range(rng.choice([1, 1, 2, 4])):
        at = rng.randrange(len(lines))
        name, equals, _ = lines[at].partition("=")
        kind = rng.randrange(4)
        if kind < 2 and equals:
            lines[at] = f"{name}= {rng.choice(TOML)}"
        elif kind == 2:
            lines[at:at] = [rng.choice(lines)]
        else:
            del lines[at : at + 1]
            lines = lines or [""]
    return "\n".join(lines).encode()


def value(rng, depth=2):
    """A value of any kind."""
    if depth and rng.random() < 0.3:
        some = [value(rng, depth - 1) for _ in range(rng.randrange(3))]
        return some if rng.random() < 0.5 else {str(rng.choice(NASTY)): entry for entry in some}
    return rng.choice(NASTY)


def spoiled(content, rng):
    """A JSON value with one part of it replaced or gone."""
    if isinstance(content, dict) and content and rng.random() < 0.8:
        key = rng.choice(list(content))
        if rng.random() < 0.2:
            return {name: entry for name, entry in content.items() if name != key}
        return {name: spoiled(entry, rng) if name == key else entry for name, entry in content.items()}
    if isinstance(content, list) and content and rng.random() < 0.8:
        at = rng.randrange(len(content))
        return [spoiled(entry, rng) if index == at else entry for index, entry in enumerate(content)]
    return value(rng)


def as_json(content):
    return json.dumps(content, ensure_ascii=True).encode()


def table(found, rng):
    """A table with a column gone, of another kind, or of other values; or its metadata spoiled."""
    names = found.column_names
    name, kind = rng.choice(names), rng.randrange(6)
    at = names.index(name)
    if kind == 0:
        return found.drop_columns([name])
    if kind == 1:
        return found.set_column(at, name, pa.nulls(found.num_rows))
    if kind == 2:
        return found.set_column(at, name, pa.array([str(rng.random()) for _ in range(found.num_rows)]))
    if kind == 3:
        numbers = np.array([rng.choice([-1, 0, 5, 2**31 - 1, -(2**31)]) for _ in range(found.num_rows)])
        return found.set_column(at, name, pa.array(numbers, pa.int32()))
    if kind == 4:
        return found.rename_columns([rng.choice(["site", "x", "", "step"]) if n == name else n for n in names])
    metadata = dict(found.schema.metadata or {})
    for key in [key for key in metadata if key.startswith(b"neurondrift")]:
        try:
            metadata[key] = as_json(spoiled(json.loads(metadata[key]), rng))
        except ValueError:
            metadata[key] = b"{"
    return found.replace_schema_metadata(metadata)


def parquet(file, target, rng):
    """A Parquet file spoiled as bytes or as a table."""
    if rng.random() < 0.5:
        target.write_bytes(changed_bytes(file.read_bytes(), rng))
    else:
        pq.write_table(table(pq.read_table(file, partitioning=None), rng), target)


def data_file(folder, rng):
    """A data file of any format whose rows are seldom what they should be."""
    suffix = rng.choice([".csv", ".json", ".jsonl", ".txt", ".parquet", ".tsv"])
    names = ["prompt", "response", "instruction", "input", "output", "goal", "target", "id", "category", "", "x"]
    columns = rng.sample(names, rng.randrange(1, 5))
    rows = [{name: rng.choice(["hello", "Sure", value(rng)]) for name in columns} for _ in range(rng.randrange(4))]
    path = folder / f"data{suffix}"
    if suffix == ".json":
        path.write_bytes(as_json(rows if rng.random() < 0.7 else value(rng)))
    elif suffix == ".jsonl":
        path.write_bytes(b"\n".join(as_json(row if rng.random() < 0.9 else value(rng)) for row in rows))
    elif suffix == ".parquet":
        texts = {name: pa.array([None if row[name] is None else repr(row[name]) for row in rows]) for name in columns}
        pq.write_table(pa.table(texts), path)
    else:
        quote = rng.choice(["", '"', "'"])
        mark = rng.choice([",", ";", "\t"])
        lines = [mark.join(columns)]
        lines += [
            mark.join(quote + str(entry).encode("utf-8", "replace").decode() + quote for entry in row.values())
            for row in rows
        ]
        path.write_bytes(
            rng.choice(["\n", "\r\n", "\r"]).join(lines).encode(rng.choice(["utf-8", "utf-16", "utf-8-sig"]))
        )
    if rng.random() < 0.3:
        path.write_bytes(changed_bytes(path.read_bytes(), rng))
    return path


def tries_of_configurations(folder, count, seed):
    """Faults (anything but a `UserError`) of that many configurations, resolved and made into a study's keys."""
    from importlib import resources

    from neurondrift.study.runner import STAGES, StudyRun
    from neurondrift.study.settings import resolve

    presets = resources.files("neurondrift.study") / "presets"
    texts = [entry.read_text("utf-8") for entry in presets.iterdir() if entry.name.endswith(".toml")]
    file = folder / "c.toml"

    def one(rng):
        file.write_bytes(toml(rng.choice(texts), rng))
        study = resolve(file=file)
        study.to_toml()
        run = StudyRun(study, folder / "none")
        for name in STAGES:
            run.steps(name)

    return _faults(one, count, seed)


def tries_of_standing_studies(folder, count, seed):
    """The same of a `study.toml` that stands in the folder of a run."""
    from neurondrift.study.runner import StudyRun
    from neurondrift.study.settings import resolve

    study = resolve(preset="smoke")
    (folder / "standing").mkdir(exist_ok=True)

    def one(rng):
        (folder / "standing" / "study.toml").write_bytes(toml(study.to_toml(), rng))
        StudyRun(study, folder / "standing")

    return _faults(one, count, seed)


def tries_of_groups(folder, count, seed, study):
    """Faults of that many group files, spoiled from a study's, read and put to use."""
    from neurondrift.groups.group import load_group

    files = sorted((study / "neuron_groups").glob("*.parquet"))
    files = [file for file in files if "importance" not in file.name]
    plain = json.loads((study / "neuron_groups" / "random.neurons.json").read_text())
    whole = load_group(files[0])

    def one(rng):
        if rng.random() < 0.3:
            path = folder / "g.json"
            path.write_bytes(changed_bytes(as_json(plain), rng) if rng.random() < 0.3 else as_json(spoiled(plain, rng)))
        else:
            path = folder / "g.parquet"
            parquet(rng.choice(files), path, rng)
        group = load_group(path)
        assert len(group) >= 0
        group.check_members(whole.shapes)
        group.check_model("x", whole.shapes)
        _ = group | whole, group & whole, group.role

    return _faults(one, count, seed)


def tries_of_logs(folder, count, seed, study):
    """Faults of that many drift logs, spoiled from a study's, read in every way."""
    from neurondrift.drift.log import DriftLog
    from neurondrift.study.population import load_population

    group = study / "neuron_groups" / "random.neurons.parquet"
    good = study / "drift"
    files = [file.relative_to(good) for file in sorted(good.rglob("*")) if file.is_file()]

    def one(rng):
        bad = folder / "drift"
        shutil.rmtree(bad, ignore_errors=True)
        shutil.copytree(good, bad)
        file = bad / rng.choice(files)
        kind = rng.randrange(5)
        if kind == 0:
            file.unlink()
        elif file.suffix == ".json":
            content = json.loads(file.read_text())
            file.write_bytes(as_json(spoiled(content, rng)) if kind > 1 else changed_bytes(file.read_bytes(), rng))
        else:
            parquet(good / file.relative_to(bad), file, rng)
        if rng.random() < 0.1:
            (bad / rng.choice(["step=x", "step=99999999999999", "step=7", "step=٣", "step=-1"])).mkdir()
        log = DriftLog(bad)
        for read in (
            log.steps, log.metadata, log.initial, log.read, log.weights, lambda: log.read(groups=[group]),
            lambda: log.read(columns=["l2"]), lambda: load_population({0: log}),
        ):  # fmt: skip
            with contextlib.suppress(UserError):
                read()

    return _faults(one, count, seed)


def tries_of_data(folder, count, seed):
    """Faults of that many data files."""
    from neurondrift.models.data import load_examples

    def one(rng):
        for file in folder.glob("data.*"):
            file.unlink()
        path = data_file(folder, rng)
        examples = load_examples(str(path), require_response=rng.random() < 0.5)
        assert all(isinstance(example.prompt, str) and example.prompt.strip() for example in examples)

    return _faults(one, count, seed)


def _faults(one, count, seed):
    """The tries that ended in anything but success or a `UserError`: number and error."""
    import traceback

    found = []
    for number in range(count):
        try:
            one(random.Random(f"{seed}-{number}"))
        except UserError as error:
            str(error).encode("utf-8", "replace")
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            found.append(f"try {number}: {type(error).__name__}: {str(error)[:200]} ({where.filename}:{where.lineno})")
    return found


KINDS = {
    "configurations": tries_of_configurations,
    "studies that stand": tries_of_standing_studies,
    "group files": tries_of_groups,
    "drift logs": tries_of_logs,
    "data files": tries_of_data,
}
OF_A_STUDY = ("group files", "drift logs")


def tries(kind, folder, count, seed, study):
    """Faults of that many inputs of a kind; `study` is a finished one to spoil copies of."""
    more = (study,) if kind in OF_A_STUDY else ()
    return KINDS[kind](folder, count, seed, *more)
