"""A disk that is full, read-only or over quota: one message, nothing half, and the same results when it is mended.

`benchmarks/faults.py writes` refuses every write of every stage in turn.
"""

import errno
import os
import random
import subprocess

import pytest

from helpers.faults import (
    JOBS,
    KILLED,
    SMOKE,
    attempt,
    complaint,
    differences,
    disturbed_write,
    partial_files,
    stages_alone,
)
from neurondrift.base.errors import ResourceError
from neurondrift.base.files import atomic_path, make_folder, remove_partial, storage_error
from neurondrift.drift.callback import DriftCallback

NUMBERS = (errno.ENOSPC, errno.EROFS, errno.EDQUOT)
#: The fewest writes of the last command of each job, of which one is disturbed.
FEWEST = {"finetune": 100, "score and groups": 60, "intervene": 50, "evaluate": 20, "align": 15, "report": 10}


@pytest.mark.parametrize("name", JOBS)
def test_a_write_that_is_refused_and_one_at_which_it_is_killed(name, reference, tmp_path):
    after = random.Random(name).randrange(FEWEST.get(name, 6))
    numbers = (NUMBERS[list(JOBS).index(name) % 3], KILLED)
    last = len(JOBS[name].commands) - 1
    assert disturbed_write(name, last, after, numbers, reference[0], tmp_path) == [], (after, numbers)


def test_what_is_refused_is_told_from_what_is_not(reference, tmp_path):
    """The helper itself: it sees a write that is not refused, and results that differ."""
    assert disturbed_write("diff", 0, 1000, (errno.ENOSPC,), reference[0], tmp_path)[0].startswith("exit code 0")
    assert disturbed_write("diff", 0, 1000, (KILLED,), reference[0], tmp_path) == ["not killed, but exit code 0"]
    (tmp_path / "study" / "diff" / "initial.parquet").unlink()
    assert differences(reference[0], tmp_path / "study") == ["diff/initial.parquet is gone"]


def without_asking_for_space():
    from neurondrift.study import runner
    from neurondrift.study.stages import scoring

    runner.require_space = scoring.require_space = lambda *place, **need: None


def test_a_disk_that_is_really_full(reference, tmp_path):
    """A small one, so that libraries of C++ and Rust meet its end too, in their own words; then there is room."""
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(small)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a small file system can only be mounted by root")
    try:
        for size in ("100k", "500k", "900k", "1300k"):
            subprocess.run(["mount", "-o", f"remount,size={size}", str(small)], check=True)
            command = [*SMOKE, "--output-dir", small / "study"]
            full = attempt(command, tmp_path / "told", before=without_asking_for_space)
            assert complaint(full) == "", size
            assert "No space is left" in full.err  # while writing, or for a snapshot of the drift
            assert partial_files(small) == []
        subprocess.run(["mount", "-o", "remount,size=100m", str(small)], check=True)
        done = attempt([*SMOKE, "--output-dir", small / "study"], tmp_path / "told")
        assert done.code == 0, done.err
        assert differences(stages_alone(reference[0]), small / "study") == []
        subprocess.run(["mount", "-o", "remount,ro", str(small)], check=True)
        assert complaint(attempt([*SMOKE, "--output-dir", small / "study"], tmp_path / "told")) == ""
    finally:
        subprocess.run(["umount", str(small)], check=True)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "x"), "No space is left while writing here"),
        (OSError(errno.EDQUOT, "x"), "No space is left while writing here"),
        (OSError(errno.EROFS, "x"), "here may not be written or read .Read-only file system"),
        (OSError(errno.EACCES, "x"), "here may not be written or read .Permission denied"),
        (OSError(errno.EMFILE, "x"), "Too many files are open, at here.*ulimit -n 1024"),
        (OSError(errno.EIO, "x"), "disk does not read or write here"),
        (Exception("I/O error: No space left on device (os error 28)"), "No space is left while writing here"),
        (RuntimeError("PytorchStreamWriter failed writing file data/0"), "No space is left while writing here"),
    ],
)
def test_each_refusal_is_one_message(error, words, tmp_path):
    with pytest.raises(ResourceError, match=words):
        raise storage_error(error, "here")
    with pytest.raises(ResourceError), atomic_path(tmp_path / "x") as partial:
        partial.write_text("half")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_training_does_not_go_on_where_snapshots_will_never_be_written(tmp_path):
    callback = DriftCallback(tmp_path, every=1)

    def refuses(number):
        def write():
            with atomic_path(tmp_path / "x"):
                raise OSError(number, os.strerror(number))

        return write

    callback._guard(1, refuses(errno.EDQUOT))
    assert callback.missed == [1]
    with pytest.raises(ResourceError, match="may not be written"):
        callback._guard(2, refuses(errno.EROFS))
    assert callback.missed == [1]


def test_a_fault_of_ours_is_no_refusal(tmp_path):
    for error in (ValueError("os"), KeyError("errno"), RuntimeError("size mismatch"), OSError(errno.ENOENT, "x")):
        assert storage_error(error) is None
        with pytest.raises(type(error)), atomic_path(tmp_path / "x"):
            raise error


def test_what_killed_writes_have_left_is_swept_up_and_nothing_else(tmp_path):
    (tmp_path / ".model.0123abcd.partial").mkdir()
    (tmp_path / ".model.0123abcd.partial" / "half").write_text("x")
    make_folder(tmp_path / "deep")
    (tmp_path / "deep" / ".a.json.ffffffff.partial").write_text("x")
    for kept in ("mine.partial", ".x.partial", "deep/.y.json"):
        (tmp_path / kept).write_text("x")
    remove_partial(tmp_path)
    (tmp_path / "deep" / ".y.json.0123abcd.partial").write_text("x")
    (tmp_path / "deep" / ".z.json.0123abcd.partial").write_text("x")
    (tmp_path / "deep" / "y.json").write_text("x")
    remove_partial(tmp_path / "deep" / "y.json")  # of a file: its own alone
    assert (tmp_path / "deep" / ".z.json.0123abcd.partial").exists()
    remove_partial(tmp_path / "deep")
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*"))
    assert left == [".x.partial", "deep", "deep/.y.json", "deep/y.json", "mine.partial"]
