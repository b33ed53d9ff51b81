"""Files of groups: the order of their rows is the one that docs/results.md states."""

from itertools import pairwise

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from neurondrift.base.errors import ArtifactError
from neurondrift.groups.group import Group, load_group
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


def spoilt_column(path, name, values):
    table = pq.read_table(path)
    pq.write_table(
        table.set_column(
            table.column_names.index(name), name, values if isinstance(values, pa.Array) else pa.array(values)
        ),
        path,
    )


@pytest.mark.parametrize(
    ("granularity", "name", "values", "words"),
    [
        ("neuron", "row", [0.0, 1.5, 2.0], "the column row does not hold whole numbers"),
        ("neuron", "row", [0, None, 2], "the column row does not hold whole numbers"),
        ("neuron", "row", ["0", "1", "2"], "the column row does not hold whole numbers"),
        ("neuron", "row", [0, 1, 9], "beyond the end of s"),
        ("neuron", "site", pa.array(["s", None, "s"]).dictionary_encode(), "a member has no site"),
        ("weight", "col", [0, None, 1], "the column col does not hold whole numbers"),
        (
            "weight",
            "col",
            [0, 1, 4],
            "a column lies outside of its site",
        ),  # the first of the next row, had it been taken
        ("weight", "col", [0, 1, -1], "a column lies outside of its site"),
    ],
)
def test_what_is_no_member_is_not_taken_for_another(granularity, name, values, words, tmp_path):
    """Indices were cut to whole numbers, and columns beyond a site's width became members of other rows."""
    group = Group(granularity=granularity, members={"s": np.array([0, 1, 2])}, shapes={"s": (5, 4)})
    group.save(tmp_path / "g.parquet")
    assert len(load_group(tmp_path / "g.parquet")) == 3
    spoilt_column(tmp_path / "g.parquet", name, values)
    with pytest.raises(ArtifactError, match=words):
        load_group(tmp_path / "g.parquet")
