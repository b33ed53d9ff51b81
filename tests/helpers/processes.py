"""Two processes under torchrun."""

import os
import subprocess
import sys

from helpers.paths import TESTS


def in_two_processes(module, *arguments):
    """Run a module with `-m` in two processes that talk to each other; what they wrote and how they ended."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", module]
    path = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [*command, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": path},
    )
