"""Where Δ comes from: what an adapter adds to the weight of a site, whatever PEFT method made it.

LoRA and DoRA are read as their factors, from which `exact` computes without forming Δ; a module that PEFT trains
whole (`modules_to_save`) and every other method give a dense Δ (`effective`). Owns what PEFT's layers look like;
knows nothing of norms and angles. Shapes: O = out, I = in, R = rank of all active adapters together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import nn

from neurondrift.base.errors import ModelError
from neurondrift.models.merged import adapted_change
from neurondrift.models.sites import Site, Sites, gathered, row_blocks, row_norms, rows_at_once, unwrap

# Ways to initialise LoRA that subtract sB₀A₀ from the base weight (or quantise or truncate it), so that the stored
# base is no longer the weight of the original model. PEFT keeps neither the original nor A₀ and B₀.
REBASING = ("pissa", "corda", "olora", "loftq", "lora_ga")

# Methods that leave the weights alone and move something else, or whose effect depends on the input.
NO_WEIGHT_CHANGE = {
    "PROMPT_TUNING": "it adds virtual tokens and changes no weight",
    "MULTITASK_PROMPT_TUNING": "it adds virtual tokens and changes no weight",
    "P_TUNING": "it adds virtual tokens and changes no weight",
    "PREFIX_TUNING": "it adds keys and values to the attention and changes no weight",
    "CPT": "it adds virtual tokens and changes no weight",
    "CARTRIDGE": "it adds keys and values to the attention and changes no weight",
    "ADAPTION_PROMPT": "it adds prompts inside the attention and changes no weight",
    "XLORA": "it mixes adapters anew for every token, so no weight is the effective one",
    "POLY": "it mixes adapters by task, so no weight is the effective one",
    "LILY": "it mixes adapters anew for every token, so no weight is the effective one",
    "SHADOW": "its change depends on the input, so no weight is the effective one",
}

# Variants of LoRA whose layer, asked without the rest of the model, would answer as if there were no adapter.
BY_TOKEN = ("ALoraLinearVariant", "ArrowLinearVariant")


class LowRank(NamedTuple):
    """Δ = B A of a site's active adapters: A `[R, in]` as stored, B `[out, R]` float64 with the scaling."""

    a: torch.Tensor
    b: torch.Tensor


class Adapter(NamedTuple):
    """One LoRA or DoRA adapter of a site: A `[r, in]` as stored, B `[out, r]` float64 with the scaling, DoRA's
    magnitude `[out]` (None for LoRA), and the flat indices of single weights whose change is held at zero
    (`masked_lora`; None for none)."""

    a: torch.Tensor
    b: torch.Tensor
    magnitude: torch.Tensor | None = None
    held: torch.Tensor | None = None


class Rescaled(NamedTuple):
    """Adapters of which at least one is DoRA: row i of the effective weight is, for one adapter,
    mᵢ (w₀ᵢ + δᵢ)/‖w₀ᵢ + δᵢ‖ with δ = B A. Several add up their changes."""

    adapters: tuple[Adapter, ...]


class Stretched(NamedTuple):
    """Rescaled adapters in numbers: Δᵢ = γᵢ w₀ᵢ + bᵢ A.

    `stretch` γ `[out]`, `a` `[R, in]`, `b` `[out, R]` (DoRA's factor included) and
    `projected` w₀Aᵀ `[out, R]`, all float64.
    """

    stretch: torch.Tensor
    a: torch.Tensor
    b: torch.Tensor
    projected: torch.Tensor


class Dense(NamedTuple):
    """Δ itself, float64 `[out, in]`."""

    delta: torch.Tensor


Change = LowRank | Rescaled | Dense


def change_of(site: Site) -> Change | None:
    """What the active adapters change at a site, in the cheapest exact form; None where there is no adapter.

    Every other form of an adapter's change (`low_rank_delta`, `dense_delta`, `effective_weight`) is a view of this one.

    Raises
    ------
    ModelError
        A merged adapter (its rounding has already happened), disabled ones, or a method that cannot be measured
        exactly; it is named.
    """
    layers = _layers(site)
    active = _active(layers)
    if not active:
        return None
    _check_state(site, layers)
    if isinstance(layers[0], _peft().copy):
        trained = active[0].first.get_submodule(site.inner)
        return Dense(site.oriented(gathered(getattr(trained, site.parameter))).double() - site.weight.double())
    adapters = _adapters(site, active)
    return Dense(adapted_change(site)) if adapters is None else _together(adapters)


