"""A flag that overrides a setting says which, and the setting exists."""

import typing

import pytest
from pydantic import BaseModel

from neurondrift.base.errors import ConfigError
from neurondrift.cli.__main__ import app
from neurondrift.cli.app import DATA_FLAGS, EPILOGUE, STUDY_SETS, Flags, SettingFlags, Source, study_of
from neurondrift.cli.behaviour import ModelFlags
from neurondrift.cli.questions.groups import StabilityFlags, SubspacesFlags
from neurondrift.cli.questions.interventions import DoseFlags, InterveneFlags
from neurondrift.cli.questions.plants import PlantFlags
from neurondrift.cli.study import EngineFlags
from neurondrift.study.experiments.evaluation_settings import DATA_SETS, ModelEvaluation
from neurondrift.study.plants.settings import Planting
from neurondrift.study.settings import Study, nested, validated

KINDS = (Flags, InterveneFlags, DoseFlags, SubspacesFlags, StabilityFlags, ModelFlags, PlantFlags, EngineFlags)
IN_FILES = (Study, Planting)  # configurations that a file can hold
FLAGS = [(kind, name, flag) for kind in KINDS for name, flag in kind.flags().items()]


def setting(kind, path):
    """The field of a configuration that a dotted path names."""
    table, _, rest = path.partition(".")
    field = kind.model_fields[table]
    if not rest:
        return field
    parts = (field.annotation, *typing.get_args(field.annotation))
    return setting(next(part for part in parts if isinstance(part, type) and issubclass(part, BaseModel)), rest)


def test_these_are_all_the_flags_that_name_settings():
    assert set(KINDS) == set(SettingFlags.__subclasses__())
    for kind in KINDS:
        assert set(typing.get_type_hints(kind)) - {"configures", "json"} == set(kind.flags())


@pytest.mark.parametrize(("kind", "name", "flag"), FLAGS, ids=lambda part: part if isinstance(part, str) else "")
def test_the_setting_of_a_flag_exists_and_its_help_is_made_from_it(kind, name, flag):
    assert setting(kind.configures, flag.path) is not None
    (text,) = flag.help if isinstance(flag.help, tuple) else (flag.help,)
    assert text.endswith(f"[{flag.path}]") == (kind.configures in IN_FILES)
    with pytest.raises(KeyError):
        setting(kind.configures, flag.path + "x")


def test_a_flag_that_is_not_given_overrides_nothing():
    assert all(kind().overrides() == {} for kind in KINDS)
    given = Flags(seeds="1,2", lora_r=4).overrides()
    assert given == {"seeds": [1, 2], "finetune.lora_r": 4}


def test_arguments_of_the_template_are_settings(tmp_path):
    words = ["enable_thinking=false", "reasoning_effort=low", "level=3", "date_string=1 Jan 2030", "x=True", "y="]
    arguments = {
        "enable_thinking": False,
        "reasoning_effort": "low",
        "level": 3,
        "date_string": "1 Jan 2030",
        "x": True,
        "y": "",
    }
    assert Flags(template_argument=words).overrides() == {"model.template": arguments}
    file = tmp_path / "mine.toml"
    file.write_text('preset = "smoke"\n[model]\ntemplate = { enable_thinking = true, level = 2 }\n')
    study = study_of(Source(config=file, output_dir=tmp_path), Flags(template_argument=words[:1]))
    assert study.model.template == {"enable_thinking": False, "level": 2}
    assert "enable_thinking = false" in study.to_toml()
    plain = study_of(Source(preset="smoke"), Flags())
    assert "template" not in plain.model.model_dump(mode="json")  # fingerprints of studies that stand
    for wrong in ("enable thinking=1", "=1", "thinking"):
        with pytest.raises(ConfigError, match="--template-argument takes KEY=VALUE"):
            Flags(template_argument=[wrong]).overrides()


