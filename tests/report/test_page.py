"""The page: well-formed, self-contained, hostile names escaped, the same tables as the text."""

import base64
import hashlib
import html
import json
import re
from html.parser import HTMLParser

from helpers.results import FIGURE_NAMES, in_one_metric, results_text
from neurondrift.report.blocks import Table
from neurondrift.report.document import build_document
from neurondrift.report.figures.draw import draw_figures
from neurondrift.report.page import render_page
from neurondrift.report.text import render_text
from neurondrift.report.web.assets import script

HOSTILE = "<script>alert('x')</script> & \"q\" $a$ {b}\n\x1b[31m"


class Tags(HTMLParser):
    """The tags of a page, and those left open."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.loads: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data")]
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag not in ("meta", "img", "wbr"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def parse(page: str) -> Tags:
    tags = Tags()
    tags.feed(page)
    assert tags.open == []
    return tags


def test_hostile_names_are_escaped(tmp_path) -> None:
    hostile = json.loads(results_text(1).replace("safety_top", json.dumps("safety" + HOSTILE)[1:-1]))
    hostile["study"].update(name=HOSTILE, model=HOSTILE, finetune={HOSTILE: HOSTILE})
    for effect in hostile["analysis"]["effects"]:
        effect["by_module"][0]["name"] = HOSTILE
    files = draw_figures(in_one_metric(hostile), tmp_path)
    page = render_page(hostile, files)
    assert [tag for tag in parse(page).tags if tag == "script"] == ["script"] and script() in page
    assert "&lt;script&gt;" in page
    for path in files:
        if path.suffix == ".svg":
            assert "<script" not in path.read_text(encoding="utf-8")
    text = render_text(hostile)
    assert "\x1b" not in text
    assert all(c.isprintable() or c == "\n" for c in text)


def test_the_page_is_self_contained_and_holds_every_figure(results: dict, drawn, tmp_path) -> None:
    files = drawn[len(results["study"]["seeds"])]
    page = render_page(results, files)
    tags = parse(page)
    assert tags.tags.count("figure") - page.count('class="panel"') == len(FIGURE_NAMES) - 1, "a map stands for one"
    assert page.count('class="map"') == 1
    assert all(load.startswith("#") for load in tags.loads) and "://" not in page
    document = build_document(results)
    for section in (document.answer, *document.sections):
        assert f"<h2>{section.title}</h2>" in page
    other = tmp_path / "extra.png"
    other.write_bytes(files[0].read_bytes())
    images = [load for load in parse(render_page(results, [*files, other])).loads if not load.startswith("#")]
    assert len(images) == 1 and images[0].startswith("data:image/png;base64,")


def test_no_id_is_given_twice_and_every_reference_is_met(results: dict, drawn) -> None:
    page = render_page(results, drawn[len(results["study"]["seeds"])])
    tags = parse(page)
    assert len(tags.ids) == len(set(tags.ids))
    referred = set(re.findall(r"url\(#([^)]+)\)", page)) | {load[1:] for load in tags.loads}
    assert referred and referred <= set(tags.ids)


def test_the_policy_names_the_script_of_the_page_and_no_other(results: dict) -> None:
    page = render_page(results, [])
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)
    (acting,) = re.findall(r"<script>(.*)</script>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(acting.encode()).digest()).decode()
    rules = dict(rule.strip().split(" ", 1) for rule in html.unescape(policy).split(";"))
    assert rules["script-src"] == f"'sha256-{digest}'" and rules["default-src"] == "'none'"
    assert all(word not in policy for word in ("unsafe-eval", "http", "*", "self"))
    assert not re.search(r" on\w+=", page), "no handler in the markup"


def test_text_and_page_hold_the_same_tables(results: dict) -> None:
    page = render_page(results, [])
    text = render_text(results)
    document = build_document(results)
    tables = [b for s in (document.answer, *document.sections) for b in s.blocks if isinstance(b, Table)]
    assert page.count("<table>") == len(tables) >= 14
    for table in tables:
        assert table.title[:40] in text
