"""LoRA with single weights held still: W₀ + M ∘ (s B A) at a site, M zero at the held weights; and the file of M.

Owns the forward and backward pass of such an adapter, and the file beside a saved adapter that says which weights are
held (the factors cannot say it). Knows PEFT; knows nothing of trainers. Shapes: T = tokens, O = out, I = in, R = rank.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import LoraVariant, ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn

from neurondrift.base.errors import FreezeError
from neurondrift.base.files import atomic_path
from neurondrift.groups.group import Group, load_group
from neurondrift.models.sites import Site, Sites

FILE = "frozen_group.parquet"

View = Callable[[torch.Tensor], torch.Tensor]


class Factors(NamedTuple):
    """The trained factors of one adapter at one site, with the view of each (or of its gradient) that is the site's.

    For an expert the parameters hold the factors of all experts; the views pick this one's, A `[R, in]`, B `[out, R]`.
    """

    adapter: str
    layer: Any
    a: nn.Parameter
    b: nn.Parameter
    view_a: View
    view_b: View

    def held(self) -> torch.Tensor | None:
        """Flat indices of the weights that the adapter's mask holds; None without a mask."""
        variant = self.layer.lora_variant.get(self.adapter)
        return variant.held if isinstance(variant, MaskedDelta) else None

    @torch.no_grad()
    def delta(self) -> torch.Tensor:
        """The change of the effective weight, `[out, in]` in the factors' dtype (float32 at least), mask included."""
        return masked_product(self.view_a(self.a), self.view_b(self.b), self.layer.scaling[self.adapter], self.held())


