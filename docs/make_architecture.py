"""Write the picture in docs/architecture.md: every module with the first line of its docstring, in the order of rooms."""

import ast
import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "neurondrift"
DOCUMENT = ROOT / "docs" / "architecture.md"
PICTURE = re.compile(r"(?<=```text\n)src/neurondrift/\n.*?(?=```)", re.DOTALL)


def rooms() -> list[str]:
    """From what stands under all to the command line, as import-linter's contract has them."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (layers,) = (contract["layers"] for contract in contracts if contract["type"] == "layers")
    return [room.strip() for layer in reversed(layers) for room in layer.split("|")]


def first_line(path: Path) -> str:
    return (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n")[0]


def lines_of(folder: Path, depth: int) -> list[str]:
    indent = "  " * depth
    lines = [f"{indent}{folder.name + '/':<{30 - len(indent)}}{first_line(folder / '__init__.py')}"]
    for path in sorted(folder.glob("*.py")):
        if path.name != "__init__.py":
            lines.append(f"{indent}  {path.name:<{28 - len(indent)}}{first_line(path)}")
    for inner in sorted(path for path in folder.iterdir() if (path / "__init__.py").exists()):
        lines += lines_of(inner, depth + 1)
    return lines


def picture() -> str:
    """The block of text, with its last newline."""
    top = ["src/neurondrift/", f"  {'__init__.py':<28}{first_line(SOURCE / '__init__.py')}"]
    return "\n".join(top + [line for room in rooms() for line in lines_of(SOURCE / room, 1)]) + "\n"


if __name__ == "__main__":
    text, count = PICTURE.subn(lambda _: picture(), DOCUMENT.read_text())
    assert count == 1
    DOCUMENT.write_text(text)
