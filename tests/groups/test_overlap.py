"""Overlaps against brute force and simulation; the noise floor on the tiny model."""

import json

import numpy as np
import pytest

from neurondrift import config
from neurondrift.errors import DataError, GroupError
from neurondrift.folder import StudyFolder
from neurondrift.groups import random_group
from neurondrift.stability import compare_groups, layer_of_name, module_type_of_name, redraw
from neurondrift.statistics.overlap import overlap, overlap_by, stability

SHAPES = {"m.layers.0.mlp.up_proj": (40, 25), "m.layers.1.mlp.experts.down_proj.3": (60, 10)}


def test_overlap_equals_sets():
    one, two = (random_group(SHAPES, fraction=0.2, seed=seed) for seed in (0, 1))
    a = {(site, index) for site, indices in one.members.items() for index in indices.tolist()}
    b = {(site, index) for site, indices in two.members.items() for index in indices.tolist()}
    found = overlap(one, two)
    assert (found.first, found.second, found.shared) == (len(a), len(b), len(a & b))
    assert found.jaccard == len(a & b) / len(a | b)
    assert found.overlap == len(a & b) / min(len(a), len(b))
    assert overlap(one, one).jaccard == 1


def test_chance_is_what_random_groups_show():
    fixed = random_group(SHAPES, fraction=0.2, seed=0)
    found = [overlap(fixed, random_group(SHAPES, fraction=0.2, seed=seed)) for seed in range(1, 200)]
    mean, error = np.mean([f.shared for f in found]), np.std([f.shared for f in found]) / np.sqrt(len(found))
    assert abs(mean - found[0].chance_shared) < 4 * error
    assert np.mean([f.jaccard for f in found]) == pytest.approx(found[0].chance_jaccard, rel=0.05)


def test_classes_add_up():
    one, two = (random_group(SHAPES, fraction=0.2, seed=seed) for seed in (0, 1))
    by_layer = overlap_by(one, two, layer_of_name)
    assert list(by_layer) == [0, 1]
    assert sum(part.shared for part in by_layer.values()) == overlap(one, two).shared
    assert list(overlap_by(one, two, module_type_of_name)) == ["up_proj", "down_proj"]


def test_stability_of_equal_and_of_random_groups():
    groups = [random_group(SHAPES, fraction=0.2, seed=seed) for seed in range(5)]
    assert stability([groups[0]] * 3).jaccard == 1
    found = stability(groups)
    assert (found.draws, found.pairs) == (5, 10)
    assert found.jaccard == pytest.approx(found.chance_jaccard, rel=0.25)
    assert found.jaccard_low <= found.jaccard <= found.jaccard_high
    with pytest.raises(GroupError, match="at least two draws"):
        stability(groups[:1])


def test_groups_that_do_not_compare():
    one = random_group(SHAPES, fraction=0.2, seed=0)
    with pytest.raises(GroupError, match="do not overlap"):
        overlap(one, random_group(SHAPES, fraction=0.2, seed=0, granularity="neuron"))
    with pytest.raises(GroupError, match="different shapes"):
        overlap(one, random_group({site: (9, 9) for site in SHAPES}, fraction=0.2, seed=0))


def test_redrawing_on_the_tiny_model(tmp_path):
    study = config.resolve(preset="smoke", flags={"align.enabled": False})
    folder = StudyFolder(tmp_path, study)
    found = redraw(study, folder, draws=3)
    assert found["examples"] == {"safety": 16, "utility": 16}
    assert set(found["groups"]) == {"safety_top", "safety_set_difference", "utility_top"}
    top = found["groups"]["safety_top"]["weight"]
    assert top["chance_jaccard"] < top["jaccard"] < 1
    (tmp_path / "floor.json").write_text(json.dumps(found))
    files = [tmp_path / f"safety_top.{i}.parquet" for i in range(2)]
    for seed, file in enumerate(files):
        random_group(SHAPES, fraction=0.2, seed=seed).save(file)
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
            config.resolve(preset="smoke", flags={"align.enabled": False, "score.safety": "builtin:refusals"}),
            folder,
            draws=2,
        )
