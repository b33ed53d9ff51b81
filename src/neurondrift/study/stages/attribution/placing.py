"""Where the lost margin lies: the neurons that carry most of it, and the share of every site."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from neurondrift.report.findings.attribution import NeuronShare, SiteShare
from neurondrift.study.population import Compared

FloatArray = npt.NDArray[np.float64]
#: So many neurons are named.
MOST_NEURONS = 20


def largest_neurons(parts_SN: FloatArray, changes_S: FloatArray, compared: Compared) -> list[NeuronShare]:
    """The neurons with the largest share of the lost margin, the largest first.

    Parameters
    ----------
    parts_SN
        What each neuron contributed to the change of the margin, finite, in nats.
    changes_S
        The change of the margin of each seed, in nats.
    compared
        The neurons and the groups of the analysis.

    Returns
    -------
    list of NeuronShare
        At most `MOST_NEURONS`, each with a share above 0 in the mean over seeds, ties by the lower index. Empty where
        the margin fell not in every seed: there is no loss to share out.
    """
    if not (changes_S < 0).all():
        return []
    people, shares_SN = compared.population, parts_SN / changes_S[:, None]
    mean_N = shares_SN.mean(axis=0)
    first = np.argsort(-mean_N, kind="stable")[:MOST_NEURONS]
    return [
        NeuronShare(
            site=people.site_names[people.site[at]],
            module_type=people.module_type[people.site[at]],
            layer=people.layer[people.site[at]],
            row=int(people.row[at]),
            share=float(mean_N[at]),
            per_seed=shares_SN[:, at].tolist(),
            groups=[name for name, member_N in compared.members.items() if member_N[at]],
        )
        for at in first
        if mean_N[at] > 0
    ]


def shares_by_site(parts_SN: FloatArray, changes_S: FloatArray, compared: Compared) -> list[SiteShare]:
    """The share of every site in the order of the model, mean over seeds; arguments and emptiness as above."""
    if not (changes_S < 0).all():
        return []
    people = compared.population
    mean_N = (parts_SN / changes_S[:, None]).mean(axis=0)
    sums = np.bincount(people.site, weights=mean_N, minlength=len(people.site_names))
    counts = np.bincount(people.site, minlength=len(people.site_names))
    return [
        SiteShare(site=name, module_type=kind, layer=layer, n=int(count), share=float(total))
        for name, kind, layer, count, total in zip(
            people.site_names, people.module_type, people.layer, counts, sums, strict=True
        )
    ]
