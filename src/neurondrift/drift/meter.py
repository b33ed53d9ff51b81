"""A model measured again and again: drift of its neurons, and of single weights by group.

Owns the pass over the sites. Writes no files and knows nothing of trainers. Shapes: O = out, I = in, N = the groups'
members in a site.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from neurondrift.base.errors import ModelError
from neurondrift.drift.bins import Metric, WeightDrift
from neurondrift.drift.exact import (
    Moments,
    NeuronDrift,
    delta_moments,
    dense_moments,
    drift_from_moments,
    drifts_from_moments,
    low_rank_moments,
    rescaled_moments,
)
from neurondrift.drift.threads import at_once, side_by_side, threads_for
from neurondrift.groups.group import Group
from neurondrift.models.adapters import (
    Change,
    Dense,
    LowRank,
    Rescaled,
    adapted_elsewhere,
    change_of,
    check_methods,
    dense_delta,
    effective_weight,
    is_trained,
)
from neurondrift.models.architecture.saying import kinds_of, say_once
from neurondrift.models.disk.initial import Weights
from neurondrift.models.loading import load_model
from neurondrift.models.parts import as_weights
from neurondrift.models.sites import Site, Sites, row_norms, sites_of, unwrap

if TYPE_CHECKING:
    from neurondrift.drift.kernels import Tallies, Tally


class DriftMeter:
    """Measures one model again and again: what does not change (‖w₀‖) is computed once.

    Parameters
    ----------
    model
        A PEFT model (its base weights are w₀), or a plain one with `initial`; or its `linear_sites`.
    initial
        Where w₀ is read from: for full fine-tuning, and for adapters that changed the base weights when they were
        made (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA, KaSA). The weight that the model computes with is then compared
        with it, also where an adapter has been merged.

    Attributes
    ----------
    every_site
        The sites of the model.
    sites
        Those that training can move: the adapted ones, or all.
    untrained
        The other sites; their drift is exactly zero.
    elsewhere
        Modules that an adapter changes and that are no sites, such as the LM head, an embedding, or a layer outside of
        the decoder blocks: they are not measured, and a warning names them.

    Raises
    ------
    ModelError
        No adapter and no initial weights; a method whose drift no weight shows (prompt tuning, mixtures that depend
        on the input); adapters that changed the base weights, without `initial`.
    """

    def __init__(self, model: nn.Module | Sites, *, initial: Weights | None = None) -> None:
        self.every_site = sites_of(model)
        self._initial = initial
        outer: Any = self.every_site.model
        while isinstance(getattr(outer, "module", None), nn.Module):
            outer = outer.module
        check_methods(outer, initial_given=initial is not None)
        trained = {name: site for name, site in self.every_site.items() if is_trained(site)}
        if not trained and initial is None and not hasattr(outer, "peft_config"):
            raise ModelError(
                "A model without an adapter has no drift by itself",
                received=type(self.every_site.model).__name__,
                fix="pass the initial weights, or use compare_models(before, after)",
            )
        is_plain = unwrap(outer) is outer and not trained
        self.sites: Mapping[str, Site] = self.every_site if is_plain else trained
        self.untrained: list[str] = [name for name in self.every_site if name not in self.sites]
        self.elsewhere: list[str] = adapted_elsewhere(self.every_site)
        if self.elsewhere:
            say_once(f"the adapter also changes what is no site, and is not measured: {kinds_of(self.elsewhere)}")
        self._norms: dict[str, torch.Tensor] = {}

    def norms(self, site: str) -> torch.Tensor:
        """‖w₀‖ of each neuron of a site, float64 `[out]`."""
        if site not in self._norms:
            self._norms[site] = row_norms(self.base(site))
        return self._norms[site]

    @property
    def zero_norm_neurons(self) -> dict[str, int]:
        """How many neurons of each site have ‖w₀‖ = 0, so that their relative drift and cosine distance are NaN;
        sites without any are left out. The norms are computed where they have not been yet."""
        counts = {name: int((self.norms(name) == 0).sum()) for name in self.sites}
        return {name: count for name, count in counts.items() if count}

    def base(self, site: str) -> torch.Tensor:
        """w₀ of a site, `[out, in]`, in the dtype that it is stored in, on the site's device; a view where it lies in
        the model's memory: do not write."""
        known = self.sites[site]
        return known.weight if self._initial is None else self._initial(site).to(known.tensor.device)

    def change(self, site: str) -> Change:
        """Δ of a site as it is now, in the cheapest exact form, on the site's device."""
        known = self.sites[site]
        if self._initial is not None:
            return Dense(effective_weight(known) - self.base(site).double())
        change = change_of(known)
        if change is None:
            raise ModelError(f"{site} has no active adapter any more", fix="activate the adapter that was measured")
        return change

    @torch.no_grad()
    def delta(self, site: str) -> torch.Tensor:
        """Δ of a site as it is now, float32 `[out, in]` (formed in float64), on the site's device."""
        return dense_delta(self.change(site), self.base(site))

    @torch.no_grad()
    def measure(self) -> dict[str, NeuronDrift]:
        """Drift of every neuron of every trained site, now."""
        return drifts_from_moments(dict(zip(self.sites, self._moments(self.sites), strict=True)))

    def _moments(self, names: Iterable[str]) -> list[tuple[torch.Tensor, Moments]]:
        """‖w₀‖ and the moments of sites; on a CPU of several at once."""
        sites = [self.sites[name] for name in names]
        devices = {site.tensor.device.type for site in sites}
        parts = ((self.norms(site.name), self.change(site.name), self.base(site.name)) for site in sites)
        several = at_once() if devices == {"cpu"} else 1
        with contextlib.ExitStack() as stack:
            stack.enter_context(threads_for(math.prod(site.shape) for site in sites))
            for device in devices:  # autocast, where a caller has left it on, would compute the products in bfloat16
                stack.enter_context(torch.autocast(device, enabled=False))
            return list(side_by_side(_moments_of, parts, threads=several))


