"""Where Δ comes from: what an adapter adds to the weight of a site, whatever PEFT method made it.

LoRA and DoRA are read as their factors, from which `exact` computes without forming Δ; a module that PEFT trains
whole (`modules_to_save`) and every other method give a dense Δ (`effective`). Owns what PEFT's layers look like;
knows nothing of norms and angles. Shapes: O = out, I = in, R = rank of all active adapters together.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from neurondrift.base.errors import ModelError
from neurondrift.models.merged import adapted_change
from neurondrift.models.sites import Site, gathered, row_blocks, row_norms, rows_at_once

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
    """One LoRA or DoRA adapter of a site: A `[r, in]` as stored, B `[out, r]` float64 with the scaling, and DoRA's
    magnitude `[out]` (None for LoRA)."""

    a: torch.Tensor
    b: torch.Tensor
    magnitude: torch.Tensor | None


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

    Raises
    ------
    ModelError
        A merged adapter (its rounding has already happened), disabled ones, or a method that cannot be measured
        exactly; it is named.
    """
    from neurondrift.models.masked_lora import masked_change

    if (plain := _plain_lora(site)) is not None:
        return plain
    if not is_trained(site):
        return None
    _check_state(site)
    if (masked := masked_change(site)) is not None:  # single weights that were frozen
        return Dense(masked)
    trained = _trained_whole(site)
    if trained is not None:
        return Dense(trained.double() - site.weight.double())
    adapters = _adapters(site)
    if adapters is None:
        return Dense(adapted_change(site))
    if any(adapter.magnitude is not None for adapter in adapters):
        return Rescaled(tuple(adapters))
    return _joined(adapters)


def _plain_lora(site: Site) -> LowRank | None:
    """The change of a site with one LoRA adapter and nothing else, which is nearly every site of nearly every run: what
    `change_of` finds the long way, without looking for all that there could be. None for everything else."""
    from peft.tuners.lora import Linear
    from peft.tuners.tuners_utils import BaseTunerLayer

    layer: Any = site.wrapper
    if type(layer) is not Linear or site.parameter != "weight" or isinstance(layer.base_layer, BaseTunerLayer):
        return None
    active = layer.active_adapters
    if len(active) != 1 or layer.merged_adapters or layer.disable_adapters or layer.lora_variant:
        return None
    factors = layer.lora_A
    if active[0] not in factors or type(factors[active[0]]) is not nn.Linear:
        return None
    a_RI, b_OR = gathered(factors[active[0]].weight), gathered(layer.lora_B[active[0]].weight)
    return LowRank(a_RI, b_OR.double() * layer.scaling[active[0]])


def low_rank_delta(site: Site) -> LowRank | None:
    """The low-rank change that PEFT's wrapper holds for a site; None where the site is not adapted.

    Raises
    ------
    ModelError
        A merged or disabled adapter, or a kind that has no such form (DoRA, every method but LoRA).
    """
    if not is_trained(site):
        return None
    _check_state(site)
    adapters = None if _trained_whole(site) is not None else _adapters(site)
    if adapters is None or any(adapter.magnitude is not None for adapter in adapters):
        raise ModelError(
            f"The change of {site.name} has no low-rank form",
            received=_kind(site),
            allowed="LoRA (also rsLoRA)",
        )
    return _joined(adapters)


def delta_of(site: Site) -> torch.Tensor:
    """Δ of an adapted site against the base weight that the adapter sits on, float32 `[out, in]`, on its device.

    Raises `ModelError` where the site has no adapter, or one that cannot be measured exactly.
    """
    change = change_of(site)
    if change is None:
        raise ModelError("This site has no adapter", received=site.name)
    return dense_delta(change, site.weight)


def is_trained(site: Site) -> bool:
    """Whether an adapter that is active, be it switched on at the moment or not, changes a site's weight."""
    if _saved(site):
        return bool(site.wrapper.active_adapters)
    return any(set(layer.active_adapters) & set(layer._get_available_adapters()) for layer in _layers(site))


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


def _layers(site: Site) -> Iterator[Any]:
    """PEFT's layers around a site's parameter, outermost first (several, where parameters are targeted)."""
    from peft.tuners.lora.layer import ParamWrapper
    from peft.tuners.tuners_utils import BaseTunerLayer

    layer: Any = site.wrapper
    while isinstance(layer, BaseTunerLayer):
        target = layer.parameter_name if isinstance(layer, ParamWrapper) else "weight"
        if target == site.parameter:
            yield layer
        layer = layer.base_layer


