"""Drift: how far every neuron has moved since training began."""

from neurondrift.drift.exact import DriftMeter, NeuronDrift, compare_models, measure_drift
from neurondrift.drift.log import DriftLog
from neurondrift.drift.weights import WeightDrift, pooled, weight_drifts

__all__ = [
    "DriftLog",
    "DriftMeter",
    "NeuronDrift",
    "WeightDrift",
    "compare_models",
    "measure_drift",
    "pooled",
    "weight_drifts",
]
