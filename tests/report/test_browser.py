"""The page in a browser: it sorts, reads out and switches, by mouse and by keyboard; small, dark, printed, hostile."""

import json
import re

import pytest

from helpers.browser import CHROMIUM, CONTRAST, opened
from helpers.change import with_change
from helpers.sweeps import studies_of, sweep_of
from neurondrift.report import wording
from neurondrift.report.blocks import Document, Section, Table, table
from neurondrift.report.document import build_document
from neurondrift.report.figures.draw import draw_figures
from neurondrift.report.figures.effects import effect_sizes
from neurondrift.report.figures.maps import of_effects
from neurondrift.report.figures.over_training import drift_over_training
from neurondrift.report.page import lay_out, render_page
from neurondrift.report.reading import primary_of
from neurondrift.report.sweep.document import build_document as sweep_document
from neurondrift.report.sweep.figures import FIGURES as SWEEP_FIGURES
from neurondrift.study.sweep.results.findings import sweep_findings

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed", exc_type=ImportError)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on this machine")

HARMLESS_ATTACK = "<script>window.acted = 1</script><img src=x onerror='window.acted = 2'>\u202e & \"'`</section>"
ANSWERS = [
    {
        "seed": 0,
        "step": 0,
        "judge": "refusal",
        "verdict": "refused",
        "coherent": True,
        "prompt": f"a prompt {HARMLESS_ATTACK}",
        "response": f"an answer {HARMLESS_ATTACK}",
    }
]
HOSTILE_GROUP = "safety_<b>top</b>\"'><script>window.acted = 3</script>"
#: What a reader can act on.
REACHABLE = "a[href], button, input, [tabindex='0']"
A4 = 680  # pixels between margins of 15 mm, at 96 to the inch


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        running = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture(scope="module")
def results():
    return with_change(1)


