"""Results to report on, with one training seed and with three, and their figures."""

from pathlib import Path

import pytest

from helpers.results import make_results
from neurondrift.report.figures.draw import draw_figures


@pytest.fixture(scope="session")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[Path]]:
    """The figures of the studies with one seed and with three, drawn once."""
    return {seeds: draw_figures(make_results(seeds), tmp_path_factory.mktemp(f"seeds{seeds}")) for seeds in (1, 3)}


@pytest.fixture(params=[1, 3], ids=["one seed", "three seeds"])
def results(request: pytest.FixtureRequest) -> dict:
    return make_results(request.param)
