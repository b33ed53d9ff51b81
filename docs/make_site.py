"""Hooks of mkdocs: what the site shows beside the pages in docs/.

Pages may link to any file of the repository, as they must on GitHub. What such a link names becomes a page of the site
below repository/ (Markdown as it is, scripts and settings as listings); of what is too large for that, such as raw
results, and of folders the link goes and its text stays, or leads to `repo_url` where mkdocs.yml has one. Formulas
become MathML.
"""

import re
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files, InclusionLevel

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
#: Files of the repository that the navigation names.
PAGES = ["QUICKSTART.md", "CHANGELOG.md", "CONTRIBUTING.md", "benchmarks/README.md"]
LISTED = {".py": "python", ".sh": "bash", ".sbatch": "bash", ".toml": "toml", ".yaml": "yaml", ".cff": "yaml"}
CARRIED = {".ipynb", ".png", ".svg"}
CODE = re.compile(r"^(?P<fence>```+|~~~+).*?^(?P=fence)[ \t]*$|``.+?``|`[^`\n]+`", re.M | re.S)
LINK = re.compile(r"(?P<bang>!?)\[(?P<text>[^\[\]]*)\]\((?P<target>[^()\s#]+)(?P<anchor>#[^()\s]*)?\)")
CELL = re.compile(r"<td[^>]*>.*?</td>", re.S)
MATHS = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.S)


def masked(text: str) -> tuple[str, list[str]]:
    """The text with a mark in the place of each piece of code, and the pieces."""
    pieces: list[str] = []

    def mask(match: re.Match) -> str:
        pieces.append(match[0])
        return f"\ue000{len(pieces) - 1}\ue001"

    return CODE.sub(mask, text), pieces


def unmasked(text: str, pieces: list[str]) -> str:
    return re.sub("\ue000(\\d+)\ue001", lambda match: pieces[int(match[1])], text)


def source_of(uri: str) -> Path:
    """The file that a page is made of."""
    if uri.startswith("repository/"):
        path = ROOT / uri.removeprefix("repository/")
        return path if path.exists() else path.with_suffix("")
    return DOCS / uri


def place_of(path: Path) -> str | None:
    """Where the site has a file of the repository; None where it has not."""
    if path.is_relative_to(DOCS):
        shown = path.is_file() and path.suffix in {".md", ".png", ".svg"}
        return path.relative_to(DOCS).as_posix() if shown else None
    if path.is_file() and path.is_relative_to(ROOT) and path.suffix in {".md", *LISTED, *CARRIED}:
        name = f"repository/{path.relative_to(ROOT).as_posix()}"
        return f"{name}.md" if path.suffix in LISTED else name
    return None


def linked(path: Path) -> list[Path]:
    """The local files and folders that a document names."""
    text, _ = masked(path.read_text())
    targets = [match["target"] for match in LINK.finditer(text)]
    return [(path.parent / target).resolve() for target in targets if "://" not in target and ":" not in target]


def listing(path: Path) -> str:
    language, name = LISTED[path.suffix], path.relative_to(ROOT).as_posix()
    return f"# {name}\n\n~~~~~~{language}\n{path.read_text()}\n~~~~~~\n"


def on_files(files: Files, config) -> Files:
    """Adds every file of the repository that a page links to, and those that these link to."""
    found = [ROOT / name for name in PAGES]
    for file in files.documentation_pages(inclusion=InclusionLevel.is_included):
        found += linked(Path(file.abs_src_path))
    while found:
        path = found.pop()
        place = place_of(path)
        if place is None or files.get_file_from_path(place) is not None:
            continue
        if path.suffix in LISTED:
            files.append(File.generated(config, place, content=listing(path)))
        else:
            files.append(File.generated(config, place, abs_src_path=str(path)))
        if path.suffix == ".md":
            found += linked(path)
    return files


def on_page_markdown(markdown: str, page, config, files: Files) -> str:
    """Turns links to files of the repository into links to where the site has them."""
    uri = page.file.src_uri
    source = source_of(uri)
    text, pieces = masked(markdown)

    def turned(match: re.Match) -> str:
        target = match["target"]
        if ":" in target:
            return match[0]
        path = (source.parent / target).resolve()
        place = place_of(path)
        if place is not None:
            up = "../" * uri.count("/")
            return f"{match['bang']}[{match['text']}]({up}{place}{match['anchor'] or ''})"
        if not path.exists():
            return match[0]  # mkdocs says that it leads nowhere
        if config.repo_url and path.is_relative_to(ROOT):
            return f"[{match['text']}]({config.repo_url.rstrip('/')}/blob/main/{path.relative_to(ROOT).as_posix()})"
        return match["text"]

    return unmasked(LINK.sub(turned, text), pieces)


def on_page_content(html: str, **_) -> str:
    """Turns formulas into MathML, and takes the backslash away that GitHub wants before a | in the code of a table."""
    html = CELL.sub(lambda match: match[0].replace(r"\|", "|"), html)
    return MATHS.sub(lambda match: mathml(match[3], block=match[2] == "["), html)


def mathml(formula: str, *, block: bool) -> str:
    for name, character in (
        ("&amp;", "&"),
        ("&lt;", "<"),
        ("&gt;", ">"),
        (r"l\lvert", "l|"),
        (r"r\rvert", "r|"),
        (r"\_", "_"),
    ):
        formula = formula.replace(name, character)
    made = convert(formula, display="block" if block else "inline")
    if "\\" in made:
        raise ValueError(f"latex2mathml does not know all of: {formula}")
    return made
