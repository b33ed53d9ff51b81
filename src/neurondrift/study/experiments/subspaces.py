"""The rank level of a finished study: which output directions carry safety, and how much of the change lies there.

Owns the loop over data sets, seeds and subspaces, and the layout of `results/subspaces.json`. The directions
come from `importance.directions`, the intervals from `statistics.descriptive`, refusals from `removals`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from neurondrift.base.errors import ArtifactError, ModelError
from neurondrift.base.files import json_safe, read_json, write_json
from neurondrift.base.progress import progress
from neurondrift.drift.meter import DriftMeter
from neurondrift.importance.directions import (
    Basis,
    Share,
    bases,
    check_rank,
    overlap,
    random_directions,
    safety_only_directions,
    share_of_change,
)
from neurondrift.models.adapters import low_rank_delta
from neurondrift.models.architecture.experts import is_router
from neurondrift.models.data import DataReference, encode, load_examples
from neurondrift.models.disk.initial import CheckpointWeights
from neurondrift.models.loading import attach_adapter, load_model
from neurondrift.models.sites import Site, Sites
from neurondrift.statistics.descriptive import share
from neurondrift.statistics.estimates import FloatArray
from neurondrift.statistics.inference import Inference
from neurondrift.study.base_model import load_base
from neurondrift.study.experiments.removals import removal_effects
from neurondrift.study.folder import StudyFolder, saved_step, saved_steps
from neurondrift.study.settings import Study, SubspacesSection
from neurondrift.study.stages.reporting import weights_digest

Say = Callable[[str], None]

SCHEMA_VERSION = 2
SUBSPACES = ("safety", "utility", "safety_only")
#: Random subspaces of each site that the shares are compared with.
RANDOM_SUBSPACES = 20
#: What a change is measured by: its weights, or the outputs that it changes on a data set.
MEASURES = ("weights", "safety_outputs", "utility_outputs")
#: Subspaces that are compared: the first minus the second.
CONTRASTS = (("safety", "utility"), ("safety_only", "utility"))


def of_study(study: Study, folder: StudyFolder) -> str:
    """The optional stage: `results/subspaces.json` as the study's section `subspaces` asks for it."""
    write_json(results_file(folder), json_safe(measure(study, folder, study.subspaces)))
    return f"{study.subspaces.rank} safety and {study.subspaces.utility_rank} utility directions per site"


def outputs(study: Study, folder: StudyFolder) -> list[Path]:
    return [results_file(folder)]


def lacks(study: Study, folder: StudyFolder) -> None:
    """Raise `ArtifactError` where a seed has no fine-tuned model at all."""
    for seed in study.seeds:
        _last_step(folder, seed)


def results_file(folder: StudyFolder) -> Path:
    """Where the findings lie."""
    return folder.results / "subspaces.json"


def show(folder: StudyFolder, *, say: Say) -> None:
    """What `results/subspaces.json` holds, as a table on the screen."""
    from neurondrift.report.tables.ranks import section
    from neurondrift.report.text import render_section

    say("\n".join(render_section(section(read_json(results_file(folder))))))
    say(f"\nwritten to {results_file(folder)}")


