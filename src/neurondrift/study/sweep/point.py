"""One point of a sweep, done in the process that calls: a study in its folder, with a log and a status beside it."""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from neurondrift.base.errors import UserError
from neurondrift.base.files import make_folder, storage_error
from neurondrift.base.processes import tune_allocator
from neurondrift.base.progress import lines_to
from neurondrift.study.sweep.folder import Status, SweepFolder
from neurondrift.study.sweep.settings import Point, read_sweep

#: Seconds from one word about progress to the next.
BETWEEN = 2.0


class Progress:
    """Keeps a point's status up to date while it is done: how it ended is its last word, whoever speaks later."""

    def __init__(self, folder: SweepFolder, name: str) -> None:
        before = folder.status(name)
        self.folder, self.name, self.began = folder, name, time.time()
        self._lock, self._over = threading.Lock(), False
        self.status = folder.set_status(
            name,
            Status(tries=before.tries + 1),
            state="running",
            stage="starting",
            began=self.began,
            process=os.getpid(),
            host=platform.node(),
        )

    def line(self, text: str) -> None:
        """A line of `base.progress`: what is done, and how far it is."""
        stage, _, rest = text.partition(": ")
        self.set(stage=stage, progress=rest)

    def set(self, **changes: object) -> None:
        """Write what has changed."""
        changes = {"seconds": round(time.time() - self.began, 1)} | changes
        with self._lock:  # lines come from a thread
            if not self._over:
                self.status = self.folder.set_status(self.name, self.status, **changes)
                self._over = self.status.state != "running"


def do_point(root: Path, name: str) -> int:
    """Do what is left of one point of the sweep in a folder.

    What is said goes to the point's log, how far it is to its status. Returns 0 done, 2 a mistake of the user's, 1 a
    fault; of those the message stands in the status, and the traceback of a fault in the log.
    """
    folder = SweepFolder(root)
    make_folder(folder.log(name).parent)
    with folder.log(name).open("a", encoding="utf-8", buffering=1) as log, _written_to(log):
        told = Progress(folder, name)
        try:
            with lines_to(told.line, first=0.5, between=BETWEEN):
                _run(folder, read_sweep(folder.configuration).point(name), told)
        except KeyboardInterrupt:
            told.set(state="stopped", progress="", code=130)
            raise
        except Exception as error:
            shown = error if isinstance(error, UserError) else storage_error(error)
            if shown is None:
                traceback.print_exc()
            else:
                print(f"neurondrift: {shown}")
            message = str(shown) if shown is not None else f"{type(error).__name__}: {error}"
            code = 1 if shown is None else 2
            told.set(state="failed", progress="", message=message, code=code)
            return code
        told.set(state="done", stage="", progress="", message="", code=0)
    return 0


def _run(folder: SweepFolder, point: Point, told: Progress) -> None:
    from neurondrift.study.runner import StudyRun
    from neurondrift.study.sweep.sharing import Store, do_shared, plan

    tune_allocator()
    run = StudyRun(point.study, folder.study(point.name), say=print, common=folder.shared)
    do_shared(run, Store(folder.shared), plan(read_sweep(folder.configuration), folder).kept)
    run.run()


@contextlib.contextmanager
def _written_to(log: TextIO) -> Iterator[None]:
    """Within the block all that is printed and logged goes to the log."""
    handler = logging.StreamHandler(log)
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    logger = logging.getLogger("neurondrift")
    logger.addHandler(handler)
    try:
        with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            yield
    finally:
        logger.removeHandler(handler)


def _end_with_the_one_who_began_us() -> None:
    """Stop as by Ctrl-C when standard input ends: the process at its other end is gone."""

    def watch() -> None:
        with contextlib.suppress(OSError, ValueError):
            sys.stdin.buffer.read()
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=watch, name="neurondrift watch", daemon=True).start()


def main(root: str, name: str) -> None:
    """`python -m neurondrift.study.sweep.point FOLDER NAME`, as the engine `local` calls it; ends with its code."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    signal.signal(signal.SIGINT, signal.default_int_handler)
    _end_with_the_one_who_began_us()
    try:
        code = do_point(Path(root), name)
    except KeyboardInterrupt:
        code = 130
    sys.stdout.flush()
    os._exit(code)  # the thread that watches holds standard input


if __name__ == "__main__":
    main(*sys.argv[1:])
