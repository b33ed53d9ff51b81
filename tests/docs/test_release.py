"""One version, everywhere that it stands; and what an installation needs is named."""

import re
import subprocess
import tomllib

import pytest
import yaml

import neurondrift
from helpers.paths import REPOSITORY

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]


def test_the_version_is_one():
    assert PROJECT["version"] == neurondrift.__version__
    assert yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())["version"] == neurondrift.__version__
    headings = re.findall(r"^## \[(.+?)\]", (REPOSITORY / "CHANGELOG.md").read_text(), re.M)
    assert next(heading for heading in headings if heading != "Unreleased") == neurondrift.__version__
    minor = ".".join(neurondrift.__version__.split(".")[:2])
    assert (REPOSITORY / "docs" / f"changes-{minor}.md").exists()


def test_the_date_is_one():
    released = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())["date-released"]
    assert f"## [{neurondrift.__version__}] - {released}\n" in (REPOSITORY / "CHANGELOG.md").read_text()


@pytest.mark.parametrize(
    "extra", [name for name in PROJECT["optional-dependencies"] if name not in ("harness", "vllm")]
)
def test_what_an_extra_needs_is_pinned(extra):
    """Of the extras that CI installs; the others are too large."""
    pinned = {line.partition("==")[0].lower().replace("_", "-") for line in (REPOSITORY / "constraints.txt").open()}
    needed = {re.split(r"[\[<>=]", name)[0] for name in PROJECT["optional-dependencies"][extra]}
    assert needed - {"neurondrift"} <= pinned


def test_the_check_of_a_release_is_a_script():
    subprocess.run(["bash", "-n", REPOSITORY / "scripts" / "check_release.sh"], check=True)