def measure(study: Study, folder: StudyFolder, settings: SubspacesSection) -> dict[str, Any]:
    """All figures of the rank level, as they go into `results/subspaces.json`.

    Raises
    ------
    ConfigError
        A rank that a site does not have.
    ArtifactError
        The study has not been fine-tuned.
    ModelError
        An adapter whose change cannot be measured exactly.
    """
    changes = {seed: _changes(study, folder, seed) for seed in study.seeds}
    model, tokenizer = load_base(study, folder)
    everything = Sites(model)
    sites = {name: site for name, site in everything.items() if not is_router(site.owner)}
    check_rank(settings.rank, sites, setting="rank")
    check_rank(settings.utility_rank, sites, setting="utility rank")
    factors = _stacked_factors(changes)
    ranks = {"safety": settings.rank, "utility": settings.utility_rank}
    bases_of: dict[str, dict[str, Basis]] = {}
    counts: dict[str, int] = {}
    for purpose, reference in (("safety", study.score.safety), ("utility", study.score.utility)):
        chosen = load_examples(_limited(reference, settings.limit))
        encoded = encode(chosen, tokenizer, max_length=study.score.max_length)
        counts[purpose] = len(encoded)
        with progress(f"subspaces {purpose}", len(encoded)) as advance:
            bases_of[purpose] = bases(
                model,
                encoded,
                rank=ranks[purpose],
                sites=sites,
                factors=factors,
                batch_size=study.score.batch_size,
                on_batch=lambda batch: advance(len(batch.names)),
            )
    directions = _directions(bases_of)
    rows = _site_rows(sites, bases_of, directions)
    return {
        "schema_version": SCHEMA_VERSION,
        "study": {
            "name": study.name,
            "model": study.model.reference,
            "model_fingerprint": everything.fingerprint,
            "seeds": study.seeds,
            "steps": {str(seed): change.step for seed, change in changes.items()},
            "adapters": {str(seed): change.digest for seed, change in changes.items()},
        },
        "settings": {
            "rank": settings.rank,
            "utility_rank": settings.utility_rank,
            "examples": counts,
            "tokens": {purpose: max(b.tokens for b in by_site.values()) for purpose, by_site in bases_of.items()},
            "random_subspaces": RANDOM_SUBSPACES,
            "resamples": study.analyze.resamples,
            "draws": settings.draws,
        },
        "left_out": {
            "routers": [name for name in everything if name not in sites],
            "untrained_sites": len([name for name in sites if not all(name in c.pairs for c in changes.values())]),
        },
        "subspaces": _summary(rows),
        **_shares(study, sites, bases_of, directions, changes),
        "sites": rows,
        "behaviour": removal_effects(study, model, tokenizer, everything, directions, draws=settings.draws)
        if settings.draws
        else None,
    }


def _limited(reference: DataReference, limit: int | None) -> DataReference:
    if limit is None:
        return reference
    return reference.model_copy(update={"limit": min(limit, reference.limit or limit)})


class Pair(NamedTuple):
    """Δ = `b` @ `a` of a site, or `b` alone where `a` is None."""

    b: torch.Tensor  # [O, K], or [O, I]
    a: torch.Tensor | None  # [K, I]


class Changes(NamedTuple):
    """What one seed's fine-tuning changed at its last saved step, for every site that it trained.

    `digest` tells its weights from others (`weights_digest`).
    """

    step: int
    digest: str
    pairs: dict[str, Pair]


def _last_step(folder: StudyFolder, seed: int) -> int:
    """The last training step whose adapter (or model) is kept."""
    steps = saved_steps(folder.adapters(seed))
    if not steps:
        raise ArtifactError(
            "There is no fine-tuned model to measure the change of",
            received=str(folder.adapters(seed)),
            fix=f"neurondrift finetune --output-dir {folder.root}",
        )
    return steps[-1]


def _changes(study: Study, folder: StudyFolder, seed: int) -> Changes:
    step = _last_step(folder, seed)
    saved = saved_step(folder.adapters(seed), step)
    digest = weights_digest(saved)
    if study.finetune.method == "full":
        tuned, _ = load_model(saved, dtype="float32", device="cpu")
        sites = Sites(tuned)
        meter = DriftMeter(sites, initial=CheckpointWeights(folder.base_model, sites))
        return Changes(step, digest, {name: Pair(meter.delta(name), None) for name in meter.sites})
    base, _ = load_base(study, folder)
    meter = DriftMeter(attach_adapter(base, saved))
    return Changes(step, digest, {name: _pair(meter, name, site) for name, site in meter.sites.items()})


def _pair(meter: DriftMeter, name: str, site: Site) -> Pair:
    try:
        factors = low_rank_delta(site)
    except ModelError:  # an adapter without this form: the meter has the dense change, or says why not
        factors = None
    if factors is None:
        return Pair(meter.delta(name).cpu(), None)
    return Pair(factors.b.double().cpu(), factors.a.double().cpu())


def _stacked_factors(changes: Mapping[int, Changes]) -> dict[str, torch.Tensor]:
    """The A of all seeds of each site under one another: one pass over the data weighs the changes of all seeds."""
    names = dict.fromkeys(name for change in changes.values() for name in change.pairs)
    stacked = {}
    for name in names:
        parts = [c.pairs[name].a for c in changes.values() if name in c.pairs]
        known = [part for part in parts if part is not None]
        if len(known) == len(changes):
            stacked[name] = torch.cat(known)
    return stacked


