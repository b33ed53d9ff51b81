"""Patching: a model runs with a group's outputs as they are in another state of it, at the same tokens.

Owns the two passes, the one that gives and the one that takes, also while answers are written: the giver's keys and
values lie in the same cache, behind the taker's own. No weight is written, and no second model is needed for an
adapter. Source: activation patching (Vig et al., arXiv 2004.12265; Meng et al., arXiv 2202.05262).
"""

from __future__ import annotations

import contextlib
import copy
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.func import functional_call
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from neurondrift.base.errors import GroupError, ModelError
from neurondrift.behaviour.decoding.cache import is_filled
from neurondrift.groups.group import Group
from neurondrift.interventions.acting.contexts import Applied, check_base
from neurondrift.models.architecture.conventions import close, some_tokens
from neurondrift.models.parts import parts
from neurondrift.models.sites import Site, Sites, sites_of, unwrap

# Where a model keeps what it has read, if it is no cache of transformers.
OTHER_STATES = ("cache_params", "state", "mems", "past_buckets_states")
TOKENS = 6

# Class and configuration -> whether a patched model says the same with a cache as without.
_CACHES: dict[tuple[type, str], bool] = {}


class Place(NamedTuple):
    """Where outputs of a group are seen: positions of the last dimension of what a module gives, or is given."""

    module: nn.Module
    positions: torch.Tensor
    is_input: bool


@contextmanager
def patch(model: nn.Module | Sites, group: Group, *, donor: nn.Module | None = None) -> Iterator[Applied]:
    """Within the context the model runs with the group's outputs as they are in the model from before.

    Parameters
    ----------
    model
        The fine-tuned model, or its `linear_sites`: with an unmerged adapter, or fully fine-tuned with a `donor`.
    group
        Of neurons (rows: the outputs of linear layers), of hidden units (what goes into the down projection), or of the
        weights of whole rows and columns: an attention head is columns of the output projection, whose inputs are
        patched.
    donor
        The loaded model from before; None: the model itself with its adapters switched off.

    Yields
    ------
    Applied

    Raises
    ------
    GroupError
        A group of another model, or of single weights, which have no outputs of their own unless they are whole rows
        and columns.
    ModelError
        No adapter and no donor; a donor of another architecture; experts, whose tokens are others in the other model;
        within the context: a model that keeps what it has read elsewhere than in a cache of keys and values.

    Notes
    -----
    Each forward pass is preceded by one of the donor's on the same tokens, which costs as much again, but for the LM
    head. All that is not in the group is computed as usual, from the patched outputs on. No weight is written. A model
    patched with itself is unchanged, bit for bit.
    """
    with _exchanged(model, group, donor, back=False) as applied:
        yield applied


@contextmanager
def patch_back(model: nn.Module | Sites, group: Group, *, donor: nn.Module | None = None) -> Iterator[Applied]:
    """The reverse: the model from before runs with the group's outputs as they are in the fine-tuned one.

    As `patch`; `model` is the one with the adapter, which is switched off within the context but for the group's
    outputs, or the model from before, and `donor` the fine-tuned one.
    """
    with _exchanged(model, group, donor, back=True) as applied:
        yield applied


def writes_answers(model: nn.Module | Sites, group: Group, *, donor: nn.Module | None = None) -> bool:
    """Whether the patched model can write answers, and is not good for single forward passes alone.

    Parameters and errors are those of `patch`. Asked once for each class and configuration in a process.
    """
    sites = sites_of(model)
    with patch(sites, group, donor=donor):
        return _CACHES[_kind(unwrap(sites.model))]


def _kind(inner: Any) -> tuple[type, str]:
    return type(inner), repr(inner.config.to_dict())


@contextmanager
def _exchanged(model: nn.Module | Sites, group: Group, donor: nn.Module | None, *, back: bool) -> Iterator[Applied]:
    sites = sites_of(model)
    places = places_of(group, sites)
    check_base(group, sites)
    body = body_of(sites.model)
    if any(isinstance(getattr(hook, "__self__", None), _Exchange) for hook in body._forward_pre_hooks.values()):
        raise ModelError("The model is patched already", fix="leave the other patch's context first")
    with contextlib.ExitStack() as undo:
        if donor is None:
            layers = _switches(sites.model)
            if back:
                undo.enter_context(_switched(layers, disabled=True))
            giver: Callable[..., Any] = _Adapters(body, layers, disabled=not back)
        else:
            giver = _Weights(body, donor)
        exchange = _Exchange(unwrap(sites.model), body, places, giver)
        undo.enter_context(exchange.attached())
        yield Applied(len(group), len(group), 0)


