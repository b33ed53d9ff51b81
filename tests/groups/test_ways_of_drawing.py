"""Controls: every named way of drawing has its case, and each is asked only where those before it have no draw."""

from functools import partial

import numpy as np
import pytest

from neurondrift.groups import controls
from neurondrift.groups.controls import WAYS_OF_LARGE_SITES, WAYS_OF_SMALL_SITES, Site, matched
from neurondrift.groups.group import Group
from neurondrift.groups.strata import inner_bounds, strata_of


def one_site(values, own) -> tuple[Group, dict]:
    return Group(granularity="neuron", members={"a": np.sort(own)}, shapes={"a": (len(values), 1)}), {"a": values}


def ways_asked(monkeypatch, group, magnitudes, *, seed=0) -> list[str]:
    asked = []

    def noted(way, site):
        asked.append(way.__name__)
        return way(site)

    for name in ("WAYS_OF_SMALL_SITES", "WAYS_OF_LARGE_SITES"):
        monkeypatch.setattr(controls, name, tuple(partial(noted, way) for way in getattr(controls, name)))
    (control,) = matched(group, magnitudes, seed=seed)
    assert len(control) == len(group)
    return asked


def names(ways) -> list[str]:
    return [way.__name__ for way in ways]


def case(kind: str):
    generator = np.random.default_rng(0)
    size = 9000 if kind.startswith("large") else 120
    values = np.exp(generator.standard_normal(size))
    order = np.argsort(values)
    share = size // 20
    if kind.endswith("random"):
        return one_site(values, generator.choice(size, share, replace=False))
    if kind.endswith("largest"):
        return one_site(values, order[-share:])
    if kind == "small, few choices":
        return one_site(values[order[-8:]], np.array([1, 6]))
    return one_site(values, order[-2 * share :: 2])  # every other one of the large


@pytest.mark.parametrize(
    ("kind", "ways", "least"),
    [
        ("large, random", WAYS_OF_LARGE_SITES, 1),
        ("large, largest", WAYS_OF_LARGE_SITES, 3),
        ("large, every other", WAYS_OF_LARGE_SITES, 1),
        ("small, random", WAYS_OF_SMALL_SITES, 1),
        ("small, largest", WAYS_OF_SMALL_SITES, 2),
        ("small, every other", WAYS_OF_SMALL_SITES, 1),
        ("small, few choices", WAYS_OF_SMALL_SITES, 4),
    ],
)
def test_ways_are_asked_in_their_order_until_one_has_a_draw(monkeypatch, kind, ways, least):
    asked = ways_asked(monkeypatch, *case(kind))
    assert asked == names(ways)[: len(asked)]
    assert len(asked) >= least
    if kind.endswith("largest"):
        assert asked[-1] == "nearest_where_none_is_balanced"


@pytest.mark.parametrize("ways", [WAYS_OF_SMALL_SITES, WAYS_OF_LARGE_SITES], ids=["small", "large"])
@pytest.mark.parametrize("kind", ["small, random", "small, largest", "small, every other", "small, few choices"])
def test_the_last_way_has_a_draw_wherever_it_is_asked(kind, ways):
    group, magnitudes = case(kind)
    values, own = magnitudes["a"], group.members["a"]
    candidates = np.setdiff1d(np.arange(len(values)), own)
    site = Site(
        values,
        own,
        candidates,
        strata_of(values, own, candidates, inner_bounds(values, own, 10)),
        np.random.default_rng(0),
    )
    ways[0](site)  # leaves its draw, from which the last goes on
    drawn = ways[-1](site)
    assert drawn is not None
    assert len(set(drawn.members.tolist())) == len(own)
    assert not set(drawn.members.tolist()) & set(own.tolist())
    assert site.off(drawn.members) <= max(site.off(site.latest), site.off(site.ends.nearest))