def _directions(bases_of: Mapping[str, Mapping[str, Basis]]) -> dict[str, dict[str, torch.Tensor]]:
    """Subspace -> site -> orthonormal directions."""
    safety = {name: basis.directions for name, basis in bases_of["safety"].items()}
    utility = {name: basis.directions for name, basis in bases_of["utility"].items()}
    only = {name: safety_only_directions(safety[name], utility[name]) for name in safety}
    return {"safety": safety, "utility": utility, "safety_only": only}


def _site_rows(
    sites: Mapping[str, Site],
    bases_of: Mapping[str, Mapping[str, Basis]],
    directions: Mapping[str, Mapping[str, torch.Tensor]],
) -> list[dict[str, Any]]:
    rows = []
    for name, site in sites.items():
        of_site = {subspace: directions[subspace][name] for subspace in SUBSPACES}
        rows.append(
            {
                "site": name,
                "layer": site.layer,
                "module_type": site.module_type,
                "out": site.shape[0],
                "in": site.shape[1],
                "rank": {subspace: part.shape[1] for subspace, part in of_site.items()},
                "explained": {purpose: bases_of[purpose][name].explained for purpose in bases_of},
                "overlap": overlap(of_site["safety"], of_site["utility"]),
                "overlap_by_chance": of_site["utility"].shape[1] / site.shape[0],
            }
        )
    return rows


def _summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means over sites."""

    def mean(values: Sequence[float]) -> float:
        known = [value for value in values if math.isfinite(value)]
        return float(np.mean(known)) if known else math.nan

    return {
        "sites": len(rows),
        "mean_rank": {name: mean([row["rank"][name] for row in rows]) for name in SUBSPACES},
        "explained": {name: mean([row["explained"][name] for row in rows]) for name in ("safety", "utility")},
        "overlap": mean([row["overlap"] for row in rows]),
        "overlap_by_chance": mean([row["overlap_by_chance"] for row in rows]),
    }


class SiteShare(NamedTuple):
    """What lies in one subspace of a site, of each seed's change; beside K random subspaces of its rank, and chance."""

    of_seeds: list[Share]  # S
    random_SK: list[list[float]]
    expected: float


class Question(NamedTuple):
    """In which subspace, and by which measure, a change is looked for."""

    subspace: str
    measure: str


class Amounts(NamedTuple):
    """The answer to a question over all sites that were measured: S seeds, J sites, K random subspaces."""

    inside_SJ: FloatArray
    whole_SJ: FloatArray
    random_JSK: FloatArray
    expected_J: FloatArray


def _shares(
    study: Study,
    sites: Mapping[str, Site],
    bases_of: Mapping[str, Mapping[str, Basis]],
    directions: Mapping[str, Mapping[str, torch.Tensor]],
    changes: Mapping[int, Changes],
) -> dict[str, Any]:
    """Shares of the change in each subspace by each measure, with their nulls, and safety minus utility."""
    trained = [name for name in sites if all(name in change.pairs for change in changes.values())]
    answers: dict[Question, list[SiteShare]] = {}
    generator = torch.Generator().manual_seed(study.seed)
    for name in trained:
        chosen = {subspace: directions[subspace][name] for subspace in SUBSPACES}
        randoms = _random_subspaces(chosen, sites[name].shape[0], generator)
        for question, share_of_site in _site_shares(name, chosen, randoms, bases_of, changes):
            answers.setdefault(question, []).append(share_of_site)
    amounts = {question: _amounts(of_sites) for question, of_sites in answers.items()}
    settings = {"resamples": study.analyze.resamples, "rng_seed": study.seed}
    measures = [name for name in MEASURES if Question(SUBSPACES[0], name) in amounts]
    return {
        "trained_sites": len(trained),
        "shares": [
            question._asdict() | _share_row(amounts[question], settings)
            for question in (Question(subspace, measure) for measure in measures for subspace in SUBSPACES)
        ],
        "contrasts": [
            {"first": first, "second": second, "measure": measure}
            | _contrast_row(amounts[Question(first, measure)], amounts[Question(second, measure)], settings)
            for measure in measures
            for first, second in CONTRASTS
        ],
    }


def _random_subspaces(
    chosen: Mapping[str, torch.Tensor], outputs: int, generator: torch.Generator
) -> dict[int, list[torch.Tensor]]:
    """Rank -> `RANDOM_SUBSPACES` random subspaces of a site's outputs, for every rank that its subspaces have."""
    ranks = sorted({part.shape[1] for part in chosen.values()})
    return {rank: [random_directions(outputs, rank, generator) for _ in range(RANDOM_SUBSPACES)] for rank in ranks}


