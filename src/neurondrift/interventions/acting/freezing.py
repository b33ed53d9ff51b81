"""Freezing: weights that a training must not move, in any Trainer or training loop, and the proof that they did not.

Owns how weights are held (rows and columns of LoRA factors, masks, gradients) and the assertion afterwards. Which
weights a group means is the business of `models.parts`, the masked LoRA layer that of `models.masked_lora`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from neurondrift.base.errors import FreezeError, GroupError
from neurondrift.groups.group import Group, load_group
from neurondrift.models.parts import Index, Part, bits, members_within, parts, row_marks
from neurondrift.models.sites import Site, Sites, is_quantised, is_sharded, sites_of

if TYPE_CHECKING:
    from neurondrift.models.masked_lora import Factors, View


logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class FreezeReport:
    """What was frozen, and what moved.

    Attributes
    ----------
    granularity
        Of the group: `neuron`, `weight` or `unit`.
    members, outside
        Members of the group with weights in trained sites, and those without: freezing the latter does nothing.
    weights, sites
        Frozen weights, and the trained sites in which they lie, of `trained_sites`.
    moved, others
        Neurons (rows) of trained sites with a weight that moved, of those that were free to move, at least in part.
    """

    granularity: str
    members: int
    outside: int
    weights: int
    sites: int
    trained_sites: int
    moved: int = 0
    others: int = 0

    def __str__(self) -> str:
        text = (
            f"froze {self.weights:,} weights ({self.members:,} {self.granularity}s) "
            f"in {self.sites} of {self.trained_sites} trained sites"
        )
        if self.outside:
            text += f"; {self.outside:,} members lie outside the trained sites, where freezing does nothing"
        if self.others:
            text += f"; {self.moved:,} of {self.others:,} other neurons moved"
        return text


class _Pin(NamedTuple):
    """Entries of a parameter that are put back to a value after every step; their gradient is zero."""

    parameter: nn.Parameter
    view: View
    entry: Index
    value: torch.Tensor


class _Trained(NamedTuple):
    """One trained site: what is frozen in it, its adapters' factors, and what the base weight was."""

    site: Site
    part: Part | None
    factors: list[Factors]
    original: list[tuple[Index, torch.Tensor]]  # the frozen entries of the base weight
    marks: torch.Tensor | None  # of each row, where the base weight itself is trained


