"""What scores are taken from: a model, its examples and prompts, and the model from before; shared passes over them.

Owns the way from what a caller has (examples or encoded rows, a reference of a base) to what measures take, and what
several of them have in common, computed once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import nn
from transformers import AutoTokenizer

from neurondrift.attribution.changes import Change, change_from
from neurondrift.attribution.margin import Margin
from neurondrift.attribution.openings import Openings
from neurondrift.attribution.outputs import SHARED, OutputDrift, functional_drift
from neurondrift.attribution.paths import Attribution, downs_of, path_attribution
from neurondrift.attribution.provenance import Provenances, provenance
from neurondrift.base.errors import ConfigError, DataError, ModelError
from neurondrift.importance.methods import get_method
from neurondrift.importance.scores import iterate_scores
from neurondrift.models.adapters import is_trained
from neurondrift.models.batches import Batch
from neurondrift.models.data import Example, encode
from neurondrift.models.disk.adapter_files import CONFIG, read_config
from neurondrift.models.disk.initial import Weights
from neurondrift.models.loading import folder_of, quiet_transformers
from neurondrift.models.parts import Compound, Unit, compounds
from neurondrift.models.sites import Sites, sites_of

Set = Literal["safety", "utility"]
Base = str | Path | Weights
Examples = Sequence[Example] | Sequence[Mapping[str, Any]]
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


class Reduced(NamedTuple):
    """Scores of single weights, summed over each row `[out]` and over each column `[in]` of the sites whose columns are
    hidden units or heads; float64. Of a method of neurons `columns` is empty."""

    rows: dict[str, torch.Tensor]
    columns: dict[str, torch.Tensor]


@dataclass(eq=False, kw_only=True)
class Material:
    """What scores are taken from.

    Parameters
    ----------
    model
        The model that is scored, its `linear_sites`, or a `Change` of it, whose last state is scored.
    tokenizer
        The model's.
    safety, utility
        Harmful requests with refusals, and ordinary prompts with answers: examples, or rows that are encoded.
    harmful, harmless
        Prompts; by default those of `safety` and of `utility`, where these are examples.
    base
        The model from before the change that is studied: the folder of a full model, a hub id, `pypi:NAME`, an
        adapter's folder (its base), a callable site -> `[out, in]`, or the `Change` from it to the model as it is
        loaded. A model with an adapter on it has its base.
    openings
        Of the refusal margin: `Openings`, a language, or None for English.
    system, chat_template
        A system prompt before each prompt, and whether prompts go through the chat template.
    points, tolerance
        Midpoints of path attribution, and how far its sum may be from the change (None: as far as it is).
    shared
        Leading directions that functional drift leaves out.
    batch_size, max_length, seed
        Examples at once, the longest in tokens, and the seed of what is random.
    on_batch
        Called after each batch, for progress, where a measure goes through examples.
    """

    model: nn.Module | Sites | Change
    tokenizer: Any
    safety: Examples
    utility: Examples
    harmful: Sequence[str | Example] | None = None
    harmless: Sequence[str | Example] | None = None
    base: Base | Change | None = None
    openings: Openings | str | None = None
    system: str | None = None
    chat_template: bool = True
    points: int = 3
    tolerance: float | None = None
    shared: int = SHARED
    batch_size: int = 8
    max_length: int = 512
    seed: int = 0
    on_batch: Callable[[Batch], None] = lambda batch: None
    _reduced: dict[tuple[str, Set], Reduced] = field(default_factory=dict, init=False, repr=False)
    _paths: dict[str, Attribution] = field(default_factory=dict, init=False, repr=False)
    _kept: dict[str, Any] = field(default_factory=dict, init=False, repr=False)

    @cached_property
    def sites(self) -> Sites:
        """The sites that are scored."""
        return self.model.sites if isinstance(self.model, Change) else sites_of(self.model)

    @cached_property
    def has_base(self) -> bool:
        """Whether the model from before is known."""
        known = isinstance(self.model, Change) or self.base is not None
        return known or any(map(is_trained, self.sites.values()))

    @cached_property
    def change(self) -> Change:
        """The change from the base to the model.

        Raises `ConfigError` where no base is known; `ModelError` where it has other tokens; `ArtifactError` where its
        weights are missing or of another shape.
        """
        for given in (self.model, self.base):
            if isinstance(given, Change):
                return given
        if not self.has_base:
            raise ConfigError("The model from before the change is not known", fix="name it: base")
        if isinstance(self.base, str | Path):
            return change_from(self.sites, base_of(self.base, self.tokenizer))
        assert not isinstance(self.base, Change)
        return change_from(self.sites, self.base)

    @contextlib.contextmanager
    def standing(self) -> Iterator[nn.Module]:
        """The model in the state that is scored: as it is, or the last one of a `Change` that was given."""
        if not isinstance(self.model, Change):
            yield self.sites.model
            return
        with self.model.vessel as vessel:
            vessel.go(self.model.states[-1], self.model.states[-1], 1.0)
            yield self.sites.model

    def once(self, key: str, make: Callable[[], Any]) -> Any:
        """What several scores have in common: made when it is first asked for."""
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]

    def compounds(self, unit: Unit) -> dict[str, Compound]:
        """The hidden units or the heads of the model."""
        found: dict[str, Compound] = self.once(f"compounds {unit}", lambda: compounds(self.sites, unit))
        return found

    @cached_property
    def downs(self) -> dict[str, int]:
        """Site whose columns are hidden units or heads -> how many columns each of them has."""
        return downs_of(self.sites)

    def encoded(self, part: Set) -> list[Mapping[str, Any]]:
        """The examples of a set as token ids and labels."""
        found: list[Mapping[str, Any]] = self.once(f"encoded {part}", lambda: self._encoded(part))
        return found

    def _encoded(self, part: Set) -> list[Mapping[str, Any]]:
        given: Sequence[Any] = getattr(self, part)
        if not given:
            raise DataError(f"There are no examples of {part}")
        rows: list[Mapping[str, Any]] = [one for one in given if isinstance(one, Mapping)]
        if len(rows) not in (0, len(given)):
            raise DataError(f"Some examples of {part} are encoded and some are not", received=len(rows))
        return rows or list(encode(given, self.tokenizer, max_length=self.max_length))

    def prompts(self, part: Set) -> Sequence[str | Example]:
        """The harmful prompts (of `safety`) or the harmless ones (of `utility`)."""
        name = "harmful" if part == "safety" else "harmless"
        given = getattr(self, name)
        found: Sequence[Any] = getattr(self, part) if given is None else given
        if not found or any(isinstance(one, Mapping) for one in found):
            raise DataError(f"There are no {name} prompts", fix=f"give them: {name}, as texts or examples")
        return found

    def reduced(self, method: str, part: Set) -> Reduced:
        """The scores of an importance method on a set, summed over rows and columns."""
        key = method, part
        if key not in self._reduced:
            needs_data = get_method(method).needs != "nothing"
            encoded = self.encoded(part) if needs_data else []
            how: dict[str, Any] = {"batch_size": self.batch_size, "seed": self.seed, "on_batch": self.on_batch}
            rows, columns = {}, {}
            with self.standing() as model:
                for name, values in iterate_scores(model, encoded, method=method, sites=self.sites, **how):
                    if values.ndim == 1:
                        rows[name] = values.double()
                        continue
                    rows[name] = values.sum(dim=1, dtype=torch.float64)
                    if name in self.downs:
                        columns[name] = values.sum(dim=0, dtype=torch.float64)
            self._reduced[key] = Reduced(rows, columns)
        return self._reduced[key]

    @cached_property
    def outputs(self) -> OutputDrift:
        """Functional drift of the change."""
        return functional_drift(
            self.change,
            self.encoded("safety"),
            self.encoded("utility"),
            shared=self.shared,
            batch_size=self.batch_size,
            on_batch=self.on_batch,
        )

    @cached_property
    def origins(self) -> Provenances:
        """Provenance of the change."""
        return provenance(
            self.change,
            self.encoded("safety"),
            self.encoded("utility"),
            batch_size=self.batch_size,
            on_batch=self.on_batch,
        )

    def margin(self, part: Set) -> Margin:
        """The refusal margin of a set's prompts."""
        return self.margin_of(self.prompts(part))

    def margin_of(self, prompts: Sequence[str | Example]) -> Margin:
        """The refusal margin of some prompts."""
        how: dict[str, Any] = {"chat_template": self.chat_template, "system": self.system}
        return Margin(self.sites.model, self.tokenizer, prompts, self.openings, **how)

    def path(self, part: Set) -> Attribution:
        """What the change contributed to the margin of a set's prompts."""
        if part not in self._paths:
            self._paths |= path_attribution(
                self.change,
                {part: self.margin(part)},
                points=self.points,
                tolerance=self.tolerance,
                batch_size=self.batch_size,
            )
        return self._paths[part]


