"""The causal curve of a score: what the model does with the units that rank first put back, or held at their mean.

Beside as many units drawn at random in the same places.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, Literal

import numpy as np
import torch

from neurondrift.groups.group import Group, without_empty
from neurondrift.interventions.acting.contexts import Applied, rewind
from neurondrift.models.disk.initial import Weights
from neurondrift.models.sites import Sites
from neurondrift.study.localisation.board import Answer, Values, counts_of, top
from neurondrift.study.localisation.holding import hold
from neurondrift.study.plants.outcomes import Looks

Way = Literal["put back", "held"]
# How many are acted on, as multiples of how many were planted. Answers are asked for where as many are put back.
DOSES: dict[Way, tuple[float, ...]] = {"put back": (0.25, 0.5, 1.0, 2.0), "held": (0.25, 1.0)}
ASKED: tuple[Way, float] = ("put back", 1.0)
DRAWS = 2
RANDOM, PLANTED = "random", "planted"


class Curves:
    """Looks at one plant's model, the same for every score.

    Parameters
    ----------
    sites
        The plant's model.
    answer, groups
        Where everything is.
    looks
        What is looked at.
    initial
        W0 of every site.
    means
        The mean inputs of every site on ordinary text.
    seed
        Of the random units.
    """

    def __init__(
        self,
        sites: Sites,
        answer: Answer,
        groups: Mapping[str, Group],
        looks: Looks,
        *,
        initial: Weights,
        means: Mapping[str, torch.Tensor],
        seed: int,
        answers: bool,
    ) -> None:
        self._sites, self._answer, self._groups, self._looks = sites, answer, groups, looks
        self._initial, self._means, self._seed, self._answers = initial, means, seed, answers

    def references(self) -> Iterator[dict[str, Any]]:
        """The model as it is, the planted units, and as many at random, acted on in each way."""
        planted = self._groups["planted"]
        yield {"score": "model", "way": "", "dose": 0.0, "units": 0, **self._look(asked=self._answers)}
        for way in DOSES:
            yield self._point(PLANTED, way, 1.0, planted, asked=self._asks(way, 1.0))
        for way, doses in DOSES.items():
            for dose in doses:
                for draw in range(DRAWS):
                    group = self._random(dose, draw)
                    yield {
                        **self._point(RANDOM, way, dose, group, asked=self._asks(way, dose) and not draw),
                        "draw": draw,
                    }

    def of(self, name: str, values: Values) -> Iterator[dict[str, Any]]:
        """One score's points."""
        for way, doses in DOSES.items():
            for dose in doses:
                group = top(values, dose, self._answer, self._groups["planted"])
                if len(group):
                    yield self._point(name, way, dose, group, asked=self._asks(way, dose))

    def _asks(self, way: Way, dose: float) -> bool:
        return self._answers and (way, dose) == ASKED

    def _random(self, dose: float, draw: int) -> Group:
        """As many at random, in the same places."""
        generator = np.random.default_rng([self._seed, 11, draw])
        planted, answer = self._groups["planted"], self._answer
        if not answer.in_places:
            drawn = np.sort(generator.permutation(len(answer.planted))[: max(1, round(dose * len(planted)))])
            members = answer.placed(drawn.astype(np.int64))
        else:
            members = {
                place: np.sort(generator.permutation(answer.places[place])[:count]).astype(np.int64)
                for place, count in counts_of(dose, answer, planted).items()
            }
        return planted.with_members(without_empty(members), {"rule": "random", "seed": draw})

    def _act(self, way: Way, group: Group) -> AbstractContextManager[Applied]:
        if way == "put back":
            return rewind(self._sites, group, initial=self._initial)
        return hold(self._sites, group, self._means)

    def _point(self, name: str, way: Way, dose: float, group: Group, *, asked: bool) -> dict[str, Any]:
        planted = self._groups["planted"]
        hits = sum(len(np.intersect1d(rows, planted.members.get(p, rows[:0]))) for p, rows in group.members.items())
        with self._act(way, group):
            seen = self._look(asked=asked)
        return {"score": name, "way": way, "dose": dose, "units": len(group), "hit": hits / len(group), **seen}

    def _look(self, *, asked: bool) -> dict[str, float]:
        outcome = self._looks.look(answers=asked, harmless=False)
        return {"margin": outcome.harmful, "loss": outcome.loss, "refused": outcome.refused}
