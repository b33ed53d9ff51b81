"""Tables in documents: where they stand, and what they were made with."""

import os
import platform
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from neurondrift.base.files import write_text

REPOSITORY = Path(__file__).parents[1]


def markers(script: str) -> tuple[str, str]:
    """What a script's tables stand between in a document."""
    return f"<!-- made by benchmarks/{script} -->", f"<!-- end of benchmarks/{script} -->"


def write_between(document: Path, script: str, lines: Sequence[str]) -> None:
    """Put the lines between a script's markers."""
    first, last = markers(script)
    text = document.read_text(encoding="utf-8")
    if any(text.count(marker) != 1 for marker in (first, last)):
        raise SystemExit(f"{document} lacks the markers {first} and {last}")
    before, rest = text.split(first)
    _, after = rest.split(last)
    write_text(document, "\n\n".join([f"{before}{first}", "\n".join(lines), f"{last}{after}"]))


def commit() -> str:
    """The commit that is checked out, and whether anything tracked differs from it."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(REPOSITORY), *arguments], capture_output=True, text=True, check=False
        ).stdout.strip()

    head = git("rev-parse", "--short=7", "HEAD") or "no checkout"
    return head + (", with changes" if git("status", "--porcelain", "-uno") else "")


def machine() -> str:
    """Processor and cores, and whether it computes bfloat16."""
    name, flags = platform.processor() or platform.machine(), ""
    if (info := Path("/proc/cpuinfo")).exists():
        lines = [line.partition(":") for line in info.read_text().splitlines()]
        name = next((value.strip() for key, _, value in lines if key.strip() == "model name"), name)
        flags = next((value for key, _, value in lines if key.strip() == "flags"), "")
    best = next((f for f in ("avx512_bf16", "avx512f", "avx2") if f in flags.split()), "")
    return f"{name}, {os.cpu_count()} cores" + (f", {best}" if best else "")


def surroundings(*packages: str) -> str:
    """Commit, machine and versions, for the caption of a table."""
    versions = "".join(f"; {name} {metadata.version(name)}" for name in packages)
    return f"commit {commit()}; {machine()}{versions}"
