"""Commands about behaviour: evaluate a study or any model, and the report that may show answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from cyclopts import Group, Parameter

from neurondrift.base.errors import ConfigError
from neurondrift.base.locks import only_one
from neurondrift.base.processes import tune_allocator
from neurondrift.cli.app import (
    DATA_FLAGS,
    NO_FLAGS,
    NO_SOURCE,
    Flag,
    Flags,
    SettingFlags,
    Source,
    app,
    given_of,
    study_of,
)
from neurondrift.cli.study import Again, run_stages, say
from neurondrift.study.experiments.evaluation_settings import DATA_SETS, ModelEvaluation
from neurondrift.study.settings import AttackSection, Section, nested, validated

ALONE = Group("With MODEL only")
# Flags of a study that count for a model on its own too, and the setting that they are then.
OF_A_MODEL = {
    "device": "model.device",
    "dtype": "model.dtype",
    "template_argument": "model.template",
    "batch_size": "batch_size",
}

Shown = Annotated[bool, Parameter(help="show the answers to harmful requests, escaped", negative="")]


def _alone(path: str, text: str, read: Callable[[Any], Any] | None = None) -> Flag:
    return Flag(path, text, read=read, shows_path=False, group=ALONE)


def _attacks(words: list[str]) -> list[AttackSection]:
    from neurondrift.study.stages.evaluation import attack_from_words

    return [attack_from_words(text) for text in words]


def _tasks(text: str) -> list[str]:
    return [task for task in text.split(",") if task]


def _limit(count: int) -> int:
    if count < 1:
        raise ConfigError("--limit takes a whole number from 1", received=count)
    return count


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ModelFlags(SettingFlags):
    """What a model on its own is asked for."""

    configures: ClassVar[type[Section]] = ModelEvaluation

    adapter: Annotated[Path | None, _alone("adapter", "folder of a PEFT adapter, put on top unmerged")] = None
    harmful: Annotated[str | None, _alone("harmful", "harmful requests: builtin:NAME, a file, hf:NAME; or none")] = None
    ordinary: Annotated[str | None, _alone("ordinary", "ordinary prompts, or none")] = None
    borderline: Annotated[str | None, _alone("borderline", "safe prompts that sound harmful, or none")] = None
    answers: Annotated[str | None, _alone("answers", "held-out answers for the perplexity, or none")] = None
    judge: Annotated[list[str] | None, _alone("judges", "refusal, keyword, prefix, hf:ID; may be repeated")] = None
    judge_kind: Annotated[
        Literal["harmbench", "llama-guard", "strongreject", "yes-no"] | None,
        _alone("judge_kind", "how an hf: judge is asked"),
    ] = None
    judge_prompt: Annotated[
        str | None, _alone("judge_prompt", "prompt of an hf: judge, with {prompt} and {response}")
    ] = None
    attack: Annotated[
        list[str] | None,
        _alone(
            "attacks",
            "vanilla, no-template, decoding[:N], suffix:FILE, no-template+decoding ...; may be repeated",
            read=_attacks,
        ),
    ] = None
    system_prompt: Annotated[str | None, _alone("system_prompt", "llama2, or a text")] = None
    tasks: Annotated[
        str | None,
        _alone("tasks", "tasks of lm-evaluation-harness, such as boolq,rte (extra harness)", read=_tasks),
    ] = None
    limit: Annotated[int | None, _alone("limit", "prompts drawn from each set", read=_limit)] = None
    max_new_tokens: Annotated[int | None, _alone("max_new_tokens", "longest answer in tokens; default: 128")] = None
    revision: Annotated[str | None, _alone("model.revision", "branch, tag or commit of the model")] = None
    trust_remote_code: Annotated[
        bool | None, _alone("model.trust_remote_code", "let code that comes with a model run")
    ] = None
    backend: Annotated[Literal["transformers", "vllm"] | None, _alone("backend", "vllm is untested")] = None
    json: Annotated[Path | None, Parameter(help="write the figures here too", group=ALONE, show_default=False)] = None


NO_MODEL_FLAGS = ModelFlags()


@app.command
def evaluate(
    reference: Annotated[
        str | None, Parameter(name="MODEL", help="a hub id, a folder, pypi:NAME; without it, the study's models")
    ] = None,
    /,
    source: Source = NO_SOURCE,
    flags: Flags = NO_FLAGS,
    alone: ModelFlags = NO_MODEL_FLAGS,
    *,
    force: Again = False,
    show_responses: Shown = False,
) -> None:
    """Measure refusals, over-refusal and perplexity: of a study before, during and after fine-tuning; or of any model.

    With MODEL: asks it the prompts of three sets, prints the shares with intervals, and writes answers.parquet to the
    output folder. A judge that is a model reads whole answers; ask for longer ones then (Wei et al.: 256 tokens).
    """
    if reference is None:
        if given := given_of(alone):
            raise ConfigError(
                "These flags are about one model, and none is named",
                received=", ".join(given),
                fix="neurondrift evaluate MODEL ..., or set [evaluate] in the study's configuration",
            )
        run_stages(["evaluate"], source, flags, ["evaluate"] if force else ())
        if show_responses:
            _with_responses(source, flags)
        return
    about_any = ["output_dir", *DATA_FLAGS]
    strange = [*given_of(flags, but=OF_A_MODEL), *given_of(source, but=about_any), *["--force"] * force]
    if strange:
        raise ConfigError("These flags are about a study, and a model is named", received=", ".join(strange))
    of_study = flags.overrides()
    shared = {path: of_study.get(Flags.flags()[name].path) for name, path in OF_A_MODEL.items()}
    own = source.reading(alone.overrides(), {name: name for name in DATA_SETS}, configured=False)
    asked = validated(ModelEvaluation, nested({"model.reference": reference, **shared, **own}))
    from neurondrift.base.files import write_json
    from neurondrift.study.experiments.evaluate_model import WRITTEN, evaluate_model

    tune_allocator()
    with only_one(source.output_dir, writes=WRITTEN):
        figures = evaluate_model(asked, source.output_dir, show_responses=show_responses, say=say)
    if alone.json is not None:
        write_json(alone.json, figures)


@app.command
def report(
    source: Source = NO_SOURCE, flags: Flags = NO_FLAGS, *, force: Again = False, show_responses: Shown = False
) -> None:
    """Write the report, the figures and the page from the findings.

    With --show-responses also report_with_responses.txt and .html, which hold the answers to harmful requests.
    """
    run_stages(["report"], source, flags, ["report"] if force else ())
    if show_responses:
        _with_responses(source, flags)


def _with_responses(source: Source, flags: Flags) -> None:
    study = study_of(source, flags)
    from neurondrift.study.folder import StudyFolder
    from neurondrift.study.stages.reporting import report_with_responses

    with only_one(source.output_dir, writes=("results",)):
        written = report_with_responses(study, StudyFolder(source.output_dir, study))
    for path in written:
        say(str(path))
