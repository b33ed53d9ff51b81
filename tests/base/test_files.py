"""Files are written whole or not at all; a manifest tells when they have changed."""

import errno
import json
import math
import types

import pytest

from neurondrift.base import files
from neurondrift.base.errors import ArtifactError, ResourceError
from neurondrift.base.files import Parts


def test_a_failed_write_leaves_what_stood(tmp_path):
    target = tmp_path / "a.txt"
    files.write_text(target, "old")
    with pytest.raises(RuntimeError), files.atomic_path(target) as partial:
        partial.write_text("half")
        raise RuntimeError
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_full_disk_is_the_users_to_mend_and_leaves_nothing(tmp_path):
    with (
        pytest.raises(ResourceError, match="No space is left while writing"),
        files.atomic_path(tmp_path / "x") as partial,
    ):
        partial.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_replaced_whole(tmp_path):
    target = tmp_path / "folder"
    for content in ("one", "two"):
        with files.atomic_path(target) as partial:
            partial.mkdir()
            (partial / content).write_text(content)
    assert [path.name for path in target.iterdir()] == ["two"]


def test_manifest_notices_every_change(tmp_path):
    file, manifest = tmp_path / "out" / "a.txt", tmp_path / "m.json"
    files.write_text(file, "result")
    files.write_manifest(manifest, root=tmp_path, stage="s", inputs="k", outputs=[tmp_path / "out"], details={})

    def stands(inputs="k"):
        return files.manifest_stands(manifest, root=tmp_path, inputs=inputs)

    assert stands()
    assert not stands(inputs="other")
    file.write_text("resulT")
    assert not stands()
    file.write_text("result")
    assert stands()
    file.unlink()
    assert not stands()
    manifest.write_text("{")
    assert not stands()


def test_json_errors_name_the_file(tmp_path):
    with pytest.raises(ArtifactError, match="missing.*nope.json"):
        files.read_json(tmp_path / "nope.json")
    (tmp_path / "half.json").write_text('{"a": ')
    with pytest.raises(ArtifactError, match="half.json is no readable JSON"):
        files.read_json(tmp_path / "half.json")
    with pytest.raises(ValueError, match="Out of range"):
        files.write_json(tmp_path / "n.json", {"a": float("nan")})


def test_scratch_is_found_again_and_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "SHARED_MEMORY", tmp_path / "shm")
    (tmp_path / "shm").mkdir()
    study = tmp_path / "study"
    first = files.scratch_directory(study, needed=10)
    assert first.parent == tmp_path / "shm"
    assert files.scratch_directory(study, needed=1 << 60) == first
    assert files.remove_scratch(study) == [first]
    beside = files.scratch_directory(study, needed=1 << 60)
    assert beside == study / "scratch"
    assert files.remove_scratch(study) == [beside]


def test_scratch_takes_no_memory_that_is_not_there(tmp_path, monkeypatch):
    """A tmpfs may have a size of all of the memory, however much of it is in use: scores would end in it out of memory."""
    monkeypatch.setattr(files, "SHARED_MEMORY", tmp_path / "shm")
    (tmp_path / "shm").mkdir()
    available = types.SimpleNamespace(available=1000)
    monkeypatch.setattr(files.psutil, "virtual_memory", lambda: available)
    assert files.free_bytes(tmp_path / "shm") > 10_000
    assert files.scratch_directory(tmp_path / "large", needed=501) == tmp_path / "large" / "scratch"
    assert files.scratch_directory(tmp_path / "small", needed=499).parent == tmp_path / "shm"


def test_require_space_says_how_much(tmp_path):
    with pytest.raises(ResourceError, match=r"1000000\d*\.0 GB needed"):
        files.require_space(tmp_path, 10**15, purpose="the scores")


def test_canonical_hash_does_not_depend_on_order():
    assert files.sha256_of_value({"a": 1, "b": 2}) == files.sha256_of_value(json.loads('{"b": 2, "a": 1}'))


def test_parts_stand_for_what_they_were_made_from(tmp_path):
    parts = Parts(tmp_path / "parts", "abc")
    assert parts.get("a") is None
    value = {"rows": [[1, 0.1, None, "é", True]], "nothing": math.inf}
    parts.put("a", value)
    parts.below("a").put("b", [1])
    assert parts.get("a") == value and parts.get("a.b") == [1]
    assert Parts(tmp_path / "parts", "abd").get("a") is None
    file = tmp_path / "parts" / "a.json"
    file.write_text(file.read_text().replace("0.1", "0.2"))
    assert parts.get("a") is None
    file.write_text("{")
    assert parts.get("a") is None
    parts.below("a").remove()
    assert [path.name for path in (tmp_path / "parts").iterdir()] == ["a.json"]
    parts.remove()
    assert not (tmp_path / "parts").exists()
    parts.remove()
