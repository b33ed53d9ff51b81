"""What is shown of a sweep while it runs: a table that moves on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator, Mapping, Sequence

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from neurondrift.base.progress import Step, duration, spoken_of
from neurondrift.base.terminal import plain
from neurondrift.study.sweep.folder import Status

STYLES = {"done": "green", "failed": "red", "running": "cyan", "stopped": "yellow", "waiting": "dim"}
#: Rows of the table at most; the others are counted.
MOST_ROWS = 30


class Board:
    """How far every point of a sweep has come.

    `room`: how many are done at once, for the estimate; `standing`: points that were done before.
    """

    def __init__(self, names: Sequence[str], *, room: int, standing: int = 0) -> None:
        self.names, self.room, self.standing = list(names), max(1, room), standing
        self.states: dict[str, Status] = {}
        self.began = time.monotonic()

    def update(self, states: Mapping[str, Status]) -> None:
        self.states = dict(states)

    def of(self, *kinds: str) -> list[str]:
        """The points in one of these states, in order."""
        return [name for name in self.names if self.states.get(name, Status()).state in kinds]

    def summary(self) -> str:
        """`5 of 12 done, 1 failed, 2 at work; 3m10s so far, about 4m20s left`."""
        done, failed = self.of("done"), self.of("failed")
        parts = [f"{len(done)} of {len(self.names)} done"]
        parts += [f"{len(failed)} failed"] * bool(failed)
        parts += [f"{len(self.of('running'))} at work"] * bool(self.of("running"))
        text = f"{', '.join(parts)}; {duration(time.monotonic() - self.began)} so far"
        left = self.left()
        return f"{text}, about {duration(left)} left" if left is not None else text

    def left(self) -> float | None:
        """Seconds that are left, from how long points took that were done here; None before the first has ended."""
        took = [self.states[name].seconds for name in self.of("done") if self.states[name].seconds > 0]
        if len(self.of("done")) <= self.standing or not took:
            return None
        mean = sum(took) / len(took)
        begun = [max(0.0, mean - (time.time() - self.states[name].began)) for name in self.of("running")]
        rest = sum(begun) + mean * len(self.of("waiting", "stopped"))
        return rest / self.room if rest > 0 else None

    def line(self) -> str:
        """The summary and what is being done, on one line."""
        doing = [
            f"{name}: {state.stage}{f' ({state.progress})' if state.progress else ''}"
            for name in self.of("running")
            if (state := self.states[name])
        ]
        return "; ".join([self.summary(), *doing[:4]])

    def table(self) -> Table:
        """One row a point; of long sweeps those that are at work or failed, and as many others as there is room."""
        shown = self.names
        if len(shown) > MOST_ROWS:
            first = set(self.of("running", "failed", "stopped"))
            rest = [name for name in self.names if name not in first]
            chosen = first | set(rest[: max(0, MOST_ROWS - len(first))])
            shown = [name for name in self.names if name in chosen]
        made = Table(box=None, pad_edge=False, title_justify="left", caption_justify="left")
        made.caption = self.summary()
        for header in ("", "point", "state", "stage", "progress"):
            made.add_column(header, no_wrap=header != "progress", overflow="ellipsis")
        for name in shown:
            state = self.states.get(name, Status())
            ended = state.message if state.state == "failed" else duration(state.seconds) if state.seconds else ""
            told = state.progress if state.state == "running" else ended
            made.add_row(
                str(self.names.index(name)),
                Text(plain(name)),
                Text(state.state, style=STYLES[state.state]),
                Text(plain(state.stage)),
                Text(plain(told)),
            )
        if len(shown) < len(self.names):
            made.add_row("", f"and {len(self.names) - len(shown)} more", "", "", "")
        return made


class _Spoken(Step):
    """A board as a step that is spoken of in lines."""

    def __init__(self, board: Board) -> None:
        super().__init__("sweep", None)
        self.board = board

    def line(self) -> str:
        return f"sweep: {self.board.line()}"


@contextlib.contextmanager
def shown(board: Board) -> Iterator[None]:
    """Within the block the board is shown: as a table where standard output is a terminal, else as a line to standard
    error every half minute."""
    console = Console()
    if not sys.stdout.isatty() or console.is_dumb_terminal:
        with spoken_of(_Spoken(board)):
            yield
    else:
        with Live(get_renderable=board.table, console=console, refresh_per_second=2):
            yield
