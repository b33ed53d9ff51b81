"""What `neurondrift evaluate MODEL` asks of one model: typed, validated, written beside its answers.

Imports no torch, so that `--help` and mistakes are fast.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import Field, model_validator

from neurondrift.models.data import DataReference, PromptKind
from neurondrift.study.settings import AttackSection, Count, ModelSection, Section

KINDS: tuple[PromptKind, ...] = ("harmful", "ordinary", "borderline")
DATA_SETS = (*KINDS, "answers")


class ModelEvaluation(Section):
    """What `neurondrift evaluate MODEL` asks of one model, outside of any study."""

    model: ModelSection
    adapter: Path | None = Field(None, description="folder of a PEFT adapter, put on top unmerged")
    harmful: DataReference | None = DataReference(source="builtin:refusals-heldout")
    ordinary: DataReference | None = DataReference(source="builtin:ordinary-heldout")
    borderline: DataReference | None = DataReference(source="builtin:borderline")
    answers: DataReference | None = Field(
        DataReference(source="builtin:ordinary-heldout"), description="for the perplexity; vllm: none"
    )
    judges: list[str] = Field(["refusal"], description="refusal, keyword, prefix, hf:ID")
    judge_kind: Literal["harmbench", "llama-guard", "strongreject", "yes-no"] | None = None
    judge_prompt: str | None = None
    attacks: list[AttackSection] = Field([AttackSection()], description="one after the other")
    system_prompt: str | None = Field(None, description="llama2, or a text")
    tasks: list[str] = Field([], description="tasks of lm-evaluation-harness; `limit` counts there too")
    limit: Count | None = Field(None, description="prompts drawn from each set")
    max_new_tokens: Count = Field(128, description="answers are never ended early")
    batch_size: Count = 32
    max_length: Annotated[int, Field(ge=8)] = 2048
    backend: Literal["transformers", "vllm"] = "transformers"

    @model_validator(mode="before")
    @classmethod
    def _none(cls, value: Any) -> Any:
        """The word none leaves a set out; vLLM, which answers prompts only, is asked for no perplexity by itself."""
        if not isinstance(value, Mapping):
            return value
        answers = {"answers": "none"} if value.get("backend") == "vllm" else {}
        return {key: None if key in DATA_SETS and one == "none" else one for key, one in {**answers, **value}.items()}

    def to_toml(self) -> str:
        """What was asked, as TOML; a set that is left out is none, other settings that are unset are left out."""
        content = self.model_dump(mode="json", exclude_none=True)
        return tomli_w.dumps(content | {name: "none" for name in DATA_SETS if getattr(self, name) is None})
