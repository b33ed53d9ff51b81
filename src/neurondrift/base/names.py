"""Names of modules without what wraps them: one rule for the sites of models, for checkpoints and for adapters."""

from __future__ import annotations

# Modules that wrap another one and stand in its children's names, wherever they are: torch.compile, FSDP, activation
# checkpointing, DeepSpeed's and accelerate's inner models.
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module")
# Wrappers around a whole model: DataParallel, DDP and DeepSpeed; PEFT.
AROUND = (("module",), ("base_model", "model"))


def plain(name: str) -> str:
    """A name without the wrappers that a training run has put around the model or its blocks."""
    parts = [part for part in name.split(".") if part not in WRAPPERS]
    while True:
        around = next((wrapper for wrapper in AROUND if tuple(parts[: len(wrapper)]) == wrapper), ())
        if not around or len(parts) == len(around):
            return ".".join(parts)
        parts = parts[len(around) :]
