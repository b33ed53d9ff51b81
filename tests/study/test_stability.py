"""The noise floor of groups on the tiny model: examples drawn again, and two files compared."""

import json

import pytest

from neurondrift.base.errors import DataError
from neurondrift.base.roles import ALIGNMENT_GROUPS, GROUP_NAMES
from neurondrift.groups.selection import random_group
from neurondrift.study.experiments.stability import compare_groups, redraw
from neurondrift.study.folder import StudyFolder
from neurondrift.study.settings import resolve


def test_redrawing_on_the_tiny_model(tmp_path):
    study = resolve(preset="smoke", flags={"align.enabled": False})
    folder = StudyFolder(tmp_path, study)
    found = redraw(study, folder, draws=3)
    assert found["examples"] == {"safety": 16, "utility": 16, "style": 16, "gradient": 16}
    assert (found["pool"]["style"], found["pool"]["gradient"]) == (80, 24)
    published = {"safety_top", "safety_set_difference", "utility_top"}
    known = set(GROUP_NAMES) - {"random", *ALIGNMENT_GROUPS}  # no base
    assert set(found["groups"]) == known
    assert {name for name, own in found["groups"].items() if "weight" in own} == published
    for name in known:
        figures = found["groups"][name]["neuron"]
        assert figures["chance_jaccard"] < figures["jaccard"] < 1, name
    top = found["groups"]["safety_top"]["weight"]
    assert top["chance_jaccard"] < top["jaccard"] < 1
    (tmp_path / "floor.json").write_text(json.dumps(found))
    shapes = {"m.layers.0.mlp.up_proj": (40, 25), "m.layers.1.mlp.experts.down_proj.3": (60, 10)}
    files = [tmp_path / f"safety_top.{i}.parquet" for i in range(2)]
    for seed, file in enumerate(files):
        random_group(shapes, fraction=0.2, seed=seed).save(file)
    lines = []
    result = compare_groups(*files, floor=tmp_path / "floor.json", say=lines.append)
    assert result["same_model_floor"] == top
    text = "\n".join(lines)
    for words in ("Jaccard", "by chance", "same model, re-drawn examples", "up_proj", "layer"):
        assert words in text
    with pytest.raises(DataError, match="at least two draws"):
        redraw(study, folder, draws=1)
    with pytest.raises(DataError, match="no examples left to re-draw"):
        redraw(
            resolve(preset="smoke", flags={"align.enabled": False, "score.safety": "builtin:refusals"}),
            folder,
            draws=2,
        )