def body_of(model: nn.Module) -> Any:
    """The transformer below the LM head, which every forward pass goes through."""
    inner = unwrap(model)
    return getattr(inner, "base_model", inner)


def places_of(group: Group, sites: Sites) -> list[Place]:
    """Where the outputs of a group are seen. Raises the errors of `patch` for groups that have none."""
    places = []
    for name, part in parts(group, sites).items():
        if len(part.entries):
            raise GroupError(
                "Single weights have no outputs that could be patched",
                received=f"{len(part.entries)} weights of {name} that are no whole rows or columns",
                allowed="groups of neurons, of hidden units, or of all weights of some rows and columns",
            )
        # The rows of a unit need no patch: what they make is what goes into its column.
        seen = ((part.rows, False), (part.columns, True)) if group.granularity != "unit" else ((part.columns, True),)
        for where, is_input in seen:
            if len(where):
                positions = torch.from_numpy(where.copy()).to(sites[name].tensor.device)
                places += [Place(module, positions, is_input) for module in _modules_of(sites[name])]
    return places


def _modules_of(site: Site) -> list[nn.Module]:
    """The modules that give a site's outputs, adapter included."""
    if site.expert is not None:
        raise ModelError(
            f"The outputs of {site.name} cannot be patched: an expert is given other tokens in the other model",
            allowed="sites that every token passes through",
        )
    if site.inner:
        raise ModelError(
            f"The outputs of {site.name} cannot be patched: the adapter keeps a copy of a module around it"
        )
    return [site.wrapper, *(other.wrapper for other in site.also)]


def _switches(model: nn.Module) -> list[Any]:
    """The parts of adapters that are switched on. Raises `ModelError` where there are none, or where one is merged."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    layers: list[Any] = [m for m in model.modules() if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper)]
    if merged := next((layer for layer in layers if getattr(layer, "merged", False)), None):
        raise ModelError(
            "The adapter is merged: the model from before is not in the weights any more",
            received=type(merged).__name__,
            fix="call model.unmerge_adapter() or load the adapter unmerged",
        )
    on = [layer for layer in layers if not layer.disable_adapters]
    if not on:
        raise ModelError(
            "There is nothing to patch from: the model has no active adapter",
            received=type(unwrap(model)).__name__,
            fix="load the adapter unmerged, or pass the other model as donor",
        )
    return on


@contextmanager
def _switched(layers: list[Any], *, disabled: bool) -> Iterator[None]:
    """Adapters off or on within the block. The flag alone: PEFT's own switch also sets what requires gradients, layer
    by layer, which would cost as much as the step of a small model."""
    before = [layer._disable_adapters for layer in layers]
    for layer in layers:
        layer._disable_adapters = disabled
    try:
        yield
    finally:
        for layer, flag in zip(layers, before, strict=True):
            layer._disable_adapters = flag


class _Adapters:
    """The giver's pass where it is the same model with its adapters off (or, in the reverse, on)."""

    def __init__(self, body: nn.Module, layers: list[Any], *, disabled: bool) -> None:
        self.body, self.layers, self.disabled = body, layers, disabled

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        with _switched(self.layers, disabled=self.disabled):
            self.body(*args, **kwargs)


class _Weights:
    """The giver's pass with another model's weights in the taker's own modules, so that both compute alike."""

    def __init__(self, body: nn.Module, donor: nn.Module) -> None:
        own, other = dict(body.named_parameters()), dict(body_of(donor).named_parameters())
        if (wrong := [n for n in own if n not in other or own[n].shape != other[n].shape]) or len(own) != len(other):
            raise ModelError(
                "The donor is no other state of this model",
                received=f"{type(unwrap(donor)).__name__}: {', '.join(wrong[:3]) or 'further parameters'}",
                allowed="a model of the same architecture and size, without adapters",
            )
        self.body = body
        self.weights = {n: p.detach().to(device=own[n].device, dtype=own[n].dtype) for n, p in other.items()}

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        functional_call(self.body, self.weights, args, kwargs)


