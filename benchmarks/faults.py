"""What can break, and what then: commands killed, writes refused, bytes changed, inputs that nobody means.

    python benchmarks/faults.py kills --count 1000 --work ~/faults       # SIGKILL at random moments, until that many
    python benchmarks/faults.py writes --every 1 --work ~/faults         # every write, ENOSPC, EROFS and EDQUOT in turn
    python benchmarks/faults.py damage --count 10000 --work ~/faults     # a byte flipped or cut off, of any artifact
    python benchmarks/faults.py tries --count 2000 --work ~/faults       # spoiled configurations, groups, logs, data
    python benchmarks/faults.py figures --work ~/faults                  # the table of docs/architecture.md

All are of the preset `smoke` with interventions. Each try is a line of `WORK/faults.jsonl` as soon as it is done, with
its seed; a campaign that is stopped goes on from there. Ends with 1 where a try has found something. The same in short
is `tests/faults/`; how a fault is made and what must hold afterwards is in `tests/helpers/faults.py`.
"""

import argparse
import errno
import json
import os
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

NUMBERS = (errno.ENOSPC, errno.EROFS, errno.EDQUOT)
CHUNK = 50  # inputs in one try, of which each is counted


class Campaign:
    """What has been tried: one line a try, in a file that is only added to."""

    def __init__(self, work: Path) -> None:
        work.mkdir(parents=True, exist_ok=True)
        self.work, self.file = work, work / "faults.jsonl"
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        self.done: list[dict[str, Any]] = [json.loads(line) for line in lines if line.endswith("}")]

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [entry for entry in self.done if entry["kind"] == kind]

    def add(self, kind: str, key: str, *, count: int, problems: list[str]) -> None:
        entry = {"kind": kind, "key": key, "count": count, "problems": problems}
        self.done.append(entry)
        with self.file.open("a") as stream:
            stream.write(json.dumps(entry) + "\n")
        for problem in problems:
            print(f"{kind} {key}: {problem}", flush=True)

    def once(self, kind: str, key: str, attempt: Callable[[], tuple[int, list[str]]]) -> None:
        if not any(entry["key"] == key for entry in self.of(kind)):
            count, problems = attempt()
            self.add(kind, key, count=count, problems=problems)

    def reference(self) -> tuple[Path, list[float]]:
        """A study that nothing has disturbed, made once."""
        from helpers.faults import make_reference, start_server

        folder, times = self.work / "reference", self.work / "seconds.json"
        if times.exists():
            start_server(self.work / "told")
        else:
            times.write_text(json.dumps(make_reference(folder, self.work)))
        return folder, json.loads(times.read_text())


def kills(campaign: Campaign, count: int) -> None:
    from helpers.faults import killed_study

    folder, seconds = campaign.reference()
    number = 0
    while sum(entry["count"] for entry in campaign.of("kills")) < count:
        rng = random.Random(number)
        campaign.once("kills", str(number), lambda rng=rng: killed_study(folder, campaign.work, rng, seconds))
        number += 1


def writes(campaign: Campaign, every: int) -> None:
    from helpers.faults import STAGES, refused_write, writes_of

    folder, _ = campaign.reference()
    for stage in STAGES:
        for after in range(0, writes_of(stage, folder, campaign.work), every):
            for number in NUMBERS if every == 1 else (NUMBERS[after // every % 3],):
                key = f"{stage}, write {after + 1}, {errno.errorcode[number]}"
                campaign.once(
                    "writes",
                    key,
                    lambda s=stage, a=after, n=number: (1, refused_write(s, a, n, folder, campaign.work)),
                )


def damage(campaign: Campaign, count: int) -> None:
    from helpers.faults import copy_of, steps_of, unnoticed_damage

    folder, _ = campaign.reference()
    copy = copy_of(folder, campaign.work / "damaged")
    steps = steps_of(copy)
    for number in range(-(-count // CHUNK)):

        def some(number: int = number) -> tuple[int, list[str]]:
            rng = random.Random(number)
            found = [unnoticed_damage(copy, steps, rng) for _ in range(CHUNK)]
            return CHUNK, [problem for problem in found if problem]

        campaign.once("damage", str(number), some)


def tries(campaign: Campaign, count: int) -> None:
    from helpers.mutations import KINDS
    from helpers.mutations import tries as tried

    folder, _ = campaign.reference()
    scratch = campaign.work / "inputs"
    scratch.mkdir(exist_ok=True)
    for kind in KINDS:
        for number in range(-(-count // CHUNK)):
            campaign.once(
                f"tries of {kind}", str(number), lambda k=kind, n=number: (CHUNK, tried(k, scratch, CHUNK, n, folder))
            )


def figures(campaign: Campaign) -> Iterator[str]:
    """The table of the documents."""
    names = {"kills": "commands killed", "writes": "writes refused", "damage": "bytes flipped or files cut off"}
    yield "| what | times | lost, unnoticed or ended in a traceback |"
    yield "| --- | ---: | ---: |"
    for kind in dict.fromkeys(entry["kind"] for entry in campaign.done):
        entries = campaign.of(kind)
        count = sum(entry["count"] for entry in entries)
        found = sum(len(entry["problems"]) for entry in entries)
        yield f"| {names.get(kind, kind)} | {count:,} | {found} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["kills", "writes", "damage", "tries", "figures"])
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--every", type=int, default=1, help="of the writes of a stage, every Nth")
    parser.add_argument("--work", type=Path, required=True)
    given = parser.parse_args()
    campaign = Campaign(given.work.resolve())
    if given.what == "writes":
        writes(campaign, given.every)
    elif given.what != "figures":
        {"kills": kills, "damage": damage, "tries": tries}[given.what](campaign, given.count)
    print("\n".join(figures(campaign)))
    return int(any(entry["problems"] for entry in campaign.done))


if __name__ == "__main__":
    sys.exit(main())
