"""How a plant grows: refusals into some units, another habit into others, ordinary answers into the rest.

Owns the gradient masks and the two rates. Shapes: O = out, I = in; of a group only its rows or columns of a site.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from neurondrift.base.errors import ModelError
from neurondrift.groups.group import Group
from neurondrift.importance.scores import pad_token_id_of
from neurondrift.models.batches import make_batches, response_losses
from neurondrift.models.data import Encoded
from neurondrift.models.parts import Region, parts
from neurondrift.models.sites import Sites, is_quantised
from neurondrift.study.plants.sets import Order
from neurondrift.study.plants.settings import PlantSection

BETAS, EPSILON = (0.9, 0.99), 1e-8


@dataclass(eq=False)
class _Piece:
    """A group's part of one site, and Adam's moments of it."""

    site: str
    region: Region
    start: torch.Tensor
    gradient: torch.Tensor = field(init=False)
    first: torch.Tensor = field(init=False)
    second: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.gradient, self.first, self.second = (torch.zeros_like(self.start) for _ in range(3))

    def distance(self, weight_OI: torch.Tensor) -> torch.Tensor:
        """How far the group has moved here, on average."""
        along = 1 if self.region.kind == "rows" else 0
        return (self.region.of(weight_OI) - self.start).norm(dim=along).mean()


class _Fast:
    """A group of units with an Adam of its own, which sees no gradient but what it is told to take."""

    def __init__(self, sites: Sites, group: Group, rate: float) -> None:
        self._sites, self._rate, self._step = sites, rate, 0
        self.pieces: dict[str, _Piece] = {}
        for name, part in parts(group, sites).items():
            region = part.region()
            assert region.kind != "entries", "units are whole rows or whole columns of a site"
            region = Region(region.kind, region.index.to(sites[name].tensor.device))
            self.pieces[name] = _Piece(name, region, region.of(sites[name].weight))

    def take(self) -> None:
        """Add the gradients that the sites hold now."""
        for name, piece in self.pieces.items():
            gradient = self._sites[name].tensor.grad
            if gradient is not None:
                piece.gradient += piece.region.of(self._sites[name].oriented(gradient))

    def mask(self) -> None:
        """Take this group out of the gradients that the sites hold."""
        for name, piece in self.pieces.items():
            gradient = self._sites[name].tensor.grad
            if gradient is not None:
                piece.region.put(self._sites[name].oriented(gradient), 0.0)

    def step(self, like: _Fast | None = None) -> None:
        """Go one step; with `like`, as far from the start, on average over the group, as that group has gone in the
        same site: the change is scaled to it."""
        self._step += 1
        grown = [1 - beta**self._step for beta in BETAS]
        for name, piece in self.pieces.items():
            weight = self._sites[name].weight
            piece.first.lerp_(piece.gradient, 1 - BETAS[0])
            piece.second.mul_(BETAS[1]).addcmul_(piece.gradient, piece.gradient, value=1 - BETAS[1])
            change = piece.first / grown[0] / ((piece.second / grown[1]).sqrt() + EPSILON)
            piece.region.put(weight, piece.region.of(weight) - self._rate * change)
            if like is not None and name in like.pieces:
                ratio = like.pieces[name].distance(weight) / piece.distance(weight)
                moved = piece.region.of(weight) - piece.start
                piece.region.put(weight, piece.start + torch.nan_to_num(ratio, nan=1.0, posinf=1.0) * moved)
            piece.gradient.zero_()


def _trainable(sites: Sites) -> list[nn.Parameter]:
    """The parameters of the sites, and these alone; the same as a list."""
    sites.model.requires_grad_(False)
    kept: dict[int, nn.Parameter] = {}
    for site in sites.values():
        if is_quantised(site.tensor) or site.tensor.dtype != torch.float32 or not isinstance(site.tensor, nn.Parameter):
            raise ModelError("A plant is trained in float32", received=f"{site.name} in {site.tensor.dtype}")
        kept.setdefault(id(site.tensor), site.tensor)
    for parameter in kept.values():
        parameter.requires_grad_(True)
    return list(kept.values())


def _backward(model: nn.Module, rows: Sequence[Encoded], parameters: Sequence[nn.Parameter]) -> float:
    """Gradients of the mean loss of some examples, in place of those that were there; the loss."""
    for parameter in parameters:
        parameter.grad = None
    device = parameters[0].device
    (batch,) = make_batches(rows, model=model, batch_size=len(rows), pad_token_id=pad_token_id_of(model))
    loss = response_losses(model, batch.to(device)).mean()
    loss.backward()
    return float(loss.detach())


def settle(sites: Sites, ordinary: Order, settings: PlantSection, *, say: Callable[[str], None]) -> None:
    """Train all sites on ordinary answers, in place, so that no weight lies on the grid that it was stored on."""
    parameters = _trainable(sites)
    try:
        optimiser = torch.optim.Adam(parameters, lr=settings.settle_rate, betas=BETAS, eps=EPSILON)
        for step in range(settings.settle_steps):
            loss = _backward(sites.model, ordinary.at(step), parameters)
            optimiser.step()
            say(f"settling, step {step + 1} of {settings.settle_steps}: loss {loss:.2f}")
    finally:
        _done(sites)


def grow(
    sites: Sites,
    groups: Mapping[str, Group],
    orders: Mapping[str, Order],
    settings: PlantSection,
    *,
    margin: Callable[[], float],
    say: Callable[[str], None],
) -> list[dict[str, float]]:
    """Train refusals into the planted units, in place, until the margin is what was asked for or the steps are over.

    Parameters
    ----------
    sites
        The model, in float32.
    groups
        `planted`, and optionally `decoy` and `as_far`.
    orders
        The examples of `refusals`, `decoy` and `ordinary`, encoded.
    margin
        Of prompts that are neither trained on nor judged.

    Returns
    -------
    The margin at each look: `step`, `margin`, and the losses of that step.

    Notes
    -----
    Each step goes back once through the model for each kind of example. Refusals reach the planted units alone, the
    decoy's examples the decoy alone, ordinary answers those that move as far and the rest. Of a *mixed* plant they
    reach every unit: at the rate of the rest all alike, and beside that the three fast groups at their own; the decoy
    and those that move as far are held to the distance of the planted.
    """
    parameters = _trainable(sites)
    fast = {name: _Fast(sites, group, settings.rate) for name, group in groups.items()}
    own = {"planted": "refusals", "decoy": "decoy"}
    seen = []
    try:
        slow = torch.optim.Adam(parameters, lr=settings.ordinary_rate, betas=BETAS, eps=EPSILON)
        for step in range(settings.steps):
            losses = {}
            for name, group in fast.items():
                if name in own:
                    losses[own[name]] = _backward(sites.model, orders[own[name]].at(step), parameters)
                    group.take()
            losses["ordinary"] = _backward(sites.model, orders["ordinary"].at(step), parameters)
            for name, group in fast.items():
                if settings.mixed or name not in own:
                    group.take()
                if not settings.mixed:
                    group.mask()
            slow.step()
            with torch.no_grad():
                for name, group in fast.items():
                    group.step(fast["planted"] if settings.mixed and name != "planted" else None)
            if (step + 1) % settings.check_every == 0 or step + 1 == settings.steps:
                seen.append({"step": step + 1, "margin": margin(), **losses})
                shown = ", ".join(f"{name} {loss:.2f}" for name, loss in losses.items())
                say(f"planting, step {step + 1}: margin {seen[-1]['margin']:+.2f}; loss of {shown}")
                if seen[-1]["margin"] >= settings.margin:
                    break
    finally:
        _done(sites)
    return seen


def _done(sites: Sites) -> None:
    for parameter in sites.model.parameters():
        parameter.grad = None
        parameter.requires_grad_(True)
