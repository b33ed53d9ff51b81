"""Tables of what a study may be asked beyond its stages: out of sample, ranks, stability; what each such table is."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from neurondrift.study.sections.section import Count, Fraction, Section


class Experiment(Section):
    """What a study may be asked beyond its stages: by the command of that name, or with `enabled` by every run."""

    enabled: bool = Field(False, description="whether `neurondrift run` does it too")


class DoseResponseSection(Experiment):
    """Neurons ranked on half of the harmful prompts, put back or patched, and the margin taken on the other half."""

    doses: Annotated[list[Fraction], Field(min_length=1)] = Field(
        [0.01, 0.02, 0.05, 0.1], description="top shares of each site's neurons"
    )
    interventions: Annotated[list[Literal["rewind", "patch"]], Field(min_length=1)] = Field(
        ["rewind", "patch"], description="what is done to them"
    )
    ranking: Literal["budget", "path"] = Field(
        "budget", description="what the budget is taken along: the saved steps, or the straight way to the last"
    )
    draws: Count = Field(39, description="permutations of the budget within site and |w|, which judge it")
    uniform_draws: Count = Field(19, description="permutations within the site alone")
    bins: Annotated[int, Field(ge=1, le=1000)] = Field(20, description="bins of |w| of a site for the former")
    harmful: Count = Field(48, description="harmful prompts of evaluate at most, both halves together")
    ordinary: Count = Field(8, description="ordinary prompts at most")
    batch_size: Count = Field(8, description="prompts that gradients are taken of together")
    seed: int | None = Field(None, description="training seed that is acted on; default: the first")

    @field_validator("doses", "interventions")
    @classmethod
    def _once(cls, value: list[Any]) -> list[Any]:
        if len(set(value)) != len(value):
            raise ValueError("one is named twice")
        return value


class SubspacesSection(Experiment):
    """The rank level: directions of each site's outputs."""

    rank: int = Field(32, description="safety directions of each site")
    utility_rank: int = Field(32, description="utility directions of each site")
    limit: int | None = Field(None, description="examples of each set at most; default: as the study scores")
    draws: Annotated[int, Field(ge=0)] = Field(
        5, description="random removals that refusals are compared with; 0: no refusals are measured"
    )


class StabilitySection(Experiment):
    """The noise floor of the groups."""

    draws: int = Field(4, description="how often the calibration examples are re-drawn")
