"""A LoRA adapter in a folder, read as its factors: neither PEFT's layers nor the model are built.

Owns the names, shapes and scaling of adapter_model.safetensors and adapter_config.json. The maths is `exact`'s.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from neurondrift.base.errors import ModelError
from neurondrift.base.files import read_json
from neurondrift.groups.group import load_group
from neurondrift.models.adapters import REBASING, Adapter
from neurondrift.models.disk.checkpoints import Checkpoint, DiskSite, Slab
from neurondrift.models.disk.references import refuse_other_formats
from neurondrift.models.disk.tensors import TensorFile, read_header

logger = logging.getLogger(__name__)

CONFIG, WEIGHTS, FROZEN = "adapter_config.json", "adapter_model.safetensors", "frozen_group.parquet"
# Settings of LoRA under which Δ is not s·B A of the two stored factors.
UNREADABLE = ("layer_replication", "use_qalora", "use_bdlora", "kasa_config", "arrow_config", "monteclora_config")
FACTOR = re.compile(r"(.+?)\.lora_(A|B|magnitude_vector)(?:\.default)?(?:\.weight)?$")


class Factors(NamedTuple):
    """Where a site's factors lie. `expert` of `experts` picks from stacked factors: A `[experts·r, in]`, whose rows
    run expert by expert, and B `[out, r·experts]`, whose columns run rank by rank."""

    a: TensorFile
    b: TensorFile
    magnitude: TensorFile | None
    scaling: float
    rank: int
    expert: int
    experts: int


class AdapterFolder:
    """An adapter on a base checkpoint.

    Attributes
    ----------
    changes
        Site name -> `Factors`, or a `DiskSite` where the adapter keeps a whole weight (`modules_to_save`). Sites
        that are not in it have not moved.
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
        self.config: dict[str, Any] = read_json(folder / CONFIG)
        self._check_method()
        self._check_base()
        if not (folder / WEIGHTS).exists():
            refuse_other_formats(folder, reference)
            raise ModelError(f"This adapter folder holds no {WEIGHTS}", received=reference)
        self.changes: dict[str, Factors | DiskSite] = {}
        self.held = self._read_mask()
        self._read_keys(read_header(folder / WEIGHTS))

    def factors(self, site: str) -> Adapter:
        """A `[r, in]`, B `[out, r]` float64 with the scaling, and DoRA's magnitude `[out]`, of an adapted site."""
        found = self.changes[site]
        assert isinstance(found, Factors)
        a, b = found.a.mapped(), found.b.mapped()
        if found.experts > 1:
            a = a.reshape(found.experts, found.rank, -1)[found.expert]
            b = b.reshape(b.shape[0], found.rank, found.experts)[:, :, found.expert]
        magnitude = None if found.magnitude is None else found.magnitude.mapped().flatten()
        return Adapter(a, b.double() * found.scaling, magnitude)

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

    def _read_keys(self, tensors: Mapping[str, TensorFile]) -> None:
        modules: dict[str, dict[str, TensorFile]] = {}
        for key, tensor in tensors.items():
            name = key.removeprefix("base_model.model.")
            match = FACTOR.match(name)
            if match is not None:
                modules.setdefault(match[1], {})[match[2]] = tensor
            elif not self._read_whole(name, tensor) and not self._lies_elsewhere(name):
                raise self._fits_nothing(key)
        for module, found in modules.items():
            if "A" not in found or "B" not in found:
                raise ModelError(
                    f"The adapter {self.reference} has only one factor of {module}", received=sorted(found)
                )
            if not self._read_factors(module, found) and not self._lies_elsewhere(f"{module}.weight"):
                raise self._fits_nothing(module)
        if not self.changes:
            logger.warning("the adapter %s changes no site: all drift is zero", self.reference)

    def _fits_nothing(self, key: str) -> ModelError:
        return ModelError(
            f"{key} of the adapter {self.reference} fits nothing in {self.base.reference}",
            received=f"trained on {self.config.get('base_model_name_or_path')}",
            fix="give the model that the adapter was trained on as BASE",
        )

    def _read_factors(self, module: str, found: Mapping[str, TensorFile]) -> bool:
        from peft.utils.other import get_pattern_key

        a, b = found["A"], found["B"]
        if module in self.base.sites:
            names, target = [module], module
        else:  # PEFT's wrapper of a 3-D parameter is named after the module that holds it, nested for a second one
            holder = re.sub(r"(\.base_layer)+$", "", module)
            groups: dict[str, list[str]] = {}
            for name in self.base.sites:
                if name.startswith(f"{holder}.") and re.fullmatch(r"\w+\.\d+", name[len(holder) + 1 :]):
                    groups.setdefault(name.rpartition(".")[0], []).append(name)
            fitting = {
                parameter: members
                for parameter, members in groups.items()
                if self.base.sites[members[0]].shape == (b.shape[0], a.shape[1])
            }
            if not groups:
                return False
            if len(fitting) != 1:
                raise self._shapes_differ(module, next(iter(groups.values()))[0], a, b)
            target, names = next(iter(fitting.items()))
        ranks, alphas = self.config.get("rank_pattern") or {}, self.config.get("alpha_pattern") or {}
        rank = int(ranks.get(get_pattern_key(list(ranks), target), self.config["r"]))
        alpha = float(alphas.get(get_pattern_key(list(alphas), target), self.config["lora_alpha"]))
        scaling = alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)
        experts = len(names)
        for index, name in enumerate(names):
            rows, columns = self.base.sites[name].shape
            if a.shape != (rank * experts, columns) or b.shape != (rows, rank * experts):
                raise self._shapes_differ(module, name, a, b, rank)
            self.changes[name] = Factors(a, b, found.get("magnitude_vector"), scaling, rank, index, experts)
        return True

    def _shapes_differ(
        self, module: str, site: str, a: TensorFile, b: TensorFile, rank: int | None = None
    ) -> ModelError:
        return ModelError(
            f"The factors of {module} in the adapter {self.reference} do not fit {self.base.reference}",
            received=f"A {list(a.shape)}, B {list(b.shape)}" + (f", rank {rank}" if rank else ""),
            allowed=f"factors of {site} {list(self.base.sites[site].shape)}",
            fix="give the model that the adapter was trained on as BASE",
        )

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

    def _lies_elsewhere(self, name: str) -> bool:
        """Whether a key belongs to what is no site: biases, norms, embeddings, the LM head."""
        module = re.sub(r"\.(weight|bias|lora_.*|token_adapter.*|trainable_tokens.*)$", "", name)
        known = {tensor.rpartition(".")[0] for tensor in self.base.tensors}
        return (
            module in self.base.sites
            or any(entry == module or entry.endswith(f".{module}") or module.endswith(f".{entry}") for entry in known)
            or module.rpartition(".")[2] in ("lm_head", "embed_out", "embed_tokens", "wte")
        )
