"""Score files: read site by site, and what is damaged or foreign is noticed."""

import pytest
import torch

from helpers.groups import scores
from neurondrift.base.errors import ArtifactError, GroupError
from neurondrift.groups.selection import select_top
from neurondrift.importance.scores import ScoreFile, check_compatible, write_scores


def test_tensors_and_score_files_give_the_same_group(tmp_path):
    data = {site: torch.from_numpy(values) for site, values in scores().items()}
    write_scores(tmp_path / "s.safetensors", data, header={"model": "m", "method": "snip", "data": "d"})
    from_file = select_top(ScoreFile(tmp_path / "s.safetensors"), fraction=0.1)
    from_memory = select_top(data, fraction=0.1)
    assert {site: indices.tolist() for site, indices in from_file.members.items()} == {
        site: indices.tolist() for site, indices in from_memory.members.items()
    }
    assert from_file.provenance["model"] == "m"


def test_score_files_notice_damage_and_foreigners(tmp_path):
    data = {site: torch.from_numpy(values) for site, values in scores().items()}
    first, second = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    write_scores(first, data, header={"model": "m", "method": "snip", "data": "d"})
    write_scores(second, data, header={"model": "n", "method": "snip", "data": "d"})
    with pytest.raises(GroupError, match="different models"):
        check_compatible(ScoreFile(first), ScoreFile(second))
    from safetensors.torch import load_file

    assert torch.equal(load_file(first)["a.q_proj"], data["a.q_proj"])
    first.write_bytes(first.read_bytes()[:-8])
    with pytest.raises(ArtifactError, match="truncated"):
        ScoreFile(first)
    (tmp_path / "c.safetensors").write_bytes(b"not a file of ours")
    with pytest.raises(ArtifactError, match="is no score file"):
        ScoreFile(tmp_path / "c.safetensors")
    with pytest.raises(ArtifactError, match="missing"):
        ScoreFile(tmp_path / "nope.safetensors")
