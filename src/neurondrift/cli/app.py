"""The application, what a flag that names a setting is, and the flags that name a study."""

from __future__ import annotations

import json
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, get_type_hints

from cyclopts import App, Group, Parameter

from neurondrift import __version__
from neurondrift.base.errors import ConfigError
from neurondrift.study.settings import Section, Study, resolve

EPILOGUE = "Stages in order: align, score, groups, finetune, evaluate, attribute, analyze, report. `run` does them all."

app = App(
    name="neurondrift",
    version=__version__,
    help=(
        "What happens to the weights that keep a language model safe when it is fine-tuned?\n\n"
        "Scores every neuron for safety and for utility, fine-tunes the model while measuring how far each neuron "
        "drifts, watches the refusals go, and says with statistics which hypothesis the data support."
    ),
    help_format="plaintext",
    help_epilogue=EPILOGUE,
    suppress_keyboard_interrupt=False,  # the entry point says that the command goes on from here
)

SETTINGS = Group("Settings (they override the preset and the file)")
DATA = Group("How data is read (of the sets that flags name; or SET=VALUE, such as safety=..., for one of them)")
# Sets of examples that a study reads: the word for them -> the setting that names them.
STUDY_SETS = {
    "safety": "score.safety",
    "utility": "score.utility",
    "data": "finetune.data",
    **{name: f"evaluate.{name}" for name in ("harmful", "ordinary", "borderline", "answers")},
}
# Flags that say how sets are read -> what they are within the setting of a set.
DATA_FLAGS = {"prompt_column": "prompt", "response_column": "response", "split": "split", "subset": "subset"}


class Flag(Parameter):
    """A flag that overrides one setting: `path` is where the setting stands in the configuration, and the help is made
    from it.

    Parameters
    ----------
    path
        Such as `finetune.lora_r`.
    text
        What the flag is, in a few words.
    read
        From what was typed to the setting's value, where it is not what it seems.
    shows_path
        Whether the help names the setting: not where no file holds it.
    default
        What the help gives as the setting's default; None: nothing.
    group
        The heading that the flag stands under in the help; None: with the parameters of the command.
    """

    path: str
    read: Callable[[Any], Any] | None

    def __init__(
        self,
        path: str,
        text: str,
        *,
        read: Callable[[Any], Any] | None = None,
        shows_path: bool = True,
        default: object = None,
        group: Group | None = None,
    ) -> None:
        under: dict[str, Any] = {} if group is None else {"group": group}
        super().__init__(
            help=f"{text} [{path}]" if shows_path else text,
            negative="",
            show_default=False if default is None else str(default),
            **under,
        )
        object.__setattr__(self, "path", path)  # cyclopts freezes its parameters
        object.__setattr__(self, "read", read)


@dataclass(frozen=True, kw_only=True)
class SettingFlags:
    """Flags that name settings, None where they were not given."""

    configures: ClassVar[type[Section]] = Study

    @classmethod
    def flags(cls) -> dict[str, Flag]:
        """Name of the field -> what the flag is, of those that name a setting."""
        hints = get_type_hints(cls, include_extras=True)
        parts = ((name, part) for name, hint in hints.items() for part in getattr(hint, "__metadata__", ()))
        return {name: part for name, part in parts if isinstance(part, Flag)}

    def overrides(self) -> dict[str, Any]:
        """Setting -> value for the flags that were given."""
        given = {name: value for name, value in vars(self).items() if value is not None}
        return {
            flag.path: given[name] if flag.read is None else flag.read(given[name])
            for name, flag in self.flags().items()
            if name in given
        }


def _setting(path: str, text: str, read: Callable[[Any], Any] | None = None) -> Flag:
    return Flag(path, text, read=read, group=SETTINGS)


def asked(path: str, text: str, read: Callable[[Any], Any] | None = None) -> Flag:
    """A flag of a command that asks a study for more; its help gives the default of the configuration."""
    table, _, name = path.partition(".")
    default = getattr(Study.model_fields[table].default, name)
    return Flag(path, text, read=read, default=None if default == [] else default)


def _template_arguments(words: list[str]) -> dict[str, Any]:
    """`enable_thinking=false` as `{"enable_thinking": False}`: a value is JSON, or else text."""
    found: dict[str, Any] = {}
    for text in words:
        name, sign, value = text.partition("=")
        if not sign or not name.isidentifier():
            raise ConfigError(
                "--template-argument takes KEY=VALUE",
                received=text,
                allowed="for example enable_thinking=false or reasoning_effort=low",
            )
        lowered = value.lower() if value.lower() in ("true", "false", "null") else value
        try:
            found[name] = json.loads(lowered)
        except ValueError:
            found[name] = value
    return found