class _Exchange:
    """The hooks of one patch: what the giver's pass leaves at each place, the taker's takes up, call by call."""

    def __init__(self, inner: Any, body: nn.Module, places: list[Place], giver: Callable[..., Any]) -> None:
        self.inner, self.body, self.places, self.giver = inner, body, places, giver
        self.is_giving = False
        self.left: list[deque[torch.Tensor]] = [deque() for _ in places]
        self.own_layers = len(DynamicCache(config=inner.config).layers)
        self.takes_caches = True

    @contextmanager
    def attached(self) -> Iterator[None]:
        with contextlib.ExitStack() as undo:
            undo.callback(self.body.register_forward_pre_hook(self.give, with_kwargs=True, prepend=True).remove)
            undo.callback(self.body.register_forward_hook(self.check).remove)
            for at, place in enumerate(self.places):
                register = (
                    place.module.register_forward_pre_hook if place.is_input else place.module.register_forward_hook
                )
                undo.callback(register(self._hook(at)).remove)
            self.takes_caches = self._known()
            yield

    def _hook(self, at: int) -> Callable[..., Any]:
        place = self.places[at]

        def of_input(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            found = self._at(at, args[0])
            return None if found is None else (found, *args[1:])

        def of_output(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor | None:
            return self._at(at, output)

        return of_input if place.is_input else of_output

    def _at(self, at: int, values: torch.Tensor) -> torch.Tensor | None:
        """Leave the giver's values at a place, or take them up: None where nothing is to change."""
        place, left = self.places[at], self.left[at]
        if not isinstance(values, torch.Tensor):
            raise ModelError(f"The outputs of {type(place.module).__name__} cannot be patched")
        if self.is_giving:
            left.append(values.detach().index_select(-1, place.positions))
            return None
        if not left:
            raise ModelError("A part of the model is computed more often than in the other model: it cannot be patched")
        return values.index_copy(-1, place.positions, left.popleft().to(values.dtype))

    def give(self, body: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the taker's pass: the giver's on the same tokens."""
        if self.is_giving:
            return
        for left in self.left:
            left.clear()
        self.is_giving = True
        try:
            with torch.no_grad():
                self.giver(*map(self._given, args), **{key: self._given(value, key) for key, value in kwargs.items()})
        finally:
            self.is_giving = False

    def check(self, body: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """After it: nothing is left over."""
        if not self.is_giving and any(self.left):
            raise ModelError("A part of the model is computed less often than in the other model: it cannot be patched")

    def _given(self, value: Any, key: str = "") -> Any:
        if key == "use_cache" and value is None:
            return False
        unknown = value is not None and (key in OTHER_STATES or (key == "past_key_values"))
        if unknown and (not isinstance(value, Cache) or not hasattr(value, "layers") or not self.takes_caches):
            raise ModelError(
                "A patched model of this kind cannot write answers: it keeps what it has read in a way of its own",
                received=type(self.inner).__name__,
                fix="patch it for the margin alone (--outcome margin)",
            )
        return self._second(value) if isinstance(value, Cache) else value

    def _second(self, cache: Any) -> Any:
        """The giver's part of a cache: as many layers again, behind the taker's own, so that what is done to the rows
        of the one is done to those of the other."""
        own = self.own_layers
        if not cache.layers:
            cache.layers = [DynamicLayer() for _ in range(own)]
        if len(cache.layers) == own:
            if is_filled(cache):
                raise ModelError(
                    "The cache was begun before the model was patched", fix="begin a new one within the patch"
                )
            cache.layers = [*cache.layers, *copy.deepcopy(cache.layers)]
        assert len(cache.layers) == 2 * own, "a cache of this model, once for each pass"
        second = copy.copy(cache)
        second.layers = cache.layers[own:]
        return second

    @torch.no_grad()
    def _known(self) -> bool:
        """Whether the patched model says the same of a few tokens with a cache as without: asked once a class."""
        key = _kind(self.inner)
        if key not in _CACHES:
            _CACHES[key] = False
            self.takes_caches = True
            ids = some_tokens(self.inner, TOKENS)
            try:
                plain = self.inner(input_ids=ids, use_cache=False).logits[:, -1].float()
                cache = DynamicCache(config=self.inner.config)
                self.inner(input_ids=ids[:, :-1], past_key_values=cache, use_cache=True)
                cached = self.inner(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True).logits[:, -1].float()
                _CACHES[key] = close(cached, plain, self.inner.dtype)
            except (
                RuntimeError,
                TypeError,
                ValueError,
                AttributeError,
                IndexError,
                KeyError,
                AssertionError,
                ModelError,
            ):
                pass
        return _CACHES[key]
