"""Machines that lack something: encodings, streams, a home, shared memory, file descriptors, a steady clock, a lock."""

import io
import os
import random
import subprocess
import sys
import time
from functools import partial

import pytest

from helpers.faults import DIFF, FORKS, SMOKE, _command, attempt, copy_of, differences, stages_alone, to_be_done_again
from neurondrift.base import files, terminal
from neurondrift.base.errors import ArtifactError, ResourceError
from neurondrift.base.locks import NAME, only_one
from neurondrift.cli.__main__ import main
from neurondrift.study.runner import StudyRun
from neurondrift.study.settings import resolve

CLI = [sys.executable, "-m", "neurondrift.cli"]


def ended(*arguments, environment=None, without=(), **how):
    given = {name: value for name, value in os.environ.items() if name not in without} | (environment or {})
    return subprocess.run([*CLI, *map(str, arguments)], stderr=subprocess.PIPE, env=given, check=False, **how)


# E1: an error of the encoding after all the work was done
@pytest.mark.parametrize("encoding", ["cp1252", "latin-1", "ascii"])
def test_output_that_is_not_utf8(encoding, reference, tmp_path):
    folder, environment = reference[0], {"PYTHONIOENCODING": encoding}
    command = [word.format(folder) for word in (*DIFF[:3], "--output-dir")] + [tmp_path / "log"]
    if encoding == "ascii":  # from a shell; the others as forks, which take the encoding in the same way
        done = ended(*command, environment=environment, stdout=subprocess.PIPE)
        code, out, err = done.returncode, done.stdout.decode(encoding), done.stderr
    else:
        done = attempt(command, tmp_path / "told", environment=environment)
        code, out, err = done.code, (tmp_path / "told.out").read_bytes().decode(encoding), done.err
    assert code == 0, err
    assert "?" in out and "mean relative drift" in out