def _seeds(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError("--seeds takes whole numbers", received=text, allowed="for example 0,1,2") from None


def _read(text: str) -> Parameter:
    return Parameter(help=f"{text}; may be repeated", negative="", show_default=False, group=DATA)


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Reading:
    """How the sets of examples that flags name are read: every command that reads examples has these flags."""

    prompt_column: Annotated[list[str] | None, _read("column of the prompts, where it has no usual name")] = None
    response_column: Annotated[list[str] | None, _read("column of the responses")] = None
    split: Annotated[list[str] | None, _read("split of an hf: set or of a folder")] = None
    subset: Annotated[list[str] | None, _read("configuration of an hf: set")] = None

    def reading(self, given: Mapping[str, Any], sets: Mapping[str, str], *, configured: bool) -> dict[str, Any]:
        """The overrides that were given, and how the sets among them are read.

        Parameters
        ----------
        given
            Setting -> value, of other flags.
        sets
            The word for a set -> the setting that names it.
        configured
            Whether a set that no flag names may stand in a configuration.

        Raises
        ------
        ConfigError
            A flag that is about no set.
        """
        result = dict(given)
        named = [word for word, path in sets.items() if given.get(path) not in (None, "none")]
        for flag, field in DATA_FLAGS.items():
            for text in getattr(self, flag) or ():
                word, equals, value = text.partition("=")
                chosen, value = ([word], value) if equals and word in sets else (named, text)
                if not chosen or not (configured or set(chosen) <= set(named)):
                    raise ConfigError(
                        f"--{flag.replace('_', '-')} is about a set that no flag names",
                        received=text,
                        allowed=f"VALUE, or SET=VALUE with SET one of {', '.join(sets)}",
                        fix=f"name the set too, such as --{next(iter(sets))} FILE",
                    )
                for path in (sets[each] for each in chosen):
                    if path in result:
                        before = result[path] if isinstance(result[path], dict) else {"source": result[path]}
                        result[path] = {**before, field: value}
                    else:
                        result[f"{path}.{field}"] = value
        return result


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Source(Reading):
    """Which study, where, and how the files of examples that flags name are read."""

    preset: Annotated[
        str | None, Parameter(help="smoke, demo or llama2-7b-chat; default: the folder's study.toml, else demo")
    ] = None
    config: Annotated[Path | None, Parameter(help="TOML file that overrides the preset")] = None
    output_dir: Annotated[Path, Parameter(help="the study's folder")] = Path()


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Flags(SettingFlags):
    """The few settings that matter most, as flags."""

    model: Annotated[str | None, _setting("model.reference", "model: a hub id, a folder, a GGUF file, pypi:NAME")] = (
        None
    )
    device: Annotated[str | None, _setting("model.device", "auto, cpu, cuda, cuda:N")] = None
    dtype: Annotated[str | None, _setting("model.dtype", "auto, float32, bfloat16, float16")] = None
    template_argument: Annotated[
        list[str] | None,
        _setting(
            "model.template",
            "argument of the chat template: enable_thinking=false; may be repeated",
            _template_arguments,
        ),
    ] = None
    seeds: Annotated[str | None, _setting("seeds", "training seeds, such as 0,1,2", _seeds)] = None
    safety: Annotated[str | None, _setting("score.safety", "safety examples: builtin:NAME, a file, hf:NAME")] = None
    utility: Annotated[str | None, _setting("score.utility", "utility examples")] = None
    data: Annotated[str | None, _setting("finetune.data", "fine-tuning examples")] = None
    snip_top_k: Annotated[float | None, _setting("groups.top_fraction", "share of each site in the top groups")] = None
    set_diff_p: Annotated[float | None, _setting("groups.set_difference_p", "utility's top share taken out")] = None
    set_diff_q: Annotated[float | None, _setting("groups.set_difference_q", "safety's top share kept")] = None
    lora_r: Annotated[int | None, _setting("finetune.lora_r", "LoRA rank")] = None
    lora_alpha: Annotated[float | None, _setting("finetune.lora_alpha", "LoRA alpha")] = None
    epochs: Annotated[float | None, _setting("finetune.epochs", "epochs of fine-tuning")] = None
    batch_size: Annotated[int | None, _setting("finetune.batch_size", "examples a step")] = None
    learning_rate: Annotated[float | None, _setting("finetune.learning_rate", "learning rate")] = None
    optimiser: Annotated[str | None, _setting("finetune.optimiser", "adamw, or sgd with finetune.momentum")] = None
    max_steps: Annotated[
        int | None, _setting("finetune.max_steps", "stop after this many steps; -1: after the epochs")
    ] = None
    drift_interval: Annotated[int | None, _setting("finetune.drift_interval", "steps between drift snapshots")] = None
    freeze: Annotated[
        str | None,
        _setting("finetune.freeze", "hold a group still while fine-tuning: a group's name, matched:NAME, or a file"),
    ] = None
    freeze_granularity: Annotated[
        str | None, _setting("finetune.freeze_granularity", "neuron, weight or unit: which group of that name")
    ] = None


def study_of(source: Source, *flags: SettingFlags) -> Study:
    """The study that the flags describe; without --preset and --config, the one that stands in the folder."""
    file = source.config
    standing = source.output_dir / "study.toml"
    if file is None and source.preset is None and standing.exists():
        file = standing
    given = {path: value for each in flags for path, value in each.overrides().items()}
    return resolve(preset=source.preset, file=file, flags=source.reading(given, STUDY_SETS, configured=True))


NO_SOURCE, NO_FLAGS = Source(), Flags()


def given_of(flags: object, but: Container[str] = ()) -> list[str]:
    """The flags that were given, as they are typed."""
    return [
        f"--{name.replace('_', '-')}" for name, value in vars(flags).items() if value is not None and name not in but
    ]
