"""neurondrift: what happens to the weights that keep a language model safe when it is fine-tuned?

The public names below are imported when they are first used, so that `import neurondrift` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "load_model": "models",
    "linear_sites": "sites",
    "Site": "sites",
    "load_examples": "data",
    "Example": "data",
    "encode": "data",
    "score": "importance",
    "select_top": "groups",
    "set_difference": "groups",
    "random_group": "groups",
    "matched": "groups",
    "load_group": "groups",
    "Group": "groups",
    "measure_drift": "drift",
    "compare_models": "drift",
    "NeuronDrift": "drift",
    "DriftLog": "drift",
    "DriftCallback": "drift.callback",
    "is_refusal": "behaviour.judges",
    "weights_of_units": "groups",
    "prune": "interventions",
    "rewind": "interventions",
    "transplant": "interventions",
    "save_model": "interventions",
    "freeze": "freezing",
    "FreezeCallback": "freezing",
    "UserError": "errors",
}

__all__ = ["__version__", *_HOMES]

if TYPE_CHECKING:
    from neurondrift.behaviour.judges import is_refusal
    from neurondrift.data import Example, encode, load_examples
    from neurondrift.drift import DriftLog, NeuronDrift, compare_models, measure_drift
    from neurondrift.drift.callback import DriftCallback
    from neurondrift.errors import UserError
    from neurondrift.freezing import FreezeCallback, freeze
    from neurondrift.groups import (
        Group,
        load_group,
        matched,
        random_group,
        select_top,
        set_difference,
        weights_of_units,
    )
    from neurondrift.importance import score
    from neurondrift.interventions import prune, rewind, save_model, transplant
    from neurondrift.models import load_model
    from neurondrift.sites import Site, linear_sites


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(import_module(f"neurondrift.{_HOMES[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'neurondrift' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
