"""What each stage of a study does: it reads the files of the stages above it and writes its own.

One function a stage, and beside it the files that it makes. `study.py` decides when a stage runs.
"""

from __future__ import annotations

import collections
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from neurondrift import artifacts, findings
from neurondrift.batches import Batch
from neurondrift.behaviour.attacks import attack_of, system_prompt
from neurondrift.behaviour.capability import capability, check_tasks, perplexity
from neurondrift.behaviour.evaluate import count_answers, judge_answers, write_answers
from neurondrift.behaviour.panel import Panel
from neurondrift.behaviour.rates import per_prompt, refusal_rate
from neurondrift.config import DataReference, Study
from neurondrift.data import Example, encode, load_examples
from neurondrift.distributed import is_first_process, joined_processes, process_count
from neurondrift.drift.callback import DriftCallback
from neurondrift.drift.exact import CheckpointWeights, row_norms
from neurondrift.drift.log import DriftLog
from neurondrift.errors import ConfigError
from neurondrift.folder import GROUP_NAMES, StudyFolder, record
from neurondrift.freezing import FreezeCallback
from neurondrift.groups import (
    Granularity,
    Group,
    load_group,
    matched,
    random_group,
    select_top,
    set_difference,
    unit_scores,
)
from neurondrift.groups.order import importance_of, write_importance
from neurondrift.importance.scoring import (
    ScoreFile,
    check_compatible,
    iterate_scores,
    score_header,
    score_shapes,
    write_scores,
)
from neurondrift.models import attach_adapter, load_model, quiet_transformers, resolve_device, resolve_dtype
from neurondrift.progress import progress
from neurondrift.sites import Site, linear_sites, mlp_units
from neurondrift.training import align as align_model
from neurondrift.training import evaluated_steps, saved_step, total_steps
from neurondrift.training import finetune as finetune_model

GRANULARITIES: tuple[Granularity, ...] = ("neuron", "weight")


def load_base(study: Study, folder: StudyFolder, *, dtype: str | None = None) -> tuple[Any, Any]:
    """The model that is scored and fine-tuned (aligned, where the study aligns), and its tokenizer."""
    settings = study.model
    return load_model(
        folder.base_model,
        dtype=dtype or settings.dtype,
        device=settings.device,
        revision=None if study.align.enabled else settings.revision,
        trust_remote_code=settings.trust_remote_code,
    )


# --- align ----------------------------------------------------------------------------------------------


def align(study: Study, folder: StudyFolder) -> str:
    """Teach the model to refuse: supervised fine-tuning on refusals and ordinary answers in turn."""
    settings, source = study.align, study.model
    model, tokenizer = load_model(
        source.reference,
        dtype="float32",
        device=source.device,
        revision=source.revision,
        trust_remote_code=source.trust_remote_code,
    )
    references = [settings.refusals, settings.ordinary, settings.borderline]
    examples = [example for reference in references if reference is not None for example in load_examples(reference)]
    encoded = encode(examples, tokenizer, max_length=settings.max_length)
    with progress("align", settings.max_steps) as advance, tempfile.TemporaryDirectory() as scratch:
        log = align_model(
            model,
            encoded,
            settings,
            seed=study.seed,
            autocast=_autocasts(study),
            scratch=Path(scratch),
            advance=advance,
        )
    with artifacts.atomic_path(folder.aligned) as partial, quiet_transformers():
        model.save_pretrained(str(partial))
        tokenizer.save_pretrained(str(partial))
        artifacts.write_json(partial / "training_log.json", findings.json_safe(log))
    loss = f", loss {log[0]['loss']:.2f} → {log[-1]['loss']:.2f}" if log else ""
    return f"{settings.max_steps} steps on {len(examples)} examples{loss}"


def align_outputs(study: Study, folder: StudyFolder) -> list[Path]:
    return [folder.aligned]


# --- score ----------------------------------------------------------------------------------------------


