"""The tables `[score]` and `[groups]`: by which score neurons are ranked, on what, and which groups are made of it."""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated, Literal, get_args

from pydantic import Field

from neurondrift.base.errors import ConfigError
from neurondrift.base.roles import ALIGNMENT_GROUPS
from neurondrift.models.data import DataOrNone, DataReference
from neurondrift.study.sections.section import Count, Fraction, Section

#: Scores of single weights, of which groups of weights are made too; of neurons only; and those that need a base.
OfWeights = Literal["snip", "wanda", "fisher", "magnitude", "random"]
OfNeurons = Literal["taylor", "gradient", "snip_ratio", "wanda_ratio", "attribution_patching"]
#: Of neurons too: they tell two texts apart, and not which is which.
TwoSided = Literal["activation_contrast", "cohens_d", "refusal_direction"]
OfChange = Literal[
    "functional_drift_ratio", "functional_drift_shrunk", "path_attribution", "provenance", "change_length"
]
Score = OfWeights | OfNeurons | TwoSided | OfChange


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

    @property
    def of_weights(self) -> bool:
        """Whether single weights are scored, so that groups of weights and of hidden units can be made."""
        return self.method in get_args(OfWeights)

    @property
    def of_change(self) -> bool:
        """Whether the score is of the alignment's change, so that its base is needed."""
        return self.method in get_args(OfChange)


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


def check_score(score: ScoreSection, *, base: str | None, frozen: str | None, granularity: str) -> None:
    """Raise `ConfigError` where a score cannot be taken in a study, or gives no group that is to be frozen.

    `base`: the model from before the alignment, where it is known; `frozen`: the group of the study that is held still,
    and its `granularity`.
    """
    method = score.method
    before = "name it (model.base), let the study align (align.enabled)"
    if score.of_change and base is None:
        raise ConfigError(
            f"The score {method} needs the model from before the alignment",
            received=f"score.method = {method}",
            fix=f"{before}, or score by another method",
        )
    if method in get_args(TwoSided) and score.style is None:
        raise ConfigError(
            f"The score {method} tells two texts apart, not which is which: for utility it is taken of ordinary text "
            "and a style",
            received="score.style = none",
            fix="name a style (score.style), or score by another method",
        )
    if frozen is not None and granularity != "neuron" and not score.of_weights:
        raise ConfigError(
            f"The score {method} is of neurons: no group of {granularity}s is made of it",
            received=f"finetune.freeze_granularity = {granularity}",
            allowed="neuron",
        )
    if frozen in ALIGNMENT_GROUPS and base is None:
        raise ConfigError(
            f"The group {frozen} needs the model from before the alignment",
            received=f"finetune.freeze = {frozen}",
            fix=f"{before}, or freeze another group",
        )
