"""What others have put into a folder, and what models write, does nothing but be read."""

import json
import os
import pickle
import re
import shutil

import pytest
import torch

from helpers.families import build, examples
from helpers.faults import copy_of
from helpers.paths import SOURCE
from helpers.training import Killed
from neurondrift.base import files
from neurondrift.base.errors import ArtifactError
from neurondrift.base.terminal import plain
from neurondrift.cli.study import say
from neurondrift.models.data import load_examples
from neurondrift.models.disk.checkpoints import weight_files
from neurondrift.report.page import render_page
from neurondrift.report.text import render_text
from neurondrift.study.folder import StudyFolder, clean
from neurondrift.study.settings import FinetuneSection, resolve
from neurondrift.study.training import SEAL, finetune, last_checkpoint

SECTION = FinetuneSection(max_steps=4, batch_size=2, lora_r=2, target_modules=["q_proj"], drift_interval=2)
PICKLED = ("rng_state.pth", "optimizer.pt", "scheduler.pt", "training_args.bin")


class Planted:
    """What runs when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def trained(folder, kill_at=None):
    seen = []

    def advance(count):
        seen.append(count)
        if kill_at is not None and sum(seen) == kill_at:
            raise Killed

    model, _ = finetune(build("llama"), None, examples(8), SECTION, seed=0, folder=folder, save_at=[], advance=advance)
    adapter = {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}
    return adapter, seen


def interrupted(folder):
    with pytest.raises(Killed):
        trained(folder, kill_at=3)
    checkpoint = last_checkpoint(folder / "trainer", (folder,))
    assert checkpoint == folder / "trainer" / "checkpoint-2"
    return checkpoint


def seal_again(checkpoint, name):
    """What somebody does who knows how a checkpoint is marked."""
    manifest = json.loads((checkpoint / SEAL).read_text())
    file = checkpoint / name
    key = next(key for key in manifest["files"] if key.endswith(f"/{name}"))
    manifest["files"][key] = {"sha256": files.sha256_of_file(file), "bytes": file.stat().st_size}
    (checkpoint / SEAL).write_text(json.dumps(manifest))


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("straight"))[0]


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("form", ["pickle", "torch"])
@pytest.mark.parametrize("name", PICKLED)
def test_a_planted_pickle_is_not_executed(name, form, straight, tmp_path, caplog):
    checkpoint, planted = interrupted(tmp_path / "t"), tmp_path / "executed"
    if form == "pickle":
        (checkpoint / name).write_bytes(pickle.dumps(Planted(planted)))
    else:
        torch.save(Planted(planted), checkpoint / name)
    assert same(trained(tmp_path / "t")[0], straight)  # passed over, and said
    assert "not as it was saved" in caplog.text
    assert not planted.exists()

    checkpoint = interrupted(tmp_path / "u")
    if form == "pickle":
        (checkpoint / name).write_bytes(pickle.dumps(Planted(planted)))
    else:
        torch.save(Planted(planted), checkpoint / name)
    seal_again(checkpoint, name)
    if name == "training_args.bin":  # nobody reads it
        adapter, seen = trained(tmp_path / "u")
        assert same(adapter, straight) and seen[0] == 2
    else:
        with pytest.raises(ArtifactError, match=r"nothing is ever unpickled.*checkpoint-2.*delete the folder"):
            trained(tmp_path / "u")
    assert not planted.exists()


def test_a_checkpoint_is_whole_or_passed_over(straight, tmp_path):
    """Each file of it cut off, gone or changed; its seal gone; the newest with an older time than the one before."""
    for number, spoil in enumerate(["cut", "gone", "changed", "no seal"]):
        folder = tmp_path / str(number)
        checkpoint = interrupted(folder)
        file = checkpoint / (SEAL if spoil == "no seal" else "optimizer.pt")
        if spoil in ("gone", "no seal"):
            file.unlink()
        else:
            content = file.read_bytes()
            file.write_bytes(content[:-9] if spoil == "cut" else content[:100] + b"x" + content[101:])
        assert last_checkpoint(folder / "trainer", (folder,)) is None
        assert same(trained(folder)[0], straight)
    folder = tmp_path / "beside"
    checkpoint = interrupted(folder)
    shutil.copytree(checkpoint, folder / "trainer" / "checkpoint-3")  # of another step
    assert last_checkpoint(folder / "trainer", (folder,)) == checkpoint
    adapter, seen = trained(folder)
    assert same(adapter, straight) and seen[0] == 2
    assert [entry.name for entry in (folder / "trainer").iterdir()] == ["checkpoint-4"]


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "a/../../outside", "link", ""])
def test_a_manifest_leads_nowhere_else(name, tmp_path):
    root = tmp_path / "study"
    (root / "a").mkdir(parents=True)
    (tmp_path / "outside").write_text("x")
    (root / "link").symlink_to(tmp_path / "outside")
    target = root / name if name else root
    about = {"sha256": files.sha256_of_file(target), "bytes": target.stat().st_size} if name else {}
    files.write_json(root / "m.json", {"inputs": "k", "files": {name: about}})
    assert not files.manifest_stands(root / "m.json", root=root, inputs="k")
    assert files.changed_file(root / "m.json", root=root, inputs="k") == "m.json"
    with pytest.raises(ArtifactError, match="names a file outside of its folder"):
        files.inside(root, name, links=False)


def test_a_folder_that_the_user_has_linked_elsewhere_is_followed(tmp_path):
    (tmp_path / "big" / "models").mkdir(parents=True)
    (tmp_path / "big" / "models" / "a").write_text("x")
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "models").symlink_to(tmp_path / "big" / "models")
    made = {"root": tmp_path / "study", "inputs": "k"}
    files.write_manifest(
        tmp_path / "m.json", stage="s", outputs=[tmp_path / "study" / "models" / "a"], details={}, **made
    )
    assert files.manifest_stands(tmp_path / "m.json", **made)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd"])
def test_an_index_of_shards_leads_nowhere_else(name, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ArtifactError, match=f"names a file outside of its folder.*{name}"):
        weight_files(tmp_path, "here")


def test_clean_deletes_a_link_and_not_what_it_leads_to(tmp_path):
    (tmp_path / "big").mkdir()
    (tmp_path / "big" / "precious").write_text("x")
    study = tmp_path / "study"
    study.mkdir()
    (study / "study.toml").write_text("")
    (study / StudyFolder.MODELS).symlink_to(tmp_path / "big")
    (study / StudyFolder.DRIFT).symlink_to(tmp_path / "nowhere")
    clean(study, everything=True)
    assert list(study.iterdir()) == []
    assert (tmp_path / "big" / "precious").exists()


def test_shared_memory_that_somebody_else_has_prepared_is_not_used(tmp_path, monkeypatch):
    shared = tmp_path / "shm"
    shared.mkdir()
    monkeypatch.setattr(files, "SHARED_MEMORY", shared)
    study = tmp_path / "study"
    made = files.scratch_directory(study, needed=10)
    made.rmdir()
    (tmp_path / "theirs").mkdir()
    made.symlink_to(tmp_path / "theirs")
    assert files.scratch_directory(study, needed=10) == study / "scratch"
    assert files.remove_scratch(study) == [study / "scratch"]
    made.unlink()
    made.mkdir()
    made.chmod(0o777)
    assert files.find_scratch(study) is None
    assert files.scratch_directory(study, needed=10) == study / "scratch"


HOSTILE = "\x1b[2J\x1b]0;title\x07\x9b31m=cmd|' /C calc'!A0 <script>alert(1)</script> \u202egnp.exe\r\x08\ud800"


def renamed(content):
    """The same findings of a group whose name was chosen by somebody else."""
    if isinstance(content, dict):
        return {key: renamed(entry) for key, entry in content.items()}
    if isinstance(content, list):
        return [renamed(entry) for entry in content]
    return f"safety_top{HOSTILE}" if content == "safety_top" else content


def acts(text):
    """The characters that a terminal or a reader's eye would act on."""
    return [letter for letter in text if not letter.isprintable() and letter != "\n"]


