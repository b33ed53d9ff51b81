"""The forest plot: the names of the two sides of 1 stand apart, wherever 1 lies and in both kinds of file."""

import re

import matplotlib
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from neurondrift.report.figures.draw import draw_figures
from neurondrift.report.figures.effects import effect_sizes
from neurondrift.report.figures.style import RC


def results(low: float, high: float) -> dict:
    """One group whose interval spans `low` to `high`; a narrow band, so that 1 can lie near an edge."""
    found = {"ratio": (low * high) ** 0.5, "ratio_ci90": [low, high], "ratio_ci95": [low, high]}
    found |= {"verdict": "more", "comparable": True, "below_band": False}
    effect = {"group": "safety_top", "metric": "relative", "effect_norm": found, "by_site": []}
    return {"analysis": {"primary_metric": "relative", "metrics": ["relative"], "band": 1.02, "effects": [effect]}}


@pytest.mark.parametrize(
    ("low", "high", "where"), [(1.0, 8.0, "left"), (0.125, 1.0, "right"), (0.25, 4.0, "middle")], ids=lambda v: str(v)
)
def test_the_names_of_the_sides_of_one_do_not_run_into_each_other(low, high, where):
    with matplotlib.rc_context(RC):
        figure = effect_sizes(results(low, high))
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        renderer = canvas.get_renderer()
        ax = figure.axes[0]
        left, right = (next(t for t in ax.texts if word in t.get_text()) for word in ("less far", "moved further"))
        assert all(label.get_text() == label.get_text().strip() for label in (left, right)), "an SVG drops spaces"
        boxes = [label.get_window_extent(renderer) for label in (left, right)]
        zero = ax.transData.transform((1, 0))[0]
        share = (zero - ax.bbox.x0) / ax.bbox.width
        assert {"left": share < 0.1, "right": share > 0.9, "middle": 0.4 < share < 0.6}[where]
        point = figure.dpi / 72
        assert boxes[0].x1 <= zero - 4 * point
        assert boxes[1].x0 >= zero + 4 * point
        assert not boxes[0].overlaps(boxes[1])
        others = [t for t in ax.texts if t not in (left, right)] + [figure._suptitle, *ax.get_yticklabels()]
        for box in boxes:
            assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1, "inside the figure"
            assert not any(box.overlaps(other.get_window_extent(renderer)) for other in others)


def test_in_an_svg_each_side_has_a_place_of_its_own(tmp_path):
    draw_figures(results(1.0, 8.0), tmp_path)
    text = (tmp_path / "effect_sizes.svg").read_text()
    ends = {
        word: float(re.search(rf'text-anchor: {anchor};[^>]* x="([\d.]+)"[^>]*>[^<]*{word}', text)[1])
        for word, anchor in (("less far", "end"), ("moved further", "start"))
    }
    assert ends["moved further"] - ends["less far"] > 8
