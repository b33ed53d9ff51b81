"""Imports go downward only, and what must stay light stays light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.paths import SOURCE

# A module may import modules of lower layers, and of its own package.
LAYERS = [
    ["errors"],
    ["artifacts", "config", "distributed", "memory", "progress", "threads"],
    ["folder", "sites"],
    ["data", "groups"],
    ["members"],
    ["masked_lora"],
    ["freezing"],
    ["models"],
    ["batches"],
    ["importance", "drift", "behaviour", "statistics"],
    ["training", "findings", "magnitudes", "verify", "report"],
    ["stages"],
    ["study", "stability", "interventions", "rank_level"],
    ["cli"],
]

RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}

SIDEWAYS = {("verify", "training"), ("rank_level", "interventions")}  # none of these is a cycle


def top_level_imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("neurondrift"):
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names if alias.name in RANK}
    return found


def unit_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_go_downward(path):
    unit = unit_of(path)
    if unit in ("__init__", "__main__"):
        return
    assert unit in RANK, f"{unit} has no layer: add it to the picture in docs/architecture.md and to LAYERS"
    for imported in top_level_imports(path) - {unit}:
        if unit == "study" and imported == "stages":
            continue
        assert RANK[imported] < RANK[unit] or (unit, imported) in SIDEWAYS, (
            f"{unit} imports {imported}, which is not below it"
        )


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        ("neurondrift", ["torch", "transformers", "numpy"]),
        ("neurondrift.config", ["torch", "transformers"]),
        ("neurondrift.cli", ["torch", "transformers", "pandas"]),
        ("neurondrift.statistics", ["torch", "matplotlib"]),
        ("neurondrift.report", ["torch"]),
        ("neurondrift.behaviour.judges", ["torch", "transformers"]),
    ],
)
def test_light_modules_stay_light(module, forbidden):
    code = f"import sys, {module}; print([m for m in {forbidden!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_report_computes_no_statistic():
    for path in (SOURCE / "report").glob("*.py"):
        assert "scipy" not in path.read_text()
        assert "statsmodels" not in path.read_text()


def test_nothing_is_pickled():
    for path in SOURCE.rglob("*.py"):
        names = {
            alias.name
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Import)
            for alias in node.names
        }
        assert not names & {"pickle", "joblib", "dill"}
        assert "torch.load(" not in path.read_text()
        assert "torch.save(" not in path.read_text()


def test_public_names_exist():
    import neurondrift as nd

    for name in nd.__all__:
        assert getattr(nd, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'scroe'"):
        nd.scroe  # noqa: B018
