"""The initial weights of a model in training, read from the folder of the original model site by site."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch

from neurondrift.base.errors import ArtifactError
from neurondrift.models.disk.checkpoints import Checkpoint, DiskSite
from neurondrift.models.sites import Site


class Weights(Protocol):
    """Somewhere to read a site's weight `[out, in]` from, by name."""

    def __call__(self, site: str) -> torch.Tensor: ...


class CheckpointWeights:
    """The weights of a full model in a folder of safetensors and config.json, mapped: never all in memory at once.

    Calling it with a site's name gives the weight `[out, in]` in the dtype on disk. Names are those of the model that
    transformers makes of the folder; what it renames, fuses and splits while loading is put together (`Checkpoint`).

    Raises
    ------
    ArtifactError
        A file of the folder is missing or truncated; on reading, a site that the folder has not, or in another shape.
    ModelError
        No model, pickled or quantised weights, or a form that cannot be read site by site.
    """

    def __init__(self, folder: str | Path, sites: Mapping[str, Site], *, checkpoint: Checkpoint | None = None) -> None:
        self.folder = Path(folder)
        self._stored = (Checkpoint(self.folder, str(folder)) if checkpoint is None else checkpoint).sites
        self._sites = sites

    def __call__(self, site: str) -> torch.Tensor:
        return self.stored(site).read()

    def stored(self, site: str) -> DiskSite:
        """Where the weight of a site lies, its shape compared; the errors are those of reading it."""
        known, stored = self._sites[site], self._stored.get(site)
        if stored is None:
            name = site if known.expert is None else site.rsplit(".", 2)[0]
            raise ArtifactError(f"The checkpoint {self.folder} has no tensor {name}.{known.parameter}")
        if stored.shape != tuple(known.shape):
            raise ArtifactError(
                f"The checkpoint {self.folder} holds {site} in another shape",
                received=stored.shape,
                allowed=str(tuple(known.shape)),
            )
        return stored
