"""Two processes under torchrun."""

import os
import subprocess
import sys

import psutil

from helpers.paths import TESTS

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")


def launch(*arguments):
    """Start two processes that talk to each other, with the arguments that Python takes; they are not waited for."""
    path = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")]))
    return subprocess.Popen(
        [sys.executable, *TORCHRUN, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
    )


def children(process):
    """The ids of the processes that a launch has started, the first process's first."""
    of = {int(each.environ()["RANK"]): each.pid for each in psutil.Process(process.pid).children(recursive=True)}
    return [of[rank] for rank in sorted(of)]


def in_two_processes(module, *arguments):
    """Run a module with `-m` in two processes that talk to each other; what they wrote and how they ended."""
    process = launch("-m", module, *arguments)
    out, told = process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, out, told)
