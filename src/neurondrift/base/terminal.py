"""What goes to the standard streams: never an error of the encoding, never a character that a terminal acts on."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys


def open_streams() -> None:
    """Make the standard streams safe to write to: those that are closed lead nowhere, and what the encoding of standard
    output lacks becomes a question mark."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:  # else the next file that is opened would be taken for a standard stream
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free: this one
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None or stream.closed:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def give_up_output() -> None:
    """Let what is still to be written to standard output go nowhere: its reader has gone, or its disk is full."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class PlainFormatter(logging.Formatter):
    """Lines of the log without what a terminal would act on."""

    def format(self, record: logging.LogRecord) -> str:
        return plain(super().format(record))


def plain(text: str) -> str:
    """A text without control and formatting characters, but its line breaks: safe for a terminal."""
    return "".join(letter if letter.isprintable() or letter == "\n" else " " for letter in text)
