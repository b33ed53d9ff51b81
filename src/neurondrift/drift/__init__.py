"""How far weights have moved since training began."""

from typing import Any


def __getattr__(name: str) -> Any:
    """`pooled` and `weight_drifts` were documented here in 0.1; they are `nd.pooled` and `nd.weight_drifts` now."""
    if name in ("pooled", "weight_drifts"):
        import importlib
        import warnings

        warnings.warn(
            f"neurondrift.drift.{name} is neurondrift.{name} now; the old name goes with the next version",
            DeprecationWarning,
            stacklevel=2,
        )
        return getattr(importlib.import_module("neurondrift.drift.bins"), name)
    raise AttributeError(f"module 'neurondrift.drift' has no attribute {name!r}")
