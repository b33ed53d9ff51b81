"""Twelve studies on Ray with two workers, one of them killed on purpose, against the same one after the other.

    OMP_NUM_THREADS=1 python benchmarks/sweep.py --folder /tmp/sweeps            # about half an hour on 2 CPU cores
    OMP_NUM_THREADS=1 python benchmarks/sweep.py --folder /tmp/sweeps --seeds 1  # a third of it

Three seeds, two ranks and two data sets of the preset smoke. The worker that has come into the middle of a training is
killed with SIGKILL. Then: do all studies end, is each equal to its twin to the last bit (`same_results.py`), how often
was each shared stage done, and how long did either take? Ends with 1 where a study is missing or differs.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from same_results import main as differs

from neurondrift.study.sweep.folder import SweepFolder
from neurondrift.study.sweep.settings import read_sweep

SWEEP = """name = "twelve"
preset = "smoke"

[engine]
num_cpus = 1

[grid]
finetune.data = [{{ source = "builtin:ordinary", limit = 24 }}, {{ source = "builtin:ordinary-align", limit = 24 }}]
finetune.lora_r = [4, 8]
seeds = {seeds}
"""
IN_TRAINING = re.compile(r"[1-9]\d* of ")


def kill_one(folder: SweepFolder, names: list[str], killed: list[str]) -> None:
    """SIGKILL for the first worker that is seen in the middle of a training."""
    while not killed:
        for name in names:
            status = folder.status(name)
            if status.state == "running" and status.stage.startswith("finetune") and IN_TRAINING.match(status.progress):
                killed.append(f"{name} at {status.progress.partition(',')[0]} steps")
                os.kill(status.process, signal.SIGKILL)
                return
        time.sleep(0.2)


def run(file: Path, folder: Path, *flags: str) -> float:
    began = time.perf_counter()
    command = [sys.executable, "-m", "neurondrift.cli", "sweep", str(file), "--output-dir", str(folder), *flags]
    done = subprocess.run(command, check=False)
    print(f"{folder.name}: exit code {done.returncode}", flush=True)
    return time.perf_counter() - began


def done_stages(folder: SweepFolder, names: list[str]) -> dict[str, int]:
    """How often each stage was done, by what the logs say: a line with seconds, not `stands` or `is shared`."""
    lines = [line for name in names for line in folder.log(name).read_text().splitlines()]
    return {
        stage: sum(bool(re.match(rf"{stage}\b.*?\s\d+(\.\d+s|m\d\ds)\s\s", line)) for line in lines)
        for stage in ("align", "score", "groups", "finetune", "evaluate", "analyze", "report")
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    file = arguments.folder / "sweep.toml"
    file.write_text(SWEEP.format(seeds=list(range(arguments.seeds))))
    names = [point.name for point in read_sweep(file).points]
    on_ray, local = (SweepFolder(arguments.folder / name) for name in ("ray", "local"))
    killed: list[str] = []
    threading.Thread(target=kill_one, args=(on_ray, names, killed), daemon=True).start()
    seconds = {"ray": run(file, on_ray.root, "--engine", "ray", "--workers", "2"), "local": run(file, local.root)}
    bad = 0
    for name in names:
        states = [folder.status(name) for folder in (on_ray, local)]
        if any(state.state != "done" for state in states):
            print(f"{name}: {', '.join(state.state for state in states)}")
            bad += 1
        else:
            print(name, end=": ", flush=True)
            bad += differs(local.study(name), on_ray.study(name))
    pooled = [json.loads(folder.results_file.read_text()) for folder in (on_ray, local)]
    same = all(
        pooled[0][key] == pooled[1][key] for key in ("pooled", "subgroups", "regressions", "controls", "studies")
    )
    print(f"killed: {', '.join(killed) or 'NOBODY'}")
    print(f"tries on Ray: {[on_ray.status(name).tries for name in names]}")
    for folder in (on_ray, local):
        print(f"stages done, {folder.root.name}: {done_stages(folder, names)}")
    print(f"seconds: Ray with two workers {seconds['ray']:.0f}, local {seconds['local']:.0f}")
    print(f"what the studies say together is {'the same' if same else 'NOT THE SAME'}")
    print(f"{len(names) - bad} of {len(names)} studies ended and are equal to the last bit")
    return int(bad > 0 or not same or not killed)


if __name__ == "__main__":
    sys.exit(main())
