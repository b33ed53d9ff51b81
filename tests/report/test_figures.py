"""Figures are written whole, the same bytes whatever the settings, and cope with little."""

import copy
from xml.etree import ElementTree

import matplotlib
import pytest

from helpers.results import FIGURE_NAMES, bare, in_one_metric, make_results
from neurondrift.report.figures.draw import draw_figures
from neurondrift.report.figures.over_training import refusals_over_training


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


def test_whole_answers_at_the_ends_are_joined_with_no_beginnings() -> None:
    """The curve is of beginnings at every step; a star, in no line, is a rate of whole answers."""
    results = make_results(1)
    for rate in results["behaviour"]["rates"]:
        rate["whole"] = rate["step"] in (0, 75)
        rate["short"] = {"rate": 0.5, "low": 0.4, "high": 0.6}
    for rate in results["behaviour"]["before_alignment"]:
        rate |= {"whole": True, "short": {"rate": 0.25, "low": 0.2, "high": 0.3}}
    lines = refusals_over_training(results).axes[0].get_lines()
    curves = [list(line.get_ydata()) for line in lines if len(line.get_ydata()) > 2]
    assert curves == [[0.5] * 4] * 3
    stars = sorted(float(line.get_ydata()[0]) for line in lines if line.get_marker() == "*")
    ends = [
        r["rate"] for r in (*results["behaviour"]["rates"], *results["behaviour"]["before_alignment"]) if r["whole"]
    ]
    assert stars == pytest.approx(sorted(ends))
    for rate in results["behaviour"]["rates"]:
        rate["whole"] = False
    lines = refusals_over_training(results).axes[0].get_lines()
    assert not any(line.get_marker() == "*" for line in lines)
