"""What is said while work is going on: a bar that moves on a terminal, a line now and then elsewhere.

The one place that speaks of work that is not done; library functions only call the function that it hands out.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from neurondrift.base.processes import is_first_process
from neurondrift.base.terminal import plain

#: Where there is no terminal: seconds before a step is worth a line, and from one of its lines to the next.
FIRST, BETWEEN = 5.0, 30.0
#: Seconds of the past that a rate is taken from, more where nothing was done in them.
RECENT = 300.0

Clock = Callable[[], float]


class Step:
    """How far a step has come: call it with the number of units whenever some are done.

    Parameters
    ----------
    description
        What is being done.
    total
        Units in all; None where they are not counted.
    clock, moved
        Seconds from any beginning; called whenever units are done.
    """

    def __init__(
        self,
        description: str,
        total: int | None,
        *,
        clock: Clock = time.monotonic,
        moved: Callable[[int], None] = lambda done: None,
    ) -> None:
        self.description, self.total, self.clock, self.moved = description, total, clock, moved
        self.done, self.began = 0, clock()
        self._known = deque([(self.began, 0)])
        self._lock = threading.Lock()

    def __call__(self, count: int) -> None:
        with self._lock:
            self.done += count
            self._known.append((self.clock(), self.done))
            while len(self._known) > 2 and self._known[1][0] < self._known[-1][0] - RECENT:
                self._known.popleft()
        self.moved(self.done)

    def already(self, count: int) -> None:
        """Units that an earlier run has done: they say nothing about the rate."""
        with self._lock:
            self.done += count
            self._known = deque([(self.clock(), self.done)])
        self.moved(self.done)

    def line(self) -> str:
        """What is done, how far, how fast, and how long it will take, on one line."""
        with self._lock:
            now, (since, before), (last, done) = self.clock(), self._known[0], self._known[-1]
        so_far = f"{duration(now - self.began)} so far"
        if self.total is None:
            return f"{self.description}: {so_far}"
        parts = [f"{done} of {self.total}"]
        each = (last - since) / (done - before) if done > before else None
        if each is not None:
            parts.append(rate(each))
        parts.append(so_far)
        if each is not None and (left := (self.total - done) * each - (now - last)) > 0:
            parts.append(f"about {duration(left)} left")
        return f"{self.description}: {', '.join(parts)}"


class Lines:
    """Lines about the innermost of the steps that are being done: the first after `first` seconds (`FIRST`), then one
    every `between` (`BETWEEN`), also while nothing is counted."""

    def __init__(
        self,
        write: Callable[[str], None],
        *,
        clock: Clock = time.monotonic,
        first: float | None = None,
        between: float | None = None,
    ) -> None:
        self.write, self.clock = write, clock
        self._first, self._between = first, between
        self._due: list[tuple[Step, float]] = []
        self._lock, self._changed = threading.Lock(), threading.Event()
        self._speaker: threading.Thread | None = None

    @contextlib.contextmanager
    def about(self, step: Step, *, speaks: bool = True) -> Iterator[None]:
        """Within the block this is the step that is spoken of. `speaks`: at the right times, by a thread; otherwise
        when `tick` is called."""
        with self._lock:
            self._due.append((step, self.clock() + (FIRST if self._first is None else self._first)))
            if speaks and self._speaker is None:
                self._speaker = threading.Thread(target=self._speak, name="neurondrift progress", daemon=True)
                self._speaker.start()
        self._changed.set()
        try:
            yield
        finally:
            with self._lock:
                self._due = [(each, at) for each, at in self._due if each is not step]
            self._changed.set()

    def tick(self) -> float | None:
        """Say what is due. Seconds until there is something to say again, None where nothing is being done."""
        between = BETWEEN if self._between is None else self._between
        with self._lock:
            if not self._due:
                self._speaker = None
                return None
            (step, due), now = self._due[-1], self.clock()
            if now < due:
                return due - now
            # The steps around it have been spoken for.
            self._due = [(each, max(at, now + between)) for each, at in self._due]
        self.write(step.line())
        return between

    def _speak(self) -> None:
        while (seconds := self.tick()) is not None:
            self._changed.wait(seconds)
            self._changed.clear()


def _write(line: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # the reader has gone
        print(f"  {plain(line)}", file=sys.stderr, flush=True)


_LINES = Lines(_write)


@contextlib.contextmanager
def lines_to(write: Callable[[str], None], *, first: float, between: float) -> Iterator[None]:
    """Within the block the lines of `progress` go to `write`, the first of a step and the next after so many seconds.

    A bar is drawn all the same where standard error is a terminal.
    """
    global _LINES
    before, _LINES = _LINES, Lines(write, first=first, between=between)
    try:
        yield
    finally:
        _LINES = before


def spoken_of(step: Step) -> contextlib.AbstractContextManager[None]:
    """Within the block lines about this step are written, as by `progress` where there is no terminal."""
    return _LINES.about(step)


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else rate(1 / max(speed, 1e-9)))


@contextlib.contextmanager
def progress(description: str, total: int | None = None) -> Iterator[Step]:
    """Yields what is to be called with the number of units whenever some are done (`total`: of how many).

    Where standard error is a terminal it moves a bar, or does nothing where units are not counted. Elsewhere it writes
    lines there: the first once the step has taken some seconds, then one every half minute. Of several processes the
    first speaks.
    """
    console = Console(stderr=True)
    if not is_first_process():
        yield Step(description, total)
    elif not sys.stderr.isatty() or console.is_dumb_terminal:
        step = Step(description, total)
        with _LINES.about(step):
            yield step
    elif total is None:
        yield Step(description, total)
    else:
        columns = (
            TextColumn("  {task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            _Rate(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task(description, total=total)
            yield Step(description, total, moved=lambda done: bar.update(task, completed=done))


def rate(seconds_each: float) -> str:
    """`4.3 s each`, or `12.0/s`."""
    return f"{1 / max(seconds_each, 1e-9):.1f}/s" if seconds_each <= 1 else f"{seconds_each:.1f} s each"


def duration(seconds: float) -> str:
    """`4.3s`, `2m05s`, `1h02m`."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60}h{minutes % 60:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{seconds:.1f}s"