def test_what_models_and_data_write_stays_text(finished, capsys):
    study = resolve(preset="smoke")
    results = json.loads((finished[0] / "results" / "statistical_results.json").read_text())
    spoilt = renamed(results)
    row = {
        "kind": "harmful", "id": HOSTILE, "category": HOSTILE, "prompt": HOSTILE, "response": HOSTILE * 3,
        "step": 0, "seed": 0, "verdict": "none", "refused": False, "judge": HOSTILE, "attack": "vanilla",
    }  # fmt: skip
    for found in (results, spoilt):
        text, page = render_text(found, [row]), render_page(found, [], [row])
        assert acts(text) == []
        assert page.count("<script") == 1 and "<script>alert" not in page  # the page's own
        assert "default-src &#x27;none&#x27;" in page
    say(HOSTILE)
    assert acts(capsys.readouterr().out) == []
    assert acts(plain(HOSTILE)) == [] and "cmd" in plain(HOSTILE)
    assert study.model.trust_remote_code is False


def test_no_table_is_written_that_a_spreadsheet_would_compute():
    """Tables are Parquet: a cell that begins with = + - or @ is text there. No CSV is written anywhere."""
    for path in SOURCE.rglob("*.py"):
        text = path.read_text()
        assert not re.search(r"csv\.(writer|DictWriter)|\.to_csv\(|write_csv|\.to_excel\(", text), path


