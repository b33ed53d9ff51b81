"""What the interventions cost on a finished study, and what they show.

    python benchmarks/interventions.py STUDY [--draws 20] [--dose-draws 3] [--freeze-draws 20] [--stop-early freeze]
        [--doses 0.1,0.25,0.5,1] [--outcome both] [--intervention NAME ...]

STUDY is the folder of a finished study, such as that of `neurondrift run --preset demo`. The runs go to a copy of it,
so that nothing is resumed and the study is left as it is. Prints the table of `neurondrift intervene`, the seconds of
each intervention and the whole. Targets, on two cores, with 20 matched random groups of both safety groups: by the
margin alone (`--outcome margin`) all interventions but freeze in at most 10 minutes; prune, rewind, transplant and
freeze by refusals (the null of freeze, which trains again, stopped once it is settled) in at most 20.
"""

import argparse
import shutil
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import get_args

import torch

from neurondrift.base.processes import tune_allocator
from neurondrift.interventions.measures import Outcome
from neurondrift.interventions.runs import RunLog
from neurondrift.interventions.trials import StopEarly
from neurondrift.report.tables.causes import section
from neurondrift.report.text import render_tables
from neurondrift.study.experiments.intervene import intervene
from neurondrift.study.folder import StudyFolder
from neurondrift.study.settings import InterveneSection, resolve

NEEDED = ("neuron_groups", "finetuned_models")


def main() -> None:
    parser = argparse.ArgumentParser(description="What the interventions cost on a finished study.")
    parser.add_argument("study", type=Path)
    parser.add_argument("--draws", type=int, default=20)
    parser.add_argument("--dose-draws", type=int, default=3)
    parser.add_argument("--freeze-draws", type=int, default=20)
    parser.add_argument("--stop-early", choices=get_args(StopEarly), default="freeze")
    parser.add_argument("--doses", help="shares, such as 0.1,0.25,0.5,1; default: those of the command")
    parser.add_argument("--outcome", choices=get_args(Outcome), default="both")
    parser.add_argument("--intervention", action="append", help="may be repeated; default: all")
    given = parser.parse_args()
    tune_allocator()
    study = resolve(file=given.study / "study.toml")
    with tempfile.TemporaryDirectory() as scratch:
        for name in NEEDED:
            shutil.copytree(given.study / name, Path(scratch) / name)
        if (given.study / "replicates").is_dir():
            shutil.copytree(given.study / "replicates", Path(scratch) / "replicates")
        folder = StudyFolder(Path(scratch), study)
        began = time.perf_counter()
        found = intervene(
            study,
            folder,
            InterveneSection(
                draws=given.draws,
                dose_draws=given.dose_draws,
                freeze_draws=given.freeze_draws,
                stop_early=given.stop_early,
                doses=[float(part) for part in given.doses.split(",")] if given.doses else None,
                interventions=given.intervention or [],
                outcome=given.outcome,
            ),
            say=lambda line: print(line, flush=True),
        )
        whole = time.perf_counter() - began
        runs = RunLog(folder.results / "interventions.parquet").runs.values()
    print("\n".join(render_tables(section(found))))
    seconds: dict[tuple[str, str], list[float]] = defaultdict(list)
    for rows in runs:
        part = "whole group" if rows[0]["dose"] == 1 else "dose"
        seconds[rows[0]["intervention"], part].append(rows[0]["seconds"])
    print(f"\n{'intervention':<14}{'on':<14}{'runs':>6}{'seconds each':>14}{'seconds':>10}")
    for (name, part), times in seconds.items():
        print(f"{name:<14}{part:<14}{len(times):>6}{sum(times) / len(times):>14.1f}{sum(times):>10.0f}")
    print(f"{torch.get_num_threads()} threads; {whole:.0f} s in all, loading and statistics included")


if __name__ == "__main__":
    main()
