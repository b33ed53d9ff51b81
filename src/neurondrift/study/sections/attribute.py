"""The table `[attribute]`: what is asked about what the fine-tuning change does, and which openings make the margin."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, field_validator

from neurondrift.study.sections.section import Count, Section

LANGUAGES = ("en",)  # those of `attribution.openings`, which a configuration does not load
OWN = "own"


class OpeningLists(Section):
    """How refusals begin, and how other answers do."""

    refusal: Annotated[list[str], Field(min_length=1)]
    compliance: Annotated[list[str], Field(min_length=1)]

    @field_validator("refusal", "compliance")
    @classmethod
    def _texts(cls, value: list[str]) -> list[str]:
        if not all(text.strip() for text in value):
            raise ValueError("an opening is empty")
        return value


class AttributeSection(Section):
    """What the change of each neuron does: to the refusal margin, to outputs, and whose update it resembles."""

    enabled: bool = Field(True, description="whether it is measured; the margin of the snapshots is in any case")
    prompts: Count = Field(16, description="harmful and ordinary prompts of evaluate, each, for the margin's parts")
    examples: Count = Field(12, description="examples of score.safety and score.utility, each, for outputs and updates")
    points: Count = Field(3, description="midpoints of the straight way at which gradients are taken")
    most_points: Count = Field(9, description="the same where the parts do not add up to 2 %; else that is written")
    along_steps: bool = Field(True, description="also along the saved steps of the training (the budget)")
    openings: str | OpeningLists = Field(
        "en", description="of the margin: a language, own (the model's before fine-tuning), a .json file, or two lists"
    )
    batch_size: Count = 8

    @field_validator("openings")
    @classmethod
    def _known(cls, value: str | OpeningLists) -> str | OpeningLists:
        if isinstance(value, str) and value not in (*LANGUAGES, OWN) and not value.endswith(".json"):
            raise ValueError(f"there are no openings {value!r}: {', '.join(LANGUAGES)}, {OWN}, or a .json file")
        return value