def low_rank_delta(site: Site) -> LowRank | None:
    """The change of a site as B A; None where the site is not adapted.

    Raises
    ------
    ModelError
        As `change_of`; or a change that has no such form (DoRA, single weights held, every method but LoRA).
    """
    change = change_of(site)
    if change is None or isinstance(change, LowRank):
        return change
    raise ModelError(
        f"The change of {site.name} has no low-rank form", received=_kind(site), allowed="LoRA (also rsLoRA)"
    )


def dense_delta(change: Change, base_OI: torch.Tensor) -> torch.Tensor:
    """Δ of a change, float32 `[out, in]`: formed in float64, block of rows by block."""
    return torch.cat([block.float() for block in _blocks_of(change, base_OI)])


def effective_weight(site: Site) -> torch.Tensor:
    """The weight that a site computes with, adapters included, float64 `[out, in]`: a new tensor.

    A merged adapter is in the stored weight already.
    """
    weight_OI = site.weight
    merged = any(getattr(layer, "merged", False) for layer in _layers(site))
    change = None if merged else change_of(site)
    if change is None:
        return weight_OI.to(torch.float64, copy=True)
    pairs = zip(row_blocks(weight_OI), _blocks_of(change, weight_OI), strict=True)
    return torch.cat([base.double() + delta for base, delta in pairs])


def _blocks_of(change: Change, base_OI: torch.Tensor) -> Iterator[torch.Tensor]:
    """Δ in float64, block of rows by block."""
    rows = rows_at_once(base_OI)
    if isinstance(change, Dense):
        yield from change.delta.split(rows)
    elif isinstance(change, LowRank):
        a64_RI = change.a.double()
        yield from (block @ a64_RI for block in change.b.double().split(rows))
    else:
        form = stretch(change, base_OI, row_norms(base_OI))
        for base, b, gamma in zip(base_OI.split(rows), form.b.split(rows), form.stretch.split(rows), strict=True):
            yield gamma[:, None] * base.double() + b @ form.a


def is_trained(site: Site) -> bool:
    """Whether an adapter that is active, be it switched on at the moment or not, changes a site's weight."""
    return bool(_active(_layers(site)))


def adapted_elsewhere(sites: Sites) -> list[str]:
    """The modules with an active adapter that are no sites, by the names of the model without PEFT."""
    peft = _peft()
    wrappers = {id(site.wrapper): site.wrapper for site in sites.values()}
    known = {id(module) for wrapper in wrappers.values() for module in wrapper.modules()}
    names: list[str] = []
    for name, module in unwrap(sites.model).named_modules(remove_duplicate=False):
        wraps = isinstance(module, peft.layer | peft.copy) and id(module) not in known
        if wraps and _active([module]) and not any(name.startswith(f"{outer}.") for outer in names):
            names.append(name)
    return names


def check_methods(model: nn.Module, *, initial_given: bool) -> None:
    """Raises `ModelError` for active adapters whose drift no weight shows, and for any that changed the base weight
    when it was made (active or not: the change stays), unless the initial weights are given."""
    configs: Any = getattr(model, "peft_config", None)
    if not isinstance(configs, dict):
        return
    active: Any = getattr(model, "active_adapters", None) or list(configs)
    if callable(active):  # a transformers model that adapters were put into, without a PeftModel around it
        active = active() if getattr(model, "_hf_peft_config_loaded", False) else list(configs)
    for name, config in configs.items():
        method = getattr(getattr(config, "peft_type", None), "value", str(getattr(config, "peft_type", "")))
        no_weight = method in NO_WEIGHT_CHANGE or getattr(config, "is_prompt_learning", False)
        if no_weight and name in ([active] if isinstance(active, str) else active):
            reason = NO_WEIGHT_CHANGE.get(method, "it changes no weight")
            raise ModelError(
                f"The drift of the adapter {name} cannot be measured: {reason}",
                received=method,
                allowed="methods that change weights, such as LORA, ADALORA, LOHA, LOKR, IA3, OFT, BOFT, VERA, HRA",
            )
        rebased = _rebased_by(config)
        if rebased and not initial_given:
            raise ModelError(
                f"The adapter {name} changed the base weights when it was made, so they are not the original model's",
                received=f"init_lora_weights={rebased!r}",
                fix="pass the original weights: initial=CheckpointWeights(folder of the original model, sites)",
            )


