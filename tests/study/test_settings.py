"""Preset, file and flags, in that order; every mistake is one clear message."""

import pytest

from neurondrift.base.errors import ConfigError
from neurondrift.study.settings import merge, resolve


@pytest.mark.parametrize("name", ["smoke", "demo", "llama2-7b-chat"])
def test_presets_resolve_and_survive_their_toml(name, tmp_path):
    study = resolve(preset=name)
    assert study.name == name
    (tmp_path / "study.toml").write_text(study.to_toml())
    assert resolve(file=tmp_path / "study.toml") == study


def test_the_published_study_is_as_published():
    study = resolve(preset="llama2-7b-chat")
    tune = study.finetune
    assert (tune.lora_r, tune.lora_alpha, tune.target_modules) == (8, 16, ["q_proj", "v_proj", "o_proj"])
    assert (tune.batch_size, tune.gradient_accumulation, tune.learning_rate, tune.max_length) == (4, 4, 1e-4, 512)
    assert (study.groups.top_fraction, study.groups.set_difference_p, study.groups.set_difference_q) == (0.01, 0.1, 0.1)
    assert study.model.dtype == "bfloat16"
    assert study.score.safety.limit == study.score.utility.limit == 128


def test_file_overrides_preset_and_flags_override_both(tmp_path):
    file = tmp_path / "my.toml"
    file.write_text('preset = "smoke"\n[finetune]\nlora_r = 4\nlearning_rate = 0.5\n')
    study = resolve(file=file, flags={"finetune.lora_r": 2, "seeds": [1, 2], "finetune.epochs": None})
    assert (study.finetune.lora_r, study.finetune.learning_rate, study.seeds) == (2, 0.5, [1, 2])
    assert study.model.reference == "tiny:llama"


def test_a_data_reference_is_replaced_whole():
    study = resolve(preset="smoke", flags={"score.safety": "mine.csv"})
    assert study.score.safety.source == "mine.csv"
    assert study.score.safety.limit is None


def test_what_fingerprints_do_not_know_is_written_only_where_it_says_something():
    for preset in ("smoke", "demo", "llama2-7b-chat"):
        study = resolve(preset=preset)
        assert study.finetune.optimiser == "adamw"
        assert not {"optimiser", "momentum"} & study.finetune.model_dump().keys()
        assert "template" not in study.model.model_dump()
    said = resolve(preset="smoke", flags={"finetune.optimiser": "sgd", "model.template": {"x": 1}})
    written = said.finetune.model_dump(mode="json", exclude={"data"})
    assert (written["optimiser"], written["momentum"], "data" in written) == ("sgd", 0.9, False)
    assert said.model.model_dump()["template"] == {"x": 1}
    assert 'optimiser = "sgd"' in said.to_toml() and "momentum = 0.9" in said.to_toml()
    moved = resolve(preset="smoke", flags={"finetune.momentum": 0.5})  # nothing that AdamW asks for
    assert moved.finetune.model_dump() == resolve(preset="smoke").finetune.model_dump()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[finetune]\nlora_rank = 4", r"no setting finetune.lora_rank.*lora_r, .*did you mean lora_r"),
        ("[finetun]\nlora_r = 4", r"no setting finetun.*did you mean finetune"),
        ("[groups]\ntop_fraction = 0", r"groups.top_fraction does not fit.*greater than 0.*Received: 0"),
        ("[groups]\ntop_fraction = 1.5", r"groups.top_fraction does not fit.*less than or equal to 1"),
        ("[finetune]\noptimiser = 'adam'", r"finetune.optimiser does not fit.*'adamw' or 'sgd'"),
        ("[finetune]\nmomentum = 1.0", r"finetune.momentum does not fit.*less than 1"),
        ("[finetune]\nmax_steps = 0", r"max_steps does not fit.*-1 \(all epochs\) or at least 1"),
        ("seeds = [1, 1]", r"seeds does not fit.*named twice"),
        ('[score]\nmethod = "snap"', r"score.method does not fit.*'snip'"),
        ("[score]\nsafety = {sorce = 'x'}", r"no setting score.safety.sorce.*did you mean source"),
        ("seeds = [", "no valid TOML"),
    ],
)
def test_mistakes_are_named(tmp_path, content, message):
    file = tmp_path / "my.toml"
    file.write_text(
        'preset = "smoke"\n' + content if not content.startswith("seeds") else content + '\npreset = "smoke"'
    )
    with pytest.raises(ConfigError, match=message):
        resolve(file=file)


def test_unknown_preset_and_missing_file(tmp_path):
    with pytest.raises(ConfigError, match="no such preset.*'dmo'.*demo, llama2-7b-chat, smoke"):
        resolve(preset="dmo")
    with pytest.raises(ConfigError, match="does not exist.*nope.toml"):
        resolve(file=tmp_path / "nope.toml")


def test_a_folder_of_data_is_known_by_its_content(tmp_path):
    from neurondrift.models.data import DataReference
    from neurondrift.study.stages.table import data_key

    (tmp_path / "set").mkdir()
    keys = set()
    for text in ("a", "b"):
        (tmp_path / "set" / "train.jsonl").write_text(text)
        keys |= {data_key(DataReference(source=f"{prefix}{tmp_path / 'set'}")) for prefix in ("", "hf:")}
    assert len(keys) == 4
    assert data_key(DataReference(source="hf:owner/name")) == "hf:owner/name"


def test_a_part_of_a_set_that_a_bare_string_names():
    named = merge({"harmful": "a.csv", "attack": "vanilla"}, {"harmful": {"prompt": "q"}, "attack": {"kind": "suffix"}})
    assert named == {"harmful": {"source": "a.csv", "prompt": "q"}, "attack": {"kind": "suffix"}}
