"""A plant on disk: a model, the one from before, where refusals were trained, and what that was shown to cause."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from neurondrift.base.errors import ArtifactError
from neurondrift.base.files import read_json, read_toml, standing_inputs
from neurondrift.groups.group import Group, load_group
from neurondrift.models.data import Example, load_examples
from neurondrift.study.plants.settings import Planting, PlantSection
from neurondrift.study.settings import validated

CONFIGURATION, CAUSALITY, TABLE, MANIFEST = "plant.toml", "causality.json", "causality.md", "plant.json"
BASE, MODEL, EXAMPLES = "base", "model", "examples"
GROUPS = ("planted", "decoy", "as_far")
SETS = ("safety", "utility", "harmful", "harmless")


@dataclass(frozen=True, eq=False)
class Plant:
    """A plant in a folder.

    Attributes
    ----------
    folder
        Holds `model` and `base` (folders that `load_model` reads), `planted.parquet` (the answer), `decoy.parquet` and
        `as_far.parquet`, `examples/*.jsonl` (kept from training: `safety` and `utility` for scores, `harmful` and
        `harmless` for outcomes), `causality.json` and `.md`, `plant.toml`.
    """

    folder: Path

    @classmethod
    def at(cls, folder: str | Path) -> Plant:
        """The plant in a folder. Raises `ArtifactError` where there is none, it is not finished, or a file changed."""
        folder = Path(folder)
        if not (folder / MANIFEST).is_file():
            raise ArtifactError(
                "There is no finished plant in this folder", received=str(folder), fix="neurondrift plant --output-dir"
            )
        if standing_inputs(folder / MANIFEST, root=folder) is None:
            raise ArtifactError(
                "A file of this plant is missing or has changed",
                received=str(folder),
                fix="run neurondrift plant again",
            )
        return cls(folder)

    @property
    def model(self) -> Path:
        """The folder of the model into which refusals were trained."""
        return self.folder / MODEL

    @property
    def base(self) -> Path:
        """The folder of the model from before."""
        return self.folder / BASE

    @cached_property
    def asked(self) -> Planting:
        """What was asked for."""
        content = read_toml(self.folder / CONFIGURATION)
        return validated(Planting, {name: content[name] for name in ("model", "plant") if name in content})

    @property
    def settings(self) -> PlantSection:
        """Of the plant alone."""
        return self.asked.plant

    @cached_property
    def groups(self) -> dict[str, Group]:
        """`planted`, and `decoy` and `as_far` where there are such."""
        return {
            name: load_group(self.folder / f"{name}.parquet")
            for name in GROUPS
            if (self.folder / f"{name}.parquet").exists()
        }

    @cached_property
    def causality(self) -> dict[str, Any]:
        """What was shown: `states`, `holds`, `failed`."""
        found: dict[str, Any] = read_json(self.folder / CAUSALITY)
        return found

    def examples(self, name: str) -> list[Example]:
        """One of the sets `safety`, `utility`, `harmful`, `harmless`."""
        assert name in SETS, name
        return load_examples(str(self.folder / EXAMPLES / f"{name}.jsonl"), require_response=name != "harmful")

    @property
    def name(self) -> str:
        """What tables call it."""
        settings = self.settings
        kind = {"row": "rows", "hidden_unit": "hidden units", "head": "heads"}[settings.unit]
        return f"{kind}{', mixed' if settings.mixed else ''}, seed {settings.seed}"
