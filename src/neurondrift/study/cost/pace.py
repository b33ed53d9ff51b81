"""How fast this machine computes for one model: one of its blocks and one product with its LM head, timed for a moment.

Knows nothing of studies. The block has random weights: what it computes does not matter, how long it takes does.
Shapes: B = rows, T = tokens, N = tokens in all, P = positions whose logits are computed.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import DynamicCache

from neurondrift.base.errors import ModelError
from neurondrift.importance.scores import score
from neurondrift.models.architecture.blocks import decoder_blocks
from neurondrift.models.batches import batches_without_padding, context_length, token_losses
from neurondrift.models.sites import Sites

ROWS, TOKENS, ANSWER = 4, 100, 4  # that go through the block together; predicted ones of each row
PREDICTED = 64  # positions that go through the LM head together
FEW, MANY = 4, 32  # rows for which one token is decoded
CACHED = 64  # tokens before it
SORTED = 1 << 20  # numbers that are put in order
LARGE = 3e7  # weights of a block from which one row is enough


class Pace(NamedTuple):
    """Seconds, of the whole model where nothing else is said.

    Attributes
    ----------
    train, adapt, score, read
        A token through all blocks: forward and back with the gradients of all weights; of an adapter; of every example
        for scores; forward alone.
    train_head, adapt_head, read_head
        A position through the LM head and its loss: with the head's own gradient; without it; forward alone.
    update
        A step of the optimizer for one weight.
    step, row
        Decoding one token: for any batch, and for each of its rows.
    order
        Putting one number in order among many, as groups do.
    score_row
        An example that is scored, beside its tokens.
    """

    train: float
    adapt: float
    score: float
    read: float
    train_head: float
    adapt_head: float
    read_head: float
    update: float
    step: float
    row: float
    order: float
    score_row: float = 0.0

    def slowed(self, factor: float) -> Pace:
        """The pace of a process that has one part of so many of the machine; numbers are put in order by one alone."""
        return Pace(**{name: (1 if name == "order" else factor) * value for name, value in self._asdict().items()})


def measured(skeleton: Any, *, device: torch.device, dtype: torch.dtype, rank: int) -> Pace:
    """The pace of a model, from one block of it.

    Parameters
    ----------
    skeleton
        The whole model on the meta device; all its blocks but one are taken out.
    device, dtype
        Where and in what the study computes. Training has float32 weights (under autocast in bfloat16).
    rank
        Of the adapter.

    Raises
    ------
    ModelError
        A model of which no single block can be run.
    """
    blocks = decoder_blocks(skeleton)
    whole = sum(_size(block) for each in blocks for block in each.modules)
    own = _size(blocks[0].modules[0])
    try:
        model = _first_block_alone(skeleton, blocks, device, dtype)
        return _timed(model, whole / own, rank)
    except (RuntimeError, TypeError, ValueError, KeyError, AttributeError, IndexError, NotImplementedError) as error:
        raise ModelError(f"A block of this model cannot be run by itself ({type(error).__name__})") from error


def _size(block: nn.Module) -> int:
    return sum(parameter.numel() for parameter in block.parameters())


def _first_block_alone(model: Any, blocks: Any, device: torch.device, dtype: torch.dtype) -> Any:
    for at, each in enumerate(blocks):
        del each.modules[1 if at == 0 else 0 :]
    model.to_empty(device=device)
    model.to(dtype)
    model.tie_weights()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02)
        for buffer in model.buffers():
            buffer.fill_(0.5 if buffer.is_floating_point() else 1)
    return model.eval()


def _timed(model: Any, blocks: float, rank: int) -> Pace:
    head, device = model.get_output_embeddings(), model.get_input_embeddings().weight.device
    rows = ROWS if _size(decoder_blocks(model)[0].modules[0]) < LARGE else ROWS // 4
    encoded = [_row(model, min(TOKENS, context_length(model))) for _ in range(rows)]
    (batch,) = (each.to(device) for each in batches_without_padding(model, encoded, batch_size=rows, pad_token_id=0))
    tokens, positions = batch.input_ids.numel(), int((batch.labels[:, 1:] != -100).sum())
    hidden_PI = torch.randn(PREDICTED, head.weight.shape[1], device=device, dtype=head.weight.dtype)

    def through_head(own: bool) -> None:
        head.weight.requires_grad_(own)
        head(hidden_PI.detach().requires_grad_()).float().logsumexp(dim=1).sum().backward()
        head.weight.grad = None

    @torch.no_grad()
    def head_alone(count: int) -> float:
        return _seconds(lambda: head(hidden_PI[:count]), device)

    def forward() -> None:
        with torch.no_grad():
            token_losses(model, batch)

    def back() -> None:
        token_losses(model, batch).losses.mean().backward()
        model.zero_grad()

    few_head, many_head, read_head = map(head_alone, (FEW, MANY, PREDICTED))
    read_head /= PREDICTED
    train_head = _seconds(lambda: through_head(True), device) / PREDICTED
    adapt_head = _seconds(lambda: through_head(False), device) / PREDICTED
    read = _seconds(forward, device)
    few, many = (_decoding(model, rows, device) for rows in (FEW, MANY))
    # Differences: what is set up for scores once is much beside so few examples, and little beside a study's. Twice the
    # rows cost their tokens and what each row costs by itself, rows of twice the length the tokens alone.
    longer = [_row(model, min(2 * TOKENS, context_length(model))) for _ in range(rows)]
    more = sum(len(row["input_ids"]) for row in longer) - tokens
    once, twice, long = (
        _seconds(partial(score, model, each, batch_size=rows), device) for each in (encoded, 2 * encoded, longer)
    )
    scored = max(twice - once, 0.5 * once)
    of_tokens = min(max(long - once, 0.1 * scored) * tokens / more, scored) if more > 0 else scored
    model.requires_grad_(False)
    for parameter in decoder_blocks(model)[0].modules[0].parameters():
        parameter.requires_grad_(True)
    model.enable_input_require_grads()
    trained = _seconds(back, device)
    update = _updating(model, device)
    with _adapted(model, rank) as wrapped:
        model = wrapped
        adapted = _seconds(back, device)
    row = max(many - many_head - few + few_head, 0.0) * blocks + max(many_head - few_head, 0.0)
    row /= MANY - FEW

    def of_token(seconds: float, of_head: float) -> float:
        return max(seconds - positions * of_head, 0.1 * seconds) * blocks / tokens

    return Pace(
        train=of_token(trained, adapt_head),
        adapt=of_token(adapted, adapt_head),
        score=of_token(of_tokens, adapt_head),
        score_row=(scored - of_tokens) * blocks / rows,
        read=of_token(read, read_head),
        train_head=train_head,
        adapt_head=adapt_head,
        read_head=read_head,
        update=update,
        step=max(few - few_head, 0.0) * blocks + few_head - FEW * row,
        row=row,
        order=_ordering(),
    )


def _row(model: Any, tokens: int) -> dict[str, list[int]]:
    most = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(most // 3, most, (tokens,)).tolist()
    return {"input_ids": ids, "labels": [-100] * (tokens - ANSWER) + ids[-ANSWER:]}


def _seconds(work: Callable[[], object], device: torch.device, times: int = 3) -> float:
    """The least of some times, after one that is not counted."""
    best = float("inf")
    for count in range(times + 1):
        _wait(device)
        began = time.perf_counter()
        work()
        _wait(device)
        if count:
            best = min(best, time.perf_counter() - began)
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.no_grad()
def _decoding(model: Any, rows: int, device: torch.device) -> float:
    """Seconds of a token of each of some rows, with a cache."""
    cached = min(CACHED, context_length(model) - 8)
    ids = torch.tensor([_row(model, cached)["input_ids"]] * rows, device=device)
    cache = DynamicCache(config=model.config)
    model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return _seconds(lambda: model(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True), device)


def _updating(model: Any, device: torch.device) -> float:
    """Seconds of AdamW for one weight, with the clipping of its gradient."""
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-6, fused=device.type in ("cpu", "cuda"))
    for weight in weights:
        weight.grad = torch.full_like(weight, 1e-3)

    def step() -> None:
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()

    return _seconds(step, device) / sum(weight.numel() for weight in weights)


@contextlib.contextmanager
def _adapted(model: Any, rank: int) -> Iterator[Any]:
    from peft import LoraConfig, get_peft_model

    targets = sorted({site.module_type for site in Sites(model).values() if site.expert is None})
    model.zero_grad()
    yield get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=rank, target_modules=targets))


def _ordering() -> float:
    numbers = torch.rand(SORTED)
    return _seconds(lambda: numbers.sort(), torch.device("cpu"), 1) / SORTED
