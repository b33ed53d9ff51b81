"""Whether a model and its files fit: what is missing, left over or of another size is one error, whoever reads them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel

from neurondrift.base.errors import ModelError

# Tensors that older versions of transformers saved and newer ones compute.
COMPUTED = re.compile(r"(rotary_emb\.inv_freq|attn\.(masked_)?bias|attention\.(masked_)?bias|position_ids)$")


def check_complete(model: PreTrainedModel, found: Mapping[str, Any], reference: str) -> None:
    """Raise `ModelError` where transformers' loading info tells of anything missing, left over, or of another size."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    missing = sorted(set(found["missing_keys"]) & parameters, key=_by_number)
    unexpected = sorted((name for name in found["unexpected_keys"] if not COMPUTED.search(name)), key=_by_number)
    sizes = sorted(found["mismatched_keys"])
    if found.get("error_msgs"):
        raise ModelError(f"The model cannot be loaded ({found['error_msgs'][0]})", received=reference)
    if sizes:
        name, stored, wanted = sizes[0]
        raise ModelError(
            f"{name} of {reference} has another size than its config.json says",
            received=f"{list(stored)}, and {len(sizes) - 1} others",
            allowed=str(list(wanted)),
            fix="use the config.json that belongs to these files",
        )
    if missing:
        raise ModelError(
            f"The files of {reference} lack {missing[0]}",
            received=f"{len(missing)} of {len(parameters)} parameters are in no file: {_some(missing)}",
            fix=_cause(missing, unexpected, parameters),
        )
    if unexpected:
        raise ModelError(
            f"The model has no place for {unexpected[0]} of {reference}",
            received=f"{len(unexpected)} tensors of its files are left over: {_some(unexpected)}",
            fix="use the config.json that belongs to these files: this one is of another model, or names fewer blocks",
        )


def _cause(missing: Sequence[str], unexpected: Sequence[str], parameters: set[str]) -> str:
    """The likely cause, and what to do."""
    if unexpected:
        return f"the files have other names, such as {unexpected[0]}: use the config.json that belongs to them"
    blocks = {match[0] for name in missing if (match := re.match(r".*?\.\d+\.", name))}
    whole = all(name in missing for name in parameters if any(name.startswith(block) for block in blocks))
    if blocks and whole and all(any(name.startswith(block) for block in blocks) for name in missing):
        return (
            f"config.json names more blocks than the files hold ({', '.join(sorted(blocks)[:3])}), or a file is lost: "
            "copy or download the folder again"
        )
    if all("lm_head" in name or "embed_out" in name for name in missing):
        return "config.json says that the LM head is not tied to the embeddings: set tie_word_embeddings, or save it"
    return "the files are incomplete: copy or download the folder again"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _by_number(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]
