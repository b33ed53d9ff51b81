"""A LoRA adapter in a folder, read as its factors: neither PEFT's layers nor the model are built.

Owns what an adapter does to each site of a checkpoint. What lies in its files is the business of `adapter_files.py`,
the maths is `exact`'s.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch

from neurondrift.base.errors import ModelError
from neurondrift.groups.group import load_group
from neurondrift.models.adapters import REBASING, Adapter
from neurondrift.models.disk.adapter_files import FROZEN, AdapterFile, Factors, Stack
from neurondrift.models.disk.checkpoints import Checkpoint, DiskSite, Slab
from neurondrift.models.disk.tensors import TensorFile

logger = logging.getLogger(__name__)

# Settings of LoRA under which Δ is not s·B A of the two stored factors.
UNREADABLE = ("layer_replication", "use_qalora", "use_bdlora", "kasa_config", "arrow_config", "monteclora_config")


class OfSite(NamedTuple):
    """The factors that change a site, and which of the experts that they are for it is."""

    factors: Factors | Stack
    expert: int = 0


SiteChange = OfSite | DiskSite


class AdapterFolder:
    """An adapter on a base checkpoint.

    Attributes
    ----------
    changes
        Site name -> its factors, or a `DiskSite` where the adapter keeps a whole weight (`modules_to_save`). Sites
        that are not in it have not moved.
    outside
        What else the adapter changes: modules that hold no site, such as the LM head, embeddings and norms.
    held
        Site name -> flat indices of single weights that were frozen: the change is zero there, whatever the factors
        say (`masked_lora`).

    Raises
    ------
    ModelError
        Pickled weights; an adapter that is no LoRA or DoRA, or that changed the base weights when it was made; keys
        or shapes that do not fit the base.
    """

    def __init__(self, folder: Path, reference: str, base: Checkpoint) -> None:
        self.folder, self.reference, self.base = folder, reference, base
        self._file = AdapterFile(folder, reference)
        self.config: dict[str, Any] = self._file.config
        self._check_method()
        self._check_base()
        self.changes: dict[str, SiteChange] = {}
        self.outside: list[str] = []
        self.held = self._read_mask()
        self._read_changes()

    def factors(self, site: str) -> Adapter:
        """A `[r, in]`, B `[out, r]` float64 with the scaling, and DoRA's magnitude `[out]`, of an adapted site."""
        change = self.changes[site]
        assert isinstance(change, OfSite)
        factors, expert = change.factors, change.expert
        if isinstance(factors, Stack):
            a, b = factors.of_expert(expert, *self.base.sites[site].shape)
            return Adapter(a, b.double() * factors.scaling)
        a, b = factors.found["A"].mapped(), factors.found["B"].mapped()
        if factors.experts > 1:
            a = a.reshape(factors.experts, factors.rank, -1)[expert]
            b = b.reshape(b.shape[0], factors.rank, factors.experts)[:, :, expert]
        magnitude = factors.found.get("magnitude_vector")
        return Adapter(a, b.double() * factors.scaling, None if magnitude is None else magnitude.mapped().flatten())

    def _read_mask(self) -> dict[str, torch.Tensor]:
        file = self.folder / FROZEN
        if not file.exists():
            return {}
        return {site: torch.from_numpy(members) for site, members in load_group(file).members.items()}

    def _check_method(self) -> None:
        kind = str(self.config.get("peft_type"))
        how = str(self.config.get("init_lora_weights")).lower()
        if kind != "LORA":
            raise ModelError(
                "The change that this adapter makes cannot be read from its files",
                received=f"{self.reference}: {kind}",
                allowed="LORA (also rsLoRA and DoRA)",
                fix="load it on its model and call nd.measure_drift(model)",
            )
        for name in UNREADABLE:
            if self.config.get(name):
                raise ModelError(f"{self.reference} is a LoRA adapter with {name}, which is not read from files")
        if how.startswith(REBASING):
            raise ModelError(
                f"The adapter {self.reference} changed the base weights when it was made, so its factors do not tell "
                "how far the model has moved",
                received=f"init_lora_weights={how!r}",
                fix="save it with path_initial_model_for_weight_conversion, or merge it and compare two full models",
            )

    def _check_base(self) -> None:
        trained_on = self.config.get("base_model_name_or_path")
        if not trained_on:
            return
        known = {self.base.reference.partition("@")[0], str(self.base.folder), str(self.base.folder.resolve())}
        if str(trained_on) not in known and str(Path(trained_on).resolve()) not in known:
            logger.warning(
                "the adapter %s was trained on %s, and is compared with %s",
                self.reference,
                trained_on,
                self.base.reference,
            )

    def _read_changes(self) -> None:
        placed = self._file.place(self.base.names, self.base.reference)
        for name, tensor in placed.others.items():
            if not self._read_whole(name, tensor):
                self._note_outside(name)
        for module, factors in placed.loras.items():
            if factors.target in self.base.names.experts:
                for expert in range(factors.experts):
                    self.changes[f"{factors.target}.{expert}"] = OfSite(factors, expert)
            elif factors.target in self.base.sites:
                self.changes[factors.target] = OfSite(factors)
            else:
                self._note_outside(f"{module}.weight")
        for name, stack in placed.stacks.items():
            for expert in range(stack.experts):
                self.changes[f"{name}.{expert}"] = OfSite(stack, expert)
        if not self.changes:
            logger.warning("the adapter %s changes no site: all drift is zero", self.reference)

    def _note_outside(self, name: str) -> None:
        """Keep the name of a module that is no site; a site's bias is left out."""
        module = re.sub(r"(\.(weight|bias|base_layer|lora_.*|token_adapter.*|trainable_tokens.*))+$", "", name)
        if module not in self.base.sites and module not in self.outside:
            self.outside.append(module)

    def _read_whole(self, name: str, tensor: TensorFile) -> bool:
        """Take in a weight that was trained whole, where it is one of a site; its shape must be that of the base."""
        module = name.removesuffix(".weight")
        targets = [module] if module in self.base.sites else []
        if not targets and len(tensor.shape) == 3:
            targets = [f"{name}.{index}" for index in range(tensor.shape[0])]
            targets = targets if all(target in self.base.sites for target in targets) else []
        for index, target in enumerate(targets):
            site = self.base.sites[target]
            transposed = site.slabs[0].transposed
            rows, columns = tensor.shape[-2:]
            offset = tensor.offset + index * rows * columns * tensor.dtype.itemsize
            slab = Slab(tensor.path, tensor.dtype, offset, rows, columns, transposed)
            if (slab.out, rows if transposed else columns) != site.shape:
                raise ModelError(
                    f"The shapes of {target} differ",
                    received=f"{self.base.reference} {list(site.shape)}, {self.reference} {list(tensor.shape)}",
                )
            self.changes[target] = site._replace(slabs=(slab,))
        return bool(targets)
