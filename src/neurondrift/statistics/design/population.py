"""The neurons of a study: where they lie, their drift, and the covariates of their comparison. Shapes: N neurons."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from neurondrift.base.errors import DataError
from neurondrift.statistics.design.ratios import Places, log_of
from neurondrift.statistics.estimates import FloatArray, IntArray

#: Modules whose output rows are coordinates of the residual stream, by the last part of their names.
RESIDUAL_WRITERS = frozenset(
    "o_proj down_proj out_proj c_proj dense dense_4h_to_h fc2 fc_out wo w2 linear_2 out_lin lin2".split()
)


@dataclass(frozen=True, kw_only=True)
class Population:
    """All neurons of the adapted sites and their drift.

    Attributes
    ----------
    site
        Site code of each neuron, int [N]: an index into `site_names`.
    site_names, module_type, layer
        Per site: its name, its kind (such as ``q_proj``) and its decoder block, or None.
    row
        Output row of each neuron in its site, int [N].
    norm
        Row norm of w0, float64 [N]: the matching variable |w|.
    drift
        Metric name -> float64 [n_seeds, n]; NaN where undefined.
    covariates
        Name -> float64 [N], positive, as they are (logs are taken here): ``utility_score``, ``gradient_scale`` and
        others. A neuron with one that is not finite and positive has no counterfactual in the matched comparison.
    """

    site: IntArray
    site_names: tuple[str, ...]
    module_type: tuple[str, ...]
    layer: tuple[int | None, ...]
    row: IntArray
    norm: FloatArray
    drift: dict[str, FloatArray]
    covariates: Mapping[str, FloatArray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        n, sites = len(self.site), len(self.site_names)
        if n == 0 or sites == 0:
            raise DataError(
                "There are no neurons to analyse",
                received=(n, sites),
                allowed="at least one site",
                fix="check that the drift snapshots cover the adapted sites",
            )
        if len(self.module_type) != sites or len(self.layer) != sites:
            raise DataError(
                "Module types and layers do not fit the sites",
                received=(len(self.module_type), len(self.layer)),
                allowed=f"{sites} of each",
            )
        if np.min(self.site) < 0 or np.max(self.site) >= sites:
            raise DataError(
                "A site code lies outside the site names",
                received=int(np.max(self.site)),
                allowed=f"0 to {sites - 1}",
            )
        for name, values in {"row": self.row, "norm": self.norm, **self.covariates}.items():
            if np.shape(values) != (n,):
                raise DataError(f"{name} does not fit the neurons", received=np.shape(values), allowed=f"({n},)")
        if not self.drift:
            raise DataError("There is no drift metric to analyse", allowed="at least one array [n_seeds, n]")
        seeds = {np.shape(values)[0] if np.ndim(values) == 2 else 0 for values in self.drift.values()}
        if len(seeds) != 1 or 0 in seeds or any(np.shape(v)[1] != n for v in self.drift.values()):
            raise DataError(
                "The drift arrays do not fit",
                received={k: np.shape(v) for k, v in self.drift.items()},
                allowed=f"one shape [n_seeds, {n}] for all metrics",
            )
        if "norm" in self.covariates:
            raise DataError("norm is no covariate of its own", received=list(self.covariates), allowed="other names")

    def places(self) -> Places:
        """Where the neurons lie, for the clusters of their effects."""
        alone = max((layer for layer in self.layer if layer is not None), default=-1) + 1
        layers = [alone + site if layer is None else layer for site, layer in enumerate(self.layer)]
        writes = [kind.rpartition(".")[2] in RESIDUAL_WRITERS for kind in self.module_type]
        return Places(
            np.asarray(self.site, dtype=np.int64),
            np.asarray(self.row, dtype=np.int64),
            np.array(layers, dtype=np.int64),
            np.array(writes, dtype=np.bool_),
        )

    def logs(self) -> dict[str, FloatArray]:
        """Log of the norm and of every covariate; NaN where it is undefined."""
        return {"norm": log_of(self.norm), **{name: log_of(values) for name, values in self.covariates.items()}}
