"""Groups of the tiny models' neurons, weights and hidden units; scores of two made-up sites."""

import numpy as np

from neurondrift.groups.selection import random_group
from neurondrift.models.sites import fingerprint, linear_sites, mlp_units

SHAPES = {"a.q_proj": (30, 20), "a.down_proj": (12, 50)}


def scores(seed=0):
    generator = np.random.default_rng(seed)
    return {site: generator.lognormal(size=shape).astype(np.float32) for site, shape in SHAPES.items()}


def shapes_of(model, granularity="weight"):
    """What a random group is drawn from."""
    if granularity == "unit":
        return {name: (unit.count, 1) for name, unit in mlp_units(linear_sites(model)).items()}
    return {name: site.shape for name, site in linear_sites(model).items()}


def group_of(model, granularity, *, fraction=0.2, seed=0):
    """A random group that says from which model it is."""
    provenance = {"model": fingerprint(model)}
    return random_group(
        shapes_of(model, granularity), fraction=fraction, seed=seed, granularity=granularity, provenance=provenance
    )


def some(model, granularity, fraction=0.3, seed=0):
    """A random group that does not say from which model it is, so that it may act on a tuned one too."""
    return random_group(shapes_of(model, granularity), fraction=fraction, seed=seed, granularity=granularity)


def everything(model, granularity):
    return some(model, granularity, fraction=1.0)