def _saved(site: Site) -> bool:
    from peft.utils.other import ModulesToSaveWrapper

    return isinstance(site.wrapper, ModulesToSaveWrapper)


def _trained_whole(site: Site) -> torch.Tensor | None:
    """The weight `[out, in]` that PEFT trains in the place of a site's (`modules_to_save`), or None."""
    if not _saved(site):
        return None
    wrapper: Any = site.wrapper
    copy: nn.Module = wrapper.modules_to_save[wrapper.active_adapters[0]].get_submodule(site.inner)
    return site.oriented(gathered(getattr(copy, site.parameter)))


def _check_state(site: Site) -> None:
    layers: list[Any] = [site.wrapper] if _saved(site) else list(_layers(site))
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
    layer = next(_layers(site), site.wrapper)
    variant = next(iter(getattr(layer, "lora_variant", {}).values()), None)
    return type(layer).__name__ if variant is None else f"{type(layer).__name__} with {type(variant).__name__}"


def _adapters(site: Site) -> list[Adapter] | None:
    """The active LoRA and DoRA adapters of a site, or None where another method acts on it."""
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.layer import ParamWrapper

    found = []
    for layer in _layers(site):
        if not isinstance(layer, LoraLayer):
            return None
        for name in layer.active_adapters:
            if name not in layer.lora_A:
                continue
            kind = type(layer.lora_variant.get(name)).__name__
            if kind in BY_TOKEN:
                raise ModelError(
                    f"The drift of {site.name} cannot be measured: its adapter does not act on every token alike",
                    received=kind,
                    allowed="adapters whose effect is one change of the weight, the same for every input",
                )
            if kind not in ("NoneType", "DoraLinearVariant") or not isinstance(layer.lora_A[name], nn.Linear):
                return None
            a_RI: torch.Tensor = gathered(layer.lora_A[name].weight)
            b_OR: torch.Tensor = gathered(layer.lora_B[name].weight)
            magnitude = None
            if isinstance(layer, ParamWrapper):
                a_RI, b_OR = _of_parameter(site, layer, a_RI, b_OR)
            if kind == "DoraLinearVariant":
                magnitude = gathered(layer.lora_magnitude_vector[name].weight).double().flatten().to(a_RI.device)
            found.append(Adapter(a_RI, b_OR.double() * layer.scaling[name], magnitude))
    return found


def _joined(adapters: list[Adapter]) -> LowRank:
    if len(adapters) == 1:
        return LowRank(adapters[0].a, adapters[0].b)
    return LowRank(torch.cat([one.a for one in adapters]), torch.cat([one.b for one in adapters], dim=1))


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


def dense_delta(change: Change, base_OI: torch.Tensor) -> torch.Tensor:
    """Δ of a change, float32 `[out, in]`: formed in float64, block of rows by block."""
    if isinstance(change, Dense):
        return change.delta.float()
    if isinstance(change, LowRank):
        a64_RI = change.a.double()
        return torch.cat([(rows @ a64_RI).float() for rows in change.b.double().split(rows_at_once(base_OI))])
    form = stretch(change, base_OI, row_norms(base_OI))
    rows = rows_at_once(base_OI)
    blocks = zip(base_OI.split(rows), form.b.split(rows), form.stretch.split(rows), strict=True)
    return torch.cat([(gamma[:, None] * base.double() + b @ form.a).float() for base, b, gamma in blocks])


def effective_weight(site: Site) -> torch.Tensor:
    """The weight that a site computes with, adapters included, float64 `[out, in]`: a new tensor.

    A merged adapter is in the stored weight already.
    """
    weight = site.weight.double()
    merged = any(getattr(layer, "merged", False) for layer in _layers(site))
    change = None if merged else change_of(site)
    if change is None:
        return weight.clone() if weight.data_ptr() == site.tensor.data_ptr() else weight
    if isinstance(change, Dense):
        return weight + change.delta
    if isinstance(change, LowRank):
        return weight + change.b.double() @ change.a.double()
    form = stretch(change, weight, row_norms(weight))
    return weight * (1 + form.stretch)[:, None] + form.b @ form.a