class Freeze(AbstractContextManager["Freeze"]):
    """Holds a group's weights of a model that is about to be trained. See `freeze`.

    Methods
    -------
    restore()
        After an optimizer's step: put back what weight decay or momentum did. Within `with`, and in a Trainer with
        `FreezeCallback`, this is done by itself.
    check()
        Raise `FreezeError` unless every frozen weight of the effective model is what it was.
    verify()
        `check`, and that others moved; a `FreezeReport`.
    release()
        Let gradients through again. Masks of LoRA adapters stay: they are part of the model that was trained.
    """

    def __init__(self, model: nn.Module | Sites, group: Group) -> None:
        from neurondrift.models.masked_lora import lora_factors, save_masks_with

        sites = sites_of(model)
        self.model = sites.model
        chosen = _chosen(group, sites)
        self._trained: dict[str, _Trained] = {}
        for name, site in sites.items():
            factors = [each for each in lora_factors(site) if each.a.requires_grad or each.b.requires_grad]
            is_base_trained = site.tensor.requires_grad
            if not factors and not is_base_trained:
                continue
            for parameter in (site.tensor, *(p for each in factors for p in (each.a, each.b))):
                _require_whole(parameter, name)
            part, weight = chosen.get(name), site.weight
            original = [(index, weight[index].clone()) for index in (part.indices(weight.device) if part else [])]
            marks = row_marks(weight) if is_base_trained else None
            self._trained[name] = _Trained(site, part, factors, original, marks)
        self.report = self._describe(group, sites, chosen)
        for trained in self._trained.values():
            for each in trained.factors:
                _require_unmoved(trained, each, "the adapter changes frozen weights before training has begun")
        self._pins: dict[nn.Parameter, list[_Pin]] = {}
        for trained in self._trained.values():
            _mask_entries(trained)
            for pin in _pins_of(trained):
                self._pins.setdefault(pin.parameter, []).append(pin)
        self._handles = [parameter.register_post_accumulate_grad_hook(self._still) for parameter in self._pins]
        self.restore()
        if any(each.held() is not None for trained in self._trained.values() for each in trained.factors):
            save_masks_with(self.model)
        logger.info("%s", self.report)

    def _describe(self, group: Group, sites: Sites, chosen: Mapping[str, Part]) -> FreezeReport:
        touched = {name: chosen[name] for name in self._trained if name in chosen}
        inside = members_within(group, sites, touched)
        weights = sum(part.weights for part in touched.values())
        if not weights:
            raise FreezeError(
                "No member of the group lies in a site that is trained, so there is nothing to freeze",
                received=f"{len(group):,} members in {len(group.members)} sites; {len(self._trained)} trained sites",
                fix="train the sites of the group (finetune.target_modules), or freeze another group",
            )
        if weights == sum(math.prod(sites.shapes[name]) for name in self._trained):
            raise FreezeError("The group holds every weight that is trained: nothing is left to train")
        return FreezeReport(
            granularity=group.granularity,
            members=inside,
            outside=len(group) - inside,
            weights=weights,
            sites=len(touched),
            trained_sites=len(self._trained),
        )

    @torch.no_grad()
    def _still(self, parameter: torch.Tensor) -> None:
        """No gradient: so frozen entries enter neither momentum nor the norm that gradients are clipped by."""
        assert isinstance(parameter, nn.Parameter)
        if parameter.grad is not None:
            for pin in self._pins[parameter]:
                pin.view(parameter.grad)[pin.entry] = 0

    @torch.no_grad()
    def restore(self) -> None:
        """Put the frozen entries back to what they were."""
        for parameter, pins in self._pins.items():
            for pin in pins:
                pin.view(parameter)[pin.entry] = pin.value

    @torch.no_grad()
    def check(self, why: str = "frozen weights have moved while training") -> None:
        """Raise `FreezeError` unless every frozen weight of the effective model is bit-equal to the original: the
        stored weight has its old bits, and what adapters add to it is exactly zero."""
        for name, trained in self._trained.items():
            weight = trained.site.weight
            for index, value in trained.original:
                now = weight[index]
                if not torch.equal(bits(now), bits(value)):
                    changed = int((bits(now) != bits(value)).sum())
                    raise FreezeError(f"In {name} {why}", received=f"{changed} of {value.numel()}")
            for each in trained.factors:
                _require_unmoved(trained, each, why)

    @torch.no_grad()
    def verify(self) -> FreezeReport:
        """Assert that what is frozen is bit-equal to the original and that others moved.

        Raises `FreezeError` where a frozen weight moved, or none of the others.
        """
        self.check()
        moved = others = 0
        for trained in self._trained.values():
            rows = trained.site.shape[0]
            moving = torch.zeros(rows, dtype=torch.bool, device=trained.site.tensor.device)
            if trained.marks is not None:
                moving |= row_marks(trained.site.weight) != trained.marks
            for each in trained.factors:
                moving |= (each.delta() != 0).any(dim=1).to(moving.device)
            moved += int(moving.sum())
            others += rows - (len(trained.part.rows) if trained.part else 0)
        self.report = FreezeReport(**{**vars(self.report), "moved": moved, "others": others})
        if not moved:
            raise FreezeError(
                "Nothing moved: no neuron outside the frozen group is different from before training",
                received=f"{others} neurons",
                fix="look at the learning rate and the number of steps",
            )
        logger.info("%s", self.report)
        return self.report

    def release(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __enter__(self) -> Freeze:
        from torch.optim.optimizer import register_optimizer_step_post_hook

        self._handles.append(register_optimizer_step_post_hook(lambda *ignored: self.restore()))
        return self

    def __exit__(self, kind: type[BaseException] | None, *details: object) -> None:
        self.release()
        if kind is None:
            self.verify()


def freeze(model: nn.Module | Sites, group: Group) -> Freeze:
    """Hold a group's weights while `model` is trained, with any optimizer, and prove afterwards that they stood still.

        with nd.freeze(model, group):
            ...                                  # a training loop
        trainer.add_callback(nd.FreezeCallback(group))   # the same in a Trainer

    Parameters
    ----------
    model
        The model as it will be trained (or its `linear_sites`): already wrapped by PEFT for LoRA. Nothing of it is
        copied but the frozen weights.
    group
        Neurons, single weights or MLP hidden units (gate and up rows, down column).

    Returns
    -------
    Freeze
        A context manager: on leaving it without an exception, `verify` runs. Without `with`, call `restore()` after
        every optimizer step, and `verify()` and `release()` at the end.

    Raises
    ------
    GroupError
        A group of another model, or of other shapes.
    FreezeError
        No member lies in a trained site, or every trained weight is a member; the adapter already changes a member; an
        adapter in which weights cannot be held exactly (DoRA, other variants, other methods; single weights under
        `target_parameters`); sharded parameters (FSDP, ZeRO-3).

    Notes
    -----
    The original is the model before training: under LoRA the base model, so the adapter must not change the group's
    weights yet. Frozen means bit-equal: under LoRA the effective weight is W₀ + Δ, and Δ is exactly 0 there.

    - LoRA, a neuron: its row of B is zero. A column: that column of A is zero. Single weights: Δ is masked in the
      forward pass, W₀ + M ∘ (s B A), with the gradients of that model; `save_pretrained` writes the mask beside the
      adapter as `frozen_group.parquet`, and `load_model(adapter=...)` applies it again (plain PEFT does not know it).
    - Full fine-tuning: the gradient is zero there, and after each step the weights are put back, so that weight decay
      and a resumed optimizer's momentum do nothing.

    A neuron's bias is no weight of a site: where biases are trained, it stays free. So do norms and embeddings.
    """
    return Freeze(model, group)


class FreezeCallback(TrainerCallback):
    """`freeze` for any `transformers.Trainer`: holds the group, and asserts at the end of training that it stood still.

    Parameters
    ----------
    group
        The group, or a file of one.

    Attributes
    ----------
    report
        `FreezeReport`, complete once training has ended.

    Notes
    -----
    Give it to the Trainer's constructor where training may resume: it then sees the model before the checkpoint is
    loaded, and a checkpoint that was made without the freeze is an error. Training that fails leaves `release()` to the
    caller if the model is to be trained further.
    """

    def __init__(self, group: Group | str | Path) -> None:
        self.group = group if isinstance(group, Group) else load_group(group)
        self.report: FreezeReport | None = None
        self._freeze: Freeze | None = None

    def _freeze_of(self, model: nn.Module) -> Freeze:
        """The freeze of the model that is trained: made where there is none yet, or one of another model."""
        if self._freeze is None or self._freeze.model is not model:
            self.release()
            self._freeze = Freeze(model, self.group)
        self.report = self._freeze.report
        return self._freeze

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        if model is not None:
            self._freeze_of(model)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        self._freeze_of(model).check("the checkpoint has moved frozen weights: it was made without this freeze")

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        assert self._freeze is not None
        self._freeze.restore()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        assert self._freeze is not None
        finished = self._freeze
        self.release()
        self.report = finished.verify()

    def release(self) -> None:
        """Let gradients through again."""
        if self._freeze is not None:
            self._freeze.release()
            self._freeze = None


def _chosen(group: Group, sites: Sites) -> dict[str, Part]:
    """The weights to hold, site by site. Raises `GroupError` for a group of another model or without members."""
    if not len(group):
        raise GroupError("The group has no members, so there is nothing to freeze")
    if group.provenance.get("model") is not None:  # a fingerprint reads every site
        group.check_origin(sites.fingerprint)
    return parts(group, sites)


def _pins_of(trained: _Trained) -> list[_Pin]:
    """What holds a site's part step by step: in the base weight where that is trained, and in every adapter, whose
    rows of B and columns of A at zero make exactly zero rows and columns of B A."""
    site, part = trained.site, trained.part
    if part is None:
        return []
    pins = []
    if site.tensor.requires_grad:
        assert isinstance(site.tensor, nn.Parameter)
        pins += [_Pin(site.tensor, site.oriented, entry, value) for entry, value in trained.original]
    for each in trained.factors:
        if len(part.rows):
            rows = torch.from_numpy(part.rows).to(each.b.device)
            pins.append(_Pin(each.b, each.view_b, (rows,), each.b.new_zeros(())))
        if len(part.columns):
            columns = torch.from_numpy(part.columns).to(each.a.device)
            pins.append(_Pin(each.a, each.view_a, (slice(None), columns), each.a.new_zeros(())))
    return pins


def _mask_entries(trained: _Trained) -> None:
    """Mask a site's single weights in every adapter: no entries of its factors hold them."""
    from neurondrift.models.masked_lora import hold_weights

    if trained.part is not None and len(trained.part.entries):
        for each in trained.factors:
            hold_weights(each, torch.from_numpy(trained.part.entries), trained.site.name)


def _require_unmoved(trained: _Trained, factors: Factors, why: str) -> None:
    """Raise unless an adapter adds exactly zero to the frozen weights of a site."""
    if trained.part is None:
        return
    delta = factors.delta()
    for index in trained.part.indices(delta.device):
        if moved := int((delta[index] != 0).sum()):
            raise FreezeError(
                f"In {trained.site.name} {why}",
                received=f"{moved} of {delta[index].numel()}",
                fix="freeze a fresh adapter from the first step on",
            )


def _require_whole(parameter: torch.Tensor, site: str) -> None:
    if is_sharded(parameter) or hasattr(parameter, "ds_id"):
        raise FreezeError(
            f"The parameters of {site} are sharded over processes: freezing them is not supported",
            received=type(parameter).__name__,
            allowed="parameters that each process holds whole",
        )
    if parameter.requires_grad and is_quantised(parameter):
        raise FreezeError(f"The quantised weight of {site} is trained", allowed="adapters on a quantised base")
