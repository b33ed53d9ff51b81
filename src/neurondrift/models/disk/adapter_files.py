"""An adapter's folder as it lies on disk, and where each of its tensors belongs in a model.

Owns which files an adapter has, the rank and scaling of LoRA, and older layouts: names with wrappers, experts one by
one. `diff` reads factors from what is found here (`factors.py`), and `attach_adapter` gives the same to PEFT, so that
both measure and run the same adapter, or refuse it with the same words.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from neurondrift.base.errors import ArtifactError, ModelError
from neurondrift.base.files import read_json
from neurondrift.base.names import plain
from neurondrift.models.disk.keys import Names, Place
from neurondrift.models.disk.references import refuse_other_formats
from neurondrift.models.disk.tensors import TensorFile, read_header

CONFIG, WEIGHTS, FROZEN = "adapter_config.json", "adapter_model.safetensors", "frozen_group.parquet"
FACTOR = re.compile(r"(.+?)\.lora_(A|B|magnitude_vector)(?:\.default)?(?:\.weight)?$")
FACTOR_OF_ONE = re.compile(r"\.experts\.\d+\.")
PREFIX = "base_model.model."
# Settings that PEFT cannot carry over to factors that are stacked for several experts.
NOT_STACKED = ("use_dora", "lora_bias", "fan_in_fan_out", "layer_replication")


class Factors(NamedTuple):
    """LoRA's factors of one module of the file: A, B, DoRA's magnitude, by these names; rank, α and s.

    `target` is the site, or the parameter whose `experts` are adapted together (`ParamWrapper`): then A is
    `[experts·r, in]`, whose rows run expert by expert, and B `[out, r·experts]`, whose columns run rank by rank.
    """

    found: Mapping[str, TensorFile]
    target: str
    experts: int
    rank: int
    alpha: float
    scaling: float


class Stack(NamedTuple):
    """LoRA of a parameter that stacks experts, from factors of single experts and projections.

    Δ of an expert is its pieces' rows one below the other. As one pair of factors it has A = the pieces' A one below
    the other, and B with their B along the diagonal: rank `pieces`·`rank`. What the file lacks is zero.
    """

    members: dict[tuple[int, int], Factors]
    experts: int
    pieces: int
    rank: int
    alpha: float
    scaling: float

    def of_expert(self, expert: int, out: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A `[pieces·r, in]` and B `[out, pieces·r]` of an expert, in the dtype on disk."""
        rows = out // self.pieces
        dtype = next(iter(self.members.values())).found["A"].dtype
        a = torch.zeros(self.pieces * self.rank, columns, dtype=dtype)
        b = torch.zeros(out, self.pieces * self.rank, dtype=dtype)
        for piece in range(self.pieces):
            factors = self.members.get((expert, piece))
            if factors is not None:
                inner = slice(piece * self.rank, (piece + 1) * self.rank)
                a[inner] = factors.found["A"].mapped()
                b[piece * rows : (piece + 1) * rows, inner] = factors.found["B"].mapped()
        return a, b

    def together(self, out: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The factors as PEFT keeps them for all experts: A `[experts·R, in]`, whose rows run expert by expert, and
        B `[out, R·experts]`, whose columns run rank by rank."""
        each = [self.of_expert(expert, out, columns) for expert in range(self.experts)]
        a = torch.cat([one for one, _ in each])
        b = torch.stack([other for _, other in each], dim=-1).flatten(1)
        return a, b


class Placed(NamedTuple):
    """Where everything in an adapter's file belongs.

    `loras`: module (or PEFT's wrapper of a parameter, ending in `.base_layer`) -> its factors; `stacks`: parameter ->
    its `Stack`; `others`: tensor's plain name in the model -> tensor, of all that is no such factor. `renamed`: whether
    PEFT would not find these places by itself.
    """

    loras: dict[str, Factors]
    stacks: dict[str, Stack]
    others: dict[str, TensorFile]
    renamed: bool


class AdapterFile:
    """The two files of an adapter, read but for the numbers.

    Raises
    ------
    ModelError
        No adapter, or only pickled weights.
    ArtifactError
        A file that is truncated or unreadable.
    """

    def __init__(self, folder: Path, reference: str) -> None:
        self.folder, self.reference = folder, reference
        check_is_adapter(folder, reference)
        self.config = read_config(folder / CONFIG)
        self.tensors = read_header(folder / WEIGHTS)

    @property
    def is_lora(self) -> bool:
        """Whether its factors can be read from the file."""
        return str(self.config.get("peft_type")) == "LORA"

    def place(self, names: Names, base: str) -> Placed:
        """Where each tensor belongs in a model that the reader knows as `base`.

        Raises
        ------
        ModelError
            Keys that fit nothing, one factor without the other, shapes that differ, modules that the configuration
            targets and the file lacks, settings that stacked experts cannot have.
        """
        modules: dict[str, dict[str, TensorFile]] = {}
        others: dict[str, TensorFile] = {}
        renamed = False
        for key, tensor in self.tensors.items():
            match = FACTOR.match(key) if self.is_lora else None
            if match is not None:
                modules.setdefault(match[1], {})[match[2]] = tensor
                renamed |= key != factor_key(match[1], match[2])
                continue
            own = names.key(re.sub(r"(\.lora_\w+)\.default(?=\.|$)", r"\1", key) if self.is_lora else key)
            if own is None and self.is_lora and not _lies_at_the_end(key):
                raise self.fits_nothing(key, base)
            renamed |= own is not None and key != PREFIX + own
            others[plain(key) if own is None else own] = tensor
        loras: dict[str, Factors] = {}
        single: dict[str, dict[tuple[int, int], Factors]] = {}
        pieces: dict[str, int] = {}
        for key, found in modules.items():
            if "A" not in found or "B" not in found:
                raise ModelError(
                    f"The adapter {self.reference} has only one factor of {plain(key)}", received=sorted(found)
                )
            inner = re.search(r"(\.base_layer)*$", key)
            wrapped = inner[0] if inner else ""
            place = names.find(key.removesuffix(wrapped))
            if place is None and _lies_at_the_end(key):
                place = Place(plain(key.removesuffix(wrapped)))
            if place is None:
                raise self.fits_nothing(key, base)
            target = self._target(place, found, names, base)
            factors = self._factors(target, key, found, names)
            if place.expert is None:
                if place.module + wrapped in loras:
                    raise self._twice(place.module)
                loras[place.module + wrapped] = factors
                renamed |= key != PREFIX + place.module + wrapped
                self._check_shape(factors, names, base)
            else:
                if (place.expert, place.piece) in single.get(place.module, {}):
                    raise self._twice(f"{place.module}.{place.expert}")
                single.setdefault(place.module, {})[place.expert, place.piece] = factors
                pieces[place.module] = place.pieces
        stacks = {name: self._stack(name, members, pieces[name], names, base) for name, members in single.items()}
        if self.is_lora and not stacks:
            self._check_targets(loras, names)
        return Placed(loras, stacks, others, renamed or bool(stacks))

    def fits_nothing(self, key: str, base: str) -> ModelError:
        """The error for a key that the model has no place for."""
        return ModelError(
            f"{key} of the adapter {self.reference} fits nothing in {base}",
            received=f"trained on {self.config.get('base_model_name_or_path')}",
            fix="give the model that the adapter was trained on as the base",
        )

    def _twice(self, module: str) -> ModelError:
        return ModelError(
            f"The adapter {self.reference} has two pairs of factors of {module}, by different names",
            fix="keep the pair that was trained last",
        )

    def shapes_differ(self, module: str, base: str, site: str, shape: tuple[int, int], factors: Factors) -> ModelError:
        """The error for factors that the matrix of a site does not take."""
        a, b = factors.found["A"], factors.found["B"]
        return ModelError(
            f"The factors of {module} in the adapter {self.reference} do not fit {base}",
            received=f"A {list(a.shape)}, B {list(b.shape)}, rank {factors.rank}",
            allowed=f"factors of {site} {list(shape)}",
            fix="give the model that the adapter was trained on as the base",
        )

    def _target(self, place: Place, found: Mapping[str, TensorFile], names: Names, base: str) -> str:
        """The site or the stacked parameter that factors belong to. PEFT names its wrapper of a parameter after the
        module that holds it, nested for a second one: the shapes tell which it is."""
        shape = found["B"].shape[0], found["A"].shape[-1]
        stacks = [stack for stack in names.experts if stack.rpartition(".")[0] == place.module]
        if place.expert is not None or place.module in names.shapes or not stacks:
            return place.module
        fitting = [stack for stack in stacks if names.shapes[f"{stack}.0"] == shape]
        if len(fitting) != 1:
            factors = self._factors(place.module, place.module, found, names)
            raise self.shapes_differ(place.module, base, f"{stacks[0]}.0", names.shapes[f"{stacks[0]}.0"], factors)
        return fitting[0]

    def _factors(self, module: str, key: str, found: Mapping[str, TensorFile], names: Names) -> Factors:
        from peft.utils.other import get_pattern_key

        ranks, alphas = self.config.get("rank_pattern") or {}, self.config.get("alpha_pattern") or {}
        old = key.removeprefix(PREFIX)
        values = []
        for patterns, default in ((ranks, self.config.get("r")), (alphas, self.config.get("lora_alpha"))):
            chosen = next(
                (
                    hit
                    for name in (module, old, plain(key))
                    if (hit := get_pattern_key(list(patterns), name)) in patterns
                ),
                None,
            )
            value = default if chosen is None else patterns[chosen]
            if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
                raise ModelError(
                    f"The configuration of the adapter {self.reference} does not say its rank and lora_alpha",
                    received=f"r {self.config.get('r')!r}, lora_alpha {self.config.get('lora_alpha')!r}",
                    allowed="two positive numbers",
                )
            values.append(value)
        rank, alpha = int(values[0]), float(values[1])
        experts = names.experts.get(module, 1) if FACTOR_OF_ONE.search(key) is None else 1
        return Factors(found, module, experts, rank, alpha, self._scaling(alpha, rank))

    def _scaling(self, alpha: float, rank: int) -> float:
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def _check_shape(self, factors: Factors, names: Names, base: str) -> None:
        site = factors.target if factors.experts == 1 else f"{factors.target}.0"
        shape, rank = names.shapes.get(site), factors.rank * factors.experts
        a, b = factors.found["A"].shape, factors.found["B"].shape
        if shape is not None and (a != (rank, shape[1]) or b != (shape[0], rank)):
            raise self.shapes_differ(factors.target, base, site, shape, factors)

    def _stack(self, name: str, members: dict[tuple[int, int], Factors], pieces: int, names: Names, base: str) -> Stack:
        first = next(iter(members.values()))
        refused = [setting for setting in NOT_STACKED if self.config.get(setting)]
        if refused or any("magnitude_vector" in one.found for one in members.values()):
            raise ModelError(
                f"The adapter {self.reference} has factors of single experts with {(refused or ['use_dora'])[0]}, "
                "which cannot be put into the experts as transformers keeps them now",
                received=name,
                fix="merge it with the versions that it was trained with, and compare two full models",
            )
        out, columns = names.shapes[f"{name}.0"]
        for (expert, _), one in members.items():
            a, b = one.found["A"], one.found["B"]
            if (one.rank, one.alpha) != (first.rank, first.alpha):
                raise ModelError(
                    f"The experts of {name} have factors of different ranks or scalings in {self.reference}",
                    received=f"rank {one.rank}, lora_alpha {one.alpha:g}; rank {first.rank}, {first.alpha:g}",
                    fix="merge it with the versions that it was trained with, and compare two full models",
                )
            if a.shape != (one.rank, columns) or b.shape != (out // pieces, one.rank):
                raise self.shapes_differ(name, base, f"{name}.{expert}", (out, columns), one)
        rank = pieces * first.rank
        alpha = first.alpha * (math.sqrt(pieces) if self.config.get("use_rslora") else pieces)
        return Stack(members, names.experts[name], pieces, first.rank, alpha, self._scaling(alpha, rank))

    def _check_targets(self, loras: Iterable[str], names: Names) -> None:
        """Raise `ModelError` where the configuration targets sites that the file has no factors of."""
        from peft.tuners.tuners_utils import check_target_module_exists

        targets = self.config.get("target_modules")
        if not targets or targets == "all-linear" or self.config.get("target_parameters"):
            return
        of = SimpleNamespace(
            target_modules=targets if isinstance(targets, str) else set(targets),
            exclude_modules=self.config.get("exclude_modules"),
            modules_to_save=self.config.get("modules_to_save"),
            layers_to_transform=self.config.get("layers_to_transform"),
            layers_pattern=self.config.get("layers_pattern"),
        )
        known = set(loras)
        plain_sites = [name for name in names.shapes if name.rpartition(".")[0] not in names.experts]
        wanted = [name for name in plain_sites if check_target_module_exists(of, name)]
        lacking = [name for name in wanted if name not in known]
        if lacking:
            raise ModelError(
                f"The adapter {self.reference} has no factors of {lacking[0]}, which its configuration targets",
                received=f"{len(lacking)} of {len(wanted)} modules are without",
                fix="its file is incomplete, or of another adapter: copy or save it again",
            )


def factor_key(module: str, kind: str) -> str:
    """The key that PEFT writes a factor under."""
    return f"{module}.lora_{kind}" + ("" if kind == "magnitude_vector" else ".weight")


def _lies_at_the_end(key: str) -> bool:
    """Whether a key is of the embeddings or the LM head, which a checkpoint may keep under one name for both."""
    module = re.sub(r"(\.base_layer|\.weight|\.bias|\.lora_.*|\.token_adapter.*|\.trainable_tokens.*)+$", "", key)
    return module.rpartition(".")[2] in ("lm_head", "embed_out", "embed_tokens", "embed_in", "wte")


def read_config(path: Path) -> dict[str, Any]:
    """The configuration of an adapter.

    Raises `ArtifactError` where it is unreadable, `ModelError` where it is not PEFT's.
    """
    config = read_json(path)
    if not isinstance(config, dict):
        raise ArtifactError(f"{path} is no configuration of an adapter", received=type(config).__name__)
    if not config.get("peft_type"):
        raise ModelError(
            f"{path} does not say what kind of adapter it is",
            received=f"keys {', '.join(sorted(config)[:6])}",
            allowed="the configuration that PEFT's save_pretrained writes, with a peft_type",
            fix="convert the adapter to PEFT's format" if "fine_tune_type" in config else "",
        )
    return config


def check_is_adapter(folder: Path, reference: str) -> None:
    """Raise `ModelError` where a folder holds no adapter in safetensors; one within a folder of it is named."""
    if (folder / CONFIG).exists() and (folder / WEIGHTS).exists():
        return
    inner = inner_adapters(folder)
    if (folder / CONFIG).exists() and not inner:
        refuse_other_formats(folder, reference)
        raise ModelError(
            f"This adapter folder holds no adapter in safetensors: it has no {WEIGHTS}", received=reference
        )
    raise ModelError(
        "This folder holds no adapter in safetensors",
        received=reference,
        allowed=f"a folder with {CONFIG} and {WEIGHTS}",
        fix=f"name the folder within it that holds one: {', '.join(inner[:3])}" if inner else "",
    )


def inner_adapters(folder: Path) -> list[str]:
    """The folders within a folder that hold an adapter, as PEFT writes them for adapters with a name."""
    return sorted(str(file.parent) for file in folder.glob(f"*/{CONFIG}") if (file.parent / WEIGHTS).exists())