def test_flags_of_a_command_override_its_section(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text('preset = "smoke"\n[intervene]\ndraws = 7\nmode = "mean"\n')
    asks = InterveneFlags(draws=5, doses="0.5,1", group=["random"], prompts=3)
    study = study_of(Source(config=file, output_dir=tmp_path), Flags(lora_r=2), asks)
    asked = study.intervene
    assert (asked.draws, asked.mode, asked.doses, asked.groups, asked.harmful) == (5, "mean", [0.5, 1], ["random"], 3)
    assert study.finetune.lora_r == 2
    with pytest.raises(ConfigError, match="--doses takes shares"):
        InterveneFlags(doses="2").overrides()


def test_the_help_gives_the_defaults_of_the_configuration():
    text = app.generate_docs(output_format="markdown", recursive=True)
    assert r"`--draws INT`: matched random groups for each group \[intervene.draws] *[default: 20]*" in text
    assert r"`--utility-rank INT`: utility directions of each site \[subspaces.utility_rank] *[default: 32]*" in text


def test_the_stages_in_the_help_are_those_of_the_table():
    from neurondrift.study.runner import STAGES, TABLE

    assert f"Stages in order: {', '.join(STAGES)}." in EPILOGUE
    assert all(app[name] for name in TABLE)


def test_what_is_asked_of_a_model_survives_its_toml(tmp_path):
    import tomllib

    flags = ModelFlags(harmful="none", limit=3, judge=["keyword"], attack=["decoding:2", "no-template"], tasks="a,b")
    asked = validated(ModelEvaluation, nested({"model.reference": "tiny:llama", **flags.overrides()}))
    assert asked.harmful is None and asked.ordinary.source == "builtin:ordinary-heldout"
    assert [(attack.kind, attack.samples, attack.chat_template) for attack in asked.attacks] == [
        ("decoding", 2, True),
        ("vanilla", 5, False),
    ]
    assert asked.tasks == ["a", "b"]
    assert validated(ModelEvaluation, tomllib.loads(asked.to_toml())) == asked
    by_vllm = validated(ModelEvaluation, {"model": {"reference": "a/b"}, "backend": "vllm"})
    assert by_vllm.answers is None
    with pytest.raises(ConfigError, match=r"no setting model.revison.*did you mean revision"):
        validated(ModelEvaluation, {"model": {"reference": "a/b", "revison": "x"}})


def test_what_was_asked_of_a_model_lies_beside_its_answers(tmp_path, capsys):
    import tomllib

    from neurondrift.cli.__main__ import main

    arguments = ["evaluate", "tiny:llama", "--ordinary", "none", "--borderline", "none", "--answers", "none"]
    main([*arguments, "--limit", "1", "--max-new-tokens", "2", "--output-dir", str(tmp_path)])
    record = tomllib.loads((tmp_path / "evaluation.toml").read_text())
    assert record.pop("record")["versions"]["torch"]
    asked = validated(ModelEvaluation, record)
    assert (asked.model.reference, asked.limit, asked.max_new_tokens, asked.answers) == ("tiny:llama", 1, 2, None)


def test_how_sets_are_read_goes_with_the_sets(tmp_path):
    flags = Flags(safety="a.csv", data="hf:b")
    source = Source(preset="smoke", output_dir=tmp_path, prompt_column=["q", "data=text"], split=["data=test"])
    study = study_of(source, flags)
    assert (study.score.safety.source, study.score.safety.prompt, study.score.safety.split) == ("a.csv", "q", "train")
    assert (study.finetune.data.source, study.finetune.data.prompt, study.finetune.data.split) == (
        "hf:b",
        "text",
        "test",
    )
    file = tmp_path / "mine.toml"
    file.write_text('preset = "smoke"\n[evaluate]\nharmful = "c.csv"\n')
    study = study_of(Source(config=file, output_dir=tmp_path, response_column=["harmful=r"]), Flags())
    assert (study.evaluate.harmful.source, study.evaluate.harmful.response) == ("c.csv", "r")
    with pytest.raises(
        ConfigError, match="--subset is about a set that no flag names.*SET one of safety, utility, data"
    ):
        study_of(Source(preset="smoke", output_dir=tmp_path, subset=["x"]), Flags(lora_r=2))


# Commands that no flag gives examples: what they take are folders, models, files of groups and configurations.
READS_NO_EXAMPLES = {"clean", "overlap", "diff", "locate", "plant", "sweep"}


def test_every_command_that_reads_examples_has_the_flags_that_say_how():
    commands = {name for name in app if not name.startswith("-")}
    has = {
        name: {flag for part in app[name].assemble_argument_collection() for flag in part.names} for name in commands
    }
    ways = {f"--{flag.replace('_', '-')}" for flag in DATA_FLAGS}
    sets = {f"--{name}" for name in (*STUDY_SETS, *DATA_SETS, "harmless")}
    assert commands - READS_NO_EXAMPLES == {name for name in commands if ways <= has[name]}
    assert not [name for name in READS_NO_EXAMPLES if (ways | sets) & has[name]]


def test_settings_that_are_new_leave_old_configurations_as_they_are():
    study = study_of(Source(preset="smoke"), Flags())
    assert "turns" not in study.to_toml()
    changed = study.score.safety.model_copy(update={"turns": "all"})
    assert changed.model_dump()["turns"] == "all"
