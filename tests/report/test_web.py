"""Figures within the page, and maps: what they hold, against the findings; what may not be in them."""

import copy
import math
import re

import pytest

from helpers.change import with_change
from helpers.results import bare, make_results
from neurondrift.report import wording
from neurondrift.report.figures.cells import ratio_cells
from neurondrift.report.figures.maps import of_effects, of_shares
from neurondrift.report.page import render_page
from neurondrift.report.reading import primary_of
from neurondrift.report.web.assets import script, style, themed
from neurondrift.report.web.cells import map_html
from neurondrift.report.web.svg import inlined

SVG = '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="0 0 10 10">{}</svg>'
HOSTILE = {
    "a script": "<script>alert(1)</script>",
    "a handler": '<g onload="alert(1)"/>',
    "html": "<foreignObject><p>x</p></foreignObject>",
    "a link": '<a xlink:href="https://example.org"><text>x</text></a>',
    "another file": '<use xlink:href="other.svg#x"/>',
    "an image from elsewhere": '<image xlink:href="https://example.org/x.png"/>',
    "a page as an image": '<image xlink:href="data:text/html,x"/>',
    "a style that loads": '<path style="fill: url(https://example.org/x)"/>',
    "an animation": '<set attributeName="href" to="x"/>',
    "no xml": "<g>",
}


@pytest.mark.parametrize("inside", HOSTILE.values(), ids=HOSTILE)
def test_what_is_no_drawing_is_embedded_as_an_image(tmp_path, inside) -> None:
    file = tmp_path / "figure.svg"
    file.write_text(SVG.format(inside))
    assert inlined(file, "x") is None
    page = render_page(make_results(1), [file])
    assert inside not in page and '<img src="data:image/svg+xml;base64,' in page


def test_a_drawing_keeps_what_it_shows_under_ids_and_colours_of_the_page(tmp_path) -> None:
    file = tmp_path / "one.svg"
    inside = (
        '<defs><style>*{color:red}</style><path id="m1" d="M0 0"/></defs><metadata><x/></metadata>'
        '<g id="series/a%20%3Cb%3E_c%2F1/0"><use xlink:href="#m1" style="fill: #222222; stroke: #123456"/></g>'
        '<g clip-path="url(#m1)"><text>a &lt; "b"</text></g>'
    )
    file.write_text(SVG.format(inside))
    told = inlined(file, 'what "it" <shows>')
    assert told is not None and "metadata" not in told and "color:red" not in told and "xmlns" not in told
    assert 'id="one-m1"' in told and 'href="#one-m1"' in told and 'clip-path="url(#one-m1)"' in told
    assert "fill: var(--figure-222222,#222222); stroke: #123456" in told
    assert re.search(r'data-series="a (<|&lt;)b(>|&gt;)_c/1"', told)
    assert "a &lt; " in told and "&quot;it&quot;" in told


def test_every_curve_of_the_drift_can_be_told_apart(drawn) -> None:
    for seeds, files in drawn.items():
        (file,) = (path for path in files if path.name == "drift_over_training.svg")
        told = inlined(file, "")
        groups = {point["group"] for point in make_results(seeds)["trajectories"]} - {"all"}
        named = re.findall(r'data-series="([^"]*)"', told)
        assert {"safety_top", "random", "all neurons"} <= set(named) <= groups | {"all neurons"}
        assert named.count("safety_top") == 3 * (3 if seeds == 1 else 2 * (seeds + 1)), "in each of three panels"


def test_colours_for_dark_mode_are_those_of_the_figures(drawn) -> None:
    """What a figure is drawn with, but for colours that are seen on both papers, has a colour for dark mode."""
    used = set()
    for path in drawn[3]:
        if path.suffix == ".svg" and path.stem != "layer_module_effects":
            used |= set(re.findall(r"(?:fill|stroke): #([0-9a-f]{6})", path.read_text()))
    assert used - themed() <= {"d55e00", "cc79a7", "e69f00", "56b4e9"}
    assert {"222222", "ffffff", "767676"} <= themed()


def test_the_map_holds_the_ratio_of_every_site(results: dict) -> None:
    (made,) = of_effects(results)
    effects = [e for e in results["analysis"]["effects"] if e["metric"] == primary_of(results)]
    assert {panel.title for panel in made.panels} == {effect["group"] for effect in effects}
    for effect in effects:
        (panel,) = (panel for panel in made.panels if panel.title == effect["group"])
        told = {(made.rows[cell.row], made.columns[cell.column]): cell for cell in panel.cells}
        assert len(told) == len(effect["by_site"])
        for site in effect["by_site"]:
            cell = told[str(site["layer"]), site["module_type"]]
            value = "undefined" if site["ratio"] is None else wording.ratio(site["ratio"])
            assert cell.text == f"{value}, {site['n']} member{'s' * (site['n'] != 1)}"
            if site["ratio"] is None:
                assert cell.value is None
            else:
                assert (cell.value > 0) == (site["ratio"] > 1) and abs(cell.value) <= 1
    text = map_html(made)
    assert text.count("<title>") == sum(len(panel.cells) for panel in made.panels)
    assert of_effects(bare(results))[0] == made and of_effects({}) == ()


def test_experts_that_share_a_place_share_a_cell() -> None:
    effect = {
        "by_site": [
            {"site": f"x.{n}", "layer": 1, "module_type": "up", "n": n, "ratio": ratio, "g": 0, "reason": ""}
            for n, ratio in ((1, 2.0), (3, 0.5), (4, None))
        ]
    }
    (cell,) = ratio_cells(effect).values()
    assert cell.n == 8 and cell.sites == 3
    assert math.exp(cell.log_ratio) == pytest.approx(2 ** ((1 - 3) / 4))


def test_the_map_of_shares_adds_up() -> None:
    found = with_change()["attribution"]
    (made,) = of_shares(found)
    (panel,) = made.panels
    largest = max(abs(site["share"]) for site in found["by_site"])
    assert sum(cell.value for cell in panel.cells) * largest == pytest.approx(1, abs=1e-6)
    assert max(abs(cell.value) for cell in panel.cells) == 1
    older = copy.deepcopy(found)
    del older["by_site"]
    assert of_shares(older) == of_shares({**found, "by_site": []}) == ()


def test_a_map_stands_for_its_figure_where_there_is_one(drawn) -> None:
    results = make_results(1)
    page, without = render_page(results, drawn[1]), copy.deepcopy(results)
    assert "layer_module_effects" not in page and page.count('class="map"') == 1
    for effect in without["analysis"]["effects"]:
        effect["by_site"] = []
    page = render_page(without, drawn[1])
    assert page.count('class="map"') == 0 and 'id="layer_module_effects-' in page


def test_names_in_a_map_are_escaped() -> None:
    results = make_results(1)
    for effect in results["analysis"]["effects"]:
        effect["group"] += '"><script>alert(1)</script>'
        for part in (*effect["by_site"], *effect["by_module"]):
            for key in ("module_type", "name"):
                if key in part:
                    part[key] += '"><script>x</script>'
    (made,) = of_effects(results)
    assert "<script" not in map_html(made)


def test_the_files_of_the_page_are_of_it_alone() -> None:
    """Nothing in them is fetched, and the script neither makes markup of text nor keeps anything."""
    assert not re.search(r"https?:|@import|url\(", style() + script())
    for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "eval", "Function(", "fetch", "XMLHttp", "Storage"):
        assert word not in script(), word
