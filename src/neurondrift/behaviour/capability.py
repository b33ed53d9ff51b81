"""What a model can still do: the perplexity of held-out answers, and tasks of lm-evaluation-harness."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from neurondrift.base.errors import ConfigError
from neurondrift.base.processes import in_shares
from neurondrift.models.batches import Batch, batches_without_padding, token_losses
from neurondrift.models.data import Example, encode
from neurondrift.models.text.templates import prompt_ids

# Wei et al., section 4.1: zero-shot accuracy on these.
WEI_TASKS = ("boolq", "rte", "hellaswag", "winogrande", "arc_challenge", "openbookqa")


@torch.no_grad()
def perplexity(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    batch_size: int = 16,
    max_length: int = 512,
) -> float:
    """exp of the mean cross-entropy over all response tokens of all examples (each token counts the same)."""
    device = model.get_input_embeddings().weight.device
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    encoded = encode(examples, tokenizer, max_length=max_length)
    batches = batches_without_padding(model, encoded, batch_size=batch_size, pad_token_id=pad)

    def sums(own: Sequence[Batch]) -> list[tuple[float, int]]:
        losses = (token_losses(model, batch.to(device)).losses for batch in own)
        return [(float(losses_N.sum(dtype=torch.float64)), len(losses_N)) for losses_N in losses]

    total, count = 0.0, 0
    for of_batch, tokens in in_shares(batches, sums):
        total, count = total + of_batch, count + tokens
    return math.exp(total / count)


def require_harness() -> None:
    """Raise `ConfigError` where lm-evaluation-harness is not installed."""
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"Capability tasks need lm-evaluation-harness ({error})", fix="pip install 'neurondrift[harness]'"
        ) from error


def check_tasks(tasks: Sequence[str], *, manager: Any = None) -> Any:
    """The harness's task manager, once all the tasks are known to it; `ConfigError` otherwise."""
    require_harness()
    from lm_eval.tasks import TaskManager

    manager = manager or TaskManager()
    missing = [task for task in tasks if task not in manager.all_tasks]
    if missing:
        raise ConfigError(
            "lm-evaluation-harness knows no such task",
            received=missing,
            allowed=f"such as {', '.join(WEI_TASKS)}; all of them: lm-eval ls tasks",
        )
    return manager


def capability(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    batch_size: int = 8,
    limit: int | None = None,
    seed: int = 0,
    manager: Any = None,
) -> list[dict[str, Any]]:
    """Zero-shot results of lm-evaluation-harness on a model object, adapter and all.

    Parameters
    ----------
    model, tokenizer
        As in `generate`. The harness runs them as they are: nothing is saved, merged or loaded again.
    tasks
        Names of its tasks, such as those of Wei et al. (`WEI_TASKS`).
    batch_size
        Sequences at once.
    limit
        Documents per task, for trying things out.
    seed
        Of its draws of few-shot examples (there are none in zero-shot tasks).
    manager
        A `TaskManager`, for tasks of the user's own.

    Returns
    -------
    One row per task and metric: task, metric, value, stderr (None where the harness gives none), n.

    Raises
    ------
    ConfigError
        lm-evaluation-harness is not installed, or knows no such task.
    """
    manager = check_tasks(tasks, manager=manager)
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    # The harness leaves the first token out unless it is told; with it, texts begin as in `perplexity`.
    begun: dict[str, Any] = (
        {"add_bos_token": True} if prompt_ids("a", tokenizer)[:1] == [tokenizer.bos_token_id] else {}
    )
    evaluation = simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, **begun),
        tasks=list(tasks),
        num_fewshot=0,
        limit=limit,
        task_manager=manager,
        bootstrap_iters=0,
        log_samples=False,
        random_seed=seed,
        numpy_random_seed=seed,
        torch_random_seed=seed,
        fewshot_random_seed=seed,
    )
    rows = []
    for task, values in evaluation["results"].items():
        for key, value in values.items():
            metric, _, kind = key.partition(",")
            if kind and not metric.endswith("_stderr") and isinstance(value, int | float):
                error = values.get(f"{metric}_stderr,{kind}")
                rows.append(
                    {
                        "task": task,
                        "metric": metric if kind == "none" else f"{metric} ({kind})",
                        "value": float(value),
                        "stderr": float(error) if isinstance(error, int | float) else None,
                        "n": int(evaluation.get("n-samples", {}).get(task, {}).get("effective", 0)),
                    }
                )
    return rows