def _rebased_by(config: Any) -> str | None:
    way = getattr(config, "init_lora_weights", None)
    if isinstance(way, str) and way.lower().startswith(REBASING):
        return way
    return "kasa" if getattr(config, "kasa_config", None) is not None else None


class _Peft(NamedTuple):
    """PEFT's classes of layers: any adapter's, LoRA's, that of a targeted parameter, and a module's trained copy."""

    layer: type[Any]
    lora: type[Any]
    parameter: type[Any]
    copy: type[Any]


@cache
def _peft() -> _Peft:
    """Importing PEFT takes seconds, and asking for it anew at every site as long as reading the site's factors."""
    from peft.tuners.lora.layer import LoraLayer, ParamWrapper
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import ModulesToSaveWrapper

    return _Peft(BaseTunerLayer, LoraLayer, ParamWrapper, ModulesToSaveWrapper)


def _layers(site: Site) -> list[Any]:
    """PEFT's layers around a site's parameter, outermost first (several, where parameters are targeted); the wrapper
    alone where PEFT trains a copy of the module."""
    peft = _peft()
    layer: Any = site.wrapper
    if isinstance(layer, peft.copy):
        return [layer]
    layers = []
    while isinstance(layer, peft.layer):
        target = layer.parameter_name if isinstance(layer, peft.parameter) else "weight"
        if target == site.parameter:
            layers.append(layer)
        layer = layer.base_layer
    return layers


class _Active(NamedTuple):
    """An active adapter (enabled or not) in one of PEFT's layers, and the first thing that the layer keeps of it: A of
    LoRA, the copy of a module that is trained whole."""

    layer: Any
    name: str
    first: Any


def _active(layers: Sequence[Any]) -> list[_Active]:
    active = []
    for layer in layers:
        for name in layer.active_adapters:
            for key in layer.adapter_layer_names:
                kept = getattr(layer, key)
                if isinstance(kept, nn.ModuleDict | nn.ParameterDict) and name in kept:
                    active.append(_Active(layer, name, kept[name]))
                    break
    return active


def _check_state(site: Site, layers: Sequence[Any]) -> None:
    for layer in layers:
        if getattr(layer, "merged", False):
            raise ModelError(
                f"The adapter is merged into {site.name}: its rounding has already changed the drift",
                fix="call model.unmerge_adapter() or load the adapter unmerged",
            )
        if layer.disable_adapters:
            raise ModelError(
                f"The adapters of {site.name} are disabled: the model computes with its base weights",
                fix="enable them (model.enable_adapter_layers()) before measuring",
            )


def _kind(site: Site) -> str:
    layer = next(iter(_layers(site)), site.wrapper)
    variant = next(iter(getattr(layer, "lora_variant", {}).values()), None)
    return type(layer).__name__ if variant is None else f"{type(layer).__name__} with {type(variant).__name__}"


