"""The application, the flags that name a study, and the exit codes: 0 done; 2 a mistake of the user's; 1 a fault."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

from cyclopts import App, Group, Parameter

from neurondrift import __version__
from neurondrift.base.errors import ConfigError
from neurondrift.study.settings import Study, resolve

EPILOGUE = "Stages in order: align, score, groups, finetune, evaluate, analyze, report. `run` does them all."

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
)

SETTINGS = Group("Settings (they override the preset and the file)")


def _setting(path: str, text: str) -> Any:
    """A flag that overrides one setting of the configuration."""
    return Parameter(help=f"{text} [{path}]", group=SETTINGS, show_default=False)


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Source:
    """Which study, and where."""

    preset: Annotated[
        str | None, Parameter(help="smoke, demo or llama2-7b-chat; default: the folder's study.toml, else demo")
    ] = None
    config: Annotated[Path | None, Parameter(help="TOML file that overrides the preset")] = None
    output_dir: Annotated[Path, Parameter(help="the study's folder")] = Path()


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Flags:
    """The few settings that matter most, as flags."""

    model: Annotated[str | None, _setting("model.reference", "model: a hub id, a folder, pypi:NAME")] = None
    device: Annotated[str | None, _setting("model.device", "auto, cpu, cuda, cuda:N")] = None
    dtype: Annotated[str | None, _setting("model.dtype", "auto, float32, bfloat16, float16")] = None
    seeds: Annotated[str | None, _setting("seeds", "training seeds, such as 0,1,2")] = None
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

    def overrides(self) -> dict[str, Any]:
        """Setting -> value for the flags that were given."""
        given = {path: getattr(self, flag) for flag, path in _settings_of_flags().items()}
        return {path: _seeds(value) if path == "seeds" else value for path, value in given.items() if value is not None}


def _settings_of_flags() -> dict[str, str]:
    """Flag -> setting, read from the end of each flag's help."""
    hints = get_type_hints(Flags, include_extras=True)
    return {name: hint.__metadata__[0].help.rpartition(" [")[2].removesuffix("]") for name, hint in hints.items()}


def _seeds(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError("--seeds takes whole numbers", received=text, allowed="for example 0,1,2") from None


def study_of(source: Source, flags: Flags) -> Study:
    """The study that the flags describe; without --preset and --config, the one that stands in the folder."""
    file = source.config
    standing = source.output_dir / "study.toml"
    if file is None and source.preset is None and standing.exists():
        file = standing
    return resolve(preset=source.preset, file=file, flags=flags.overrides())


NO_SOURCE, NO_FLAGS = Source(), Flags()