def _moments_of(part: tuple[torch.Tensor, Change, torch.Tensor]) -> tuple[torch.Tensor, Moments]:
    norm, change, base = part
    if isinstance(change, LowRank):
        return norm, low_rank_moments(change.a, change.b, base, norm)
    if isinstance(change, Rescaled):
        return norm, rescaled_moments(change, base, norm)
    return norm, delta_moments(base, change.delta)


def measure_drift(model: nn.Module | Sites, *, initial: Weights | None = None) -> dict[str, NeuronDrift]:
    """How far every neuron of a fine-tuned model is from where it started.

    Parameters
    ----------
    model
        A PEFT model, its adapters unmerged; or any model together with `initial`; or its `linear_sites`.
    initial
        Callable site name -> initial weight `[out, in]`, for example `CheckpointWeights`.

    Returns
    -------
    dict
        Site name -> `NeuronDrift`, for the sites that training can move.

    Raises
    ------
    ModelError
        No adapter and no initial weights; a merged adapter; an adapter that cannot be measured exactly.
    """
    return DriftMeter(model, initial=initial).measure()


@torch.no_grad()
def compare_models(before: Any, after: Any) -> dict[str, NeuronDrift]:
    """Drift of every neuron between two models: modules, or references that `load_model` takes.

    A module with an adapter, merged or not, counts as it computes: with the change that the adapter makes. Raises
    `ModelError` where the two have different sites or shapes, or an adapter cannot be measured exactly.
    """
    first, second = (
        load_model(m, dtype="float32", device="cpu")[0] if isinstance(m, str | Path) else m for m in (before, after)
    )
    sites_before, sites_after = sites_of(first), sites_of(second)
    if sites_before.shapes != sites_after.shapes:
        different = sorted(set(sites_before) ^ set(sites_after)) or [
            name for name, shape in sites_before.shapes.items() if shape != sites_after.shapes[name]
        ]
        raise ModelError("The two models have different sites or shapes", received=different[0])
    return {
        name: drift_from_moments(*dense_moments(_as_computed(site), _as_computed(sites_after[name])))
        for name, site in sites_before.items()
    }


