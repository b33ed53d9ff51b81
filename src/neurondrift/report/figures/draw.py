"""Draws the figures of a study and writes them as PNG and SVG, the same bytes for the same results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from neurondrift.base.files import atomic_path
from neurondrift.report.figures.distributions import final_drift_distributions
from neurondrift.report.figures.doses import intervention_doses
from neurondrift.report.figures.effects import effect_sizes, layer_module_effects
from neurondrift.report.figures.over_training import (
    drift_over_training,
    refusals_over_training,
)
from neurondrift.report.figures.style import RC
from neurondrift.report.findings.statistical import Findings

FIGURES: tuple[Callable[[Findings], Figure | None], ...] = (
    effect_sizes,
    drift_over_training,
    final_drift_distributions,
    refusals_over_training,
    layer_module_effects,
    intervention_doses,
)
#: Dates are left out so that the same results give the same bytes.
METADATA: dict[str, dict[str, str | None]] = {
    "png": {"Software": None},
    "svg": {"Date": None, "Creator": "neurondrift"},
}


def draw_figures(results: Any, folder: Path, figures: Sequence[Callable[[Any], Figure | None]] = FIGURES) -> list[Path]:
    """Draw every figure that the results have something for.

    Parameters
    ----------
    results
        The content of `statistical_results.json`. `trajectories` and `rates` carry 95 % limits in `low` and
        `high`; `distributions` carry densities over the base-10 logarithm of the drift. With other `figures` what
        these take.
    folder
        Where `<name>.png` (160 dpi) and `<name>.svg` are written; made where it does not exist. A figure with
        nothing to show is not drawn, and one of its name from an earlier run is removed.
    figures
        Functions from the results to a figure or None, whose names are the files'.

    Returns
    -------
    list of Path
        The files written, each figure as PNG then SVG.

    Notes
    -----
    matplotlib's settings are changed only while this runs; pyplot and its current figure are not touched.
    """
    folder = Path(folder)
    written = []
    settings: Any = {**{key: v for key, v in matplotlib.rcParamsDefault.items() if "backend" not in key}, **RC}
    with matplotlib.rc_context(settings):
        for draw in figures:
            figure = draw(results)
            for suffix, metadata in METADATA.items():
                path = folder / f"{draw.__name__}.{suffix}"
                if figure is None:
                    path.unlink(missing_ok=True)
                    continue
                with atomic_path(path) as partial:
                    figure.savefig(partial, format=suffix, metadata=metadata)
                figure.set_layout_engine("none")  # keeps what the first file computed
                written.append(path)
    return written