def _site_shares(
    site: str,
    chosen: Mapping[str, torch.Tensor],
    randoms: Mapping[int, Sequence[torch.Tensor]],
    bases_of: Mapping[str, Mapping[str, Basis]],
    changes: Mapping[int, Changes],
) -> Iterator[tuple[Question, SiteShare]]:
    """What lies in each subspace of a site, by each measure that its change has."""
    for measure_name in MEASURES:
        inners = _inners(measure_name, site, bases_of, changes)
        if inners is None:
            continue
        weighed = [(change.pairs[site].b, inner) for change, inner in zip(changes.values(), inners, strict=True)]
        for subspace, part_OR in chosen.items():
            outputs, rank = part_OR.shape
            yield (
                Question(subspace, measure_name),
                SiteShare(
                    of_seeds=[share_of_change(part_OR, b, inner) for b, inner in weighed],
                    random_SK=[
                        [share_of_change(random, b, inner).inside for random in randoms[rank]] for b, inner in weighed
                    ],
                    expected=rank / outputs,
                ),
            )


def _inners(
    measure_name: str, site: str, bases_of: Mapping[str, Mapping[str, Basis]], changes: Mapping[int, Changes]
) -> list[torch.Tensor | None] | None:
    """The matrix of each seed that `share_of_change` weighs a site's Δ with; None where the measure has none (outputs
    of a change that is not low-rank)."""
    pairs = [change.pairs[site] for change in changes.values()]
    if measure_name == "weights":
        return [None if pair.a is None else pair.a @ pair.a.T for pair in pairs]
    inner = bases_of[measure_name.removesuffix("_outputs")][site].inner
    if inner is None:
        return None
    blocks: list[torch.Tensor | None] = []
    start = 0
    for pair in pairs:
        assert pair.a is not None
        stop = start + len(pair.a)
        blocks.append(inner[start:stop, start:stop])
        start = stop
    return blocks


def _amounts(of_sites: Sequence[SiteShare]) -> Amounts:
    """The sites' shares as arrays. Raises `ArtifactError` where nothing has changed in any of them."""
    shares_JS2 = np.array([site.of_seeds for site in of_sites])
    whole_SJ = shares_JS2[..., 1].T
    if not (whole_SJ > 0).all(axis=0).any():
        raise ArtifactError("Fine-tuning has changed nothing: there is no change to share out")
    random_JSK = np.array([site.random_SK for site in of_sites])
    return Amounts(shares_JS2[..., 0].T, whole_SJ, random_JSK, np.array([site.expected for site in of_sites]))


def _share_row(amounts: Amounts, settings: Mapping[str, int]) -> dict[str, Any]:
    """The share of the change that lies in one subspace, beside random subspaces of its rank and chance."""
    both = share(amounts.inside_SJ, amounts.whole_SJ, **settings)
    whole_S = amounts.whole_SJ.sum(axis=1)
    random_K = (amounts.random_JSK.sum(axis=0).T / whole_S).mean(axis=1)  # each draw over all sites
    by_chance = float((amounts.whole_SJ @ amounts.expected_J / whole_S).mean())
    return {
        "of_sum": _estimate(both.of_sum),
        "of_sites": _estimate(both.of_sites),
        "expected": by_chance,
        "expected_of_sites": float(amounts.expected_J.mean()),
        "ratio": both.of_sum.value / by_chance if by_chance > 0 else math.nan,
        "random": {
            "mean": float(random_K.mean()),
            "sd": float(random_K.std(ddof=1)),
            "low": float(random_K.min()),
            "high": float(random_K.max()),
        },
    }


def _contrast_row(first: Amounts, second: Amounts, settings: Mapping[str, int]) -> dict[str, Any]:
    """The share in one subspace minus that in another, each beyond chance, so that different ranks compare."""
    whole_SJ = first.whole_SJ
    chance_SJ = whole_SJ * (first.expected_J - second.expected_J)
    both = share(first.inside_SJ - second.inside_SJ - chance_SJ, whole_SJ, **settings)
    return {"of_sum": _estimate(both.of_sum), "of_sites": _estimate(both.of_sites)}


def _estimate(inferred: Inference) -> dict[str, Any]:
    return {
        "value": inferred.value,
        "ci95": list(inferred.interval(0.95)),
        "per_seed": inferred.per_seed.tolist(),
        "sites": inferred.sites,
        "method": inferred.method,
        "reason": inferred.reason or None,
    }