def base_of(reference: str | Path, tokenizer: Any) -> str:
    """The reference of the full model that a base names: itself, or what an adapter's folder was trained on.

    Raises `ModelError` for an adapter that does not say so, and for a model whose tokenizer gives tokens other ids.
    """
    text, folder = str(reference), Path(str(reference)).expanduser()
    if folder.is_dir():
        text = str(folder)
        if (folder / CONFIG).exists() and not (folder / "config.json").exists():
            text = str(read_config(folder / CONFIG).get("base_model_name_or_path") or "")
            if not text:
                raise ModelError("The adapter does not say which model it was trained on", received=str(reference))
    check_tokens(text, tokenizer)
    return text


def check_tokens(reference: str, tokenizer: Any) -> None:
    """Raise `ModelError` where the tokenizer beside a model gives some token another id than `tokenizer` does.

    Nothing is compared where no tokenizer lies beside it.
    """
    if reference.startswith("tiny:"):
        return
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(folder_of(reference))
        stack.enter_context(quiet_transformers())
        source: dict[str, Any] = {"pretrained_model_name_or_path": str(folder)}
        if not any((folder / name).exists() for name in TOKENIZER_FILES):
            if Path(reference).exists() or reference.startswith("pypi:"):
                return
            name, _, revision = reference.partition("@")  # of the hub, where only weights have been fetched
            source = {"pretrained_model_name_or_path": name, "revision": revision or None}
        try:
            other = AutoTokenizer.from_pretrained(**source).get_vocab()
        except (OSError, ValueError, KeyError):  # of a class that is not known, or not to be had
            return
    own = tokenizer.get_vocab()
    strange = next((token for token, place in other.items() if own.get(token, place) != place), None)
    if strange is not None or not own.keys() & other.keys():
        received = f"{strange!r} is {other.get(strange)} there" if strange is not None else "no token in common"
        raise ModelError(
            f"The base {reference} has another tokenizer than the model",
            received=received,
            allowed="" if strange is None else f"{own[strange]}, as in the model",
            fix="name the model that the change started from",
        )
