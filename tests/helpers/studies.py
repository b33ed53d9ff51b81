"""Studies of the tiny model, run in this process, and the command line in another."""

import subprocess
import sys

from helpers.paths import REPOSITORY
from neurondrift.study.runner import StudyRun
from neurondrift.study.settings import resolve

SETTINGS = {"evaluate.max_new_tokens": 4, "evaluate.final_max_new_tokens": 6}


def smoke(**flags):
    return resolve(preset="smoke", flags={**SETTINGS, **flags})


def run(study, folder, **arguments):
    lines = []
    StudyRun(study, folder, say=lines.append).run(**arguments)
    return lines


def stands(lines):
    return [line.split()[0] for line in lines if line.rstrip().endswith("stands")]


def command(*arguments, script=None):
    head = [sys.executable, "-m", "neurondrift.cli"] if script is None else [sys.executable, str(REPOSITORY / script)]
    return subprocess.run([*head, *arguments], capture_output=True, text=True, check=False)
