"""A study that freezes a group: its files say so, its key knows it, mistakes are named."""

import numpy as np
import pytest

from helpers.families import build
from helpers.frozen import check_frozen, weights
from helpers.groups import group_of
from neurondrift.groups.group import load_group
from neurondrift.interventions.acting.freezing import FreezeCallback
from neurondrift.models.loading import attach_adapter


def small_study(**settings):
    from neurondrift.study.settings import resolve

    cheap = {
        "align.enabled": False,
        "score.safety": {"source": "builtin:refusals", "limit": 4},
        "score.utility": {"source": "builtin:ordinary-align", "limit": 4},
        "score.max_length": 192,
        "finetune.data": {"source": "builtin:ordinary", "limit": 8},
        "finetune.max_length": 192,
    }
    return resolve(preset="smoke", flags=cheap | {f"finetune.{name}": value for name, value in settings.items()})


def test_a_study_freezes_a_group_and_its_files_say_so(tmp_path):
    from neurondrift.drift.log import DriftLog
    from neurondrift.models.loading import load_model
    from neurondrift.study.folder import StudyFolder
    from neurondrift.study.runner import StudyRun

    def run(**settings):
        study, lines = small_study(**settings), []
        StudyRun(study, tmp_path, say=lines.append).run(["score", "groups", "finetune"])
        return StudyFolder(tmp_path, study), lines

    folder, lines = run(freeze="safety_top")
    group = load_group(folder.group_file("safety_top", "neuron"))
    frozen_weights = sum(len(rows) * group.shapes[site][1] for site, rows in group.members.items())
    assert f"froze {frozen_weights:,} weights ({len(group)} neurons) in 21 of 21 trained sites" in lines[-1]
    final = DriftLog(folder.drift(0)).read(steps=[2])
    frozen = np.zeros(len(final), dtype=bool)
    for site in group.members:
        frozen |= ((final["site"] == site) & final["row"].isin(group.rows(site))).to_numpy()
    assert frozen.sum() == len(group)
    assert not final.loc[frozen, ["l2", "relative", "cosine_distance"]].to_numpy().any()
    assert (final.loc[~frozen, "l2"] > 0).all()

    folder, lines = run(freeze="matched:random", freeze_granularity="unit")
    assert "units) in" in lines[-1]
    control, own = load_group(folder.frozen_group), load_group(folder.group_file("random", "unit"))
    assert len(control) == len(own) > 0 and not len(control & own)
    base, _ = load_model("tiny:llama", dtype="float32", device="cpu")
    before = weights(base)
    check_frozen(attach_adapter(base, folder.adapters(0) / "step=000002"), before, control)


def test_what_is_frozen_is_part_of_the_stages_key(tmp_path):
    from neurondrift.study.folder import StudyFolder
    from neurondrift.study.runner import StudyRun

    def keys(**settings):
        run = StudyRun(small_study(**settings), tmp_path)
        return run.key("groups"), run.key("finetune", 0)

    file = tmp_path / "group.parquet"
    group_of(build("llama"), "neuron", seed=0).save(file)
    first = keys(freeze=str(file))
    assert first == keys(freeze=str(file))
    group_of(build("llama"), "neuron", seed=1).save(file)
    assert keys(freeze=str(file))[1] != first[1]
    plain, named, unit = keys(), keys(freeze="random"), keys(freeze="random", freeze_granularity="unit")
    assert plain[0] == named[0] != unit[0]
    assert len({plain[1], named[1], unit[1], first[1]}) == 4
    for setting, name in (("random", "random"), ("matched:utility_top", "utility_top.matched")):
        folder = StudyFolder(tmp_path, small_study(freeze=setting, freeze_granularity="weight"))
        assert folder.frozen_group == tmp_path / "neuron_groups" / f"{name}.weights.parquet"
    assert StudyFolder(tmp_path, small_study(freeze=str(file))).frozen_group == file


def test_mistakes_in_the_setting_are_named(tmp_path):
    from neurondrift.base.errors import ArtifactError, ConfigError
    from neurondrift.study.settings import resolve

    with pytest.raises(ConfigError, match=r"finetune.freeze does not fit.*safety_set_difference.*'safety'"):
        resolve(preset="smoke", flags={"finetune.freeze": "safety"})
    with pytest.raises(ConfigError, match=r"finetune.freeze_granularity does not fit"):
        resolve(preset="smoke", flags={"finetune.freeze_granularity": "row"})
    with pytest.raises(ArtifactError, match="group file is missing"):
        FreezeCallback(tmp_path / "nothing.parquet")
