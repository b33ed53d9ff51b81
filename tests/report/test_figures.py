"""Figures are written whole, the same bytes whatever the settings, and cope with little."""

import copy
from xml.etree import ElementTree

import matplotlib
import pytest

from helpers.results import FIGURE_NAMES, bare, in_one_metric, make_results
from neurondrift.report.figures.draw import draw_figures


@pytest.mark.parametrize("seeds", [1, 3])
def test_figures_are_written_whole(drawn, seeds: int) -> None:
    files = drawn[seeds]
    assert {p.stem for p in files} == FIGURE_NAMES
    assert {p.suffix for p in files} == {".png", ".svg"}
    assert len(files) == 2 * len(FIGURE_NAMES)
    assert sorted(p.name for p in files[0].parent.iterdir()) == sorted(p.name for p in files)
    for path in files:
        assert path.stat().st_size > 5_000
        if path.suffix == ".svg":
            ElementTree.parse(path)
            assert "<text" in path.read_text(encoding="utf-8")
        else:
            assert path.read_bytes().startswith(b"\x89PNG")


def test_the_same_results_give_the_same_bytes_whatever_the_settings(tmp_path) -> None:
    results = in_one_metric(make_results(3))
    first = draw_figures(results, tmp_path / "a")
    with matplotlib.rc_context({"font.size": 20, "svg.fonttype": "path", "savefig.dpi": 30}):
        before = dict(matplotlib.rcParams)
        again = draw_figures(results, tmp_path / "b")
        assert dict(matplotlib.rcParams) == before
    for one, two in zip(first, again, strict=True):
        assert one.read_bytes() == two.read_bytes(), one.name


def test_figures_cope_with_little(tmp_path) -> None:
    results = make_results(1)
    assert {p.stem for p in draw_figures(bare(results), tmp_path)} == {"effect_sizes", "layer_module_effects"}
    assert draw_figures({}, tmp_path) == []
    assert list(tmp_path.iterdir()) == []
    few = copy.deepcopy(results)
    few["trajectories"] = [p for p in few["trajectories"] if p["step"] in (0, 75) and p["metric"] == "relative"]
    few["behaviour"]["rates"] = [r for r in few["behaviour"]["rates"] if r["step"] in (0, 75)]
    few["behaviour"]["before_alignment"] = None
    few["distributions"] = few["distributions"][:1]
    for effect in few["analysis"]["effects"]:
        effect["by_site"] = [c for c in effect["by_site"] if c["layer"] == 0][:2]
        for cell in effect["by_site"]:
            cell["layer"] = None
    assert {p.stem for p in draw_figures(few, tmp_path)} == FIGURE_NAMES
