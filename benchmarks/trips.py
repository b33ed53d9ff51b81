"""How many modules a thing passes on its way through the package, and how many rooms.

    python benchmarks/trips.py                         # this tree
    PYTHONPATH=OTHER/src python benchmarks/trips.py    # another tree of the package, such as an older commit

Runs the preset `smoke` in a temporary folder and notes the module of every function of the package that is entered on
three trips: a score from the pass that captures it to the file of a group; a snapshot from the drift callback to the
verdict; a flag from the command line to the stage whose setting it is. A module counts once, however often it is
entered. What stands under all rooms (files, errors, progress, memory, processes) is no stop.
"""

import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

PACKAGE = "neurondrift."
UNDER_ALL = {"base", "errors", "artifacts", "progress", "memory", "distributed", "threads"}


class Place(NamedTuple):
    """A function, by the end of its module's name and its own."""

    module: str
    function: str


class Trip:
    """The modules entered on legs, each from the first call of one function to the last call of another."""

    def __init__(self, name: str, *legs: tuple[Place, Place]) -> None:
        self.name, self.legs = name, legs
        self.on: dict[int, list[str]] = {}  # leg -> modules since the last call of its end
        self.modules: list[str] = []

    def enter(self, place: Place) -> None:
        for number, (first, last) in enumerate(self.legs):
            if is_at(place, first):
                self.on.setdefault(number, [])
            if number in self.on:
                self.on[number].append(place.module)
                if is_at(place, last):
                    self.modules += self.on[number]
                    self.on[number] = []

    def __str__(self) -> str:
        stops = [module.removeprefix(PACKAGE) for module in dict.fromkeys(self.modules)]
        stops = [stop for stop in stops if stop.partition(".")[0] not in UNDER_ALL and stop != "drift.threads"]
        rooms = list(dict.fromkeys(stop.partition(".")[0] for stop in stops))
        return f"{self.name}: {len(stops)} modules, {len(rooms)} rooms\n    {' '.join(stops)}"


def is_at(place: Place, wanted: Place) -> bool:
    return place.module.endswith(wanted.module) and place.function == wanted.function


def watch(trips: Sequence[Trip]) -> None:
    def enter(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call":
            module = str(frame.f_globals.get("__name__", ""))
            if module.startswith(PACKAGE) and frame.f_code.co_name != "<module>":
                for trip in trips:
                    trip.enter(Place(module, frame.f_code.co_name))

    sys.setprofile(enter)
    threading.setprofile(enter)


def main_of_package() -> Callable[[list[str]], None]:
    try:
        from neurondrift.cli.__main__ import main
    except ImportError:  # version 0.1
        from neurondrift.cli import main
    return main


TRIPS = (
    Trip(
        "a score, from capture to group file",
        (Place("importance.capture", "run"), Place("", "write_scores")),
        (Place("stages.grouping", "groups"), Place("groups.group", "save")),
    ),
    Trip(
        "a snapshot, from callback to verdict",
        (Place("drift.callback", "on_step_end"), Place("drift.log", "write")),
        (Place("stages.analysis", "analyze"), Place("", "decide")),
    ),
    Trip(
        "a flag, from the command line to its stage",
        (Place("cli.app", "study_of"), Place("stages.finetuning", "finetune")),
    ),
)

if __name__ == "__main__":
    main = main_of_package()
    with tempfile.TemporaryDirectory() as folder:
        for stage in ("align", "score", "groups", "finetune", "evaluate", "attribute", "analyze"):
            watch(TRIPS if stage == "finetune" else TRIPS[:2])
            main([stage, "--preset", "smoke", "--lora-r", "4", "--output-dir", str(Path(folder))])
            sys.setprofile(None)
    print(*TRIPS, sep="\n")
