"""What can break, and what then: commands killed, writes refused, bytes changed, inputs that nobody means.

    python benchmarks/faults.py kills --count 1000 --work ~/faults       # SIGKILL at random moments, until that many
    python benchmarks/faults.py writes --work ~/faults                   # every write refused, and killed at it
    python benchmarks/faults.py damage --count 10000 --work ~/faults     # a byte flipped or cut off, of any artifact
    python benchmarks/faults.py tries --count 2000 --work ~/faults       # spoiled configurations, groups, logs, data
    python benchmarks/faults.py figures --work ~/faults                  # writes the table of docs/architecture.md

All are of the preset `smoke` with every experiment, `diff`, and an evaluation of a model alone (`JOBS` of
`tests/helpers/faults.py`, which says what must hold afterwards). Each try is a line of `WORK/faults.jsonl` as soon as
it is done, with its seed and the commit; a campaign that is stopped (`--minutes`, or in any way) goes on from there.
What had found something is tried again at another commit. Ends with 1 where something is still found. The same in
short is `tests/faults/`.
"""

import argparse
import errno
import itertools
import json
import os
import platform
import random
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from document import commit, write_between

REPOSITORY = Path(__file__).parents[1]
sys.path.insert(0, str(REPOSITORY / "tests"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

NUMBERS = (errno.ENOSPC, errno.EROFS, errno.EDQUOT)
CHUNK = 50  # inputs in one try, of which each is counted
DOCUMENT = REPOSITORY / "docs" / "architecture.md"


class Campaign:
    """What has been tried: one line a try, in a file that is only added to."""

    def __init__(self, work: Path, minutes: float) -> None:
        work.mkdir(parents=True, exist_ok=True)
        self.work, self.file, self.until = work, work / "faults.jsonl", time.monotonic() + 60 * minutes
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        self.entries: list[dict[str, Any]] = [json.loads(line) for line in lines if line.endswith("}")]
        self.commit = commit()

    def of(self, kind: str) -> dict[str, dict[str, Any]]:
        """The last try of each key."""
        return {entry["key"]: entry for entry in self.entries if entry["kind"] == kind}

    def once(self, kind: str, key: str, attempt: Callable[[], tuple[int, list[str]]]) -> bool:
        """Try what has not been tried, or not since it found something; False where the time is over."""
        last = self.of(kind).get(key)
        if last is not None and (not last["problems"] or last["commit"] == self.commit):
            return True
        if time.monotonic() > self.until:
            return False
        began = time.process_time()
        count, problems = attempt()
        entry = {
            "kind": kind, "key": key, "count": count, "problems": problems, "commit": self.commit,
            "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
            "seconds": round(time.process_time() - began, 2),
        }  # fmt: skip
        self.entries.append(entry)
        with self.file.open("a") as stream:
            stream.write(json.dumps(entry) + "\n")
        for problem in problems:
            print(f"{kind} {key}: {problem}", flush=True)
        return True

    def reference(self) -> tuple[Path, dict[str, float]]:
        """A study that nothing has disturbed, made once."""
        from helpers.faults import make_reference, start_server

        folder, times = self.work / "reference", self.work / "seconds.json"
        if times.exists():
            start_server(self.work / "told")
        else:
            times.write_text(json.dumps(make_reference(folder, self.work)))
        return folder, json.loads(times.read_text())


def kills(campaign: Campaign, count: int) -> None:
    """The jobs in turn, each killed up to four times; a whole study now and then."""
    from helpers.faults import FROM_NOTHING, JOBS, killed_job

    folder, seconds = campaign.reference()
    jobs = {"everything": FROM_NOTHING, **JOBS}
    for number, name in zip(itertools.count(), itertools.cycle(jobs), strict=False):
        if sum(entry["count"] for entry in campaign.of("kills").values()) >= count:
            return
        rng = random.Random(number)
        if not campaign.once(
            "kills",
            f"{number} {name}",
            lambda rng=rng, name=name: killed_job(jobs[name], folder, campaign.work, rng, seconds, most=4),
        ):
            return


def writes(campaign: Campaign, _: int) -> None:
    """Every write of every job, in an order of chance, so that a part of the campaign is a sample of it."""
    from helpers.faults import JOBS, KILLED, disturbed_write, writes_of

    folder, _ = campaign.reference()
    found = campaign.work / "writes.json"
    if not found.exists():
        found.write_text(json.dumps({name: writes_of(name, folder, campaign.work) for name in JOBS}))
    places = [
        (name, index, after)
        for name, counts in json.loads(found.read_text()).items()
        for index, count in enumerate(counts)
        for after in range(count)
    ]
    random.Random(0).shuffle(places)
    for place, number in zip(places, itertools.cycle(NUMBERS), strict=False):
        name, index, after = place
        if not campaign.once(
            f"writes of {len(places)}",
            f"{name}, command {index + 1}, write {after + 1}, {errno.errorcode[number]}, then killed",
            lambda n=name, i=index, a=after, e=number: (
                1,
                disturbed_write(n, i, a, (e, KILLED), folder, campaign.work),
            ),
        ):
            return


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

        if not campaign.once("damage", str(number), some):
            return


def tries(campaign: Campaign, count: int) -> None:
    from helpers.mutations import KINDS
    from helpers.mutations import tries as tried

    folder, _ = campaign.reference()
    scratch = campaign.work / "inputs"
    scratch.mkdir(exist_ok=True)
    for number, kind in itertools.product(range(-(-count // CHUNK)), KINDS):
        if not campaign.once(kind, str(number), lambda k=kind, n=number: tried(k, scratch, CHUNK, n, folder)):
            return


def figures(campaign: Campaign) -> Iterator[str]:
    """The table of the documents."""
    names = {
        "kills": "commands killed at random moments",
        "damage": "bytes flipped or files cut off, of every artifact",
    }
    yield "| what | tried | had found something, until mended | still finds something | last at commit |"
    yield "| --- | ---: | ---: | ---: | --- |"
    for kind in sorted({entry["kind"] for entry in campaign.entries}, key=lambda kind: (kind not in names, kind)):
        last = campaign.of(kind)
        name = names.get(kind, kind)
        if kind.startswith("writes of "):
            name = f"writes refused, then killed at the same write ({kind.removeprefix('writes of ')} there are)"
        count = sum(entry["count"] for entry in last.values())
        ever = {entry["key"] for entry in campaign.entries if entry["kind"] == kind and entry["problems"]}
        still = {key for key, entry in last.items() if entry["problems"]}
        commit = next(entry["commit"] for entry in reversed(campaign.entries) if entry["kind"] == kind)
        yield f"| {name} | {count:,} | {len(ever - still)} | {len(still)} | `{commit}` |"
    machines = sorted({entry["machine"] for entry in campaign.entries})
    yield ""
    yield f"Written by `python benchmarks/faults.py figures`; {'; '.join(machines)}."


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["kills", "writes", "damage", "tries", "figures"])
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--minutes", type=float, default=24 * 60, help="begin no try after so many")
    parser.add_argument("--work", type=Path, required=True)
    given = parser.parse_args()
    campaign = Campaign(given.work.resolve(), given.minutes)
    if given.what == "figures":
        write_between(DOCUMENT, Path(__file__).name, list(figures(campaign)))
    else:
        {"kills": kills, "writes": writes, "damage": damage, "tries": tries}[given.what](campaign, given.count)
    print("\n".join(figures(campaign)))
    return int(
        any(entry["problems"] for kind in {e["kind"] for e in campaign.entries} for entry in campaign.of(kind).values())
    )


if __name__ == "__main__":
    sys.exit(main())
