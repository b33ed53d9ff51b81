"""The site is built without a warning, holds every page and every public name, and loads nothing from elsewhere."""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest
import yaml

import neurondrift as nd
from helpers.paths import REPOSITORY

pytest.importorskip("mkdocs")
DOCS = REPOSITORY / "docs"


class Loader(yaml.SafeLoader):
    """mkdocs.yml has tags of Python's own."""


Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: suffix)


def leaves(nav):
    for entry in nav:
        for value in entry.values():
            yield from leaves(value) if isinstance(value, list) else [value]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", folder],
        cwd=REPOSITORY,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    return folder


def test_the_navigation_has_every_page():
    named = set(leaves(yaml.load((REPOSITORY / "mkdocs.yml").read_text(), Loader)["nav"]))
    results = {"example", "localisation", "studies"}  # folders whose documents lie beside raw results
    pages = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md") if not results & set(path.parts)}
    assert pages <= named


def test_the_reference_has_every_public_name():
    text = (DOCS / "reference" / "api.md").read_text()
    named = re.findall(r"^::: neurondrift\.([\w.]+)$", text, re.M)
    assert len(named) == len(set(named))
    assert set(named) == {f"{nd._HOMES[name]}.{name}" for name in nd.__all__ if name != "__version__"}


def test_the_settings_are_up_to_date():
    script = [sys.executable, DOCS / "make_settings.py", "--print"]
    made = subprocess.run(script, capture_output=True, text=True, check=True).stdout
    assert made == (DOCS / "reference" / "settings.md").read_text(), "run: python docs/make_settings.py"


def test_the_site_has_its_pages(site):
    for place in leaves(yaml.load((REPOSITORY / "mkdocs.yml").read_text(), Loader)["nav"]):
        page = (site / place).with_suffix(".html")
        assert (page.with_stem("index") if page.stem == "README" else page).exists()
    assert not [path for path in site.rglob("*") if path.suffix in {".py", ".parquet"}]
    assert not list((site / "example").glob("*.json"))
    api = (site / "reference" / "api.html").read_text()
    assert "as many members in every stratum" in api  # a docstring
    assert "learning_rate" in (site / "reference" / "settings.html").read_text()


def test_what_github_needs_is_not_shown(site):
    results = (site / "results.html").read_text()
    assert "<code>|</code>" in results and r"\|</code>" not in results
    assert "enable_thinking = false" in (site / "reference" / "settings.html").read_text()  # no list of attributes


def test_formulas_are_drawn(site):
    methods = (site / "methods.html").read_text()
    assert methods.count("<math ") > 200
    assert "arithmatex" not in methods
    assert not re.search(r"\\(?:frac|sum|lVert|delta)", methods)


class Loads(HTMLParser):
    """What a page makes the browser fetch."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attributes):
        named = dict(attributes)
        if tag == "link" and named.get("rel") in {"stylesheet", "icon", "preload", "preconnect", "modulepreload"}:
            self.found.append(named.get("href"))
        elif tag in {"script", "img", "iframe", "source", "video", "object"}:
            self.found.append(named.get("src") or named.get("data"))


def loads(html):
    parser = Loads()
    parser.feed(html)
    return [address for address in parser.found if address and re.match(r"(?:https?:)?//", address)]


def test_no_page_loads_anything_from_elsewhere(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 25
    for page in pages:
        assert loads(page.read_text()) == [], page
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(?:@import|url\()\s*['\"]?(?:https?:)?//", sheet.read_text()), sheet


def test_what_is_loaded_from_elsewhere_would_be_seen():
    assert loads('<link rel="stylesheet" href="https://fonts.googleapis.com/css"><script src="//cdn.x/y.js"></script>')
    assert not loads('<link rel="stylesheet" href="assets/a.css"><a href="https://arxiv.org">x</a><script>1</script>')