def _as_computed(site: Site) -> torch.Tensor:
    return effective_weight(site) if is_trained(site) else site.weight


class Members(NamedTuple):
    """The members of the groups in one site: the groups' names, how many each has, and the flat indices of all, int32
    or int64 `[N]`, one group after the other, each ascending."""

    groups: list[str]
    counts: list[int]
    flat: npt.NDArray[Any]


class WeightMeter:
    """Sums up the drift of groups of weights, again and again, site by site.

    Parameters
    ----------
    groups
        Name -> group of weights or of hidden units (all weights of their rows and columns).
    sites
        The trained sites. Members elsewhere have not moved; they are left out and counted in `outside`.

    Attributes
    ----------
    members
        Name -> how many weights are measured.
    outside
        Name -> how many members lie in untrained sites.

    Notes
    -----
    Kept in memory: an index of four bytes a member. While measuring: a few rows of Δ of one site, all of it where it
    has no low-rank form.
    """

    def __init__(self, groups: Mapping[str, Group], sites: Mapping[str, Site], *, every_site: Sites) -> None:
        self._members: dict[str, Members] = {}
        self.members: dict[str, int] = {}
        self.outside: dict[str, int] = {}
        in_weights = {name: as_weights(group, every_site) for name, group in groups.items()}
        for name, group in in_weights.items():
            self.outside[name] = sum(len(flat) for site, flat in group.members.items() if site not in sites)
            self.members[name] = len(group) - self.outside[name]
        for site, matrix in sites.items():
            rows, columns = matrix.shape
            small = np.int32 if rows * columns < 1 << 31 else np.int64
            chosen = {name: group.members[site] for name, group in in_weights.items() if site in group.members}
            if chosen:
                counts = [len(flat) for flat in chosen.values()]
                self._members[site] = Members(list(chosen), counts, np.concatenate([*chosen.values()], dtype=small))

    def bytes_kept(self) -> int:
        """Memory of the indices."""
        return sum(members.flat.nbytes for members in self._members.values())

    @torch.no_grad()
    def measure(self, meter: DriftMeter) -> list[WeightDrift]:
        """|Δ| and |Δ|/|w₀| of every group in every site where it has members, now."""
        from neurondrift.drift.kernels import Tallies

        rooms = threading.local()

        def summed(part: tuple[str, Change, torch.Tensor]) -> list[WeightDrift]:
            if not hasattr(rooms, "own"):
                rooms.own = Tallies()
            site, change, base = part
            members = self._members[site]
            both = zip(members.groups, members.counts, _summed(change, base, members, rooms.own), strict=True)
            return [
                WeightDrift(group, site, metric, count, *tally)
                for group, count, tallies in both
                for metric, tally in zip(get_args(Metric), tallies, strict=True)
            ]

        sites = [meter.sites[name] for name in self._members]
        several = at_once() if all(site.tensor.device.type == "cpu" for site in sites) else 1
        parts = ((site.name, meter.change(site.name), meter.base(site.name)) for site in sites)
        with threads_for(math.prod(site.shape) for site in sites):
            return [drift for of_site in side_by_side(summed, parts, threads=several) for drift in of_site]


def _summed(change: Change, base_OI: torch.Tensor, members: Members, tallies: Tallies) -> list[tuple[Tally, Tally]]:
    """Both metrics of each group."""
    flat_N, counts = members.flat, members.counts
    if base_OI.device.type != "cpu":  # only the members are brought to the CPU
        chosen = torch.from_numpy(flat_N).to(base_OI.device)
        delta_N, base_N = (
            weight.reshape(-1).index_select(0, chosen).cpu() for weight in (dense_delta(change, base_OI), base_OI)
        )
        return tallies.dense(delta_N, base_N, np.arange(len(flat_N)), counts)
    if isinstance(change, LowRank):
        return tallies.low_rank(change.a, change.b, base_OI, flat_N, counts)
    return tallies.dense(dense_delta(change, base_OI), base_OI, flat_N, counts)
