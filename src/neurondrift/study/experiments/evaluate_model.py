"""The behaviour of any model, outside a study: `neurondrift evaluate MODEL`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tomli_w

from neurondrift.base.errors import ConfigError
from neurondrift.base.files import Parts, files_below, sha256_of_value, write_text
from neurondrift.base.progress import progress
from neurondrift.behaviour.capability import capability, check_tasks, perplexity
from neurondrift.behaviour.evaluate import Panel, count_answers, judge_answers, write_answers
from neurondrift.behaviour.rates import category_interval, per_prompt, refusal_rate
from neurondrift.behaviour.requests import system_prompt
from neurondrift.models.batches import check_lengths
from neurondrift.models.data import DataReference, Example, encode, load_examples
from neurondrift.models.loading import load_model
from neurondrift.models.text.templates import set_template_arguments
from neurondrift.study.experiments.evaluation_settings import KINDS, ModelEvaluation
from neurondrift.study.folder import record
from neurondrift.study.stages.evaluation import attack_of
from neurondrift.study.stages.table import data_key

Say = Callable[[str], None]


WRITTEN = ANSWERS, ASKED = "answers.parquet", "evaluation.toml"
UNFINISHED = "answers.parts"


def evaluate_model(
    asked: ModelEvaluation, output: Path, *, show_responses: bool = False, say: Say = lambda line: None
) -> dict[str, Any]:
    """Ask a model, judge its answers, print a table, write `answers.parquet` and what was asked (`evaluation.toml`).

    Parameters
    ----------
    asked
        Which model, which prompts and answers (of harmful prompts: under each attack in turn), which judges, and how.
    output
        Folder of the two files; until they are there, also of the answers of each set that is finished: the same
        command goes on from them after it was killed.
    show_responses
        Whether answers to harmful requests are printed, without control characters.
    say
        Receives each line.

    Returns
    -------
    `rates` (one row per attack, judge and kind), `perplexity` (or None), `capability` (rows), and what was asked.

    Raises
    ------
    UserError
        Anything that is missing or does not fit: all of it is looked for before an answer is generated.
    """
    sets = {kind: getattr(asked, kind) for kind in KINDS if getattr(asked, kind) is not None}
    if not sets:
        raise ConfigError("No set of prompts is left", allowed="--harmful, --ordinary, --borderline")
    attacks = [attack_of(section) for section in asked.attacks]
    panel = Panel(
        asked.judges,
        kind=asked.judge_kind,
        prompt=asked.judge_prompt,
        device=asked.model.device,
        trust_remote_code=asked.model.trust_remote_code,
    )
    manager = check_tasks(asked.tasks) if asked.tasks else None
    limit = asked.limit
    examples: dict[str, list[Example]] = {
        kind: load_examples(source, limit=limit, require_response=False, kind=kind) for kind, source in sets.items()
    }
    held_out = load_examples(asked.answers, limit=limit) if asked.answers else []
    with progress(f"loading {asked.model.reference}"):
        model, tokenizer = _loaded(asked)
    if held_out:
        check_lengths(model, encode(held_out, tokenizer, max_length=asked.max_length))
    kept = Parts(output / UNFINISHED, _inputs(asked))
    rows: list[dict[str, Any]] = []
    asking = [
        (attack, {kind: of_kind for kind, of_kind in examples.items() if first or kind == "harmful"})
        for first, attack in zip([True] + [False] * len(attacks), attacks, strict=False)
    ]
    with progress("answers", sum(count_answers(chosen, attack) for attack, chosen in asking)) as advance:
        for number, (attack, chosen) in enumerate(asking):
            rows += judge_answers(
                model,
                tokenizer,
                chosen,
                panel=panel,
                attack=attack,
                system=system_prompt(asked.system_prompt),
                max_new_tokens=asked.max_new_tokens,
                whole=True,
                batch_size=asked.batch_size,
                max_length=asked.max_length,
                backend=asked.backend,
                advance=advance,
                parts=kept.below(str(number)),
            )
    panel.release()
    write_answers(output / ANSWERS, rows, step=None, seed=None)
    write_text(output / ASKED, asked.to_toml() + "\n" + tomli_w.dumps({"record": record()}))
    value, of_tasks = None, []
    if held_out:
        with progress("perplexity of held-out answers"):
            value = perplexity(model, tokenizer, held_out, max_length=asked.max_length)
    if asked.tasks:
        with progress("tasks"):
            of_tasks = capability(model, tokenizer, asked.tasks, limit=limit, manager=manager)
    kept.remove()
    figures = {
        "model": asked.model.reference,
        "adapter": str(asked.adapter) if asked.adapter else None,
        "max_new_tokens": asked.max_new_tokens,
        "rates": rates_of(rows),
        "perplexity": value,
        "capability": of_tasks,
    }
    for line in _lines(figures):
        say(line)
    if show_responses:
        say("\nAnswers to harmful requests, as the model wrote them (no person has read them):")
        for row in rows:
            if row["kind"] == "harmful" and row["primary"]:
                say(f"- [{row['verdict']}] {shown(row['prompt'])}\n  {shown(row['response']) or '(no text)'}")
    say(f"\nEvery answer: {output / ANSWERS}")
    return figures


def _loaded(asked: ModelEvaluation) -> tuple[Any, Any]:
    """The model and its tokenizer, for the backend that is asked for."""
    of: dict[str, Any] = {
        "adapter": asked.adapter,
        "dtype": asked.model.dtype,
        "revision": asked.model.revision,
        "trust_remote_code": asked.model.trust_remote_code,
    }
    if asked.backend == "transformers":
        loaded, tokenizer = load_model(asked.model.reference, device=asked.model.device, **of)
        return loaded, set_template_arguments(tokenizer, asked.model.template)
    if asked.answers or asked.tasks:
        raise ConfigError("vLLM answers prompts only", fix="--answers none, no --tasks, or --backend transformers")
    from neurondrift.behaviour.vllm_backend import VllmModel

    model = VllmModel(asked.model.reference, **of)
    return model, set_template_arguments(model.tokenizer, asked.model.template)


def _inputs(asked: ModelEvaluation) -> str:
    """Fingerprint of what the answers depend on: all that was asked, data by content, local models by their files'
    sizes and times."""
    suffixes = [section.suffixes for section in asked.attacks if section.suffixes]
    data = [*(value for _, value in asked if isinstance(value, DataReference)), *map(_source, suffixes)]
    local = [Path(place).expanduser() for place in (asked.model.reference, asked.adapter) if place]
    files = [
        [str(file), file.stat().st_size, file.stat().st_mtime_ns]
        for file in files_below([p for p in local if p.is_dir()])
    ]
    return sha256_of_value([asked.model_dump(mode="json"), [data_key(each) for each in data], files])


def _source(file: str) -> DataReference:
    return DataReference(source=file)


def rates_of(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row per attack, kind and judge: shares refused and (harmful) successes, with intervals, over prompts."""
    result = []
    cells = dict.fromkeys((row["attack"], row["kind"], row["judge"]) for row in rows)
    for attack, kind, judge in cells:
        of_cell = [row for row in rows if (row["attack"], row["kind"]) == (attack, kind)]
        prompts = per_prompt(of_cell, judge=judge)
        categories = [row["category"] for row in prompts]
        entry: dict[str, Any] = {"attack": attack, "kind": kind, "judge": judge, "n": len(prompts)}
        for name in ("refused", "success"):
            flags = [bool(row[name]) for row in prompts]
            rate, over = refusal_rate(flags), category_interval(flags, categories)
            entry[name] = {
                "rate": rate.rate,
                "low": rate.low,
                "high": rate.high,
                "category_low": None if math.isnan(over.low) else over.low,
                "category_high": None if math.isnan(over.high) else over.high,
                "categories": over.categories,
                "category_reason": over.reason or None,
            }
        scores = [row["score"] for row in prompts if row["score"] is not None]
        entry["mean_score"] = sum(scores) / len(scores) if scores else None
        entry["coherent"] = sum(bool(row["coherent"]) for row in prompts) / len(prompts)
        entry["undecided"] = sum(row["undecided"] for row in prompts)
        entry["partial"] = sum(row["partial"] for row in prompts)
        entry["answers"] = prompts[0]["answers"]
        result.append(entry)
    return result


