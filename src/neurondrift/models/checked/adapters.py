"""A PEFT adapter put on a model, of which every tensor is accounted for.

Owns how an adapter's file becomes PEFT's layers: by PEFT itself where the file has the names of the model, else with
the names, ranks and stacked experts that `disk/adapter_files.py` finds, which `diff` measures too. Knows nothing of
references.
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from neurondrift.base.errors import ModelError, UserError
from neurondrift.base.names import plain
from neurondrift.models.architecture.classes import first_line
from neurondrift.models.disk.adapter_files import PREFIX, AdapterFile, Placed, factor_key
from neurondrift.models.disk.keys import names_of
from neurondrift.models.sites import unwrap

# Last parts of names that PEFT takes for those of experts in mixtures, even where they are of a dense MLP beside them.
TAKEN_FOR_EXPERTS = ("gate", "w1", "w2", "w3", "gate_proj", "up_proj", "down_proj")
# Parameters that PEFT keeps once and shows in every layer, or makes anew.
SHARED = ("vblora_vector_bank", "prompt_encoder", ".tinylora_v.", ".unilora_theta_d.")


def put_on(model: Any, folder: Path, *, trainable: bool) -> Any:
    """The model with the adapter of a folder around it.

    Raises
    ------
    ModelError
        No adapter; an adapter whose tensors do not fit the model, or that lacks some that its configuration names.
    ArtifactError
        A file that is cut off.
    """
    from peft import PeftConfig

    reference = str(folder)
    file = AdapterFile(folder, reference)
    inner = unwrap(model)
    base = str(getattr(inner.config, "_name_or_path", "") or type(inner).__name__)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # keys of newer versions of PEFT
            config: Any = PeftConfig.from_pretrained(reference)
        if config.is_prompt_learning and trainable:
            raise ModelError("A prompt-learning adapter cannot be trained further", received=reference)
        config.inference_mode = not trainable
        names = names_of(inner)
        placed = file.place(names, base)
        explicit = placed.renamed or (file.is_lora and bool(names.experts) and _peft_mistakes(placed, config))
        if explicit and file.is_lora:
            _name_targets(config, placed, inner, mixture=bool(names.experts), trainable=trainable)
        adapted = _wrapped(model, config)
        if explicit:
            result = _give(adapted, placed, inner)
        else:
            mapping = getattr(model, "_checkpoint_conversion_mapping", None) or None
            result = adapted.load_adapter(reference, "default", is_trainable=trainable, key_mapping=mapping)
    except UserError:
        raise
    except KeyError as error:
        raise ModelError(f"The adapter {reference} lacks {error.args[0]}", received=f"put on {base}") from error
    except Exception as error:  # PEFT fails in many ways where an adapter is of another model
        raise ModelError(f"The adapter does not fit the model ({first_line(error)})", received=reference) from error
    _check(result, file, config, base)
    if not trainable:
        adapted.eval()
    return adapted


def _wrapped(model: Any, config: Any) -> Any:
    from peft import MODEL_TYPE_TO_PEFT_MODEL_MAPPING, PeftModel

    return MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(config.task_type, PeftModel)(model, config, "default")


def _peft_mistakes(placed: Placed, config: Any) -> bool:
    """Whether PEFT would take modules beside the experts for projections of experts as older versions had them."""
    stacked = any(factors.target not in module for module, factors in placed.loras.items())
    return not (stacked or getattr(config, "target_parameters", None)) and any(
        module.rpartition(".")[2] in TAKEN_FOR_EXPERTS for module in placed.loras
    )


def _name_targets(config: Any, placed: Placed, model: Any, *, mixture: bool, trainable: bool) -> None:
    """Write into the configuration exactly what the file has factors of, by the model's names."""
    modules: list[str] = []
    parameters: list[str] = []
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for module, factors in placed.loras.items():
        target = factors.target
        if re.sub(r"(\.base_layer)+$", "", module) == target:
            owner = model.get_submodule(target)
            plain_layer = isinstance(owner, nn.Linear | nn.Embedding | nn.Conv1d | Conv1D)
            if not plain_layer or (mixture and target.rpartition(".")[2] in TAKEN_FOR_EXPERTS):
                target = f"{target}.weight"
                parameters.append(target)
            else:
                modules.append(target)
        else:
            parameters.append(target)
        ranks[re.escape(target)], alphas[re.escape(target)] = factors.rank, factors.alpha
    for name, stack in placed.stacks.items():
        parameters.append(name)
        ranks[re.escape(name)], alphas[re.escape(name)] = stack.pieces * stack.rank, stack.alpha
    modules += sorted({name.rpartition(".lora_embedding_")[0] for name in placed.others if ".lora_embedding_" in name})
    config.target_modules, config.target_parameters = set(modules), parameters or None
    # Patterns are looked through for every layer: only those that say something are written.
    config.rank_pattern = {name: rank for name, rank in ranks.items() if rank != config.r}
    config.alpha_pattern = {name: alpha for name, alpha in alphas.items() if alpha != config.lora_alpha}
    config.layers_to_transform = config.layers_pattern = config.exclude_modules = None
    if parameters and config.lora_dropout:
        if trainable:
            raise ModelError(
                "PEFT cannot train the factors of experts further with a dropout",
                received=f"lora_dropout = {config.lora_dropout}",
                fix="set it to 0 in adapter_config.json",
            )
        config.lora_dropout = 0.0


def _give(adapted: Any, placed: Placed, model: Any) -> Any:
    """Put the file's tensors into PEFT's layers, under the names that these have."""
    from peft import set_peft_model_state_dict

    state: dict[str, torch.Tensor] = {PREFIX + name: tensor.mapped() for name, tensor in placed.others.items()}
    for module, factors in placed.loras.items():
        for kind, tensor in factors.found.items():
            state[factor_key(PREFIX + module, kind)] = tensor.mapped()
    holders: dict[str, list[str]] = {}
    for name in placed.stacks:
        holders.setdefault(name.rpartition(".")[0], []).append(name)
    for holder, names in holders.items():
        wrapper = adapted.get_submodule(PREFIX + holder)
        depth = 0
        while hasattr(wrapper, "parameter_name"):  # one of PEFT's wrappers within the other
            name = f"{holder}.{wrapper.parameter_name}"
            if name in names:
                a, b = placed.stacks[name].together(wrapper.out_features, wrapper.in_features)
                path = PREFIX + holder + ".base_layer" * depth
                state |= {f"{path}.lora_A.weight": a, f"{path}.lora_B.weight": b}
            wrapper, depth = wrapper.base_layer, depth + 1
    return set_peft_model_state_dict(adapted, state)


def _check(result: Any, file: AdapterFile, config: Any, base: str) -> None:
    """Raise `ModelError` where a tensor of the file has gone nowhere, or a layer of the adapter has had none."""
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

    if config.is_prompt_learning:
        return
    if result.unexpected_keys:
        raise file.fits_nothing(result.unexpected_keys[0], base)
    prefix = PEFT_TYPE_TO_PREFIX_MAPPING.get(config.peft_type, "lora_")
    missing = [
        name
        for name in result.missing_keys
        if prefix in name and "default" in name and not any(shared in name for shared in SHARED)
    ]
    if missing:
        name = plain(missing[0]).partition(f".{prefix}")[0]
        raise ModelError(
            f"The adapter {file.reference} has no factors of {name}, which its configuration targets",
            received=f"{len(missing)} tensors are without",
            fix="its file is incomplete, or of another adapter: copy or save it again",
        )