def lora_factors(site: Site) -> list[Factors]:
    """The factors of a site's active LoRA adapters; none where the site is not adapted.

    Raises `FreezeError` for adapters whose effective weight is not W₀ + s B A: DoRA, other variants, other methods.
    """
    layer: Any = site.wrapper
    if isinstance(layer, ModulesToSaveWrapper):
        raise FreezeError(
            f"{site.name} is trained as a copy (modules_to_save), in which weights cannot be held",
            allowed="LoRA, rsLoRA, full fine-tuning",
        )
    if not isinstance(layer, BaseTunerLayer):
        return []
    if not isinstance(layer, LoraLayer):
        raise FreezeError(
            f"{site.name} has an adapter in which weights cannot be held exactly",
            received=type(layer).__name__,
            allowed="LoRA, rsLoRA, full fine-tuning",
        )
    while isinstance(layer, ParamWrapper) and layer.parameter_name != site.parameter:
        layer = layer.base_layer
    if not isinstance(layer, LoraLayer):
        return []
    if layer.merged or layer.disable_adapters:
        raise FreezeError(
            f"The adapter of {site.name} is merged or disabled, so it cannot be held",
            fix="call model.unmerge_adapter() or model.base_model.enable_adapter_layers()",
        )
    factors = []
    for adapter in layer.active_adapters:
        if adapter not in layer.lora_A:
            continue
        variant = layer.lora_variant.get(adapter)
        if variant is not None and not isinstance(variant, MaskedDelta):
            raise FreezeError(
                f"{site.name} has an adapter in which weights cannot be held exactly",
                received=type(variant).__name__,
                allowed="LoRA, rsLoRA, full fine-tuning",
            )
        split = None if site.expert is None else (int(layer.num_experts), site.expert)
        factors.append(
            Factors(
                adapter=adapter,
                layer=layer,
                a=layer.lora_A[adapter].weight,
                b=layer.lora_B[adapter].weight,
                view_a=partial(_expert_a, *split) if split else _whole,
                view_b=partial(_expert_b, *split) if split else _whole,
            )
        )
    return factors


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _expert_a(experts: int, expert: int, tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(experts, -1, tensor.shape[-1])[expert]


def _expert_b(experts: int, expert: int, tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(tensor.shape[0], -1, experts)[:, :, expert]


def masked_product(a_RI: torch.Tensor, b_OR: torch.Tensor, scaling: float, held: torch.Tensor | None) -> torch.Tensor:
    """M ∘ (s B A), in float32 or better whatever autocast says."""
    with torch.autocast(a_RI.device.type, enabled=False):
        wide = torch.promote_types(a_RI.dtype, torch.float32)
        delta_OI = (b_OR.to(wide) * scaling) @ a_RI.to(wide)
        if held is not None:
            delta_OI.view(-1).index_fill_(0, held.to(delta_OI.device), 0)
        return delta_OI


class _MaskedLinear(torch.autograd.Function):
    """x ↦ x (M ∘ (s B A))ᵀ. The dense Δ of a site lives within its own forward and backward step only: kept for the
    backward pass, those of all sites would need the memory of the model again."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, a_RI: torch.Tensor, b_OR: torch.Tensor, scaling: float, held: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(x, a_RI, b_OR, held)
        ctx.scaling = scaling
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x, masked_product(a_RI, b_OR, scaling, held).to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, a_RI, b_OR, held = ctx.saved_tensors
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            y = gradients[0].to(x.dtype)
            for_x = for_a = for_b = None
            if ctx.needs_input_grad[0]:
                for_x = y @ masked_product(a_RI, b_OR, ctx.scaling, held).to(x.dtype)
            if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
                wide = torch.promote_types(a_RI.dtype, torch.float32)
                dense_OI = (y.reshape(-1, y.shape[-1]).T @ x.reshape(-1, x.shape[-1])).to(wide)
                dense_OI.view(-1).index_fill_(0, held, 0).mul_(ctx.scaling)
                for_a = (b_OR.to(wide).T @ dense_OI).to(a_RI.dtype)
                for_b = (dense_OI @ a_RI.to(wide).T).to(b_OR.dtype)
        return for_x, for_a, for_b, None, None


class MaskedDelta(LoraVariant):
    """PEFT's own way to change what an adapter does at a layer, used for a mask on its dense change.

    Attributes
    ----------
    held
        Sorted flat indices `row * in + col`, int64, of the weights that are held.
    """

    def __init__(self, held: torch.Tensor) -> None:
        self.held = held

    def supports_lora_conversion(self) -> bool:
        return False

    def forward(
        self, module: Any, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        """`result` plus the masked change, in the dtype that autocast asks for, else in that of `x`."""
        x = module.lora_dropout[active_adapter](x)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if self.held.device != x.device:
            self.held = self.held.to(x.device)
        factor_b = module.lora_B[active_adapter]
        added = _MaskedLinear.apply(
            x, module.lora_A[active_adapter].weight, factor_b.weight, module.scaling[active_adapter], self.held
        )
        if factor_b.bias is not None:
            added = added + (factor_b.bias * module.scaling[active_adapter]).to(added.dtype)
        return result + added

    def _delta(self, module: Any, adapter: str) -> torch.Tensor:
        a, b = module.lora_A[adapter].weight.detach(), module.lora_B[adapter].weight.detach()
        delta = masked_product(a, b, module.scaling[adapter], self.held)
        return delta.T if getattr(module, "fan_in_fan_out", False) else delta

    def merge_safe(self, module: Any, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
        return (orig_weight + self._delta(module, active_adapter)).to(orig_weight.dtype)

    def merge_unsafe(self, module: Any, active_adapter: str, orig_weight: torch.Tensor) -> None:
        orig_weight.data += self._delta(module, active_adapter).to(orig_weight.dtype)

    def unmerge(self, module: Any, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
        return orig_weight.data - self._delta(module, active_adapter).to(orig_weight.dtype)


def hold_weights(factors: Factors, entries: torch.Tensor, site: str) -> None:
    """Mask single weights (flat indices) of an adapter's change, besides those that are masked already.

    Raises `FreezeError` for a layer of PEFT's that cannot be masked.
    """
    layer = factors.layer
    # A layer whose forward pass does not ask for variants would go on adding the unmasked change.
    if isinstance(layer, ParamWrapper) or "lora_variant" not in type(layer).forward.__code__.co_names:
        raise FreezeError(
            f"Single weights of {site} cannot be held under this kind of LoRA layer",
            received=type(layer).__name__,
            allowed="whole neurons and hidden units",
        )
    old = factors.held()
    entries = entries.to(factors.a.device)
    held = entries if old is None else torch.cat([old.to(entries.device), entries])
    layer.lora_variant[factors.adapter] = MaskedDelta(held.unique())


def masks_of(sites: Sites, adapter: str = "default") -> dict[str, torch.Tensor]:
    """Site name -> flat indices of the single weights that an adapter's mask holds, for the sites that have one."""
    masks = {}
    for name, site in sites.items():
        layer: Any = site.wrapper
        variant = layer.lora_variant.get(adapter) if isinstance(layer, LoraLayer) else None
        if isinstance(variant, MaskedDelta):
            masks[name] = variant.held
    return masks


def save_masks_with(model: nn.Module) -> None:
    """From now on `model.save_pretrained`, whoever calls it, writes the masks beside the adapter."""
    if "save_pretrained" not in model.__dict__:
        model.save_pretrained = _SaveWithMasks(model)  # type: ignore[assignment]


class _SaveWithMasks:
    """The `save_pretrained` of one PEFT model, followed by a file of the masks of each adapter that has any.

    Compressing millions of indices takes a second or two, and they do not change from one save to the next: the bytes
    that were written are kept, with the masks that they are of.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._written: dict[str, tuple[list[torch.Tensor], bytes]] = {}

    def __call__(self, save_directory: Any, *arguments: Any, **settings: Any) -> None:
        model: Any = self._model
        type(model).save_pretrained(model, save_directory, *arguments, **settings)
        if not settings.get("is_main_process", True):
            return
        sites = Sites(model)
        for adapter in settings.get("selected_adapters") or list(model.peft_config):
            folder = Path(save_directory) if adapter == "default" else Path(save_directory) / adapter
            if masks := masks_of(sites, adapter):
                self._write(folder / FILE, adapter, masks, sites)

    def _write(self, file: Path, adapter: str, masks: dict[str, torch.Tensor], sites: Sites) -> None:
        known, content = self._written.get(adapter, ([], b""))
        held = list(masks.values())
        if len(known) == len(held) and all(old is new for old, new in zip(known, held, strict=True)):
            with atomic_path(file) as partial_path:
                partial_path.write_bytes(content)
            return
        Group(
            granularity="weight",
            members={name: mask.cpu().numpy().astype(np.int64) for name, mask in masks.items()},
            shapes={name: sites.shapes[name] for name in masks},
            provenance={"model": sites.fingerprint, "rule": "held while training"},
        ).save(file)
        self._written[adapter] = (held, file.read_bytes())


def reapply_masks(model: nn.Module, folder: Path, adapter: str = "default") -> None:
    """Put the masks that lie beside a saved adapter back onto the loaded one; nothing where there are none.

    Raises `FreezeError` where the file names weights that the adapter does not change.
    """
    if not (folder / FILE).exists():
        return
    group, sites = load_group(folder / FILE), Sites(model)
    for name, entries in group.members.items():
        site = sites.get(name)
        if site is None or site.shape != tuple(group.shapes[name]):
            raise FreezeError(
                f"{FILE} beside the adapter belongs to another model: it names weights of {name}",
                received=str(folder),
            )
        factors = [each for each in lora_factors(site) if each.adapter == adapter]
        if not factors:
            raise FreezeError(
                f"{FILE} names weights of {name}, which the adapter does not change", received=str(folder)
            )
        hold_weights(factors[0], torch.from_numpy(entries), name)
    save_masks_with(model)
