"""`neurondrift plant` and `neurondrift locate`: what they write, and what they say of mistakes."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
import tomli_w

import neurondrift as nd
from helpers.plants import TINY_PLANT
from neurondrift.cli.__main__ import main
from neurondrift.importance.scores import score_header, write_scores


def configuration(path, **changed):
    path.write_text(tomli_w.dumps({"model": {"reference": "tiny:llama"}, "plant": {**TINY_PLANT, **changed}}))
    return str(path)


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plants")
    main(["plant", "--config", configuration(folder / "rows.toml"), "--output-dir", str(folder / "rows")])
    return folder / "rows"


@pytest.fixture(scope="module")
def own_scores(planted, tmp_path_factory):
    """A table of two scores, and a file of one, of the plant's model."""
    folder = tmp_path_factory.mktemp("own")
    model, _ = nd.load_model(planted / "model", dtype="float32", device="cpu")
    sites = nd.linear_sites(model)
    group = nd.load_group(planted / "planted.parquet")
    rows = [
        {"site": name, "row": row, "right": float(right), "size": float(size)}
        for name, site in sites.items()
        for row, (right, size) in enumerate(zip(group.mask(name), site.weight.norm(dim=1), strict=True))
    ]
    pd.DataFrame(rows).sample(frac=1, random_state=0).to_parquet(folder / "mine.parquet")  # in any order
    size = {name: site.weight.float().abs() for name, site in sites.items()}
    write_scores(folder / "size.safetensors", size, header=score_header(sites, [], method="own"))
    write_scores(folder / "foreign.safetensors", size, header={"model": "0" * 16})
    return folder


def failed(capsys, *arguments):
    """What a command says that ends with exit code 2."""
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    assert ended.value.code == 2
    return capsys.readouterr().err


def test_locate_writes_tables_a_section_and_a_figure(planted, own_scores, tmp_path, capsys):
    files = ["--scores", str(own_scores / "mine.parquet"), "--scores", str(own_scores / "size.safetensors")]
    methods = [word for name in ("wanda", "functional_drift_ratio") for word in ("--method", name)]
    main(["locate", str(planted), "--output-dir", str(tmp_path / "found"), *files, *methods])
    said = capsys.readouterr().out
    board = pd.read_parquet(tmp_path / "found" / "localisation.parquet").set_index("score")
    assert set(board.index) == {"mine: right", "mine: size", "size", "wanda", "functional_drift_ratio"}
    assert board.loc["mine: right", "auroc"] == 1
    assert board.loc["functional_drift_ratio", "question"] == "trained"
    assert bool(board.loc["functional_drift_ratio", "base"])
    assert abs(board.loc["mine: size", "auroc"] - board.loc["size", "auroc"]) < 0.1  # lengths and sums are alike
    curves = pd.read_parquet(tmp_path / "found" / "curves.parquet")
    assert set(curves["score"]) == {"model", "planted", "random", *board.index}
    assert set(curves["way"]) == {"", "put back", "held"}
    summary = json.loads((tmp_path / "found" / "localisation.json").read_text())
    assert len(summary["board"]) == 5
    assert summary["about"]["causality"]["holds"]
    for name in ("localisation.md", "localisation.txt", "localisation.png", "localisation.svg"):
        assert (tmp_path / "found" / name).stat().st_size > 500
        assert str(tmp_path / "found" / name) in said
    assert "| mine: right |" in said
    assert all(len(line) <= 100 for line in (tmp_path / "found" / "localisation.txt").read_text().splitlines())


def test_mistakes_are_told_with_exit_code_2(planted, own_scores, tmp_path, capsys):
    out = ["--output-dir", tmp_path / "out"]
    assert "no finished plant" in failed(capsys, "locate", tmp_path, *out)
    assert "no such score" in failed(capsys, "locate", planted, "--method", "snipp", *out)
    assert "no score to look at" in failed(capsys, "locate", planted, "--method", "none", *out)
    told = failed(capsys, "locate", planted, "--method", "none", "--scores", own_scores / "foreign.safetensors", *out)
    assert "of another model than the plant's" in told
    assert "no model to plant in" in failed(capsys, "plant", *out)
    assert "There is no setting plant.sharee" in failed(
        capsys, "plant", "--config", configuration(tmp_path / "typo.toml", sharee=0.1), *out
    )
    assert "plant.share" in failed(capsys, "plant", "tiny:llama", "--share", "0.9", *out)
    pd.DataFrame({"site": ["a"], "text": ["b"]}).to_parquet(tmp_path / "strange.parquet")
    told = failed(capsys, "locate", planted, "--method", "none", "--scores", tmp_path / "strange.parquet", *out)
    assert "holds no scores" in told
    twice = ["--scores", own_scores / "size.safetensors"] * 2
    assert "Two scores have one name" in failed(capsys, "locate", planted, "--method", "none", *twice, *out)
    assert not (tmp_path / "out").exists()  # nothing was begun


def test_a_plant_that_changed_is_none(planted, tmp_path, capsys):
    shutil.copytree(planted, tmp_path / "changed")
    group = nd.load_group(tmp_path / "changed" / "planted.parquet")
    first = next(iter(group.members))
    moved = {**group.members, first: np.array([0])}
    nd.Group(granularity="neuron", members=moved, shapes=group.shapes).save(tmp_path / "changed" / "planted.parquet")
    told = failed(capsys, "locate", tmp_path / "changed", "--output-dir", tmp_path / "out")
    assert "missing or has changed" in told


def test_no_causality_is_an_error_with_the_table_and_no_scoreboard(tmp_path, capsys):
    weak = configuration(tmp_path / "weak.toml", rate=1e-6, steps=1, check_every=1)
    told = failed(capsys, "plant", "--config", weak, "--output-dir", tmp_path / "weak")
    assert "stand and fall" in told
    assert "| planted units put back |" in told
    told = failed(capsys, "locate", tmp_path / "weak", "--output-dir", tmp_path / "out")
    assert "| planted units put back |" in told
    assert not (tmp_path / "out" / "localisation.json").exists()
