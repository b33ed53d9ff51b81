"""Time and peak memory of every stage of the demo, or of any study, each in a process of its own.

    python benchmarks/demo.py [--output-dir DIR] [--preset demo | --config FILE] [--busy [STAGE ...]] [--costs FILE]
                              [--write docs/demo.md]

Writes the study into DIR (a new temporary folder by default) and prints a table in Markdown, with what
`neurondrift verify` said beforehand. `--busy`: the stages named (default: score and finetune) are then done again with
one core kept busy by another process of the same priority (`yes`), and the ratio of the times is printed. `--costs`:
everything goes into a JSON file, and is added to what an earlier attempt left there, so that a study that was
broken off and resumed has its whole cost (what a killed stage took since its last half minute is lost). Stages that
stand are not run again. `--write`: the table goes into a document, between its markers.
"""

import argparse
import contextlib
import os
import platform
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from document import REPOSITORY, surroundings, write_between

from neurondrift.base.files import read_json, write_json
from neurondrift.study.runner import StudyRun
from neurondrift.study.settings import Study, resolve

sys.path.insert(0, str(REPOSITORY / "docs"))
from costs import table

BUSY = ("score", "finetune")
#: Seconds between two notes of a stage that runs.
EVERY = 30


class Costs:
    """What each attempt at each stage took, in a file that is written again while it runs; without a file in memory."""

    def __init__(self, file: Path | None):
        self.file = file
        self.found = read_json(file) if file and file.exists() else {"attempts": []}
        self.found["machine"] = {"cores": os.cpu_count(), "processor": processor()}

    def write(self) -> None:
        if self.file:
            write_json(self.file, self.found)

    @contextlib.contextmanager
    def attempt(self, stage: str) -> Iterator[dict[str, Any]]:
        """An entry of the list, whose seconds are kept up to date until the block ends."""
        entry: dict[str, Any] = {"stage": stage, "began": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        entry |= {"seconds": 0.0, "peak_gb": None, "ended": False}
        self.found["attempts"].append(entry)
        began, over = time.perf_counter(), threading.Event()

        def follow() -> None:
            while not over.wait(EVERY):
                entry["seconds"] = time.perf_counter() - began
                self.write()

        thread = threading.Thread(target=follow, daemon=True)
        thread.start()
        try:
            yield entry
        finally:
            over.set()
            thread.join()
            self.write()


def processor() -> str:
    """The processor's name and whether it computes bfloat16, where Linux says it."""
    about = Path("/proc/cpuinfo")
    text = about.read_text() if about.exists() else ""
    name = re.search(r"^model name\s*:\s*(.*)$", text, re.MULTILINE)
    fast = "with" if "avx512_bf16" in text else "without"
    return f"{name[1] if name else platform.machine()}, {fast} avx512_bf16"


def measured(arguments: list[str]) -> tuple[float, float, str]:
    """Seconds, peak resident memory in GB, and a command's output."""
    began = time.perf_counter()
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if os.waitstatus_to_exitcode(status) != 0:
        raise SystemExit(f"{' '.join(arguments)} failed")
    return time.perf_counter() - began, usage.ru_maxrss * 1024 / 1e9, output.strip()


def stages_left(study: Study, folder: Path) -> list[str]:
    """What a run of the study would still do, in its order."""
    return list(dict.fromkeys(title.split()[0] for title in StudyRun(study, folder).unfinished()))


@contextlib.contextmanager
def one_core_busy() -> Iterator[None]:
    other = subprocess.Popen(["yes"], stdout=subprocess.DEVNULL)
    time.sleep(1)
    try:
        yield
    finally:
        other.kill()
        other.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output-dir", type=Path)
    of = parser.add_mutually_exclusive_group()
    of.add_argument("--preset", default="demo")
    of.add_argument("--config", type=Path)
    parser.add_argument("--busy", nargs="*", metavar="STAGE")
    parser.add_argument("--costs", type=Path)
    parser.add_argument("--write", type=Path)
    options = parser.parse_args()
    folder = options.output_dir or Path(tempfile.mkdtemp(prefix="neurondrift-demo-"))
    named = ["--config", str(options.config)] if options.config else ["--preset", options.preset]
    study = resolve(file=options.config) if options.config else resolve(preset=options.preset)
    costs = Costs(options.costs)

    def command(name: str, *more: str) -> list[str]:
        return [sys.executable, "-m", "neurondrift.cli", name, *named, "--output-dir", str(folder), *more]

    took, _, said = measured(command("verify"))
    at = re.search(r"^estimate.*\n.*$", said, re.MULTILINE)
    foretold = "nothing" if at is None else " ".join(at[0].split())
    costs.found.setdefault("foretold", foretold)  # of what is left a later attempt would say less
    print(f"{study.name} in {folder}, {os.cpu_count()} cores; verify, in {took:.0f} s: {foretold}\n")
    for stage in stages_left(study, folder):
        with costs.attempt(stage) as entry:
            seconds, memory, said = measured(command(stage))
            entry |= {"seconds": seconds, "peak_gb": memory, "ended": True, "said": said.splitlines()[-1]}
        print(f"{stage}: {seconds:.0f} s, {memory:.1f} GB; {' '.join(said.splitlines()[-1].split())}", flush=True)
    if options.busy is not None:
        costs.found["busy"] = {}
        for stage in options.busy or BUSY:
            with one_core_busy():
                costs.found["busy"][stage], _, _ = measured(command(stage, "--force"))
            costs.write()
    lines = table(costs.found)
    print("", *lines, sep="\n")
    if options.write:
        about = f"*`python benchmarks/demo.py{' --busy' * (options.busy is not None)}`: {surroundings('torch')}.*"
        write_between(options.write, "demo.py", [about, "", *lines])


if __name__ == "__main__":
    main()
