"""The house: what import-linter cannot say. Sizes, what must stay light, and what the picture shows.

The order of the rooms and the absence of circles are contracts in pyproject.toml, checked by `lint-imports`.
"""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = next(folder for folder in Path(__file__).parents if (folder / "pyproject.toml").exists())
SOURCE = ROOT / "src" / "neurondrift"
MODULES = sorted(SOURCE.rglob("*.py"))

MOST_MODULES, MOST_LINES = 8, 450


def named(path: Path) -> str:
    return str(path.relative_to(SOURCE))


def test_the_contracts_of_the_rooms_and_of_no_circles_are_kept():
    done = subprocess.run(
        [Path(sys.executable).parent / "lint-imports", "--no-cache"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


def test_at_most_twelve_rooms():
    entries = {entry.name for entry in SOURCE.iterdir() if entry.name != "__pycache__"}
    rooms = {name for name in entries if (SOURCE / name).is_dir()}
    assert len(rooms) <= 12
    assert entries - rooms == {"__init__.py", "py.typed"}


@pytest.mark.parametrize("folder", sorted({path.parent for path in MODULES} - {SOURCE}), ids=named)
def test_a_folder_holds_at_most_eight_modules(folder):
    assert len([path for path in folder.glob("*.py") if path.name != "__init__.py"]) <= MOST_MODULES


@pytest.mark.parametrize("path", MODULES, ids=named)
def test_a_module_is_short_and_says_in_its_first_line_what_it_owns(path):
    text = path.read_text()
    assert len(text.splitlines()) <= MOST_LINES
    first = (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]
    assert first.endswith((".", "?")), first


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        ("neurondrift", ["torch", "transformers", "numpy"]),
        ("neurondrift.base.files", ["torch", "transformers"]),
        ("neurondrift.groups.selection", ["torch", "transformers"]),
        ("neurondrift.study.settings", ["torch", "transformers"]),
        ("neurondrift.study.sweep.settings", ["torch", "transformers"]),
        ("neurondrift.study.sweep.engines", ["torch", "transformers", "ray"]),
        ("neurondrift.cli.__main__", ["torch", "transformers", "pandas"]),
        ("neurondrift.statistics.analysis", ["torch", "matplotlib"]),
        ("neurondrift.report.page", ["torch"]),
        ("neurondrift.behaviour.judges", ["torch", "transformers"]),
    ],
)
def test_light_modules_stay_light(module, forbidden):
    code = f"import sys, {module}; print([m for m in {forbidden!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_report_computes_no_statistic():
    for path in (SOURCE / "report").rglob("*.py"):
        assert "scipy" not in path.read_text()
        assert "statsmodels" not in path.read_text()


def test_nothing_is_pickled():
    for path in MODULES:
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


def test_the_documented_import_of_the_last_version_still_works():
    import neurondrift as nd

    with pytest.warns(DeprecationWarning, match=r"neurondrift\.pooled"):
        from neurondrift.drift import pooled
    with pytest.warns(DeprecationWarning, match=r"neurondrift\.weight_drifts"):
        from neurondrift.drift import weight_drifts
    assert (pooled, weight_drifts) == (nd.pooled, nd.weight_drifts)


def test_the_picture_names_every_module_and_no_other():
    drawn = subprocess.run(
        [sys.executable, "-c", "import make_architecture; print(make_architecture.picture(), end='')"],
        cwd=ROOT / "docs",
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    text = (ROOT / "docs" / "architecture.md").read_text()
    assert f"```text\n{drawn}```" in text, "run: python docs/make_architecture.py"
    names = re.findall(r"^ +(\w+\.py) ", drawn, re.MULTILINE)
    shown = [path for path in MODULES if path.name != "__init__.py" or path.parent == SOURCE]
    assert sorted(names) == sorted(path.name for path in shown)


def test_the_tour_and_the_document_name_files_that_exist():
    text = (ROOT / "docs" / "architecture.md").read_text()
    named_files = set(re.findall(r"`((?:\w+/)+\w+\.py)`", text))
    assert len(named_files) >= 6
    for name in named_files:
        assert (SOURCE / name).exists() or (ROOT / name).exists(), name
