"""The recipes for clusters: the shell reads them, Slurm's and Ray's own keys, and commands that the package has."""

import json
import re
import shlex
import subprocess
from importlib import resources
from pathlib import Path

import pytest
import yaml

from neurondrift.cli.__main__ import app
from neurondrift.study.sweep.folder import SweepFolder
from neurondrift.study.sweep.settings import read_sweep
from neurondrift.study.sweep.sharing import plan

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "examples" / "cluster"
JOBS = sorted(CLUSTER.glob("*.sbatch"))
#: Of sbatch(1), those that the recipes use.
DIRECTIVES = {
    "array", "cpus-per-task", "exclusive", "gpus-per-node", "gpus-per-task", "job-name", "mem", "nodes", "ntasks",
    "ntasks-per-node", "output", "requeue", "signal", "time",
}  # fmt: skip
VARIABLES = {"SLURM_ARRAY_TASK_ID": "3", "SLURM_SUBMIT_DIR": "/work", "SLURM_GPUS_ON_NODE": "8", "PORT": "6379"}


def commands(text):
    """The words of every call of neurondrift in a script or document, variables put in."""
    text = re.sub(r"\\\n\s*", " ", text)
    for line in text.splitlines():
        found = re.search(
            r"(?:-m neurondrift\.cli|(?:^|[\s\"(])neurondrift) ((?:run|score|sweep|verify)\b[^#`&;)\n]*)", line
        )
        if found and not found[1].strip().endswith("…"):
            words = (
                found[1].replace('" ', " ").rstrip().removesuffix('"') if line.lstrip().startswith("#") else found[1]
            )
            yield [re.sub(r"\$\{?(\w+)\}?", lambda m: VARIABLES.get(m[1], "word"), word) for word in shlex.split(words)]


@pytest.mark.parametrize("job", JOBS, ids=lambda path: path.name)
def test_a_job_is_a_script_with_slurms_own_directives(job):
    subprocess.run(["bash", "-n", job], check=True)
    text = job.read_text()
    assert text.startswith("#!/bin/bash\n") and "set -euo pipefail" in text
    named = re.findall(r"^#SBATCH --([\w-]+)", text, re.M)
    assert named and set(named) <= DIRECTIVES
    # what comes after the first command is not read by Slurm
    assert text.rindex("#SBATCH") < text.index("set -euo")


@pytest.mark.parametrize(
    "file",
    [*JOBS, CLUSTER / "ray_cluster.yaml", CLUSTER / "sweep.toml", ROOT / "docs" / "scale.md"],
    ids=lambda p: p.name,
)
def test_commands_are_ones_that_the_package_has(file):
    found = list(commands(file.read_text()))
    assert found
    for words in found:
        command, _, _ = app.parse_args(words, exit_on_error=False, print_error=False)
        assert command.__name__ == words[0]


def test_a_wrong_flag_would_be_seen():
    (words,) = commands("srun neurondrift sweep sweep.toml --ony 3\n")
    with pytest.raises(Exception, match="ony"):
        app.parse_args(words, exit_on_error=False, print_error=False)


def test_the_array_runs_every_point_and_those_that_share_nothing_first(tmp_path):
    sweep = read_sweep(CLUSTER / "sweep.toml")
    text = (CLUSTER / "slurm_sweep.sbatch").read_text()
    assert re.search(r"^#SBATCH --array=0-(\d+)$", text, re.M)[1] == str(len(sweep.points) - 1)
    first, rest = (numbers(each) for each in re.findall(r"--parsable --array=([\d,-]+) ", text))
    assert sorted(first + rest) == list(range(len(sweep.points)))
    shared = plan(sweep, SweepFolder(tmp_path))
    made = [pair for index in first for pair in shared.of(sweep.points[index].name)]
    assert len(made) == len(set(made))
    assert {pair for index in rest for pair in shared.of(sweep.points[index].name)} == set(made)


def numbers(text):
    """Slurm's `0-2,6-8`."""
    parts = [part.split("-") for part in text.split(",")]
    return [number for part in parts for number in range(int(part[0]), int(part[-1]) + 1)]


def test_the_ray_cluster_is_as_ray_wants_it():
    jsonschema = pytest.importorskip("jsonschema")
    pytest.importorskip("ray")
    schema = json.loads((resources.files("ray") / "autoscaler" / "ray-schema.json").read_text())
    content = yaml.safe_load((CLUSTER / "ray_cluster.yaml").read_text())
    jsonschema.validate(content, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**content, "max_wrokers": 4}, schema)
    assert content["head_node_type"] in content["available_node_types"]


def test_documents_name_every_recipe():
    text = (ROOT / "docs" / "scale.md").read_text()
    for path in CLUSTER.iterdir():
        assert path.name in text
