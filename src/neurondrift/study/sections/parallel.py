"""The table `[parallel]`: how several processes, as torchrun starts them, share a study. It changes no result."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

from pydantic import Field

from neurondrift.study.sections.section import Section


class ParallelSection(Section):
    strategy: Literal["ddp", "fsdp2"] | None = Field(
        None,
        description="ddp: every process holds the model; fsdp2: scoring and fine-tuning hold a part of it each; "
        "default: ddp where the model fits one device",
    )

    def unsaid(self) -> Collection[str]:
        return ["strategy"] if self.strategy is None else ()
