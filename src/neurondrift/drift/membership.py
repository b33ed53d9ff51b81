"""The groups that a callback or a log follows: what they are called, and which neurons of a log are theirs."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from neurondrift.errors import GroupError
from neurondrift.groups import Group, load_group

#: Groups by name; or groups and files of groups, which get their names from `named_groups`.
Groups: TypeAlias = Mapping[str, Group] | Sequence[Group | str | Path]


def named_groups(groups: Groups) -> dict[str, Group]:
    """Groups by name. A mapping names them itself; else a file gives its name without the endings
    (`safety_top.matched.weights.parquet` is `safety_top.matched`), a group its rule and granularity (`top_neurons`).
    A name that is taken gets a number.

    Raises `GroupError` for something that is no group, `ArtifactError` for a file that cannot be read.
    """
    if isinstance(groups, Mapping):
        return dict(groups)
    if isinstance(groups, str | Path | Group):
        raise GroupError("groups is one group rather than a list", received=groups, fix="put it into a list")
    found: dict[str, Group] = {}
    for entry in groups:
        group = load_group(entry) if isinstance(entry, str | Path) else entry
        if not isinstance(group, Group):
            raise GroupError("This is no group", received=entry, allowed="a Group, or the path of its file")
        name = stem = _name(Path(entry).name if isinstance(entry, str | Path) else None, group)
        number = 2
        while name in found:
            name, number = f"{stem}_{number}", number + 1
        found[name] = group
    return found


def _name(file: str | None, group: Group) -> str:
    file = file or group.provenance.get("source")
    if file:
        return re.sub(r"(\.(neuron|weight|unit)s)?\.(parquet|json)$", "", file)
    return f"{group.provenance.get('rule', 'group')}_{group.granularity}s".replace(" ", "_")


def check_groups(groups: Mapping[str, Group], metadata: Mapping[str, Any]) -> None:
    """Raise `GroupError` unless the groups of neurons or weights were made from the model of a log's metadata."""
    anything = (1 << 62, 1)  # the shapes of untrained sites are not kept
    shapes = dict.fromkeys(metadata["untrained"], anything)
    shapes |= {site: tuple(shape) for site, shape in metadata["sites"].items()}
    for group in groups.values():
        group.check_model(metadata["model"], shapes)


def neuron_positions(
    group: Group, sizes: Mapping[str, int], sites: Sequence[str] | None = None
) -> npt.NDArray[np.int64]:
    """Where the members of a group of neurons stand in a snapshot, int64, ascending.

    `sizes` gives the neurons of each site in the snapshot's order; members in other sites are left out, and so
    are those in sites that are not in `sites`.
    """
    if group.granularity != "neuron":
        raise GroupError(
            f"A snapshot's neurons cannot be chosen by a group of {group.granularity}s", allowed="groups of neurons"
        )
    starts = dict(zip(sizes, np.cumsum([0, *sizes.values()]), strict=False))
    chosen = [site for site in sizes if site in group.members and (sites is None or site in sites)]
    return np.concatenate([np.empty(0, dtype=np.int64), *(starts[site] + group.members[site] for site in chosen)])
