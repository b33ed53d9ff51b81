"""Time and peak memory of every stage of the demo, each in a process of its own.

    python benchmarks/demo.py [--output-dir DIR] [--preset demo]

Writes the study into DIR (a new temporary folder by default) and prints a table in Markdown.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

STAGES = ("align", "score", "groups", "finetune", "evaluate", "attribute", "analyze", "report")


def measured(arguments: list[str]) -> tuple[float, float, str]:
    """Seconds, peak resident memory in GB, and the last line of a command's output."""
    began = time.perf_counter()
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if os.waitstatus_to_exitcode(status) != 0:
        raise SystemExit(f"{' '.join(arguments)} failed")
    return time.perf_counter() - began, usage.ru_maxrss * 1024 / 1e9, output.strip().splitlines()[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output-dir", type=Path)
    parser.add_argument("--preset", default="demo")
    options = parser.parse_args()
    folder = options.output_dir or Path(tempfile.mkdtemp(prefix="neurondrift-demo-"))
    print(f"{options.preset} in {folder}, {os.cpu_count()} cores\n")
    print("| stage | seconds | peak memory (GB) | said |\n| --- | ---: | ---: | --- |")
    total, peak = 0.0, 0.0
    for stage in STAGES:
        command = [
            sys.executable,
            "-m",
            "neurondrift.cli",
            stage,
            "--preset",
            options.preset,
            "--output-dir",
            str(folder),
        ]
        seconds, memory, said = measured(command)
        total, peak = total + seconds, max(peak, memory)
        print(f"| {stage} | {seconds:.0f} | {memory:.1f} | {' '.join(said.split())} |", flush=True)
    print(f"| **all** | **{total:.0f}** | **{peak:.1f}** | |")


if __name__ == "__main__":
    main()
