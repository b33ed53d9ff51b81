"""The behaviour of any model, outside a study: `neurondrift evaluate MODEL`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from neurondrift.base.errors import ConfigError
from neurondrift.base.progress import progress
from neurondrift.behaviour.capability import capability, check_tasks, perplexity
from neurondrift.behaviour.evaluate import Panel, count_answers, judge_answers, write_answers
from neurondrift.behaviour.generate import Backend
from neurondrift.behaviour.rates import category_interval, per_prompt, refusal_rate
from neurondrift.behaviour.requests import Attack, system_prompt
from neurondrift.models.data import load_examples
from neurondrift.models.loading import load_model

Say = Callable[[str], None]


def evaluate_model(
    reference: str,
    *,
    adapter: Path | None = None,
    sets: Mapping[str, str],
    answers: str | None = None,
    judges: Sequence[str] = ("refusal",),
    judge_kind: Any = None,
    judge_prompt: str | None = None,
    attacks: Sequence[Attack],
    system: str | None = None,
    tasks: Sequence[str] = (),
    limit: int | None = None,
    max_new_tokens: int = 32,
    batch_size: int = 32,
    max_length: int = 2048,
    dtype: str = "auto",
    device: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    backend: Backend = "transformers",
    output: Path,
    show_responses: bool = False,
    say: Say = lambda line: None,
) -> dict[str, Any]:
    """Ask a model, judge its answers, print a table and write `answers.parquet`.

    Parameters
    ----------
    reference, adapter, dtype, device, revision, trust_remote_code
        The model, as in `load_model`.
    sets
        Kind of prompt (`harmful`, `ordinary`, `borderline`) -> data reference.
    answers
        Data reference of held-out answers for the perplexity; None: not measured.
    judges, judge_kind, judge_prompt
        As in `Panel`.
    attacks
        How harmful prompts are put, one after the other.
    system
        `llama2`, or a system prompt.
    tasks
        Of lm-evaluation-harness; `limit` counts there too.
    limit
        Prompts drawn from each set.
    max_new_tokens, batch_size, max_length, backend
        As in `generate.answer`.
    output
        Folder of `answers.parquet`.
    show_responses
        Whether answers to harmful requests are printed, without control characters.
    say
        Receives each line.

    Returns
    -------
    `rates` (one row an attack, judge and kind), `perplexity` (or None), `capability` (rows), and what was asked.

    Raises
    ------
    UserError
        Anything that is missing or does not fit: all of it is looked for before an answer is generated.
    """
    panel = Panel(judges, kind=judge_kind, prompt=judge_prompt, device=device, trust_remote_code=trust_remote_code)
    manager = check_tasks(tasks) if tasks else None
    examples = {kind: load_examples(source, limit=limit, require_response=False) for kind, source in sets.items()}
    held_out = load_examples(answers, limit=limit) if answers else []
    if backend == "vllm":
        if held_out or tasks:
            raise ConfigError("vLLM answers prompts only", fix="--answers none, no --tasks, or --backend transformers")
        from neurondrift.behaviour.vllm_backend import VllmModel

        model: Any = VllmModel(
            reference, adapter=adapter, dtype=dtype, revision=revision, trust_remote_code=trust_remote_code
        )
        tokenizer = model.tokenizer
    else:
        model, tokenizer = load_model(
            reference,
            adapter=adapter,
            dtype=dtype,
            device=device,
            revision=revision,
            trust_remote_code=trust_remote_code,
        )
    rows: list[dict[str, Any]] = []
    parts = [
        (attack, {kind: found for kind, found in examples.items() if first or kind == "harmful"})
        for first, attack in zip([True] + [False] * len(attacks), attacks, strict=False)
    ]
    with progress("answers", sum(count_answers(chosen, attack) for attack, chosen in parts)) as advance:
        for attack, chosen in parts:
            rows += judge_answers(
                model,
                tokenizer,
                chosen,
                panel=panel,
                attack=attack,
                system=system_prompt(system),
                max_new_tokens=max_new_tokens,
                batch_size=batch_size,
                max_length=max_length,
                backend=backend,
                advance=advance,
            )
    panel.release()
    write_answers(output / "answers.parquet", rows, step=None, seed=None)
    found = {
        "model": reference,
        "adapter": str(adapter) if adapter else None,
        "max_new_tokens": max_new_tokens,
        "rates": rates_of(rows),
        "perplexity": perplexity(model, tokenizer, held_out, max_length=max_length) if held_out else None,
        "capability": capability(model, tokenizer, tasks, limit=limit, manager=manager) if tasks else [],
    }
    for line in _lines(found):
        say(line)
    if show_responses:
        say("\nAnswers to harmful requests, as the model wrote them (no person has read them):")
        for row in rows:
            if row["kind"] == "harmful" and row["primary"]:
                say(f"- [{row['verdict']}] {shown(row['prompt'])}\n  {shown(row['response']) or '(no text)'}")
    say(f"\nEvery answer: {output / 'answers.parquet'}")
    return found


def rates_of(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row an attack, kind and judge: shares refused and (harmful) successes, with intervals, over prompts."""
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
        entry["answers"] = prompts[0]["answers"]
        result.append(entry)
    return result


def _lines(found: Mapping[str, Any]) -> list[str]:
    """The table, and what else was measured, as lines of text."""
    headers = ["prompts", "attack", "judge", "n", "refused", "over categories", "attack success", "coherent"]
    table = [headers]
    for row in found["rates"]:
        harmful = row["kind"] == "harmful"
        table.append(
            [
                row["kind"],
                row["attack"] if harmful else "–",
                shown(row["judge"]),
                str(row["n"]),
                _share(row["refused"], "low", "high"),
                _share(row["refused"], "category_low", "category_high", alone=True),
                _share(row["success"], "low", "high") if harmful else "–",
                f"{row['coherent']:.2f}",
            ]
        )
    widths = [max(len(line[column]) for line in table) for column in range(len(headers))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in table]
    lines.insert(1, "─" * len(max(lines, key=len)))
    lines.append("95 % intervals: Wilson; over categories: cluster bootstrap (– where there are too few, or all alike)")
    if found["perplexity"] is not None:
        lines.append(f"Perplexity of held-out answers: {found['perplexity']:.2f}")
    for row in found["capability"]:
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
