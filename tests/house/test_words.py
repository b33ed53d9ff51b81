"""Words stand in `report` alone: no module that computes holds a sentence."""

import ast

import pytest

from helpers.paths import SOURCE

ROOMS = [SOURCE / room for room in ("statistics", "interventions")]
MODULES = [path for room in ROOMS for path in sorted(room.rglob("*.py"))]
WITH_DOCSTRINGS = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def sentences(source: str) -> list[str]:
    """The strings of a module that end in a full stop, but for docstrings and what errors say.

    Of an f-string the end counts. What begins with a full stop is a separator, or part of a dotted name.
    """
    tree = ast.parse(source)
    skipped: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, WITH_DOCSTRINGS) and ast.get_docstring(node) is not None:
            skipped.add(node.body[0])
        if isinstance(node, ast.Raise) or (isinstance(node, ast.Call) and is_error(node.func)):
            skipped.add(node)
    return list(walk(tree, skipped))


def is_error(function: ast.expr) -> bool:
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    return name.endswith(("Error", "Exception", "Warning"))


def walk(node: ast.AST, skipped: set[ast.AST]):
    if node in skipped:
        return
    if isinstance(node, ast.JoinedStr):
        last = node.values[-1] if node.values else None
        if isinstance(last, ast.Constant) and last.value.endswith("."):
            yield ast.unparse(node)
        inner = [part for part in node.values if isinstance(part, ast.FormattedValue)]
        for part in inner:
            yield from walk(part, skipped)
        return
    if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value[-1:] == "." != node.value[0]:
        yield node.value
    for child in ast.iter_child_nodes(node):
        yield from walk(child, skipped)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_what_computes_holds_no_sentence(path):
    assert sentences(path.read_text()) == []


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ('x = "It drifted more."', 1),
        ('x = f"{n} of {m} drifted."', 1),
        ('x = f"{text}."', 1),
        ("x = f\"{'It drifted.'} more\"", 1),
        ('x = ("in two parts, " "joined.")', 1),
        ('x = "a clause"', 0),
        ('x = name.split(".")', 0),
        ('x = name.partition(".base_layer.")', 0),
        ('x = f"{prefix}.{name}"', 0),
        ('"""A docstring."""\ndef f():\n    """Another."""\n', 0),
        ('raise DataError("It does not fit.", fix="Make it fit.")', 0),
        ('warn(UserWarning("It is late."))', 0),
        ('def f():\n    """A docstring."""\n    return "A sentence."', 1),
    ],
)
def test_the_rule_finds_sentences_and_nothing_else(source, found):
    assert len(sentences(source)) == found
