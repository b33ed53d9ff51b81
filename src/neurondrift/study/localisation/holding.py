"""Holding as a reversible context on a loaded model: units that say the same whatever they are given, their mean.

Owns the means of inputs over examples, and the hooks that put them in the place of what is computed. No weight is
written. Knows nothing of prompts and of files. Shapes: T = tokens, O = out, I = in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from neurondrift.base.errors import GroupError, ModelError
from neurondrift.groups.group import Group
from neurondrift.importance.capture import run
from neurondrift.importance.methods import Tokens
from neurondrift.importance.scores import pad_token_id_of
from neurondrift.interventions.acting.contexts import Applied
from neurondrift.models.batches import make_batches
from neurondrift.models.parts import Part, parts
from neurondrift.models.sites import Site, Sites, sites_of

Hook = Callable[..., Any]


def mean_inputs(
    model: nn.Module | Sites, encoded: Sequence[Mapping[str, Any]], *, batch_size: int = 8
) -> dict[str, torch.Tensor]:
    """The mean of every site's inputs over the response tokens of examples: site -> float32 `[in]`, with the site.

    Raises `DataError` and `ModelError` as `score` does.
    """
    sites = sites_of(model)
    sums = {name: torch.zeros(site.shape[1], device=site.tensor.device) for name, site in sites.items()}
    counts = dict.fromkeys(sites, 0)

    def record(site: Site, tokens: Tokens) -> None:
        assert tokens.inputs is not None and tokens.is_response is not None
        chosen = tokens.inputs[tokens.is_response]
        sums[site.name] += chosen.float().sum(dim=0)
        counts[site.name] += len(chosen)

    batches = make_batches(encoded, model=sites.model, batch_size=batch_size, pad_token_id=pad_token_id_of(sites.model))
    run(sites.model, sites, batches, record, backward=False)
    return {name: total / max(1, counts[name]) for name, total in sums.items()}


@contextmanager
def hold(model: nn.Module | Sites, group: Group, means: Mapping[str, torch.Tensor]) -> Iterator[Applied]:
    """Within the context the group's units give their mean, whatever the model is given.

    Parameters
    ----------
    model
        Any model, or its `linear_sites`.
    group
        Of neurons (what the row gives, `w · mean x + b`), or of units with a column (a hidden unit: what the column of
        the down projection is given).
    means
        Site -> the mean of its inputs `[in]`, such as `mean_inputs` gives.

    Yields
    ------
    Applied

    Raises
    ------
    GroupError
        A group of single weights, which give nothing by themselves.
    ModelError
        An expert, or a site whose mean is not given.
    """
    if group.granularity == "weight":
        raise GroupError("Single weights cannot be held at a mean", fix="name whole rows or hidden units")
    sites = sites_of(model)
    with ExitStack() as undo, torch.no_grad():
        for name, part in parts(group, sites).items():
            site = sites[name]
            if site.expert is not None or name not in means:
                raise ModelError("What this site gives cannot be held at a mean", received=name)
            if len(part.columns):
                undo.callback(site.wrapper.register_forward_pre_hook(_given(part, means[name])).remove)
            elif group.granularity == "neuron":
                undo.callback(site.wrapper.register_forward_hook(_giving(site, part, means[name])).remove)
        yield Applied(len(group), len(group), 0)


def _giving(site: Site, part: Part, mean_I: torch.Tensor) -> Hook:
    """A hook after which the rows give their means."""
    rows = torch.from_numpy(part.rows).to(site.tensor.device)
    values = site.weight[rows].float() @ mean_I.to(site.tensor.device)
    if site.bias is not None:
        values = values + site.bias[rows].float()

    def hook(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        return output.index_copy(-1, rows, values.to(output).expand(*output.shape[:-1], -1))

    return hook


def _given(part: Part, mean_I: torch.Tensor) -> Hook:
    """A hook before which the columns are given their means."""
    columns = torch.from_numpy(part.columns)
    values = mean_I[columns.to(mean_I.device)]

    def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        index = columns.to(args[0].device)
        held = args[0].index_copy(-1, index, values.to(args[0]).expand(*args[0].shape[:-1], -1))
        return (held, *args[1:])

    return hook
