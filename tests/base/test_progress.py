"""A log that lives: what is said of a step where there is no terminal, when, and where it goes."""

import contextlib
import os
import pty
import re
import subprocess
import sys
import threading

import pytest

from neurondrift.base import progress as module
from neurondrift.base.progress import BETWEEN, FIRST, Lines, Step, duration, rate


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def lines(clock):
    said = []
    told = Lines(said.append, clock=clock)
    told.said = said
    return told


def seconds_of(lines, clock, seconds, each=lambda second: None):
    """Let that many seconds pass, with a tick every second."""
    for second in range(seconds):
        clock.now += 1
        each(second)
        lines.tick()


def test_a_line_says_what_how_far_how_fast_and_how_long(clock):
    step = Step("finetune, seed 0", 45, clock=clock)
    clock.now += 5
    assert step.line() == "finetune, seed 0: 0 of 45, 5.0s so far"
    for _ in range(5):
        clock.now += 4
        step(1)
    assert step.line() == "finetune, seed 0: 5 of 45, 5.0 s each, 25.0s so far, about 3m20s left"
    clock.now += 3  # a unit that is being done
    assert step.line() == "finetune, seed 0: 5 of 45, 5.0 s each, 28.0s so far, about 3m17s left"
    clock.now += 500
    assert step.line().endswith("5.0 s each, 8m48s so far")  # longer than estimated: no estimate
    step(40)
    assert step.line() == f"finetune, seed 0: 45 of 45, {rate(503 / 40)}, 8m48s so far"
    assert Step("groups", None, clock=clock).line() == "groups: 0.0s so far"


def test_the_rate_is_that_of_late_and_not_of_what_an_earlier_run_did(clock):
    step = Step("x", 1000, clock=clock)
    clock.now += 10
    step.already(400)
    assert step.line() == "x: 400 of 1000, 10.0s so far"
    for _ in range(100):
        clock.now += 10
        step(1)
    assert "500 of 1000, 10.0 s each" in step.line()
    for _ in range(200):
        clock.now += 4
        step(2)
    assert "900 of 1000, 2.0 s each" in step.line()  # the last minutes alone


def test_a_short_step_says_nothing_and_a_long_one_speaks_every_half_minute(clock, lines):
    with lines.about(Step("short", 3, clock=clock), speaks=False):
        seconds_of(lines, clock, int(FIRST) - 1)
    assert lines.said == [] and lines.tick() is None
    step = Step("long", 100, clock=clock)
    with lines.about(step, speaks=False):
        seconds_of(lines, clock, 200, lambda second: step(1) if second % 2 else None)
    assert len(lines.said) == 1 + int((200 - FIRST) // BETWEEN)
    assert lines.said[0].startswith("long: 2 of 100")
    assert lines.said[1] == "long: 17 of 100, 2.0 s each, 35.0s so far, about 2m45s left"


def test_a_step_that_counts_nothing_for_long_still_speaks(clock, lines):
    with lines.about(Step("one unit", 2, clock=clock), speaks=False):
        seconds_of(lines, clock, 125)
    assert [line.split(", ")[-1] for line in lines.said] == [f"{at}s so far" for at in ("5.0", "35.0")] + [
        "1m05s so far",
        "1m35s so far",
        "2m05s so far",
    ]


def test_the_innermost_step_is_spoken_of_and_the_others_wait(clock, lines):
    with lines.about(Step("outer", None, clock=clock), speaks=False):
        seconds_of(lines, clock, 7)
        with lines.about(Step("inner", 4, clock=clock), speaks=False):
            seconds_of(lines, clock, 40)
        seconds_of(lines, clock, 40)
    names = [line.split(":")[0] for line in lines.said]
    assert names == ["outer", "inner", "inner", "outer"]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.04, "0.0s"), (59.4, "59.4s"), (60, "1m00s"), (3599, "59m59s"), (3725, "1h02m")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_rates():
    assert (rate(0.1), rate(2.5), rate(0.0)) == ("10.0/s", "2.5 s each", "1000000000.0/s")


SCRIPT = """
import sys, time
from neurondrift.base import progress
progress.FIRST, progress.BETWEEN = 0.3, 0.5
with progress.progress("short", 2) as advance:
    advance(1)
with progress.progress("outer"):
    with progress.progress("a long step", 8) as advance:
        for _ in range(8):
            time.sleep(0.25)
            advance(1)
print("the result")
"""


@pytest.mark.parametrize("where", ["pipe", "file", "closed"])
def test_a_real_process_to_a_pipe_a_file_and_a_reader_that_has_gone(where, tmp_path):
    if where == "closed":
        run = subprocess.Popen([sys.executable, "-c", SCRIPT], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        run.stderr.close()
        assert (run.stdout.read().decode(), run.wait(60)) == ("the result\n", 0)
        run.stdout.close()
        return
    with open(tmp_path / "log", "wb") as file:
        errors = subprocess.PIPE if where == "pipe" else file
        done = subprocess.run([sys.executable, "-c", SCRIPT], stdout=subprocess.PIPE, stderr=errors, check=True)
    assert done.stdout == b"the result\n"
    said = (done.stderr if where == "pipe" else (tmp_path / "log").read_bytes()).decode().splitlines()
    assert 2 <= len(said) <= 6
    form = r"  a long step: \d of 8(, [\d.]+(/s| s each))?, [\d.]+s so far(, about [\d.]+s left)?"
    assert all(re.fullmatch(form, line) for line in said), said
    assert re.search(r"[1-8] of 8, .* so far, about", said[-1])


def test_lines_go_elsewhere_for_a_while(monkeypatch):
    told, clock = [], threading.Event()
    with module.lines_to(told.append, first=0.0, between=60.0), module.progress("work", 3) as step:
        step(1)
        clock.wait(0.3)
    assert len(told) == 1 and told[0].startswith("work: ")
    with module.progress("later", 3):
        clock.wait(0.1)
    assert len(told) == 1


def test_no_thread_is_left_behind():
    for _ in range(20):
        with module.progress("x", 1) as advance:
            advance(1)
    for thread in threading.enumerate():
        if thread.name == "neurondrift progress":
            thread.join(5)
            assert not thread.is_alive()


def test_of_several_processes_the_first_speaks(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with module.progress("x", 1) as advance:
        advance(1)
        assert not any(thread.name == "neurondrift progress" for thread in threading.enumerate() if thread.is_alive())


@pytest.mark.parametrize(("terminal", "bar"), [("xterm", True), ("dumb", False)])
def test_a_terminal_has_a_bar_and_one_that_cannot_move_has_lines(terminal, bar):
    leader, follower = pty.openpty()
    run = subprocess.Popen(
        [sys.executable, "-c", SCRIPT],
        stdout=subprocess.PIPE,
        stderr=follower,
        env=os.environ | {"TERM": terminal, "COLUMNS": "100"},
    )
    os.close(follower)
    said = b""
    with contextlib.suppress(OSError):  # the end of a terminal
        while part := os.read(leader, 4096):
            said += part
    os.close(leader)
    assert (run.communicate()[0], run.returncode) == (b"the result\n", 0)
    assert (b"\x1b[" in said, b"so far" in said) == (bar, not bar)
    assert (b"8/8" in said) == bar
