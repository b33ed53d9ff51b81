"""Where the initial weights are read from: a folder of safetensors, tensor by tensor, memory-mapped.

A model in memory may hold a tensor in another form than its folder: transformers fuses the experts of a layer into
3-D parameters and renames modules while it loads. Knows those forms; anything else is an error that names the tensor.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from neurondrift.base.errors import ArtifactError
from neurondrift.models.sites import Site


class Weights(Protocol):
    """Somewhere to read a site's weight `[out, in]` from, by name."""

    def __call__(self, site: str) -> torch.Tensor: ...


class _Source(NamedTuple):
    """Tensors on disk that one tensor in memory is made of."""

    patterns: list[str]
    keys: dict[str, list[str]]
    operations: list[str]


class CheckpointWeights:
    """The weights of a folder of safetensors, read tensor by tensor (memory-mapped), never all at once.

    Experts that the folder holds one by one (as transformers writes them) are put together as the model holds them.

    Raises
    ------
    ArtifactError
        A file of the folder is missing; on reading, a site whose tensor the folder has not, or in a form that is not
        known, or of another shape.
    """

    def __init__(self, folder: str | Path, sites: Mapping[str, Site]) -> None:
        from safetensors import safe_open

        self.folder = Path(folder)
        index = self.folder / "model.safetensors.index.json"
        if index.exists():
            files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        else:
            files = ["model.safetensors"]
        self._where: dict[str, Any] = {}
        for file in files:
            if not (self.folder / file).exists():
                raise ArtifactError("A checkpoint's file is missing", received=str(self.folder / file))
            handle = safe_open(str(self.folder / file), framework="pt")
            self._where.update(dict.fromkeys(handle.keys(), handle))
        self._sites = sites
        self._converted: dict[str, _Source] | None = None

    def __call__(self, site: str) -> torch.Tensor:
        known = self._sites[site]
        key = f"{site.rsplit('.', 2)[0]}.{known.parameter}" if known.expert is not None else f"{site}.{known.parameter}"
        tensor = self._read(key, known.expert) if key in self._where else self._assemble(key, known)
        tensor = tensor.T if known.transposed else tensor
        if tuple(tensor.shape) != tuple(known.shape):
            raise ArtifactError(
                f"The checkpoint {self.folder} holds {site} in another shape",
                received=tuple(tensor.shape),
                allowed=str(tuple(known.shape)),
            )
        return tensor

    def _read(self, key: str, expert: int | None = None) -> torch.Tensor:
        if expert is None:
            tensor: torch.Tensor = self._where[key].get_tensor(key)
            return tensor
        part: torch.Tensor = self._where[key].get_slice(key)[expert]
        return part

    def _assemble(self, key: str, site: Site) -> torch.Tensor:
        """A tensor that the folder holds in another form: renamed, or an expert's parts one by one."""
        if self._converted is None:
            self._converted = self._conversions()
        source = self._converted.get(key)
        if source is None:
            raise ArtifactError(f"The checkpoint {self.folder} has no tensor {key}")
        lists = [source.keys[pattern] for pattern in source.patterns if pattern in source.keys]
        if not source.operations and len(lists) == 1 and len(lists[0]) == 1:
            return self._read(lists[0][0], site.expert)
        per_expert = source.operations[:1] == ["MergeModulelist(dim=0)"] and site.expert is not None
        fused = source.operations[1:] == ["Concatenate(dim=1)"]
        complete = len(lists) == len(source.patterns) and len({len(keys) for keys in lists}) == 1
        if per_expert and complete and (fused or (len(lists) == 1 and not source.operations[1:])):
            assert site.expert is not None
            if site.expert < len(lists[0]):
                return torch.cat([self._read(keys[site.expert]) for keys in lists])
        raise ArtifactError(
            f"The checkpoint {self.folder} holds {key} in a form that is not known",
            received=f"{', '.join(source.operations) or 'parts'} of {lists[0][0]} and {sum(map(len, lists)) - 1} more",
            fix="save the model with transformers 5 in the form of its modules (save_original_format=False)",
        )

    def _conversions(self) -> dict[str, _Source]:
        """Name in memory -> what on disk it is made of, by transformers' own table for the folder's architecture."""
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping
        from transformers.core_model_loading import WeightConverter, dot_natural_key

        file = self.folder / "config.json"
        config = json.loads(file.read_text()) if file.exists() else {}
        names = [*(config.get("architectures") or []), config.get("model_type")]
        tables = (get_checkpoint_conversion_mapping(name) for name in names if name)
        steps: list[Any] = next((table for table in tables if table), [])
        found: dict[str, _Source] = {}
        sources: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
        for key in self._where:
            target, pattern, converter = key, None, None
            for step in steps:  # all renamings, then at most one converter
                if not isinstance(step, WeightConverter):
                    target, _ = step.rename_source_key(target)
            for step in steps:
                if isinstance(step, WeightConverter) and pattern is None:
                    target, pattern = step.rename_source_key(target)
                    converter = step if pattern is not None else None
            sources[target][pattern or key].append(key)
            if converter is None:
                found[target] = _Source([key], sources[target], [])
            else:
                operations = [repr(operation) for operation in converter.operations]
                found[target] = _Source(list(converter.source_patterns), sources[target], operations)
        for source in found.values():
            for keys in source.keys.values():
                keys.sort(key=dot_natural_key)
        return found