def _adapters(site: Site, active: Sequence[_Active]) -> list[Adapter] | None:
    """The active LoRA and DoRA adapters of a site, or None where another method acts on it."""
    peft = _peft()
    adapters = []
    for layer, name, factor_a in active:
        if not isinstance(layer, peft.lora):
            return None
        variant = layer.lora_variant.get(name)
        kind = None if variant is None else type(variant).__name__
        if kind in BY_TOKEN:
            raise ModelError(
                f"The drift of {site.name} cannot be measured: its adapter does not act on every token alike",
                received=kind,
                allowed="adapters whose effect is one change of the weight, the same for every input",
            )
        if kind not in (None, "DoraLinearVariant", "MaskedDelta") or not isinstance(factor_a, nn.Linear):
            return None
        a_RI, b_OR = gathered(factor_a.weight), gathered(layer.lora_B[name].weight)
        if isinstance(layer, peft.parameter):
            a_RI, b_OR = _of_parameter(site, layer, a_RI, b_OR)
        magnitude_O = None
        if kind == "DoraLinearVariant":
            magnitude_O = gathered(layer.lora_magnitude_vector[name].weight).double().flatten().to(a_RI.device)
        scaled_OR = b_OR.to(torch.float64, copy=True).mul_(layer.scaling[name])
        adapters.append(Adapter(a_RI, scaled_OR, magnitude_O, getattr(variant, "held", None)))
    # DoRA's length is that of all weights: beside an adapter that holds some still, PEFT's own layer is asked.
    if (
        len(adapters) > 1
        and any(a.held is not None for a in adapters)
        and any(a.magnitude is not None for a in adapters)
    ):
        return None
    return adapters


def _together(adapters: Sequence[Adapter]) -> Change:
    """The change of several adapters of a site, which add up."""
    if len(adapters) == 1 and adapters[0].magnitude is None and adapters[0].held is None:
        return LowRank(adapters[0].a, adapters[0].b)
    if any(one.held is not None for one in adapters):
        return Dense(torch.stack([_masked(one) for one in adapters]).sum(dim=0))
    if any(one.magnitude is not None for one in adapters):
        return Rescaled(tuple(adapters))
    return LowRank(torch.cat([one.a for one in adapters]), torch.cat([one.b for one in adapters], dim=1))


def _masked(adapter: Adapter) -> torch.Tensor:
    from neurondrift.models.masked_lora import masked_product

    return masked_product(adapter.a.double(), adapter.b, 1.0, adapter.held)


def _of_parameter(site: Site, layer: Any, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B of a site within PEFT's `ParamWrapper`, which holds the factors of all experts of a parameter.

    A is `[experts·r, in]` with an expert's rows together; B is `[out, r·experts]` with an expert's columns
    `experts` apart (`ParamWrapper.get_delta_weight`).
    """
    if site.expert is not None:
        experts, rank = layer.num_experts, a.shape[0] // layer.num_experts
        return a[site.expert * rank : (site.expert + 1) * rank], b[:, site.expert :: experts]
    if site.transposed:  # a 2-D parameter is taken as it is stored: [in, out] here
        return b.T, a.T
    return a, b


def stretch(change: Rescaled, base_OI: torch.Tensor, norm_O: torch.Tensor) -> Stretched:
    """DoRA's rescaling as Δᵢ = γᵢ w₀ᵢ + bᵢ A.

    An adapter's factor is c = m/‖w₀ + δ‖ with ‖w₀ + δ‖² = ‖w₀‖² + 2 w₀·δ + ‖δ‖²; γ = Σ (c - 1), taken as
    (m - ‖w₀ + δ‖)/‖w₀ + δ‖, all in float64, since c is within 1e-7 of 1 where little has moved.
    """
    a_RI = torch.cat([one.a for one in change.adapters]).double()
    projected_OR = torch.cat([block.double() @ a_RI.T for block in row_blocks(base_OI)])
    gamma_O = torch.zeros_like(norm_O)
    factors, start = [], 0
    for one in change.adapters:
        stop = start + one.a.shape[0]
        b = one.b
        if one.magnitude is not None:
            a = a_RI[start:stop]
            dot_O = (projected_OR[:, start:stop] * b).sum(dim=1)
            squared_O = ((b @ (a @ a.T)) * b).sum(dim=1)
            length_O = (norm_O.square() + 2 * dot_O + squared_O).clamp(min=0).sqrt()
            gamma_O = gamma_O + (one.magnitude - length_O) / length_O
            b = b * (one.magnitude / length_O)[:, None]
        factors.append(b)
        start = stop
    return Stretched(gamma_O, a_RI, torch.cat(factors, dim=1), projected_OR)
