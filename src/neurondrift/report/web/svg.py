"""A figure's SVG as part of the page: colours of the style sheet, ids of its own, and nothing in it can act."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote
from xml.etree import ElementTree

from neurondrift.report.web.assets import themed

#: What matplotlib draws with. A file with anything else is embedded as an image, in which nothing can act either.
DRAWN = frozenset(
    "svg g defs path use rect circle line polyline polygon clipPath text tspan pattern image".split(),
)
LEFT_OUT = frozenset({"metadata", "style", "title"})
#: How the ids of curves begin that can be switched on and off: series/<name>/<number>; see `figures.style.as_series`.
SERIES = "series/"
COLOUR = re.compile(r"#([0-9a-f]{6})\b")
REFERENCE = re.compile(r"url\(#([^)]*)\)")


def inlined(path: Path, alternative: str) -> str | None:
    """The figure in a file as an `svg` element; None where it holds what a figure has no need of.

    Parameters
    ----------
    path
        An SVG file.
    alternative
        What it shows, for readers who do not see it.

    Raises
    ------
    OSError
        The file cannot be read.
    """
    try:
        root = ElementTree.fromstring(path.read_text(encoding="utf-8"))
        width = float(root.get("viewBox", "").split()[2])
        _made_safe(root, f"{path.stem}-")
    except (ElementTree.ParseError, UnicodeDecodeError, ValueError, IndexError):
        return None
    root.attrib = {"viewBox": root.get("viewBox", ""), "role": "img", "aria-label": alternative}
    root.set("style", f"--width: {width:g}")
    return ElementTree.tostring(root, encoding="unicode", method="html")


def _made_safe(element: ElementTree.Element, prefix: str) -> None:
    """Rewrite an element and what is in it; raises ValueError for what a figure has no need of."""
    element.tag = _local(element.tag)
    if element.tag not in DRAWN:
        raise ValueError(element.tag)
    attributes: dict[str, str] = {}
    for qualified, value in element.attrib.items():
        name = _local(qualified)
        if name == "id" and value.startswith(SERIES):
            attributes["data-series"] = unquote(value.removeprefix(SERIES).rpartition("/")[0])
        elif name == "id":
            attributes["id"] = prefix + value
        elif name == "href":
            attributes["href"] = _reference(element.tag, value, prefix)
        elif name.startswith("on") or "url(" in REFERENCE.sub("", value):
            raise ValueError(name)
        else:
            value = REFERENCE.sub(rf"url(#{prefix}\1)", value)
            attributes[name] = COLOUR.sub(_variable, value) if name == "style" else value
    element.attrib = attributes
    for child in list(element):
        if _local(child.tag) in LEFT_OUT:
            element.remove(child)
        else:
            _made_safe(child, prefix)


def _reference(tag: str, value: str, prefix: str) -> str:
    if value.startswith("#"):
        return f"#{prefix}{value[1:]}"
    if tag == "image" and value.startswith("data:image/png;base64,"):
        return value
    raise ValueError(value)


def _variable(match: re.Match[str]) -> str:
    digits = match[1]
    return f"var(--figure-{digits},#{digits})" if digits in themed() else match[0]


def _local(name: object) -> str:
    """A name without its namespace; comments and processing instructions have none."""
    return str(name).rpartition("}")[2]
