"""Commands about behaviour: evaluate a study or any model, and the report that may show answers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Group, Parameter

from neurondrift.base.errors import ConfigError
from neurondrift.base.memory import tune_allocator
from neurondrift.cli.app import NO_FLAGS, NO_SOURCE, Flags, Source, app, study_of
from neurondrift.cli.study import Again, run_stages

ALONE = Group("With MODEL only")
OF_A_MODEL = ("device", "dtype", "batch_size")  # flags of a study that count for a model on its own too


def _alone(text: str) -> Any:
    return Parameter(help=text, group=ALONE, negative="", show_default=False)


Shown = Annotated[bool, Parameter(help="show the answers to harmful requests, escaped", negative="")]


@app.command
def evaluate(
    reference: Annotated[
        str | None, Parameter(name="MODEL", help="a hub id, a folder, pypi:NAME; without it, the study's models")
    ] = None,
    /,
    source: Source = NO_SOURCE,
    flags: Flags = NO_FLAGS,
    *,
    force: Again = False,
    show_responses: Shown = False,
    adapter: Annotated[Path | None, _alone("folder of a PEFT adapter, put on top unmerged")] = None,
    harmful: Annotated[str | None, _alone("harmful requests: builtin:NAME, a file, hf:NAME; or none")] = None,
    ordinary: Annotated[str | None, _alone("ordinary prompts, or none")] = None,
    borderline: Annotated[str | None, _alone("safe prompts that sound harmful, or none")] = None,
    answers: Annotated[str | None, _alone("held-out answers for the perplexity, or none")] = None,
    judge: Annotated[list[str] | None, _alone("refusal, keyword, prefix, hf:ID; may be repeated")] = None,
    judge_kind: Annotated[
        Literal["harmbench", "llama-guard", "strongreject", "yes-no"] | None, _alone("how an hf: judge is asked")
    ] = None,
    judge_prompt: Annotated[str | None, _alone("prompt of an hf: judge, with {prompt} and {response}")] = None,
    attack: Annotated[
        list[str] | None,
        _alone("vanilla, no-template, decoding[:N], suffix:FILE, no-template+decoding ...; may be repeated"),
    ] = None,
    system_prompt: Annotated[str | None, _alone("llama2, or a text")] = None,
    tasks: Annotated[str | None, _alone("tasks of lm-evaluation-harness, such as boolq,rte (extra harness)")] = None,
    limit: Annotated[int | None, _alone("prompts drawn from each set")] = None,
    max_new_tokens: Annotated[int | None, _alone("longest answer in tokens; default: 32")] = None,
    revision: Annotated[str | None, _alone("branch, tag or commit of the model")] = None,
    trust_remote_code: Annotated[bool, _alone("let code that comes with a model run")] = False,
    backend: Annotated[Literal["transformers", "vllm"] | None, _alone("vllm is untested")] = None,
    json: Annotated[Path | None, _alone("write the figures here too")] = None,
) -> None:
    """Measure refusals, over-refusal and perplexity: of a study before, during and after fine-tuning; or of any model.

    With MODEL: asks it the prompts of three sets, prints the shares with intervals, and writes answers.parquet to the
    output folder. A judge that is a model reads whole answers; ask for longer ones then (Wei et al.: 256 tokens).
    """
    given = {
        "adapter": adapter, "harmful": harmful, "ordinary": ordinary, "borderline": borderline, "answers": answers,
        "judge": judge, "judge_kind": judge_kind, "judge_prompt": judge_prompt, "attack": attack,
        "system_prompt": system_prompt, "tasks": tasks, "limit": limit, "max_new_tokens": max_new_tokens,
        "revision": revision, "trust_remote_code": trust_remote_code, "backend": backend, "json": json,
    }  # fmt: skip
    if reference is None:
        if alone := [_flag(name) for name, value in given.items() if value]:
            raise ConfigError(
                "These flags are about one model, and none is named",
                received=", ".join(alone),
                fix="neurondrift evaluate MODEL ..., or set [evaluate] in the study's configuration",
            )
        run_stages(["evaluate"], source, flags, ["evaluate"] if force else ())
        if show_responses:
            _with_responses(source, flags)
        return
    strange = [_flag(name) for name, value in vars(flags).items() if value is not None and name not in OF_A_MODEL]
    strange += [_flag(name) for name in ("preset", "config") if getattr(source, name) is not None] + ["--force"] * force
    if strange:
        raise ConfigError("These flags are about a study, and a model is named", received=", ".join(strange))
    if limit is not None and limit < 1:
        raise ConfigError("--limit takes a whole number from 1", received=limit)
    _evaluate_alone(reference, source, flags, show_responses, given)


def _evaluate_alone(reference: str, source: Source, flags: Flags, show_responses: bool, given: dict[str, Any]) -> None:
    from neurondrift.base.files import write_json
    from neurondrift.study.experiments.evaluate_model import evaluate_model
    from neurondrift.study.stages.evaluation import attack_from_words, attack_of

    defaults = {
        "harmful": "builtin:refusals-heldout",
        "ordinary": "builtin:ordinary-heldout",
        "borderline": "builtin:borderline",
    }
    sets = {kind: given[kind] or default for kind, default in defaults.items() if given[kind] != "none"}
    if not sets:
        raise ConfigError("No set of prompts is left", allowed="--harmful, --ordinary, --borderline")
    held_out = given["answers"] or ("none" if given["backend"] == "vllm" else defaults["ordinary"])
    tune_allocator()
    found = evaluate_model(
        reference,
        adapter=given["adapter"],
        sets=sets,
        answers=None if held_out == "none" else held_out,
        judges=given["judge"] or ["refusal"],
        judge_kind=given["judge_kind"],
        judge_prompt=given["judge_prompt"],
        attacks=[attack_of(attack_from_words(words)) for words in given["attack"] or ["vanilla"]],
        system=given["system_prompt"],
        tasks=[task for task in (given["tasks"] or "").split(",") if task],
        limit=given["limit"],
        max_new_tokens=given["max_new_tokens"] or 32,
        batch_size=flags.batch_size or 32,
        dtype=flags.dtype or "auto",
        device=flags.device or "auto",
        revision=given["revision"],
        trust_remote_code=given["trust_remote_code"],
        backend=given["backend"] or "transformers",
        output=source.output_dir,
        show_responses=show_responses,
        say=lambda line: print(line, flush=True),
    )
    if given["json"] is not None:
        write_json(given["json"], found)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


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

    for path in report_with_responses(study, StudyFolder(source.output_dir, study)):
        print(path)
