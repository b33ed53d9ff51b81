"""Time and peak memory of every stage of the demo, each in a process of its own.

    python benchmarks/demo.py [--output-dir DIR] [--preset demo] [--busy [STAGE ...]]

Writes the study into DIR (a new temporary folder by default) and prints a table in Markdown, with what
`neurondrift verify` said beforehand. `--busy`: the stages named (default: score and finetune) are then done again with
one core kept busy by another process of the same priority (`yes`), and the ratio of the times is printed.
"""

import argparse
import contextlib
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

STAGES = ("align", "score", "groups", "finetune", "evaluate", "attribute", "analyze", "report")
BUSY = ("score", "finetune")


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


def known_stages() -> tuple[str, ...]:
    """Those that this version has a command for."""
    from neurondrift.study.runner import STAGES as MADE

    return tuple(stage for stage in STAGES if stage in MADE)


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
    parser.add_argument("--preset", default="demo")
    parser.add_argument("--busy", nargs="*", metavar="STAGE")
    options = parser.parse_args()
    folder = options.output_dir or Path(tempfile.mkdtemp(prefix="neurondrift-demo-"))
    about = ["--preset", options.preset, "--output-dir", str(folder)]

    def command(name: str, *more: str) -> list[str]:
        return [sys.executable, "-m", "neurondrift.cli", name, *about, *more]

    took, _, said = measured(command("verify"))
    at = re.search(r"^estimate.*\n.*$", said, re.MULTILINE)
    foretold = "nothing" if at is None else " ".join(at[0].split())
    print(f"{options.preset} in {folder}, {os.cpu_count()} cores; verify, in {took:.0f} s: {foretold}\n")
    print("| stage | seconds | peak memory (GB) | said |\n| --- | ---: | ---: | --- |")
    total, peak, idle = 0.0, 0.0, {}
    for stage in known_stages():
        seconds, memory, said = measured(command(stage))
        total, peak, idle[stage] = total + seconds, max(peak, memory), seconds
        print(f"| {stage} | {seconds:.0f} | {memory:.1f} | {' '.join(said.splitlines()[-1].split())} |", flush=True)
    print(f"| **all** | **{total:.0f}** | **{peak:.1f}** | |")
    if options.busy is None:
        return
    print("\n| stage, one core taken | seconds | times the idle ones | said |\n| --- | ---: | ---: | --- |")
    for stage in options.busy or BUSY:
        with one_core_busy():
            seconds, _, said = measured(command(stage, "--force"))
        print(f"| {stage} | {seconds:.0f} | {seconds / idle[stage]:.2f} | {' '.join(said.splitlines()[0].split())} |")


if __name__ == "__main__":
    main()
