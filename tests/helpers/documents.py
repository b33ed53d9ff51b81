"""What is in a document: its links, its anchors, its blocks of code; and pages done as they say."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from helpers.paths import REPOSITORY
from neurondrift.cli.__main__ import main

DOCUMENTS = sorted(
    [*REPOSITORY.glob("*.md"), REPOSITORY / "benchmarks" / "README.md", *(REPOSITORY / "docs").rglob("*.md")]
)
FENCE = re.compile(r"^(?P<fence>```+|~~~+)(?P<info>[^\n]*)\n(?P<text>.*?)^(?P=fence)[ \t]*$", re.M | re.S)
INDENTED = re.compile(r"(?<=\n\n)(?: {4}.*\n|\n(?= {4}))+")
LINK = re.compile(
    r"!?\[(?:[^\[\]]|\[[^\[\]]*\])*\]\(\s*<?([^()\s<>]*(?:\([^()\s]*\)[^()\s]*)*)>?(?:\s+\"[^\"]*\")?\s*\)"
)
BARE = re.compile(r"<(https?:[^>]*)>")
EXTERNAL = re.compile(r"https?://(?:[a-z0-9-]+\.)+[a-z]{2,}(?::\d+)?(?:/[\w\-.~:/?#@!$&'()*+,;=%]*)?", re.I)


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, the file that it is titled for (or ""), its text, the line that it begins at."""

    language: str
    title: str
    text: str
    line: int


def name_of(document: Path) -> str:
    return document.relative_to(REPOSITORY).as_posix()


def blocks(document: Path, *languages: str) -> list[Block]:
    """The fenced blocks of a document, in order; of these languages, where some are named."""
    text = document.read_text()
    found = []
    for match in FENCE.finditer(text):
        language, _, rest = match["info"].strip().partition(" ")
        title = re.search(r'title="([^"]+)"', rest)
        line = text.count("\n", 0, match.start()) + 1
        found.append(Block(language, title[1] if title else "", match["text"], line))
    return [block for block in found if not languages or block.language in languages]


def prose(text: str) -> str:
    """A document without what is code."""
    return re.sub(r"``.+?``|`[^`\n]*`", "", INDENTED.sub("", FENCE.sub("", text)))


def links(text: str) -> list[str]:
    """Where a document leads, in order: local targets with their anchors, and addresses."""
    return [*LINK.findall(prose(text)), *BARE.findall(prose(text))]


def anchors(text: str) -> set[str]:
    """The anchors of a document's headings.

    Where GitHub and the site would make two different ones (a heading that ends in a sign) there is none: a link to it
    works on one of both only.
    """
    seen: dict[str, int] = {}
    found = set()
    for heading in re.findall(r"^#{1,6} +(.+?)(?: +#+)?$", FENCE.sub("", text), re.M):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", plain.replace("`", "").replace("*", "").lower())
        if slug != slug.strip():
            continue
        slug = slug.replace(" ", "-")
        count = seen[slug] = seen.get(slug, -1) + 1
        if count == 0:  # GitHub numbers the others -1, the site _1
            found.add(slug)
    return found


def broken(document: Path, text: str) -> list[str]:
    """The links of a document that lead nowhere: files and anchors that are not there, addresses that are none."""
    found = []
    for link in links(text):
        if re.match(r"[a-z][a-z0-9+.-]*:", link, re.I):
            right = (
                EXTERNAL.fullmatch(link) if link.lower().startswith("http") else re.fullmatch(r"mailto:\S+@\S+", link)
            )
            if not right:
                found.append(link)
            continue
        path, _, anchor = link.partition("#")
        target = (document.parent / path).resolve() if path else document
        if not target.exists() or (not path and not anchor):
            found.append(link)
        elif anchor and target.suffix == ".md":
            there = text if target == document else target.read_text()
            if anchor not in anchors(there):
                found.append(link)
    return found


def calls(text: str) -> list[list[str]]:
    """The words of every call of neurondrift in a shell block, comments and other commands left out."""
    found = []
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>")
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if not set(word) <= set("|&;<>"):
                words.append(word)
                continue
            while words and re.fullmatch(r"\w+=\S*|nohup|srun", words[0]):
                words.pop(0)
            if words[:1] == ["torchrun"] and "neurondrift.cli" in words:
                words = ["neurondrift", *words[words.index("neurondrift.cli") + 1 :]]
            if words[:1] == ["neurondrift"]:
                found.append(words[1:])
            words = []
    return found


def do(document: Path, folder: Path, replaced: dict[str, str], left_out: tuple[str, ...] = ()) -> dict:
    """Do what a page says, in a folder: write the files that it shows, run its commands and its Python, from top to end.

    `replaced` makes it cheap (a tiny model in the place of a real one); each must occur. Commands that contain one of
    `left_out` are not run. Returns the names that the Python has made.
    """
    names: dict = {"__name__": "__main__"}
    missing = [old for old in replaced if old not in document.read_text()]
    assert not missing, f"not in {name_of(document)}: {missing}"

    def cheap(text: str) -> str:
        for old, new in replaced.items():
            text = text.replace(old, new)
        return text

    for block in blocks(document):
        if block.title:
            (folder / block.title).write_text(cheap(block.text))
        elif block.language == "python":
            code = "\n" * block.line + cheap(block.text)
            exec(compile(code, str(document), "exec"), names)
        elif block.language == "bash":
            for words in calls(cheap(block.text)):
                line = " ".join(words)
                if not any(part in line for part in left_out) and words != ["--version"]:
                    main(words)
    return names
