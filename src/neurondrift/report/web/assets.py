"""The style and the script of the page, which are files beside this module, and the policy that lets it run."""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from importlib import resources

COLOUR = re.compile(r"--figure-([0-9a-f]{6}):")


@cache
def style() -> str:
    """The style sheet."""
    return _read("page.css")


@cache
def script() -> str:
    """The script. It only reads and rearranges what the page holds: nothing is loaded, nothing is stored."""
    text = _read("page.js")
    assert "</script" not in text and "<!--" not in text
    return text


def policy(text: str) -> str:
    """The content-security policy of a page whose one script is `text`: no other runs, and nothing is loaded."""
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii")
    return (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


@cache
def themed() -> frozenset[str]:
    """The colours of figures, as six hexadecimal digits, that the style sheet has others for in dark mode."""
    return frozenset(COLOUR.findall(style()))


def _read(name: str) -> str:
    return (resources.files("neurondrift.report.web") / name).read_text(encoding="utf-8")