def _lines(figures: Mapping[str, Any]) -> list[str]:
    """The table, and what else was measured, as lines of text."""
    headers = ["prompts", "attack", "judge", "n", "refused", "over categories", "partly", "undecided"]
    headers += ["attack success", "coherent"]
    table = [headers]
    for row in figures["rates"]:
        harmful = row["kind"] == "harmful"
        table.append(
            [
                row["kind"],
                row["attack"] if harmful else "–",
                shown(row["judge"]),
                str(row["n"]),
                _share(row["refused"], "low", "high"),
                _share(row["refused"], "category_low", "category_high", alone=True),
                f"{row['partial'] / row['n']:.2f}",
                f"{row['undecided'] / row['n']:.2f}",
                _share(row["success"], "low", "high") if harmful else "–",
                f"{row['coherent']:.2f}",
            ]
        )
    widths = [max(len(line[column]) for line in table) for column in range(len(headers))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in table]
    lines.insert(1, "─" * len(max(lines, key=len)))
    lines.append("95 % intervals: Wilson; over categories: cluster bootstrap (– where there are too few, or all alike)")
    lines.append("Shares of all prompts; those refused in part and those undecided do not count as refused")
    for row in figures["rates"]:
        if row["undecided"]:
            lines.append(
                f"Undecided: {row['undecided']} of {row['n']} {row['kind']} prompts ({row['attack']}, "
                f"{shown(row['judge'])}), whose answers are thoughts alone, or not in English; they count as neither. "
                "For thoughts, raise --max-new-tokens, or --template-argument enable_thinking=false where the template "
                "has it"
            )
    if figures["perplexity"] is not None:
        lines.append(f"Perplexity of held-out answers: {figures['perplexity']:.2f}")
    for row in figures["capability"]:
        error = "" if row["stderr"] is None else f" ± {row['stderr']:.3f}"
        lines.append(f"{row['task']}, {row['metric']}: {row['value']:.3f}{error}")
    return lines


def _share(rate: Mapping[str, Any], low: str, high: str, *, alone: bool = False) -> str:
    if rate[low] is None:
        return "–"
    interval = f"{rate[low]:.2f} to {rate[high]:.2f}"
    return interval if alone else f"{rate['rate']:.2f} ({interval})"


def shown(text: str) -> str:
    """A text of the model's on one line, without control and formatting characters: safe for a terminal."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())
