"""neurondrift: what happens to the weights that keep a language model safe when it is fine-tuned?

The public names below are imported when they are first used, so that `import neurondrift` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

_HOMES = {
    "load_model": "models.loading",
    "linear_sites": "models.sites",
    "Site": "models.sites",
    "load_examples": "models.data",
    "Example": "models.data",
    "encode": "models.data",
    "score": "importance.scores",
    "select_top": "groups.selection",
    "set_difference": "groups.selection",
    "set_difference_like": "groups.selection",
    "select_residual": "groups.selection",
    "random_group": "groups.selection",
    "matched": "groups.controls",
    "load_group": "groups.group",
    "Group": "groups.group",
    "measure_drift": "drift.meter",
    "compare_models": "drift.meter",
    "NeuronDrift": "drift.exact",
    "DriftLog": "drift.log",
    "pooled": "drift.bins",
    "weight_drifts": "drift.bins",
    "DriftCallback": "drift.callback",
    "is_refusal": "behaviour.judges",
    "weights_of_units": "models.parts",
    "patch": "interventions.acting.patching",
    "patch_back": "interventions.acting.patching",
    "prune": "interventions.acting.contexts",
    "rewind": "interventions.acting.contexts",
    "transplant": "interventions.acting.contexts",
    "save_model": "interventions.acting.contexts",
    "freeze": "interventions.acting.freezing",
    "FreezeCallback": "interventions.acting.freezing",
    "refusal_margin": "attribution.margin",
    "Margin": "attribution.margin",
    "ResponseLoss": "attribution.margin",
    "Openings": "attribution.openings",
    "own_openings": "attribution.openings",
    "functional_drift": "attribution.outputs",
    "path_attribution": "attribution.paths",
    "budget": "attribution.paths",
    "provenance": "attribution.provenance",
    "plant": "study.plants.planting",
    "locate": "study.localisation.locating",
    "measure": "attribution.measures.registry",
    "UserError": "base.errors",
}

__all__ = ["__version__", *_HOMES]

if TYPE_CHECKING:
    from neurondrift.attribution.margin import Margin, ResponseLoss, refusal_margin
    from neurondrift.attribution.measures.registry import measure
    from neurondrift.attribution.openings import Openings, own_openings
    from neurondrift.attribution.outputs import functional_drift
    from neurondrift.attribution.paths import budget, path_attribution
    from neurondrift.attribution.provenance import provenance
    from neurondrift.base.errors import UserError
    from neurondrift.behaviour.judges import is_refusal
    from neurondrift.drift.bins import pooled, weight_drifts
    from neurondrift.drift.callback import DriftCallback
    from neurondrift.drift.exact import NeuronDrift
    from neurondrift.drift.log import DriftLog
    from neurondrift.drift.meter import compare_models, measure_drift
    from neurondrift.groups.controls import matched
    from neurondrift.groups.group import Group, load_group
    from neurondrift.groups.selection import (
        random_group,
        select_residual,
        select_top,
        set_difference,
        set_difference_like,
    )
    from neurondrift.importance.scores import score
    from neurondrift.interventions.acting.contexts import prune, rewind, save_model, transplant
    from neurondrift.interventions.acting.freezing import FreezeCallback, freeze
    from neurondrift.interventions.acting.patching import patch, patch_back
    from neurondrift.models.data import Example, encode, load_examples
    from neurondrift.models.loading import load_model
    from neurondrift.models.parts import weights_of_units
    from neurondrift.models.sites import Site, linear_sites
    from neurondrift.study.localisation.locating import locate
    from neurondrift.study.plants.planting import plant


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(import_module(f"neurondrift.{_HOMES[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'neurondrift' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
