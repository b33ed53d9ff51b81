"""How far weights have moved since training began."""

from typing import Any


def __getattr__(name: str) -> Any:
    """`pooled` and `weight_drifts` were documented here in 0.1; they are `nd.pooled` and `nd.weight_drifts` now."""
    if name not in ("pooled", "weight_drifts"):
        raise AttributeError(f"module 'neurondrift.drift' has no attribute {name!r}")
    import warnings

    from neurondrift.drift import bins

    warnings.warn(
        f"neurondrift.drift.{name} is neurondrift.{name} now; the old name goes with the next version",
        DeprecationWarning,
        stacklevel=2,
    )
    return getattr(bins, name)
