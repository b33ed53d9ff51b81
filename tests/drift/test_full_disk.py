"""The callback on a full disk: a snapshot is left out or training stops, and nothing is left half."""

import errno
import os
import resource
import subprocess

import pytest
from transformers import TrainerCallback

from helpers.adapters import lora
from helpers.training import trainer
from neurondrift.base.errors import ResourceError
from neurondrift.drift.callback import DriftCallback
from neurondrift.drift.log import DriftLog


class Limited(DriftLog):
    """A log under a limit on the size of files while it writes step 2: a real OSError, on any machine."""

    def write(self, step, *args, **kwargs):
        old = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000 if step == 2 else old[0], old[1]))
        try:
            super().write(step, *args, **kwargs)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, old)


def test_a_snapshot_without_space_is_left_out_and_training_goes_on(tmp_path, caplog):
    callback = DriftCallback(tmp_path / "d", every=1)
    callback.log = Limited(tmp_path / "d")
    run = trainer(lora(), tmp_path / "t", callback, steps=5)
    run.train()
    assert run.state.global_step == 5
    assert callback.missed == [2]
    log = DriftLog(tmp_path / "d")
    assert log.steps() == [0, 1, 3, 4, 5]
    assert set(log.read()["step"]) == {0, 1, 3, 4, 5}
    assert caplog.text.count("No space is left for the drift snapshot of step 2") == 1
    assert not list((tmp_path / "d").glob(".*partial"))
    assert [entry["step"] for entry in callback.history] == [0, 1, 2, 3, 4, 5]  # the summary does not need the disk


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 200 kB."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("a small file system can only be mounted by root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("mode", ["continue", "stop"])
def test_a_full_file_system(small_disk, tmp_path, mode, caplog):
    class Fill(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 1:
                with pytest.raises(OSError, match="No space"), open(small_disk / "f", "wb", buffering=0) as stream:
                    while True:
                        stream.write(b"x" * 4096)
            if state.global_step == 4:
                (small_disk / "f").unlink()

    callback = DriftCallback(small_disk / "d", every=1, on_full_disk=mode)
    run = trainer(lora(), tmp_path / "t", callback, steps=5)
    run.add_callback(Fill())
    if mode == "stop":
        with pytest.raises(ResourceError, match="drift snapshot of step 2.*resume from the last checkpoint"):
            run.train()
    else:
        run.train()
    log = DriftLog(small_disk / "d")
    assert log.steps() == ([0, 1] if mode == "stop" else [0, 1, 5])
    assert callback.missed == ([] if mode == "stop" else [2, 3, 4])
    assert len(log.read()) == len(log.steps()) * len(log.initial())
    assert not list((small_disk / "d").glob(".*partial"))
    assert caplog.text.count("No space is left") == (0 if mode == "stop" else 1)


def test_only_a_full_disk_is_passed_over(tmp_path):
    callback = DriftCallback(tmp_path, every=1)

    def fails(number):
        def write():
            raise OSError(number, os.strerror(number))

        return write

    callback._guard(3, fails(errno.ENOSPC))
    assert callback.missed == [3]
    with pytest.raises(OSError, match="Input/output"):
        callback._guard(4, fails(errno.EIO))
    callback.on_full_disk = "stop"
    with pytest.raises(ResourceError, match="drift snapshot of step 5.*free some space"):
        callback._guard(5, fails(errno.EDQUOT))
