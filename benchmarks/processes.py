"""Training that is killed in two processes and goes on in one, and the other way round: is it as if it never was?

    PYTHONPATH=tests python benchmarks/processes.py [--times 10] [--seed 0]

A tiny Llama (LoRA, four steps, a checkpoint at each) is killed (SIGKILL, one process of two or the only one) at a random
moment between its first checkpoint and its end. Then it goes on in one process, or in two, and its adapters and drift
are compared with those of a run that nothing disturbed: the largest difference is printed, and how far the killed run
had come.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from helpers.alike import differences
from helpers.distributed_training import train
from helpers.processes import children, launch
from neurondrift.base.processes import joined_processes

TOLERANCE = 1e-5
STEPS = 4  # of the training


def killed(folder: Path, rng: random.Random, *, two: bool) -> str:
    """Kill a training at a random moment about a checkpoint that is drawn; the steps that it had saved."""
    worker = (__file__, "--train", str(folder))
    process = launch(*worker) if two else subprocess.Popen([sys.executable, *worker], stderr=subprocess.DEVNULL)
    trainer = folder / "llama" / "trainer"
    first = trainer / f"checkpoint-{rng.randrange(1, STEPS)}"
    while not first.exists() and process.poll() is None:
        time.sleep(0.002)
    time.sleep(rng.uniform(0, 0.2))
    if process.poll() is None:
        os.kill(children(process)[rng.randrange(2)] if two else process.pid, signal.SIGKILL)
    process.communicate()
    return ", ".join(sorted(path.name for path in trainer.glob("checkpoint-*"))) or "all done"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.train:
        with joined_processes():
            for folder in options.train:
                train("llama", Path(folder))
        return
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        train("llama", root / "undisturbed")
        tries = [(root / str(number), number % 2 == 0) for number in range(options.times)]
        left = {folder: killed(folder, rng, two=two) for folder, two in tries}
        for folder, two in tries:
            if two:
                train("llama", folder)
        process = launch(__file__, "--train", *(folder for folder, two in tries if not two))
        _, told = process.communicate()
        if process.returncode:
            raise SystemExit(told[-3000:])
        wrong = 0
        for folder, two in tries:
            found = differences(root / "undisturbed" / "llama", folder / "llama", tolerance=TOLERANCE)
            wrong += bool(found)
            way = "killed in two, goes on in one" if two else "killed in one, goes on in two"
            print(f"{way}; left: {left[folder]}; {found[:3] or 'as if never killed'}")
    print(f"{options.times} kills, {wrong} with a difference above {TOLERANCE:g}")
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
