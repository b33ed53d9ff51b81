"""What a plant's model does: the refusal margin, refusals, and the loss of ordinary answers, as it is at the moment."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from neurondrift.attribution.margin import Function, Margin, ResponseLoss, values_of
from neurondrift.behaviour.evaluate import judge_answers
from neurondrift.models.data import Example
from neurondrift.models.disk.initial import CheckpointWeights, Weights
from neurondrift.models.sites import Sites
from neurondrift.study.plants.sets import encoded_short
from neurondrift.study.plants.settings import PlantSection


class Outcome(NamedTuple):
    """`harmful`, `harmless`: mean margins, nats. `loss`: of ordinary answers, nats a token. `refused`, `over_refused`:
    shares of the harmful and of the harmless prompts, NaN where no answers were asked for."""

    harmful: float
    harmless: float
    loss: float
    refused: float = math.nan
    over_refused: float = math.nan


class Looks:
    """Looks at a model that other code changes and gives back."""

    def __init__(
        self,
        sites: Sites,
        tokenizer: Any,
        harmful: list[Example],
        harmless: list[Example],
        settings: PlantSection,
    ) -> None:
        self._model, self._tokenizer, self._settings = sites.model, tokenizer, settings
        self._examples = {"harmful": harmful, "ordinary": harmless}
        self._margins = [Margin(sites.model, tokenizer, part) for part in (harmful, harmless)]
        self._loss = ResponseLoss(sites.model, encoded_short(harmless, tokenizer, settings.answer_tokens))

    def look(self, *, answers: bool, over: bool = False, harmless: bool = True) -> Outcome:
        """The outcome with the model as it is.

        `answers`: of harmful requests too; `over`: and of harmless ones; without `harmless` their margin is NaN.
        """
        size = self._settings.batch_size
        functions: list[Function] = [self._margins[0], *([self._margins[1]] if harmless else []), self._loss]
        found = [float(values_of(self._model, function, batch_size=size).mean()) for function in functions]
        refused = self._refused("harmful") if answers else math.nan
        return Outcome(
            harmful=found[0],
            harmless=found[1] if harmless else math.nan,
            loss=found[-1],
            refused=refused,
            over_refused=self._refused("ordinary") if answers and over else math.nan,
        )

    def _refused(self, kind: str) -> float:
        rows = judge_answers(
            self._model,
            self._tokenizer,
            {kind: self._examples[kind]},
            max_new_tokens=self._settings.max_new_tokens,
            batch_size=2 * self._settings.batch_size,
        )
        return sum(bool(row["refused"]) for row in rows) / len(rows)


def margin_of(sites: Sites, tokenizer: Any, prompts: list[Example], batch_size: int) -> float:
    """The mean margin of some prompts."""
    return float(values_of(sites.model, Margin(sites.model, tokenizer, prompts), batch_size=batch_size).mean())


def initial_weights(folder: Path, sites: Sites) -> Weights:
    """W0 of every site, in the folder of the base: kept beside the model where there is room, else read when asked."""
    stored = CheckpointWeights(folder, sites)
    first = next(iter(sites.values()))
    needed = sum(4 * site.shape[0] * site.shape[1] for site in sites.values())
    if first.tensor.is_cuda:
        room = int(torch.cuda.mem_get_info(first.tensor.device)[0])
    else:
        import psutil

        room = int(psutil.virtual_memory().available)
    if needed > room / 4:
        return stored
    kept: Mapping[str, torch.Tensor] = {name: stored(name).to(site.tensor) for name, site in sites.items()}

    def weight_of(site: str) -> torch.Tensor:
        return kept[site]

    return weight_of
