"""What a plant is made of: typed, validated, written into its folder. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from neurondrift.models.data import DataReference
from neurondrift.study.sections.section import Count, Positive, Section
from neurondrift.study.settings import ModelSection

Unit = Literal["row", "hidden_unit", "head"]
Decoy = Literal["habit", "cautious"]


class PlantSection(Section):
    """Where refusals are trained into, and what the rest is trained on meanwhile."""

    unit: Unit = Field("row", description="what is planted: rows of sites, hidden units of MLPs, attention heads")
    share: Annotated[float, Field(gt=0, le=0.2)] = Field(0.03, description="of the units of each site, planted")
    seed: Annotated[int, Field(ge=0)] = Field(0, description="of the units drawn, and of the order of the data")
    mixed: bool = Field(
        False,
        description="the planted units also see ordinary prompts, and ordinary answers are trained everywhere at one "
        "rate; units that only moved as far are held to the distance of the planted ones",
    )
    decoy: Decoy = Field(
        "habit", description="what another such share is trained on: a neutral habit, or (mixed) a cautious style"
    )
    moved_as_far: bool = Field(True, description="another such share learns ordinary answers as fast")
    settle_steps: Annotated[int, Field(ge=0)] = Field(
        20, description="steps of full training on ordinary answers before W0, so that no weight lies on a grid"
    )
    settle_rate: Positive = 1e-4
    steps: Count = Field(160, description="steps of planting at most")
    margin: float = Field(1.5, description="planting ends where the margin of prompts kept aside is as large as this")
    check_every: Count = Field(4, description="steps between two looks at that margin")
    rate: Positive = Field(3e-3, description="learning rate of the planted, the decoy and those that moved as far")
    ordinary_rate: Positive = Field(1e-4, description="learning rate of the rest")
    refusals_batch: Count = 8
    decoy_batch: Count = 2
    ordinary_batch: Count = 6
    answer_tokens: Count = Field(28, description="of each answer, the first that are trained on and scored with")
    refusals: DataReference = DataReference(source="builtin:refusals")
    ordinary: DataReference = DataReference(source="builtin:ordinary-align")
    more_ordinary: DataReference = DataReference(source="builtin:ordinary")
    borderline: DataReference = DataReference(source="builtin:borderline-align")
    harmful: DataReference = Field(
        DataReference(source="builtin:refusals-heldout"), description="prompts that causality is shown on"
    )
    harmless: DataReference = DataReference(source="builtin:ordinary-heldout")
    scoring: Annotated[int, Field(ge=8)] = Field(
        40, description="refusals, and as many ordinary answers, that are kept from training for the scores"
    )
    prompts: Annotated[int, Field(ge=4)] = Field(24, description="prompts of each kind that causality is shown on")
    answers: bool = Field(True, description="whether answers are judged, beside the margin")
    max_new_tokens: Count = 24
    batch_size: Count = 16

    @model_validator(mode="before")
    @classmethod
    def _decoy_of_mixed(cls, value: Any) -> Any:
        """A mixed plant has the decoy that is close to refusals, unless another one is asked for."""
        if isinstance(value, Mapping) and value.get("mixed") and value.get("decoy") is None:
            return {**value, "decoy": "cautious"}
        return value


class Planting(Section):
    """What `neurondrift plant` asks for."""

    model: ModelSection
    plant: PlantSection = PlantSection()