# E1: the same kind, of every letter that our tables use and of whatever a model writes
@pytest.mark.parametrize("encoding", ["cp1252", "latin-1", "ascii", "utf-8", "utf-16", "koi8-r", "shift_jis"])
def test_no_letter_is_an_error(encoding, monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    terminal.open_streams()
    print("‖Δ‖ ─ ═ → ± 95 % 😀 \udcff \ud800")
    stream.flush()
    assert b"%" in stream.buffer.getvalue()


@pytest.mark.parametrize("closed", [(1,), (2,), (0, 1, 2)])
def test_streams_that_are_closed(closed, tmp_path):
    def close():
        for number in closed:
            os.close(number)

    done = subprocess.run([*CLI, "clean", "--output-dir", str(tmp_path)], preexec_fn=close, check=False)
    assert done.returncode == 0


def test_an_output_that_is_full_or_gone():
    with open("/dev/full", "wb") as full:
        done = ended("--help", stdout=full)
    assert done.returncode == 2
    assert b"No space is left" in done.stderr and b"Traceback" not in done.stderr
    reader, writer = os.pipe()
    os.close(reader)
    done = ended("--help", stdout=writer)
    os.close(writer)
    assert done.stderr == b"" and done.returncode in (0, 1)  # rich, which prints the help, ends with 1


def test_no_home(tmp_path):
    told = {"stdout": subprocess.PIPE, "cwd": tmp_path, "without": ("HOME", "XDG_CACHE_HOME", "HF_HOME", "USERPROFILE")}
    asked = ("evaluate", "tiny:llama", "--limit", 1, "--max-new-tokens", 2, "--output-dir", tmp_path / "out")
    for home in ({}, {"HOME": "/nonexistent"}, {"HOME": ""}):
        done = ended(*asked, environment=home, **told)
        assert done.returncode == 0, done.stderr
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["out"]
    done = ended(*asked, "--harmful", "~nobody-of-this-name/x.csv", **told)
    assert done.returncode == 2 and b"There is no home folder" in done.stderr, done.stderr


def test_64_file_descriptors(reference, tmp_path):
    done = attempt([*SMOKE, "--output-dir", tmp_path / "study"], tmp_path / "told", files=64)
    assert done.code == 0, done.err
    assert differences(stages_alone(reference[0]), tmp_path / "study") == []
    done = attempt([*SMOKE, "--output-dir", tmp_path / "few"], tmp_path / "told", files=8)
    assert done.code == 2 and "Too many files are open" in done.err


def without_shared_memory(place):
    files.SHARED_MEMORY = place


def test_shared_memory_that_is_absent_or_tiny(reference, tmp_path, monkeypatch):
    folder = copy_of(reference[0], tmp_path / "study")
    for stage in ("score", "groups"):
        to_be_done_again(folder, stage)
    before = partial(without_shared_memory, tmp_path / "nowhere" / "shm")
    done = attempt([*SMOKE, "--output-dir", folder], tmp_path / "told", before=before)
    assert done.code == 0, done.err
    assert differences(reference[0], folder) == []
    (tmp_path / "shm").mkdir()
    monkeypatch.setattr(files, "SHARED_MEMORY", tmp_path / "shm")
    monkeypatch.setattr(files, "free_bytes", lambda path: 1000)
    assert files.scratch_directory(tmp_path / "a", needed=10_000) == tmp_path / "a" / "scratch"
    monkeypatch.setattr(files, "free_bytes", lambda path: 1 << 40)
    monkeypatch.setattr(files.os, "access", lambda path, mode: True)
    monkeypatch.setattr(files, "SHARED_MEMORY", tmp_path / "gone")
    assert files.scratch_directory(tmp_path / "b", needed=10) == tmp_path / "b" / "scratch"


def with_a_clock_that_jumps():
    real, rng = time.time, random.Random(0)
    time.time = lambda: real() + rng.choice([-1e9, -3600, 0, 3600, 1e9])


def test_a_clock_that_jumps_changes_nothing(reference, tmp_path):
    done = attempt([*SMOKE, "--output-dir", tmp_path / "s"], tmp_path / "told", before=with_a_clock_that_jumps)
    assert done.code == 0, done.err
    assert differences(stages_alone(reference[0]), tmp_path / "s") == []


def test_two_commands_in_one_folder(tmp_path, capsys):
    folder = tmp_path / "study"
    first = FORKS.Process(
        target=_command, args=([*SMOKE, "--output-dir", folder], tmp_path / "1", None, {}, None, None)
    )
    first.start()
    while not (folder / NAME).exists() and first.is_alive():
        time.sleep(0.01)
    try:
        for command in (SMOKE, ("clean", "--everything"), ("evaluate", "tiny:llama"), ("groups", "--preset", "smoke")):
            with pytest.raises(SystemExit) as refused:
                main([*command, "--output-dir", str(folder)])
            assert refused.value.code == 2
            told = capsys.readouterr().err
            assert f"Another command is at work in the folder {folder}" in told and f"process {first.pid}" in told
            assert "wait until it has ended" in told
    finally:
        first.kill()
        first.join()
    assert (folder / NAME).exists()  # what a killed command leaves
    main(["clean", "--output-dir", str(folder)])
    assert not (folder / NAME).exists()


def test_a_lock_ends_with_its_block_and_leaves_nothing(tmp_path):
    with only_one(tmp_path), pytest.raises(ResourceError, match=r"Another command is at work.*process \d+ on"):
        StudyRun(resolve(preset="smoke"), tmp_path).run(["align"])
    with pytest.raises(KeyError), only_one(tmp_path):
        raise KeyError
    with only_one(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("x")
    with pytest.raises(ArtifactError, match="A file stands where a folder is needed"), only_one(tmp_path / "file"):
        pass


def test_what_killed_commands_have_left_of_a_commands_own_files_is_swept_up(tmp_path):
    """In a folder that is no study's (`diff`, an evaluation of a model) nothing else is touched."""
    left = [".a.json.0123abcd.partial", ".step=000006.0123abcd.partial", "results/.r.json.0123abcd.partial"]
    kept = [".b.json.0123abcd.partial", "other/.a.json.0123abcd.partial", ".a.json.partial"]
    for name in (*left, *kept):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    with only_one(tmp_path, writes=("a.json", "step=*", "results")):
        assert [name for name in (*left, *kept) if (tmp_path / name).exists()] == kept


def test_a_lock_is_no_link_to_follow(tmp_path):
    (tmp_path / "precious").write_text("x")
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / NAME).symlink_to(tmp_path / "precious")
    with pytest.raises((ResourceError, OSError)), only_one(tmp_path / "study"):
        pass
    assert (tmp_path / "precious").read_text() == "x"
