"""Folders of weights on disk and on the hub: what is refused, and how one is fetched."""

from __future__ import annotations

import json
from pathlib import Path

from neurondrift.base.errors import ModelError

#: The file that says which shard holds which tensor.
INDEX = "model.safetensors.index.json"


def refuse_other_formats(folder: Path, reference: str) -> None:
    """Raise `ModelError` where a folder's weights are pickled or GGUF."""
    pickled = sorted(entry.name for pattern in ("*.bin", "*.pt", "*.pth") for entry in folder.glob(pattern))
    if any(name.startswith(("pytorch_model", "adapter_model", "consolidated")) for name in pickled):
        raise ModelError(
            "The weights are pickled, and nothing is ever unpickled",
            received=f"{reference}: {pickled[0]}",
            allowed="safetensors",
            fix="convert them: load the model in a place that you trust and save it with save_pretrained",
        )
    if gguf := sorted(folder.glob("*.gguf")):
        raise ModelError(
            "This folder holds a GGUF file in place of a model",
            received=f"{reference}: {gguf[0].name}",
            fix=f"name the file itself: {gguf[0]}",
        )


def cached(name: str, revision: str | None = None) -> Path | None:
    """The folder of a hub id in the hub's cache, where its configuration and all its safetensors are there; None where
    some would have to be fetched.

    Raises `ModelError` where they would, and the hub is not to be asked (`HF_HUB_OFFLINE`).
    """
    from huggingface_hub import constants, try_to_load_from_cache

    def found(file: str) -> Path | None:
        path = try_to_load_from_cache(name, file, revision=revision)
        return Path(path) if isinstance(path, str) else None

    config, index = found("config.json"), found(INDEX)
    wanted = ["model.safetensors"]
    if index is not None:
        wanted = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
    if config is not None and all(found(file) is not None for file in wanted):
        return config.parent
    if constants.HF_HUB_OFFLINE:
        return download(f"{name}@{revision}" if revision else name)
    return None


def download(reference: str) -> Path:
    """The folder of a hub id (`name@revision`) in the hub's cache, fetched where it is not there.

    Safetensors, configuration and index only. Raises `ModelError` where there is no such thing, or no network.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    name, _, revision = reference.partition("@")

    def fetch(file: str, *, optional: bool = False) -> Path | None:
        """The file in the cache; None where the repository does not have it, or, of an optional one, without a
        network, where the cache does not."""
        try:
            return Path(hf_hub_download(name, file, revision=revision or None))
        except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
            if optional:
                return None
            raise ModelError(
                f"The model is not in the hub's cache, and the hub cannot be reached (looked for {file})",
                received=reference,
                allowed="an existing folder or GGUF file, pypi:NAME, or a hub id that is cached or can be downloaded",
                fix="check the spelling, the network and HF_HUB_OFFLINE",
            ) from error
        except EntryNotFoundError:
            return None

    try:
        first = fetch("adapter_config.json", optional=True)
        if first is not None:
            wanted = ["adapter_model.safetensors"]
        else:
            first = fetch("config.json")
            if first is None:
                raise ModelError("This hub repository holds no model: it has no config.json", received=reference)
            index = fetch(INDEX, optional=True)
            wanted = ["model.safetensors"]
            if index is not None:
                wanted = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
        for file in wanted:
            if fetch(file) is None:
                raise ModelError(
                    f"This hub repository has no {file}",
                    received=reference,
                    allowed="weights as safetensors: pickled weights (*.bin) are never read",
                )
    except (RepositoryNotFoundError, RevisionNotFoundError, GatedRepoError, HFValidationError) as error:
        raise ModelError(
            f"There is no such folder or hub model, or it is not open to you ({type(error).__name__})",
            received=reference,
            allowed="a folder, a hub id such as owner/name or owner/name@revision, a GGUF file, pypi:NAME",
        ) from error
    except HfHubHTTPError as error:
        raise ModelError(f"The hub refused ({str(error).splitlines()[0][:200]})", received=reference) from error
    return first.parent