def test_all_that_a_command_prints_goes_through_one_function():
    """`say` takes away what a terminal would act on; sites of a group file, paths and first examples are not ours."""
    printed = [
        (path.name, line.strip())
        for path in (SOURCE / "cli").glob("*.py")
        for line in path.read_text().splitlines()
        if re.search(r"\bprint\(|=print\b", line)
    ]
    assert sorted(printed) == [
        ("__main__.py", 'print("neurondrift: stopped; run the command again to go on from here", file=sys.stderr)'),
        ("__main__.py", 'print(f"neurondrift: {plain(str(error))}", file=sys.stderr, flush=True)'),
        ("study.py", "print(plain(line), flush=True)"),
    ]


@pytest.mark.parametrize("outside", ["../secret", "/etc", "{}/secret"])
def test_a_data_set_names_nothing_outside_of_its_folder(outside, tmp_path):
    """Arrow files and splits of `save_to_disk`, and data files that a README.md in the hub's layout names."""
    import datasets

    outside = outside.format(tmp_path)
    rows = datasets.Dataset.from_dict({"prompt": ["a"], "response": ["b"]})
    rows.save_to_disk(tmp_path / "secret")
    rows.to_json(tmp_path / "secret" / "rows.jsonl")
    for name in ("files", "splits", "hub"):
        (tmp_path / name).mkdir()
    state = json.loads((tmp_path / "secret" / "state.json").read_text())
    state["_data_files"] = [{"filename": f"{outside}/data-00000-of-00001.arrow"}]
    (tmp_path / "files" / "state.json").write_text(json.dumps(state))
    (tmp_path / "files" / "dataset_info.json").write_text("{}")
    (tmp_path / "splits" / "dataset_dict.json").write_text(json.dumps({"splits": [outside]}))
    card = (
        f"---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: {outside}/rows.jsonl\n---\n"
    )
    (tmp_path / "hub" / "README.md").write_text(card)
    for name in ("files", "splits", "hub"):
        with pytest.raises(ArtifactError, match="names a file outside of its folder"):
            load_examples(str(tmp_path / name))
    (tmp_path / "hub" / "README.md").write_text(card.replace(f"{outside}/", ""))
    rows.to_json(tmp_path / "hub" / "rows.jsonl")
    assert [example.prompt for example in load_examples(str(tmp_path / "hub"))] == ["a"]
    assert [example.prompt for example in load_examples(str(tmp_path / "secret"))] == ["a"]


def test_no_code_of_others_runs_unless_it_is_asked_for():
    for path in SOURCE.rglob("*.py"):
        assert "trust_remote_code=True" not in path.read_text(), path


def test_a_copy_of_a_study_keeps_its_own_files(finished, tmp_path):
    """Nothing in a study's folder names a place outside of it: it can be moved."""
    folder = copy_of(finished[0], tmp_path / "moved")
    for manifest in (folder / ".neurondrift").glob("*.json"):
        assert all(files.inside(folder, name, links=False) for name in json.loads(manifest.read_text())["files"])
    for file in (*folder.rglob("drift.json"), *folder.rglob("*.neurons.json")):
        assert str(finished[0]) not in file.read_text()
