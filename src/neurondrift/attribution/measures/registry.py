"""The registry of all scores, and the one way to call them: `measure`.

A score says what it needs (nothing, forward or backward passes, the model from before), which question it answers, and
how it is taken from a `Material`. Those of `importance.methods` are among them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from neurondrift.attribution.changes import Change
from neurondrift.attribution.measures.contrasts import check_prompts, cohens_d, contrast, refusal_direction
from neurondrift.attribution.measures.material import Base, Examples, Material
from neurondrift.attribution.measures.patching import attribution_patching, pairs_of
from neurondrift.attribution.measures.scores import (
    Measured,
    change_length,
    check_floor,
    drift_ratio,
    drift_shrunk,
    gradient,
    importance,
    path,
    provenance_difference,
    ratio,
    taylor,
)
from neurondrift.base.errors import ConfigError, DataError
from neurondrift.importance.methods import METHODS
from neurondrift.models.data import Example
from neurondrift.models.parts import Unit
from neurondrift.models.sites import Sites

UNITS: tuple[Unit, ...] = ("row", "hidden_unit", "head")
#: matters: which weights matter for refusals; trained: which weights were trained on refusals; carries: which
#: activations tell harmful from harmless, or carry the difference; nothing: a comparison that knows of no refusals.
Question = Literal["matters", "trained", "carries", "nothing"]


@dataclass(frozen=True, kw_only=True)
class Measure:
    """A score of rows, hidden units and heads.

    Attributes
    ----------
    name
        As it is called in configurations, tables and file headers.
    take
        `take(material, unit)`: the score.
    needs
        `nothing` (weights are enough), `forward` or `backward` passes.
    base
        Whether it needs the model from before.
    question
        What it asks.
    weights
        Whether it exists for single weights too (a method of `importance.methods`): groups of weights can be made.
    signed
        Whether values below 0 mean the opposite, so that no logarithm is to be taken.
    two_sided
        Whether it is the same with the two kinds of text exchanged: it tells them apart, and not which is which.
    check
        Raises, before anything is computed, where a material has not what it needs.
    """

    name: str
    take: Callable[[Material, Unit], Measured]
    needs: Literal["nothing", "forward", "backward"]
    question: Question
    base: bool = False
    weights: bool = False
    signed: bool = False
    two_sided: bool = False
    check: Callable[[Material], object] = lambda material: None


def _of_importance(name: str) -> Measure:
    method = METHODS[name]
    take = {"taylor": taylor, "gradient": gradient}.get(name) or importance(name)
    question: Question = "nothing" if name in ("magnitude", "random") else "matters"
    return Measure(name=name, take=take, needs=method.needs, question=question, weights=not method.neurons_only)


MEASURES: dict[str, Measure] = {
    measure.name: measure
    for measure in [
        *map(_of_importance, METHODS),
        Measure(name="snip_ratio", take=ratio("snip"), needs="backward", question="matters"),
        Measure(name="wanda_ratio", take=ratio("wanda"), needs="forward", question="matters"),
        *(
            Measure(name=name, take=take, needs="forward", question="carries", two_sided=True, check=check_prompts)
            for name, take in (
                ("activation_contrast", contrast),
                ("cohens_d", cohens_d),
                ("refusal_direction", refusal_direction),
            )
        ),
        Measure(
            name="attribution_patching",
            take=attribution_patching,
            needs="backward",
            question="carries",
            signed=True,
            check=pairs_of,
        ),
        Measure(
            name="functional_drift_ratio",
            take=drift_ratio,
            needs="forward",
            question="trained",
            base=True,
            signed=True,
            check=check_floor,
        ),
        Measure(
            name="functional_drift_shrunk",
            take=drift_shrunk,
            needs="forward",
            question="trained",
            base=True,
            signed=True,
            check=check_floor,
        ),
        Measure(name="path_attribution", take=path, needs="backward", question="trained", base=True, signed=True),
        Measure(
            name="provenance", take=provenance_difference, needs="backward", question="trained", base=True, signed=True
        ),
        Measure(name="change_length", take=change_length, needs="nothing", question="nothing", base=True),
    ]
}


def get_measure(name: str) -> Measure:
    """A score by name. Raises `ConfigError` where there is none."""
    if name not in MEASURES:
        raise ConfigError("There is no such score", received=name, allowed=", ".join(MEASURES))
    return MEASURES[name]


def measure(
    name: str,
    model: nn.Module | Sites | Change,
    tokenizer: Any,
    safety: Examples,
    utility: Examples,
    *,
    harmful: Sequence[str | Example] | None = None,
    harmless: Sequence[str | Example] | None = None,
    base: Base | Change | None = None,
    unit: Unit = "row",
    **more: Any,
) -> Measured:
    """One score of every row, hidden unit or head of a model.

    Parameters
    ----------
    name
        One of `MEASURES`.
    model, tokenizer, safety, utility, harmful, harmless, base, more
        See `Material`.
    unit
        `row` (of a site), `hidden_unit` (of an MLP: its rows of gate and up, its column of down) or `head` (of an
        attention: its query rows, its own key and value rows, its columns of the output projection).

    Returns
    -------
    Measured
        Site (row), MLP (hidden unit) or attention (head) -> float32 `[members]` on the CPU, in the model's order; the
        higher, the more. NaN where a score is not defined: `reasons` says why, and how often.

    Raises
    ------
    ConfigError
        An unknown score or unit, or no base where one is needed.
    DataError
        Too few examples; a loss that is not finite.
    ModelError, ArtifactError
        A base of another shape or with other tokens; a model whose structure is not known.
    """
    material = Material(
        model=model,
        tokenizer=tokenizer,
        safety=safety,
        utility=utility,
        harmful=harmful,
        harmless=harmless,
        base=base,
        **more,
    )
    return take(name, material, unit)


def measures(
    material: Material, names: Iterable[str] | None = None, unit: Unit = "row"
) -> Iterator[tuple[str, Measured]]:
    """Several scores, one after the other; what they have in common is computed once.

    `names`: by default all that the material is enough for. Errors as of `measure`; those about what is missing come
    before anything is computed.
    """
    if names is None:
        chosen = [name for name, one in MEASURES.items() if _enough(one, material)]
    else:
        chosen = list(names)
        for name in chosen:
            check(get_measure(name), material)
    for name in chosen:
        yield name, take(name, material, unit)


def check(chosen: Measure, material: Material) -> None:
    """Raise where a material lacks what a score needs: `ConfigError` for a base, `DataError` for examples."""
    if chosen.base and not material.has_base:
        raise ConfigError(
            f"The score {chosen.name} needs the model from before the change that is studied",
            fix="name it as the base, or use a score that needs none: "
            + ", ".join(other for other, one in MEASURES.items() if not one.base),
        )
    chosen.check(material)


def _enough(chosen: Measure, material: Material) -> bool:
    try:
        check(chosen, material)
    except (ConfigError, DataError):
        return False
    return True


def take(name: str, material: Material, unit: Unit = "row") -> Measured:
    """One score from a material. Errors as of `measure`."""
    chosen = get_measure(name)
    if unit not in UNITS:
        raise ConfigError("There is no such unit", received=unit, allowed=", ".join(UNITS))
    check(chosen, material)
    found = chosen.take(material, unit)
    assert all(values.dtype == torch.float32 and values.ndim == 1 for values in found.values())
    return found