def score(study: Study, folder: StudyFolder) -> str:
    """Importance of every weight for safety and for utility, into scratch files.

    Under torchrun every process scores its share of the examples, and the first writes.
    """
    settings = study.score
    model, tokenizer = load_base(study, folder)
    sites = linear_sites(model)
    weights = sum(site.shape[0] * site.shape[1] for site in sites.values())
    if is_first_process():
        scratch = artifacts.scratch_directory(folder.root, needed=2 * 4 * weights)
        artifacts.require_space(scratch, 2 * 4 * weights, purpose="the scores")
    with joined_processes():
        for purpose, reference in (("safety", settings.safety), ("utility", settings.utility)):
            encoded = encode(load_examples(reference), tokenizer, max_length=settings.max_length)
            with progress(f"score {purpose}", -(-len(encoded) // process_count())) as advance:
                scores = iterate_scores(
                    model,
                    encoded,
                    method=settings.method,
                    batch_size=settings.batch_size,
                    sites=sites,
                    seed=study.seed,
                    on_batch=_advancing(advance),
                )
                if not is_first_process():
                    collections.deque(scores, maxlen=0)  # the sums are shared; one process writes them
                    continue
                header = score_header(model, encoded, method=settings.method, purpose=purpose, source=reference.source)
                shapes = score_shapes(settings.method, sites)
                write_scores(folder.score_file(purpose), scores, header=header, shapes=shapes)
    return f"{settings.method}, {weights / 1e6:.1f} million weights in {len(sites)} sites"


def _advancing(advance: Callable[[int], None]) -> Callable[[Batch], None]:
    return lambda batch: advance(len(batch.names))


def score_outputs(study: Study, folder: StudyFolder) -> list[Path]:
    return [folder.score_file(purpose) for purpose in ("safety", "utility")]


# --- groups ---------------------------------------------------------------------------------------------


def groups(study: Study, folder: StudyFolder) -> str:
    """Safety by top share and by set difference, utility, random; each with a matched control; neurons and weights."""
    settings = study.groups
    safety, utility = (ScoreFile(folder.score_file(purpose)) for purpose in ("safety", "utility"))
    check_compatible(safety, utility)
    model, _ = load_base(study, folder)
    sites = linear_sites(model)
    shapes = {name: site.shape for name, site in sites.items()}
    folder.groups.mkdir(parents=True, exist_ok=True)
    counts = []
    for granularity in GRANULARITIES:
        made: dict[str, Group] = {
            "safety_top": select_top(safety, fraction=settings.top_fraction, granularity=granularity),
            "safety_set_difference": set_difference(
                safety, utility, p=settings.set_difference_p, q=settings.set_difference_q, granularity=granularity
            ),
            "utility_top": select_top(utility, fraction=settings.top_fraction, granularity=granularity),
            "random": random_group(
                shapes,
                fraction=settings.top_fraction,
                seed=study.seed,
                granularity=granularity,
                provenance={"model": safety.header["model"]},
            ),
        }
        assert tuple(made) == GROUP_NAMES
        magnitudes = {
            name: row_norms(site.weight).numpy() if granularity == "neuron" else site.weight.float().abs().cpu().numpy()
            for name, site in sites.items()
        }
        bins = settings.bins if granularity == "neuron" else settings.weight_bins

        def save(
            name: str,
            granularity: Granularity = granularity,
            made: Mapping[str, Group] = made,
            magnitudes: Mapping[str, Any] = magnitudes,
            bins: int = bins,
        ) -> None:
            (control,) = matched(made[name], magnitudes, seed=study.seed, bins=bins)
            made[name].save(folder.group_file(name, granularity))
            control.save(folder.group_file(name, granularity, matched=True))
            if granularity == "neuron":
                made[name].save(folder.group_file(name, granularity, suffix="json"))
                order = importance_of(made[name], utility if name == "utility_top" else safety)
                write_importance(folder.importance_file(name, granularity), made[name], order)

        with ThreadPoolExecutor(2) as pool:
            list(pool.map(save, made))
        counts.append(f"{len(made['safety_set_difference']):,} {granularity}s by set difference")
    if study.finetune.freeze_granularity == "unit":
        chosen = _unit_groups(study, folder, safety, utility, sites)
        counts.append(f"{len(chosen['safety_set_difference']):,} units by set difference")
    return "; ".join(counts)


def _unit_groups(
    study: Study, folder: StudyFolder, safety: ScoreFile, utility: ScoreFile, sites: Mapping[str, Site]
) -> dict[str, Group]:
    """The same groups of MLP hidden units, matched on the norm of all weights of a unit: made where they are to be
    frozen."""
    settings, units = study.groups, mlp_units(dict(sites))
    about: dict[str, Any] = {name: safety.header[name] for name in ("model", "method", "data") if name in safety.header}
    of_safety, of_utility = unit_scores(safety, units), unit_scores(utility, units)
    magnitudes = {}
    for name, unit in units.items():
        names = {unit.down, *(up for up, _ in unit.ups)}
        squares = {site: sites[site].weight.float().square().cpu().numpy() for site in names}
        magnitudes[name] = np.sqrt(unit_scores(squares, {name: unit})[name])
    made = {
        "safety_top": select_top(of_safety, fraction=settings.top_fraction, granularity="unit", provenance=about),
        "safety_set_difference": set_difference(
            of_safety,
            of_utility,
            p=settings.set_difference_p,
            q=settings.set_difference_q,
            granularity="unit",
            provenance={**about, "utility_data": utility.header.get("data")},
        ),
        "utility_top": select_top(
            of_utility,
            fraction=settings.top_fraction,
            granularity="unit",
            provenance={**about, "data": utility.header.get("data")},
        ),
        "random": random_group(
            {name: (unit.count, 1) for name, unit in units.items()},
            fraction=settings.top_fraction,
            seed=study.seed,
            granularity="unit",
            provenance={"model": safety.header["model"]},
        ),
    }
    for name, group in made.items():
        (control,) = matched(group, magnitudes, seed=study.seed, bins=settings.bins)
        group.save(folder.group_file(name, "unit"))
        control.save(folder.group_file(name, "unit", matched=True))
    return made


def groups_outputs(study: Study, folder: StudyFolder) -> list[Path]:
    return [folder.groups]


def neuron_groups(folder: StudyFolder) -> dict[str, Group]:
    """The groups of neurons that a study made, by name."""
    return {name: load_group(folder.group_file(name, "neuron")) for name in GROUP_NAMES}


def weight_groups(folder: StudyFolder) -> dict[str, Group]:
    """The groups of weights that a study made, each followed by its matched control, `NAME.matched`."""
    files = {f"{name}{mark}": (name, bool(mark)) for name in GROUP_NAMES for mark in ("", findings.MATCHED)}
    return {
        label: load_group(folder.group_file(name, "weight", matched=matched))
        for label, (name, matched) in files.items()
    }


# --- finetune -------------------------------------------------------------------------------------------


def finetune(study: Study, folder: StudyFolder, seed: int, key: str) -> str:
    """Fine-tune on ordinary instructions, with a drift snapshot at every interval.

    `key` is the fingerprint of all that the stage depends on: what an interrupted run with the same key has left is
    gone on from, anything else is deleted.
    """
    settings = study.finetune
    freeze = None if folder.frozen_group is None else FreezeCallback(folder.frozen_group)
    full = settings.method == "full"
    if full and not Path(folder.base_model).is_dir():
        raise ConfigError(
            "Full fine-tuning measures drift against the initial weights, which must lie in a local folder",
            received=folder.base_model,
            fix="download the model and name its folder as the reference",
        )
    model, tokenizer = load_base(study, folder, dtype="float32" if full else None)
    encoded = encode(load_examples(settings.data), tokenizer, max_length=settings.max_length)
    total = total_steps(len(encoded), settings)
    keep = evaluated_steps(total, settings.drift_interval, settings.evaluated_steps)
    initial = CheckpointWeights(folder.base_model, linear_sites(model)) if full else None
    callback = DriftCallback(
        folder.drift(seed),
        every=settings.drift_interval,
        groups=weight_groups(folder),
        initial=initial,
        on_full_disk="stop",  # the command is run again and resumes
    )
    target = folder.adapters(seed)
    _start_over_if_changed(target, folder.drift(seed), key)
    with progress(f"finetune, seed {seed}", total) as advance:
        _, log = finetune_model(
            model,
            tokenizer,
            encoded,
            settings,
            seed=seed,
            folder=target,
            save_at=keep,
            autocast=_autocasts(study),
            callbacks=[callback] if freeze is None else [freeze, callback],
            advance=advance,
        )
    artifacts.write_json(target / "training_log.json", findings.json_safe(log))
    tokenizer.save_pretrained(str(target / "tokenizer"))
    shutil.rmtree(target / "trainer", ignore_errors=True)
    loss = f", loss {log[0]['loss']:.2f} → {log[-1]['loss']:.2f}" if log else ""
    frozen = "" if freeze is None else f"; {freeze.report}"
    return f"{total} steps, {len(callback.log.steps())} drift snapshots{loss}{frozen}"


def _autocasts(study: Study) -> bool:
    """Whether training computes in bfloat16 over float32 weights."""
    return resolve_dtype(study.model.dtype, resolve_device(study.model.device)) == torch.bfloat16


def finetune_outputs(study: Study, folder: StudyFolder, seed: int) -> list[Path]:
    return [folder.adapters(seed), folder.drift(seed)]


def _start_over_if_changed(target: Path, drift: Path, key: str) -> None:
    """Keep what an interrupted run with the same inputs has left, so that it resumes; delete anything else."""
    marker = target / "in_progress.json"
    if (target / "trainer").is_dir() and marker.exists() and artifacts.read_json(marker) == key:
        return
    for path in (target, drift):
        if path.is_dir():
            shutil.rmtree(path)
    artifacts.write_json(marker, key)


# --- evaluate -------------------------------------------------------------------------------------------


def evaluate(study: Study, folder: StudyFolder, seed: int) -> str:
    """Refusals and perplexity before, during and after fine-tuning."""
    settings = study.evaluate
    sets = _prompt_sets(study)
    answers_set = load_examples(settings.answers)
    judging = _judging(study)  # a missing judge, file of suffixes or task is an error before anything is generated
    manager = check_tasks(settings.capability_tasks) if settings.capability_tasks else None
    target = folder.behaviour(seed)
    if target.is_dir():
        shutil.rmtree(target)
    target.mkdir(parents=True)
    steps = [0, *sorted(int(entry.name.removeprefix("step=")) for entry in folder.adapters(seed).glob("step=*"))]
    answers = count_answers(sets, judging["attack"])
    unaligned = study.align.enabled and seed == study.seed
    early = {"harmful": sets["harmful"]}
    total = answers * len(steps) + (count_answers(early, judging["attack"]) if unaligned else 0)
    harmful: dict[int, float] = {}
    perplexities: list[dict[str, Any]] = []
    capabilities: list[dict[str, Any]] = []
    with progress(f"evaluate, seed {seed}", total) as advance:
        if unaligned:
            rows = _evaluate_unaligned(study, early, advance, judging)
            write_answers(target / "before_alignment.parquet", rows, step=None, seed=None)
        for step in steps:
            model, tokenizer = _model_at(study, folder, seed, step)
            rows = judge_answers(model, tokenizer, sets, advance=advance, **judging)
            judging["panel"].release()
            write_answers(target / f"step={step:06d}.parquet", rows, step=step, seed=seed)
            harmful[step] = refusal_rate([row["refused"] for row in per_prompt(rows) if row["kind"] == "harmful"]).rate
            value = perplexity(
                model, tokenizer, answers_set, batch_size=settings.batch_size, max_length=settings.max_length
            )
            perplexities.append({"seed": seed, "step": step, "perplexity": value})
            if settings.capability_tasks:
                found = capability(
                    model, tokenizer, settings.capability_tasks, batch_size=settings.batch_size, manager=manager
                )
                capabilities += [{"seed": seed, "step": step, **row} for row in found]
            del model
    _write_rows(target / "perplexity.parquet", perplexities)
    if capabilities:
        _write_rows(target / "capability.parquet", capabilities)
    return "refusals of harmful requests " + " → ".join(f"{rate:.2f}" for rate in harmful.values())


def evaluate_outputs(study: Study, folder: StudyFolder, seed: int) -> list[Path]:
    return [folder.behaviour(seed)]


def _prompt_sets(study: Study) -> dict[str, list[Example]]:
    settings = study.evaluate
    references: dict[str, DataReference | None] = {
        "harmful": settings.harmful,
        "ordinary": settings.ordinary,
        "borderline": settings.borderline,
    }
    return {
        kind: load_examples(reference, require_response=False)
        for kind, reference in references.items()
        if reference is not None
    }


def _judging(study: Study) -> dict[str, Any]:
    settings = study.evaluate
    return {
        "panel": Panel(
            [settings.judge, *settings.further_judges],
            kind=settings.judge_kind,
            prompt=settings.judge_prompt,
            device=study.model.device,
        ),
        "attack": attack_of(settings.attack),
        "system": system_prompt(settings.system_prompt),
        "max_new_tokens": settings.max_new_tokens,
        "batch_size": settings.batch_size,
        "max_length": settings.max_length,
    }


def _evaluate_unaligned(
    study: Study, sets: Mapping[str, list[Example]], advance: Any, judging: Mapping[str, Any]
) -> list[dict[str, Any]]:
    source = study.model
    model, tokenizer = load_model(
        source.reference,
        dtype=source.dtype,
        device=source.device,
        revision=source.revision,
        trust_remote_code=source.trust_remote_code,
    )
    return judge_answers(model, tokenizer, sets, advance=advance, **judging)


def _model_at(study: Study, folder: StudyFolder, seed: int, step: int) -> tuple[Any, Any]:
    """The model at a training step: the base, the base with that step's adapter, or that step's full model."""
    if step and study.finetune.method == "full":
        model, _ = load_model(
            saved_step(folder.adapters(seed), step), dtype=study.model.dtype, device=study.model.device
        )
        return model, load_base(study, folder)[1]
    model, tokenizer = load_base(study, folder)
    if step:
        model = attach_adapter(model, saved_step(folder.adapters(seed), step)).eval()
    return model, tokenizer


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with artifacts.atomic_path(path) as partial:
        pq.write_table(pa.Table.from_pylist(rows), partial)


# --- analyze and report -----------------------------------------------------------------------------------


def analyze(study: Study, folder: StudyFolder) -> str:
    """Does each group drift more than its matched controls? The findings, as one JSON file."""
    logs = {seed: DriftLog(folder.drift(seed)) for seed in study.seeds}
    answers = {seed: findings.read_answers(folder.behaviour(seed)) for seed in study.seeds}
    parts = findings.analysis(
        logs, neuron_groups(folder), answers, study.analyze, bins=study.groups.bins, rng_seed=study.seed
    )
    before = folder.behaviour(study.seed) / "before_alignment.parquet"
    behaviour = findings.behaviour(
        answers,
        {seed: findings.read_perplexities(folder.behaviour(seed)) for seed in study.seeds},
        per_prompt(findings.read_table(before)) if before.exists() else [],
        {
            "judge": study.evaluate.judge,
            "attack": attack_of(study.evaluate.attack).name,
            "system_prompt": study.evaluate.system_prompt,
            "max_new_tokens": study.evaluate.max_new_tokens,
        },
        capability=[row for seed in study.seeds for row in findings.read_capability(folder.behaviour(seed))],
    )
    steps = parts.pop("steps")
    content = {
        "schema_version": findings.SCHEMA_VERSION,
        "study": _describe(study, next(iter(logs.values())).metadata()["model"], steps[-1]),
        **parts,
        "behaviour": behaviour,
    }
    artifacts.write_json(folder.results_file, findings.json_safe(content))
    return "; ".join(
        f"{effect['group']}: {effect['verdict']}"
        for effect in content["analysis"]["effects"]
        if effect["metric"] == study.analyze.primary_metric and effect["group"].startswith("safety")
    )


def analyze_files(
    study: Study, folder: StudyFolder, *, drift: Sequence[Path], group_files: Sequence[Path]
) -> dict[str, Any]:
    """Findings and report from drift logs (one a training seed) and groups of neurons that were made elsewhere.

    A group is called what its file is called, up to the first dot. Raises `ArtifactError` or `GroupError` for logs
    and groups that do not belong together, `ConfigError` for two groups of one name.
    """
    names = [path.name.split(".")[0] for path in group_files]
    if len(set(names)) != len(names):
        raise ConfigError(
            "Two group files have the same name", received=names, fix="rename one: the name labels the group"
        )
    logs = {index: DriftLog(path) for index, path in enumerate(drift)}
    chosen = {name: load_group(path) for name, path in zip(names, group_files, strict=True)}
    parts = findings.analysis(logs, chosen, {}, study.analyze, bins=study.groups.bins, rng_seed=study.seed)
    steps = parts.pop("steps")
    made = record()
    about = {
        "name": folder.root.resolve().name,
        "model": f"fingerprint {logs[0].metadata()['model']}",
        "model_fingerprint": logs[0].metadata()["model"],
        "seeds": list(logs),
        "steps": steps[-1],
        "versions": made["versions"],
        "created": made["created"],
    }
    content = {"schema_version": findings.SCHEMA_VERSION, "study": about, **parts, "behaviour": None}
    artifacts.write_json(folder.results_file, findings.json_safe(content))
    report(study, folder)
    return content


def analyze_outputs(study: Study, folder: StudyFolder) -> list[Path]:
    return [folder.results_file]


def _describe(study: Study, fingerprint: str, steps: int) -> dict[str, Any]:
    made = record()
    finetune_settings = study.finetune.model_dump(mode="json")
    score_settings = study.score
    return {
        "name": study.name,
        "model": study.model.reference,
        "aligned_first": study.align.enabled,
        "model_fingerprint": fingerprint,
        "seeds": study.seeds,
        "steps": steps,
        "finetune": finetune_settings | {"data": study.finetune.data.source},
        "score": {
            "method": score_settings.method,
            "safety": score_settings.safety.source,
            "utility": score_settings.utility.source,
            "examples": {
                "safety": len(load_examples(score_settings.safety)),
                "utility": len(load_examples(score_settings.utility)),
            },
        },
        "versions": made["versions"],
        "created": made["created"],
        "commit": made.get("commit"),
        "threads": torch.get_num_threads(),
    }


def report(study: Study, folder: StudyFolder) -> str:
    """The findings as text, figures and a page."""
    from neurondrift.report import draw_figures, render_page, render_text

    results = artifacts.read_json(folder.results_file)
    if (ranks := folder.results / "subspaces.json").exists():
        results["subspaces"] = artifacts.read_json(ranks)
    if (causes := folder.results / "interventions.json").exists():
        found = artifacts.read_json(causes)
        tuned = saved_step(folder.adapters(found["training_seed"]), found["training_step"] or 0)  # 0: made elsewhere
        is_current = found["adapter"] == weights_digest(tuned)
        results["interventions"] = found if is_current else found | {"model_fingerprint": "other weights"}
    artifacts.write_text(folder.results / "drift_analysis_report.txt", render_text(results))
    figures = draw_figures(results, folder.results / "figures")
    artifacts.write_text(folder.results / "report.html", render_page(results, figures))
    return str(folder.results / "drift_analysis_report.txt")


def report_with_responses(study: Study, folder: StudyFolder) -> list[Path]:
    """The report once more with the answers to harmful requests in it, in files of its own.

    Those at the first and the last evaluated step of every seed, and before the alignment. Returns the files; raises
    `ArtifactError` where the study has no findings yet.
    """
    from neurondrift.report import render_page, render_text

    results = artifacts.read_json(folder.results_file)
    answers: list[dict[str, Any]] = []
    for seed in study.seeds:
        files = sorted(folder.behaviour(seed).glob("step=*.parquet"))
        early = folder.behaviour(seed) / "before_alignment.parquet"
        for file in [early] * early.exists() + files[:1] + files[1:][-1:]:
            rows = findings.read_table(file)
            answers += [row for row in rows if row["kind"] == "harmful" and row.get("primary", True)]
    figures = sorted((folder.results / "figures").glob("*.svg"))
    written = {
        folder.results / "report_with_responses.txt": render_text(results, answers),
        folder.results / "report_with_responses.html": render_page(results, figures, answers),
    }
    for path, text in written.items():
        artifacts.write_text(path, text)
    return list(written)


def weights_digest(path: Path) -> str:
    """What tells one fine-tuned model from another: the checksums of its weights; empty where there are none."""
    sums = [artifacts.sha256_of_file(file) for file in sorted(path.glob("*.safetensors"))]
    return artifacts.sha256_of_value(sums)[:16] if sums else ""


def report_outputs(study: Study, folder: StudyFolder) -> list[Path]:
    names = ("drift_analysis_report.txt", "report.html", "figures")
    return [folder.results / name for name in names]
