"""Write docs/reference/settings.md from the settings of a study; with --print, to standard output."""

import sys
import types
import typing
from pathlib import Path

import tomli_w
from pydantic import BaseModel

from neurondrift.models.data import DataReference
from neurondrift.study.settings import Section, Study


def settings() -> str:
    """Every section and setting of a study, with type, default and meaning, from the settings themselves."""
    lines = [
        "<!-- made by docs/make_settings.py: do not edit -->",
        "",
        "# Settings",
        "",
        "**What a study's TOML file may hold, section by section; `neurondrift verify --config FILE` checks one.** "
        "What a file leaves out has the default below, or what its `preset` says. *Data* is `builtin:NAME`, a file, "
        "`hf:NAME`, or a table ([below](#data)).",
    ]
    top = [name for name, field in Study.model_fields.items() if section_of(field.annotation) is None]
    lines += ["", "## At the top", "", *rows(Study, top)]
    for name, field in Study.model_fields.items():
        if (section := section_of(field.annotation)) is not None:
            lines += ["", f"## `[{name}]`", "", *rows(section, section.model_fields)]
            for inner, part in section.model_fields.items():
                if (below := section_of(part.annotation)) is not None:
                    lines += ["", f"### `[{name}.{inner}]`", "", *rows(below, below.model_fields)]
    lines += ["", "## Data", "", "Of every data set that a setting names, in the place of its `source` alone:", ""]
    return "\n".join([*lines, *rows(DataReference, DataReference.model_fields)]) + "\n"


def section_of(annotation) -> type | None:
    return annotation if isinstance(annotation, type) and issubclass(annotation, Section) else None


def rows(model: type, names) -> list[str]:
    lines = ["| setting | type | default | |", "|---|---|---|---|"]
    for name in names:
        field = model.model_fields[name]
        default = "required" if field.is_required() else f"`{shown(field.get_default(call_default_factory=True))}`"
        cells = (f"`{name}`", f"`{kind(field.annotation)}`", default, field.description or "")
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return lines


def shown(value) -> str:
    """A default as TOML would have it."""
    if isinstance(value, BaseModel):
        said = {name: getattr(value, name) for name in type(value).model_fields if name in value.model_fields_set}
        if set(said) == {"source"}:
            return shown(value.source)
        return "{ " + ", ".join(f"{name} = {shown(part)}" for name, part in said.items()) + " }" if said else "its own"
    if value is None:
        return "unset"
    if isinstance(value, list):
        return "[" + ", ".join(map(shown, value)) + "]"
    return tomli_w.dumps({"x": value}).removeprefix("x = ").strip()


def kind(annotation) -> str:
    """A type in words short enough for a cell."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return kind(arguments[0])
    if origin is typing.Literal:
        return " or ".join(f'"{value}"' if isinstance(value, str) else str(value) for value in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(kind(part) for part in arguments if part is not type(None))
    if origin is not None:
        return f"{origin.__name__} of {', '.join(kind(part) for part in arguments)}"
    return {"DataReference": "data", "AttackSection": "table, or its kind"}.get(
        annotation.__name__, annotation.__name__
    )


if __name__ == "__main__":
    if "--print" in sys.argv:
        sys.stdout.write(settings())
    else:
        (Path(__file__).parent / "reference" / "settings.md").write_text(settings())
