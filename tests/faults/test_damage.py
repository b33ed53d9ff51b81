"""Artifacts with a byte flipped or cut off: noticed, named, and made again as they were.

`benchmarks/faults.py damage` does it many more times.
"""

import random

import pytest

from helpers.faults import SMOKE, attempt, copy_of, differences, steps_of, unnoticed_damage
from neurondrift.base.errors import ArtifactError
from neurondrift.drift.log import DriftLog
from neurondrift.groups.group import load_group


def test_a_change_of_any_byte_is_noticed_and_named(reference, tmp_path):
    folder = copy_of(reference[0], tmp_path / "study")
    steps = steps_of(folder)
    assert {step.stage.name for step, _, _ in steps} >= {"align", "groups", "finetune", "evaluate", "intervene"}
    rng = random.Random(0)
    assert [found for found in (unnoticed_damage(folder, steps, rng) for _ in range(300)) if found] == []


def test_what_has_changed_is_said_and_made_again(reference, tmp_path):
    folder = copy_of(reference[0], tmp_path / "study")
    changed = [
        folder / "finetuned_models" / "aligned" / "model.safetensors",
        folder / "neuron_groups" / "random.weights.parquet",
        folder / "behaviour" / "step=000002.parquet",
    ]
    for file in changed:
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(bytes(content))
    (folder / ".neurondrift" / "analyze.json").write_text('{"inputs": ')
    done = attempt([*SMOKE, "--output-dir", folder], tmp_path / "told")
    assert done.code == 0, done.err
    for name in (*(str(file.relative_to(folder)) for file in changed), "analyze.json"):
        assert f"is done again: {name} is not as it was made" in done.out
    assert differences(reference[0], folder) == []


def test_files_that_stand_alone_are_checked_as_they_are_read(reference, tmp_path):
    """A group and a drift log have no manifest beside them: their pages have checksums of their own."""
    rng = random.Random(0)
    for file in ("neuron_groups/random.weights.parquet", "neuron_groups/random.neurons.parquet"):
        content = (reference[0] / file).read_bytes()
        whole = load_group(reference[0] / file)
        noticed = 0
        for _ in range(60):
            changed = bytearray(content)
            changed[rng.randrange(len(content) - 8)] ^= 1 << rng.randrange(8)
            (tmp_path / "g.parquet").write_bytes(bytes(changed))
            try:
                found = load_group(tmp_path / "g.parquet")
            except ArtifactError:  # what it says: tests/groups
                noticed += 1
                continue
            assert {name: rows.tolist() for name, rows in found.members.items()} == {
                name: rows.tolist() for name, rows in whole.members.items()
            }
        assert noticed > 10
    log = copy_of(reference[0] / "drift", tmp_path / "drift")
    file = log / "step=000004" / "neurons.parquet"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))
    with pytest.raises(ArtifactError, match=r"step=000004/neurons.parquet cannot be read as a drift snapshot"):
        DriftLog(log).read()