@pytest.fixture(scope="module")
def report(results, drawn, tmp_path_factory):
    """A study's page."""
    file = tmp_path_factory.mktemp("page") / "report.html"
    file.write_text(render_page(results, drawn[1]), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """The page of a sweep."""
    folder = tmp_path_factory.mktemp("sweep")
    made = sweep_of(folder)
    effects = [{"log_ratio": 0.1 * n, "se": 0.05, "lost": 0.1 * n} for n in range(6)]
    findings = sweep_findings(made, studies_of(made, effects))
    file = folder / "sweep_report.html"
    file.write_text(lay_out(sweep_document(findings), draw_figures(findings, folder, SWEEP_FIGURES)), encoding="utf-8")
    return file


@pytest.fixture(params=["report", "sweep"])
def file(request):
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("scripts", [True, False], ids=["scripts", "no scripts"])
@pytest.mark.parametrize("width", [360, 1300])
def test_the_browser_has_nothing_to_complain_of_and_nothing_to_load(browser, file, width, scripts):
    with opened(browser, file, width=width, scripts=scripts) as page:
        page.tab.mouse.wheel(0, 3000)
        assert page.complaints == []
        assert page.requests == [file.as_uri()]


def test_without_scripts_it_reads_the_same(browser, report, results):
    """All that a script adds are controls and a read-out: no words of the report."""
    words = "(() => { document.querySelectorAll('.series, .read-out').forEach((e) => e.remove()); return document.body.innerText; })()"
    with opened(browser, report) as page, opened(browser, report, scripts=False) as plain:
        assert page.ask(words) == plain.tab.inner_text("body")
        assert plain.tab.locator("button, input, .read-out").count() == 0
        assert plain.tab.locator("nav a").count() == plain.tab.locator("main section").count()
        document = build_document(results)
        tables = [b for s in (document.answer, *document.sections) for b in s.blocks if isinstance(b, Table)]
        assert plain.texts("caption") == [" ".join(table.title.split()) for table in tables]
        assert (
            plain.tab.locator(".panel [data-at] > title").count() == plain.tab.locator(".panel [data-at]").count() > 0
        )


def test_no_script_but_its_own_acts(browser, report, tmp_path):
    """The policy is tried with scripts that did get into a page: as an element, as a handler, as a link."""
    text = report.read_text(encoding="utf-8")
    intruders = "<script>window.acted = 1</script><img src=x onerror='window.acted = 2'><a id=in href='javascript:window.acted=3'>x</a>"
    other = tmp_path / "intruded.html"
    other.write_text(text.replace("<main>", f"<main>{intruders}"), encoding="utf-8")
    with opened(browser, other) as page:
        page.tab.locator("#in").click()
        assert page.ask("window.acted") is None
        assert sum("Content Security Policy" in complaint for complaint in page.complaints) >= 3
        assert page.tab.locator("th button").count() > 0, "its own does"
    changed = tmp_path / "changed.html"
    changed.write_text(text.replace('"use strict";', '"use strict"; '), encoding="utf-8")
    with opened(browser, changed) as page:
        assert page.tab.locator("th button").count() == 0
        assert any("Content Security Policy" in complaint for complaint in page.complaints)


def test_a_hostile_answer_and_a_hostile_name_stay_text(browser, results, tmp_path):
    hostile = json.loads(json.dumps(results).replace("safety_top", json.dumps(HOSTILE_GROUP)[1:-1]))
    hostile["attribution"]["neurons"][0]["groups"] = [HOSTILE_GROUP]
    hostile["attribution"]["neurons"][0]["module_type"] = HOSTILE_GROUP
    figures = draw_figures(hostile, tmp_path / "figures", (drift_over_training, effect_sizes))
    file = tmp_path / "report_with_responses.html"
    file.write_text(render_page(hostile, figures, ANSWERS), encoding="utf-8")
    with opened(browser, file) as page:
        (told,) = page.texts("section[id^=answers] ol li")
        for said in ("prompt", "answer"):
            assert f"{said} {wording.clean(HARMLESS_ATTACK)}" in told
        assert page.tab.locator("script").count() == 1 and page.tab.locator("main img, main b").count() == 0
        assert any(HOSTILE_GROUP.replace("_", " ") in text for text in page.texts(".series label"))
        page.tab.locator(".map").last.locator("[data-at]").first.hover()
        assert HOSTILE_GROUP in page.tab.locator(".read-out").last.text_content()
        page.tab.locator(".series input").first.uncheck()
        page.tab.locator("th button").first.click()
        assert page.ask("window.acted") is None and page.complaints == []


def worth(text):
    """The first number of a cell, as a reader sees it."""
    found = re.search(r"[-+]?\d*\.?\d+(?:e[-+]?\d+)?", text.replace(",", ""))
    return float(found[0]) if found else None


def test_tables_sort_by_any_column_and_back(browser, report):
    with opened(browser, report) as page:
        for place in range(page.tab.locator("main table").count()):
            table = page.tab.locator("main table").nth(place)
            rows = table.locator("tbody tr").count()
            if rows < 3:
                assert table.locator("button").count() == 0
        table = page.tab.locator("#final-drift-by-group table").first
        heads = table.locator("thead th")
        before = table.locator("tbody tr").all_inner_texts()
        for column in range(heads.count()):
            head, cells = heads.nth(column), table.locator(f"tbody td:nth-child({column + 1})")
            button = head.locator("button")
            for order, sign in (("ascending", 1), ("descending", -1)):
                button.click()
                assert head.get_attribute("aria-sort") == order
                told = cells.all_inner_texts()
                if "number" in (head.get_attribute("class") or ""):
                    known = [worth(text) for text in told if worth(text) is not None]
                    assert known == sorted(known, key=lambda value: sign * value)
                    assert all(worth(text) is None for text in told[len(known) :]), "what is undefined comes last"
                else:
                    assert told == sorted(told, key=str.lower)[::sign]
            button.click()
            assert head.get_attribute("aria-sort") is None
            assert table.locator("tbody tr").all_inner_texts() == before
        first, second = heads.nth(0).locator("button"), heads.nth(3).locator("button")
        first.click()
        second.click()
        assert table.locator("[aria-sort]").count() == 1, "one column at a time"


def test_numbers_are_sorted_as_numbers(browser, tmp_path):
    """Thousands, powers of ten, intervals, bounds, signs of either kind; what is no number comes last."""
    cells = ["1,372/38", "4.94e-04", "<0.0001", "-0.32", "−1.5 %", "+2.9 %", "undefined (a)", "1.01 [0.97, 1.06]", "–"]
    made = table("t", ("x",), [(cell,) for cell in cells], "r")
    document = Document(title="t", subtitle="", answer=Section(title="a", blocks=(made,)), sections=())
    file = tmp_path / "x.html"
    file.write_text(lay_out(document, []), encoding="utf-8")
    expected = [
        "−1.5 %",
        "-0.32",
        "<0.0001",
        "4.94e-04",
        "1.01 [0.97, 1.06]",
        "+2.9 %",
        "1,372/38",
        "undefined (a)",
        "–",
    ]
    with opened(browser, file) as page:
        page.tab.locator("th button").click()
        assert page.texts("tbody td") == expected


def test_the_map_reads_out_what_the_findings_hold(browser, report, results):
    effects = [e for e in results["analysis"]["effects"] if e["metric"] == primary_of(results)]
    columns = of_effects(results)[0].columns
    with opened(browser, report) as page:
        made = page.tab.locator(".map").last
        said = made.locator(".read-out")
        assert "Point at a cell" in said.text_content()
        for own in (effects[0], effects[-1]):
            asked = own["by_site"][len(own["by_site"]) // 2]
            layer, module = asked["layer"], asked["module_type"]
            at = f"{layer} {columns.index(module)}"
            made.locator(f".panel[data-name={own['group']}] [data-at='{at}']").hover()
            told = said.text_content()
            assert told.startswith(f"layer {layer}, {module}: {own['group']} ")
            sites = [
                next((s for s in e["by_site"] if (s["layer"], s["module_type"]) == (layer, module)), None)
                for e in effects
            ]
            for effect, site in zip(effects, sites, strict=True):
                value = "undefined" if site and site["ratio"] is None else site and wording.ratio(site["ratio"])
                words = f"{value}, {site['n']} member" if site else "none there"
                assert f"{effect['group']} {words}" in told
            assert said.locator(".this").count() == made.locator(".here").count() == 1
            assert made.locator(".also").count() == sum(site is not None for site in sites) - 1


def test_groups_are_switched_off_and_on(browser, report):
    with opened(browser, report) as page:
        boxes = page.tab.locator("#drift-over-training .series input")
        names = page.texts("#drift-over-training .series label")
        assert {"safety top", "random", "all neurons"} <= set(names)
        shown = "(name) => [...document.querySelectorAll(`[data-series='${name}']`)].map((e) => e.getBoundingClientRect().width > 0)"
        boxes.nth(names.index("safety top")).uncheck()
        assert not any(page.ask(shown, "safety_top")) and all(page.ask(shown, "random"))
        page.tab.get_by_role("button", name="none").click()
        assert not any(page.ask(shown, "random")) and not any(box.is_checked() for box in boxes.all())
        boxes.nth(names.index("random")).check()
        assert all(page.ask(shown, "random")) and not any(page.ask(shown, "safety_top"))
        page.tab.get_by_role("button", name="all", exact=True).click()
        assert all(page.ask(shown, "safety_top"))


def test_all_that_acts_is_reached_and_acts_by_keyboard(browser, report):
    with opened(browser, report) as page:
        wanted = page.ask(f'document.querySelectorAll("{REACHABLE}").length')
        seen, focused = (
            set(),
            "(() => { const all = [...document.querySelectorAll('*')]; return all.indexOf(document.activeElement); })()",
        )
        ring = "getComputedStyle(document.activeElement).outlineStyle + document.activeElement.getAttribute('class')"
        for _ in range(wanted):
            page.tab.keyboard.press("Tab")
            assert page.ask(ring) != "nonenull", "the focus is seen"
            seen.add(page.ask(focused))
        reachable = f"(() => {{ const all = [...document.querySelectorAll('*')]; return [...document.querySelectorAll(\"{REACHABLE}\")].map((e) => all.indexOf(e)); }})()"
        assert seen == set(page.ask(reachable)) and len(seen) > 50
        page.tab.locator("nav a").nth(4).focus()
        page.tab.keyboard.press("Enter")
        target = page.tab.locator("nav a").nth(4).get_attribute("href")
        top = page.ask("(id) => document.querySelector(id).getBoundingClientRect().top", target)
        assert page.ask("location.hash") == target and -1 <= top < 100
        button = page.tab.locator("th button").first
        button.focus()
        page.tab.keyboard.press("Enter")
        assert page.tab.locator("[aria-sort=ascending]").count() == 1
        box = page.tab.locator(".series input").first
        box.focus()
        page.tab.keyboard.press("Space")
        assert not box.is_checked() and page.tab.locator("[data-series].off").count() > 0


def test_the_arrow_keys_go_through_the_map(browser, report):
    at = "document.activeElement.dataset.at + ' ' + document.activeElement.closest('.panel').dataset.name"
    with opened(browser, report) as page:
        made = page.tab.locator(".map").last
        names = [panel.get_attribute("data-name") for panel in made.locator(".panel").all()]
        columns = 7
        made.locator("[tabindex='0']").focus()
        assert page.ask(at) == f"0 0 {names[0]}"
        for key, place in (
            ("ArrowUp", f"1 0 {names[0]}"),
            ("ArrowRight", f"1 1 {names[0]}"),
            ("ArrowDown", f"0 1 {names[0]}"),
            ("ArrowDown", f"0 1 {names[0]}"),
            ("ArrowLeft", f"0 0 {names[0]}"),
            ("ArrowLeft", f"0 0 {names[0]}"),
            *[("ArrowRight", f"0 {column} {names[0]}") for column in range(1, columns)],
            ("ArrowRight", f"0 0 {names[1]}"),
            ("ArrowLeft", f"0 {columns - 1} {names[0]}"),
        ):
            page.tab.keyboard.press(key)
            assert page.ask(at) == place
            title = page.ask("document.activeElement.querySelector('title').textContent")
            assert made.locator(".read-out").text_content().startswith(title.partition(":")[0])
        assert made.locator("[data-at][tabindex='0']").count() == 1, "one stop of the Tab key"


@pytest.mark.parametrize("width", [360, 700, 1000])
def test_a_narrow_page_does_not_scroll_sideways(browser, file, width):
    with opened(browser, file, width=width) as page:
        assert page.ask("document.documentElement.scrollWidth") <= width
        page.tab.mouse.move(width / 2, 400)
        page.tab.mouse.wheel(500, 0)
        assert page.ask("window.scrollX") == 0
        small = "[...document.querySelectorAll('p, li, td, th, caption, a')].filter((e) => parseFloat(getComputedStyle(e).fontSize) < 12 && e.innerText).length"
        assert page.ask(small) == 0
        letters = "Math.min(...[...document.querySelectorAll('.figure text, .panel text')].map((e) => parseFloat(getComputedStyle(e).fontSize) * e.getScreenCTM().d || 99).map(Math.abs))"
        if page.tab.locator(".panel text").count():
            assert page.ask(letters) > 6.5, "no letter of a figure below 6.5 pixels, indices of formulas among them"
        cut = "[...document.querySelectorAll('main p, main li, caption span, figcaption')].filter((e) => e.innerText && (e.getBoundingClientRect().right > innerWidth || e.scrollWidth > e.clientWidth + 1)).map((e) => e.innerText)"
        assert page.ask(cut) == []
        scrollers = "[...document.querySelectorAll('.wide, .figure')].filter((e) => e.scrollWidth > e.clientWidth + 1).map((e) => e.tabIndex)"
        assert set(page.ask(scrollers)) <= {0}


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_words_stand_out_from_their_ground(browser, file, dark):
    """Contrast of at least 4.5 (WCAG 2.1, AA) of every word, those in figures among them; figures have no ground."""
    worst = (
        "(() => {"
        + CONTRAST
        + """
      const ground = (e) => {
        for (; e; e = e.parentElement) {
          const colour = getComputedStyle(e).backgroundColor;
          if (colour !== 'rgba(0, 0, 0, 0)') return colour;
        }
        return getComputedStyle(document.body).backgroundColor;
      };
      const words = [...document.querySelectorAll('h1, h2, p, li, td, th, a, caption, figcaption, label, button, text')];
      return words.filter((e) => e.textContent.trim()).map((e) => {
        const style = getComputedStyle(e);
        const own = e.tagName === 'text' ? style.fill : style.color;
        return [contrast(own, ground(e)), e.tagName, e.textContent.slice(0, 40), own];
      }).filter(([found]) => !(found >= 4.5));
    })()"""
    )
    with opened(browser, file, dark=dark) as page:
        assert page.ask(worst) == []
        paper = page.ask("getComputedStyle(document.body).backgroundColor")
        assert paper == ("rgb(20, 23, 26)" if dark else "rgb(255, 255, 255)")
        grounds = "[...document.querySelectorAll('.figure svg > g > g:first-child > path')].map((e) => getComputedStyle(e).fill)"
        assert set(page.ask(grounds)) == {paper}, "a figure is drawn on the paper of the page"
        assert page.complaints == []


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_it_prints_black_on_white_and_within_the_paper(browser, file, dark):
    with opened(browser, file, width=A4, dark=dark, paper=True) as page:
        colours = page.ask("[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]")
        assert colours == ["rgb(255, 255, 255)", "rgb(0, 0, 0)"]
        assert not page.tab.locator("nav").is_visible() and not page.tab.locator(".read-out").first.is_visible()
        wide = "(most) => [...document.querySelectorAll('table, svg, p, img')].filter((e) => e.getBoundingClientRect().right > most + 1).length"
        assert page.ask(wide, A4) == 0
        assert set(page.ask("[...document.querySelectorAll('.figure text')].map((e) => getComputedStyle(e).fill)")) <= {
            "rgb(34, 34, 34)",
            "rgb(118, 118, 118)",
            "rgb(0, 0, 0)",
        }
    with opened(browser, file, dark=dark) as page:
        assert page.tab.pdf().startswith(b"%PDF")


def test_the_contents_stand_at_the_side_and_say_where_the_reader_is(browser, report):
    with opened(browser, report) as page:
        nav, main = page.tab.locator("nav").bounding_box(), page.tab.locator("main").bounding_box()
        assert nav["x"] + nav["width"] <= main["x"]
        assert page.texts("nav a") == page.texts("main h2")
        page.tab.locator("nav a", has_text="Overlap of the groups").click()
        # Not wait_for_function: it evaluates a text within the page, which the page's own policy forbids.
        playwright.expect(page.tab.locator("nav a[aria-current]")).to_have_text("Overlap of the groups")
        assert page.tab.locator("nav [aria-current]").count() == 1
        assert page.tab.locator("nav").bounding_box()["y"] >= 0, "they stay in sight"
