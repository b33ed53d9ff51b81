"""Files of groups: the order of their rows is the one that docs/results.md states."""

from itertools import pairwise

import numpy as np
import pandas as pd
import pytest

from neurondrift.groups.group import Group
from neurondrift.groups.selection import random_group

SHAPES = {"b": (5, 700), "a": (4, 256), "c": (3, 40)}  # several tiles of 256 columns, one, less than half of one


def written(group: Group, folder) -> list[tuple[str, int, int | None]]:
    group.save(folder / "g.parquet")
    frame = pd.read_parquet(folder / "g.parquet")
    columns = [None] * len(frame) if frame["col"].isna().all() else frame["col"].tolist()
    return list(zip(frame["site"].tolist(), frame["row"].tolist(), columns, strict=True))


def everything(granularity: str) -> Group:
    members = {
        site: np.arange(rows * (columns if granularity == "weight" else 1)) for site, (rows, columns) in SHAPES.items()
    }
    return Group(granularity=granularity, members=members, shapes=SHAPES)


@pytest.mark.parametrize(
    "group", [everything("weight"), random_group(SHAPES, fraction=0.3, seed=0)], ids=["all", "some"]
)
def test_weights_lie_in_two_halves_then_by_site_tile_row_and_column(group, tmp_path):
    def place(entry):
        site, row, column = entry
        return column % 256 >= 128, list(SHAPES).index(site), column // 256, row, column

    rows = written(group, tmp_path)
    assert rows == sorted(rows, key=place)
    assert len(set(rows)) == len(group)
    halves = [(column % 256 >= 128, site) for site, _, column in rows]
    stretches = 1 + sum(one != two for one, two in pairwise(halves))
    assert stretches == len(set(halves)), "a site's weights lie in two stretches of the file at most"
    first = [row * SHAPES["b"][1] + column for site, row, column in rows if site == "b"]
    assert first != sorted(first), "flat indices do not ascend, as the document says"


@pytest.mark.parametrize("granularity", ["neuron", "unit"])
def test_neurons_and_units_lie_in_the_order_of_sites_and_rows(granularity, tmp_path):
    rows = written(everything(granularity), tmp_path)
    assert rows == [(site, row, None) for site, (count, _) in SHAPES.items() for row in range(count)]
