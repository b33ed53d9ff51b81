"""`DriftCallback`: drift snapshots from any `transformers.Trainer` in one line, and means of drift in its log.

Owns when to measure and whom to tell.
"""

from __future__ import annotations

import errno
import logging
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler

from neurondrift.base.errors import ConfigError, ModelError, ResourceError
from neurondrift.drift.bins import WeightDrift, pooled
from neurondrift.drift.exact import NeuronDrift
from neurondrift.drift.log import DriftLog, Groups, check_groups, describe, initial_table, named_groups
from neurondrift.drift.meter import DriftMeter, WeightMeter
from neurondrift.groups.group import Group
from neurondrift.models.disk.initial import Weights
from neurondrift.models.parts import as_weights
from neurondrift.models.sites import fingerprint_of, is_sharded

logger = logging.getLogger(__name__)

FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
OnFullDisk = Literal["continue", "stop"]


class DriftCallback(TrainerCallback):
    """Writes a drift snapshot at step 0, every `every` optimizer steps and at the end of training.

    Parameters
    ----------
    directory
        Folder of the snapshots (`DriftLog` reads it).
    every
        Optimizer steps between snapshots.
    groups
        Groups by name, or a list of groups and of files of groups. Each one's mean drift goes to the Trainer's own
        log, and so to TensorBoard, W&B or trackio: of neurons as `drift/NAME/relative` and `drift/NAME/l2`; of
        weights and of hidden units (all weights of their rows and columns) as `drift/NAME/mean_abs` and
        `drift/NAME/mean_relative`. What groups of weights and units sum up to, site by site, is part of every
        snapshot (`DriftLog.weights`). Members in sites that are not trained are left out.
    initial
        For full fine-tuning: where the initial weights are read from.
    on_full_disk
        When a snapshot finds no space: `continue` training without it, after one warning (`missed` lists the steps),
        or `stop` with a `ResourceError`. Snapshots that stand stay as they are in both cases.

    Attributes
    ----------
    history
        The summaries that went to the Trainer's log, with their `step`.
    missed
        Steps whose snapshot found no space.

    Notes
    -----
    When training resumes from a checkpoint, snapshots after the checkpoint's step are dropped and made again: none is
    lost, none doubled. Of several processes only the first writes and logs. Parameters that FSDP2 has cut among
    processes are gathered site by site, in which all processes take part; FSDP1 and DeepSpeed ZeRO-3 are refused.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        every: int,
        groups: Groups = (),
        initial: Weights | None = None,
        on_full_disk: OnFullDisk = "continue",
    ) -> None:
        if every < 1:
            raise ConfigError("every is no number of steps", received=every, allowed="an integer of at least 1")
        if on_full_disk not in ("continue", "stop"):
            raise ConfigError("on_full_disk is unknown", received=on_full_disk, allowed="continue, stop")
        self.log = DriftLog(directory)
        self.every = every
        self.groups = named_groups(groups)
        self.on_full_disk = on_full_disk
        self.history: list[dict[str, float]] = []
        self.missed: list[int] = []
        self._initial = initial
        self._meter: DriftMeter | None = None
        self._weights: WeightMeter | None = None
        self._begun = False
        self._diverged = False
        self._last: int | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        _refuse_unreadable(model)
        self._sharded = any(is_sharded(parameter) for parameter in model.parameters())
        self._begun, self._last = False, None
        if not self._takes_part(state):
            return
        self._prepare(model)
        if state.is_world_process_zero:
            self._guard(state.global_step, lambda: self._begin(state.global_step))
        if state.global_step % self.every and self._first_says(model, bool(self.log.steps())):
            return  # a checkpoint between two snapshots
        self._snapshot(args, state, control)

    def _first_says(self, model: nn.Module, flag: bool) -> bool:
        """What the first process sees in the folder, where all must do the same."""
        if not self._sharded:
            return flag
        told = torch.tensor(int(flag), device=next(model.parameters()).device)
        torch.distributed.broadcast(told, 0)
        return bool(told)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # The last step's snapshot is not left to on_train_end: reporters have closed by then, and
        # load_best_model_at_end has put other weights into the model.
        if state.global_step % self.every == 0 or control.should_training_stop:
            self._snapshot(args, state, control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if control.should_training_stop:  # set after on_step_end, for example by EarlyStoppingCallback
            self._snapshot(args, state, control)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._snapshot(args, state, control)

    def _takes_part(self, state: TrainerState) -> bool:
        """Whether this process measures: the first does, and where parameters must be gathered all do."""
        return state.is_world_process_zero or self._sharded

    def _prepare(self, model: nn.Module) -> None:
        """What holds for all snapshots: the meters, the metadata and the neurons before training."""
        self._meter = meter = DriftMeter(model, initial=self._initial)
        sites, every_site = meter.sites, meter.every_site
        # Of the weights before training, also where a checkpoint has been loaded that has moved them.
        all_trained = self._initial is not None and sites is every_site
        name = fingerprint_of((site, meter.base(site)) for site in sites) if all_trained else every_site.fingerprint
        measured = {key: as_weights(group, every_site) for key, group in self.groups.items()}
        followed = {key: group for key, group in self.groups.items() if group.granularity != "neuron"}
        of_weights = {key: measured[key] for key in followed}
        self._weights = WeightMeter(of_weights, sites, every_site=every_site) if followed else None
        norms = {site: meter.norms(site).cpu() for site in sites}
        zero_norm = {site: int((norm == 0).sum()) for site, norm in norms.items() if (norm == 0).any()}
        self._metadata = describe(
            {site: sites[site].shape for site in sites},
            meter.untrained,
            model=name,
            zero_norm=zero_norm,
            groups={
                key: {
                    "granularity": group.granularity,
                    "members": self._weights.members[key],
                    "outside": self._weights.outside[key],
                }
                for key, group in followed.items()
                if self._weights is not None
            },
        )
        check_groups(measured, self._metadata)
        for key, group in measured.items():
            if not any(site in sites for site in group.members):
                logger.warning("No member of the group %s lies in a trained site: it is not in the log", key)
        if zero_norm:
            logger.warning(
                "%d neurons have a norm of zero before training (%s, ...): their relative drift and cosine distance "
                "are undefined",
                sum(zero_norm.values()),
                next(iter(zero_norm)),
            )
        self._initial_table = initial_table(
            norms, {site: sites[site].module_type for site in sites}, {site: sites[site].layer for site in sites}
        )

    def _begin(self, step: int) -> None:
        if not self._begun:
            self.log.begin(self._metadata, self._initial_table, step=step)
            self._begun = True

    def _snapshot(self, args: TrainingArguments, state: TrainerState, control: TrainerControl) -> None:
        step = state.global_step
        if step == self._last or not self._takes_part(state):
            return
        self._last = step
        stands = state.is_world_process_zero and step in self.log.steps()
        if stands and not self._sharded:
            return
        assert self._meter is not None
        drift = self._meter.measure()
        weights = self._weights.measure(self._meter) if self._weights is not None else []
        if stands or not state.is_world_process_zero:
            return  # this process has only helped to gather
        self._guard(step, lambda: self._write(step, drift, weights))
        summary = summarise_groups(self.groups, drift, weights) | self._not_finite(step, drift)
        self.history.append({"step": float(step), **summary})
        _tell(summary, args, state, control)

    def _not_finite(self, step: int, drift: Mapping[str, NeuronDrift]) -> dict[str, float]:
        """How many neurons have moved to where there are no numbers, as it goes to the log; warned of once."""
        counts = {site: int((~values.l2.isfinite()).sum()) for site, values in drift.items()}
        bad = [site for site, count in counts.items() if count]
        if not bad:
            return {}
        if not self._diverged:
            logger.warning(
                "%d neurons have a change that is NaN or infinite at step %d (%s, ...): training has diverged, and "
                "their drift is in no mean",
                sum(counts.values()),
                step,
                bad[0],
            )
            self._diverged = True
        return {"drift/all/not_finite": float(sum(counts.values()))}

    def _write(self, step: int, drift: Mapping[str, NeuronDrift], weights: Sequence[WeightDrift]) -> None:
        self._begin(step)
        self.log.write(step, drift, weights)

    def _guard(self, step: int, write: Callable[[], None]) -> None:
        """Write; where the disk is full and training is to go on, note the step and warn once."""
        try:
            write()
        except (ResourceError, OSError) as error:
            if not _is_full(error):
                raise
            if self.on_full_disk == "stop":
                raise ResourceError(
                    f"No space is left for the drift snapshot of step {step}",
                    received=str(self.log.directory),
                    fix="free some space and resume from the last checkpoint, or pass on_full_disk='continue'",
                ) from error
            if not self.missed:
                logger.warning(
                    "No space is left for the drift snapshot of step %d in %s: training goes on without it, and "
                    "without those that follow until there is space",
                    step,
                    self.log.directory,
                )
            if step not in self.missed:
                self.missed.append(step)


def _is_full(error: Exception) -> bool:
    """Whether a disk has no space, for which training can wait; not that it is read-only or broken."""
    cause = error.__cause__ if isinstance(error, ResourceError) else error
    return not isinstance(cause, OSError) or cause.errno in FULL_DISK


def summarise_groups(
    groups: Mapping[str, Group], drift: Mapping[str, NeuronDrift], weights: Sequence[WeightDrift]
) -> dict[str, float]:
    """Mean drift of each group and of all neurons, as it goes to the Trainer's log.

    Means over the members in trained sites whose drift is defined; a group that has none is left out.
    """
    means = {"drift/all/relative": _mean([values.relative for values in drift.values()])}
    for name, group in groups.items():
        if group.granularity == "neuron":
            rows = {site: torch.from_numpy(group.rows(site)) for site in group.members if site in drift}
            for metric in ("relative", "l2"):
                means[f"drift/{name}/{metric}"] = _mean([getattr(drift[site], metric)[rows[site]] for site in rows])
        else:
            for metric, label in (("absolute", "mean_abs"), ("relative", "mean_relative")):
                parts = [part for part in weights if part.group == name and part.metric == metric]
                if parts:
                    means[f"drift/{name}/{label}"] = pooled(parts).mean
    return {key: value for key, value in means.items() if math.isfinite(value)}


def _mean(parts: Sequence[torch.Tensor]) -> float:
    """Mean of the defined and finite values, in float64; NaN where there are none."""
    values = torch.cat(list(parts)).double() if parts else torch.empty(0)
    return float(values[values.isfinite()].mean()) if values.isfinite().any() else math.nan


def _tell(summary: dict[str, float], args: TrainingArguments, state: TrainerState, control: TrainerControl) -> None:
    """Do what `Trainer.log` does: append to the history, and pass the figures to every callback that reports.

    A callback is given no handle on its Trainer, and those that report stand before it in the list, so that they do
    not see what it adds to a log's entry. It is always called by the Trainer's `CallbackHandler`, though, which knows
    them all. `Trainer.log` itself is not called: TRL's trainers override it to hand over, and to reset, their own
    running means.
    """
    entry = dict(summary) | ({} if state.epoch is None else {"epoch": state.epoch})
    state.log_history.append({**entry, "step": state.global_step})
    handler = _calling_handler()
    if handler is not None:
        due = control.should_log
        handler.on_log(args, state, control, logs=entry)
        control.should_log = due  # on_log takes it for the Trainer's own entry and withdraws it


def _calling_handler() -> CallbackHandler | None:
    """The handler that is calling this callback; None where a script calls it by itself."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, CallbackHandler):
            return caller
        frame = frame.f_back
    return None


def _refuse_unreadable(model: nn.Module) -> None:
    """Raise `ModelError` where parameters are cut among processes in a way that cannot be gathered site by site."""
    kinds = {type(module).__name__ for module in model.modules()}
    if "FullyShardedDataParallel" in kinds:
        raise ModelError(
            "Drift under FSDP1 cannot be measured", received="FullyShardedDataParallel", fix="use FSDP2 (version = 2)"
        )
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise ModelError(
            "Drift under DeepSpeed ZeRO-3 cannot be measured: its parameters are cut among processes",
            fix="use ZeRO-2, or FSDP2",
        )
