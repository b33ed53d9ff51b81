"""What contributors are told is so: paths that are named are there, and the hooks are the commands of CI."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

REPOSITORY = Path(__file__).parents[2]
PACKAGE = REPOSITORY / "src" / "neurondrift"
GUIDE = (REPOSITORY / "CONTRIBUTING.md").read_text()


@pytest.mark.parametrize("named", sorted(set(re.findall(r"`([\w./-]+(?:/|\.(?:py|md|toml|sh)))`", GUIDE))))
def test_a_path_that_is_named_is_there(named):
    assert (REPOSITORY / named).exists() or (PACKAGE / named).exists()


@pytest.mark.parametrize(
    ("file", "names"),
    [
        ("importance/methods.py", ["METHODS"]),
        ("importance/experts.py", ["observed_experts"]),
        ("models/adapters.py", ["NO_WEIGHT_CHANGE", "BY_TOKEN", "REBASING"]),
        ("behaviour/judges.py", ["JUDGES"]),
        ("behaviour/classifiers.py", ["FORMS", "_kind_of"]),
        ("behaviour/requests.py", ["Attack"]),
        ("study/sections/scoring.py", ["ScoreSection", "OfWeights", "OfNeurons"]),
        ("study/settings.py", ["EvaluateSection"]),
        ("attribution/measures/registry.py", ["MEASURES", "Measure"]),
        ("study/stages/table.py", ["Stage"]),
        ("study/runner.py", ["STAGE_FORMAT"]),
        ("cli/app.py", ["Flags"]),
        ("base/files.py", ["atomic_path"]),
    ],
)
def test_a_name_that_is_given_stands_in_its_file(file, names):
    text = (PACKAGE / file).read_text()
    for name in names:
        assert f"`{name}" in GUIDE or f".{name}`" in GUIDE
        assert re.search(rf"^(?:def |class )?{name}\b", text, re.M), f"{file} has no {name}"


def test_the_order_of_rooms_is_the_one_that_is_enforced():
    settings = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["importlinter"]
    layers = next(contract["layers"] for contract in settings["contracts"] if contract["type"] == "layers")
    enforced = [set(re.split(r"[ |]+", layer)) for layer in reversed(layers)]
    (line,) = re.findall(r"^    (base  <.*)$", GUIDE, re.M)
    assert [set(re.split(r", ", rooms.strip())) for rooms in line.split("<")] == enforced


def test_the_hooks_are_the_commands_of_ci():
    lines = (REPOSITORY / ".ci" / "run").read_text().splitlines()
    checks = [line for line in lines if re.match(r"(ruff|lint-imports|mypy)\b", line)]
    (source,) = yaml.safe_load((REPOSITORY / ".pre-commit-config.yaml").read_text())["repos"]
    assert source["repo"] == "local"
    assert all(hook["language"] == "system" for hook in source["hooks"])
    entries = [hook["entry"].removesuffix(" --force-exclude") for hook in source["hooks"]]
    commands = [re.sub(r"( --check)?( \.)?$", "", line) for line in checks]
    assert entries == [f".venv/bin/{command}" for command in commands]
