"""Which openings make a study's refusal margin, and the margin of what is asked at a snapshot."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from neurondrift.attribution.margin import Margin
from neurondrift.attribution.openings import Openings, openings_for, own_openings
from neurondrift.attribution.tables import read_openings
from neurondrift.base.errors import DataError, ModelError
from neurondrift.behaviour.requests import system_prompt
from neurondrift.models.data import Example
from neurondrift.models.text.thoughts import spoken
from neurondrift.study.sections.attribute import OWN
from neurondrift.study.settings import Study

logger = logging.getLogger(__name__)
Rows = list[dict[str, Any]]


def openings_of(study: Study, first_answers: Sequence[Mapping[str, Any]]) -> Openings | None:
    """The openings that a study names; the model's own are taken from judged answers before fine-tuning, and are None
    where there are none of these.

    Raises `DataError` where those answers do not have both kinds, `ConfigError` for a file that cannot be read.
    """
    named = study.attribute.openings
    if not isinstance(named, str):
        return Openings(refusal=tuple(named.refusal), compliance=tuple(named.compliance))
    if named != OWN:
        found = read_openings(named)
        return found if isinstance(found, Openings) else openings_for(found or "en")
    if not first_answers:
        return None
    primary = [row for row in first_answers if row.get("primary", True) and not row.get("undecided")]
    answers = [spoken(str(row["response"])) or "" for row in primary]
    return own_openings(answers, [bool(row["refused"]) for row in primary])


class Margins:
    """The refusal margin of the prompts of each snapshot, as one more column of their judged answers."""

    def __init__(self, study: Study) -> None:
        self.study, self.openings = study, openings_of(study, [])

    def see(self, rows: Rows, sets: Mapping[str, Sequence[Example]]) -> None:
        """Take the model's own openings from these rows, where they are wanted, not taken yet, and of all sets."""
        if self.openings is None and {"harmful", "ordinary"} <= sets.keys():
            self.openings = openings_of(self.study, rows)

    def added(self, rows: Rows, model: Any, tokenizer: Any, sets: Mapping[str, Sequence[Example]]) -> Rows:
        """The rows with `margin`, in nats, of the prompt as it is asked but for suffixes; None where it is not known.

        A model's own openings are those of the first rows that hold all sets, so that what is asked before has none.
        """
        evaluated = self.study.evaluate
        self.see(rows, sets)
        found: dict[tuple[str, str], float] = {}
        for kind, examples in sets.items() if self.openings is not None else ():
            template = evaluated.attack.chat_template or kind != "harmful"
            try:
                system = system_prompt(evaluated.system_prompt)
                margin = Margin(model, tokenizer, examples, self.openings, template, system)
                values = margin.quick_values(model, batch_size=min(evaluated.batch_size, BATCH))
            except (DataError, ModelError) as error:
                logger.warning("The refusal margin of %s prompts is not known: %s", kind, error)
                continue
            found |= {(kind, example.id): float(value) for example, value in zip(examples, values, strict=True)}
        return [{**row, "margin": found.get((row["kind"], row["id"]))} for row in rows]


BATCH = 16  # of the margin, whatever the batch of answers is: one forward needs more memory than one token does
