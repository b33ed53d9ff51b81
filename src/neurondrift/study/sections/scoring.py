"""The tables `[score]` and `[groups]`: by which score neurons are ranked, on what, and which groups are made of it."""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated, Literal

from pydantic import Field

from neurondrift.models.data import DataOrNone, DataReference
from neurondrift.study.sections.section import Count, Fraction, Section

#: Scores of single weights, of which groups of weights are made too; of neurons only; and those that need a base.
OfWeights = Literal["snip", "wanda", "fisher", "magnitude", "random"]
OfNeurons = Literal[
    "taylor",
    "gradient",
    "snip_ratio",
    "wanda_ratio",
    "activation_contrast",
    "cohens_d",
    "refusal_direction",
    "attribution_patching",
]
OfChange = Literal[
    "functional_drift_ratio", "functional_drift_shrunk", "path_attribution", "provenance", "change_length"
]
Score = OfWeights | OfNeurons | OfChange


class ScoreSection(Section):
    method: Score = Field("snip", description="any score of the registry (docs/methods.md); some need model.base")
    safety: DataReference = DataReference(source="builtin:refusals", limit=128)
    utility: DataReference = DataReference(source="builtin:ordinary-align", limit=128)
    style: DataOrNone = Field(
        DataReference(source="builtin:rhymes", limit=128),
        description="answers in a harmless style, scored as safety is: a placebo; none: without",
    )
    gradient_examples: Count = Field(
        64, description="examples of finetune.data that the gradient scale of each neuron is taken from"
    )
    batch_size: Count = 8
    max_length: Annotated[int, Field(ge=8)] = 512
    checkpoint_activations: bool = Field(False, description="less memory for about a third more time")


class GroupsSection(Section):
    top_fraction: Fraction = Field(0.01, description="SNIP_TOP_K: share of each site in the top groups")
    set_difference_p: Fraction = Field(0.1, description="SET_DIFF_P: utility's top share that is taken out")
    set_difference_q: Fraction = Field(0.1, description="SET_DIFF_Q: safety's top share that is kept")
    bins: Annotated[int, Field(ge=1, le=1000)] = Field(
        10, description="quantile bins of |w| per site that controls are matched on (neurons)"
    )
    weight_bins: Annotated[int, Field(ge=1, le=1000)] = Field(100, description="the same for single weights")
    drift_examples: Annotated[int, Field(ge=2)] = Field(
        24, description="refusals, and as many ordinary answers, that safety_acquired is taken from; needs a base"
    )
    margin_prompts: Count = Field(12, description="harmful prompts that safety_paying is taken from; needs a base")

    def unsaid(self) -> Collection[str]:
        usual = {"drift_examples": 24, "margin_prompts": 12}
        return [name for name, value in usual.items() if getattr(self, name) == value]
