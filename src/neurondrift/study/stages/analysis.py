"""The stage analyze: the findings, as one JSON file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from neurondrift.base.errors import ConfigError
from neurondrift.base.files import json_safe, read_json, write_json
from neurondrift.behaviour.rates import per_prompt
from neurondrift.drift.log import DriftLog
from neurondrift.groups.group import load_group
from neurondrift.report.findings.attribution import AttributionFindings
from neurondrift.report.findings.statistical import Findings, StudyFacts, findings_of
from neurondrift.study.findings import Analysed, analysis, behaviour
from neurondrift.study.folder import StudyFolder, record
from neurondrift.study.population import read_answers, read_capability, read_perplexities, read_table
from neurondrift.study.settings import Study
from neurondrift.study.stages.attribution.comparing import compare_groups, read_measured
from neurondrift.study.stages.evaluation import attack_of, longest_answer
from neurondrift.study.stages.grouping import neuron_groups
from neurondrift.study.stages.reporting import report
from neurondrift.study.stages.scoring import purposes


def analyze(study: Study, folder: StudyFolder) -> str:
    """Does each group drift more than its matched controls? The findings, as one JSON file."""
    logs = {seed: DriftLog(folder.drift(seed)) for seed in study.seeds}
    answers = {seed: read_answers(folder.behaviour(seed)) for seed in study.seeds}
    analysed = analysis(
        logs,
        neuron_groups(folder),
        answers,
        study.analyze,
        bins=study.groups.bins,
        rng_seed=study.seed,
        covariates=folder.covariates if folder.covariates.exists() else None,  # older studies have none
    )
    before = folder.behaviour(study.seed) / "before_alignment.parquet"
    behaved = behaviour(
        answers,
        {seed: read_perplexities(folder.behaviour(seed)) for seed in study.seeds},
        per_prompt(read_table(before)) if before.exists() else [],
        judge=study.evaluate.judge,
        attack=attack_of(study.evaluate.attack).name,
        system_prompt=study.evaluate.system_prompt,
        max_new_tokens=longest_answer(study.evaluate),
        capability=[row for seed in study.seeds for row in read_capability(folder.behaviour(seed))],
    )
    about = _describe(study, folder, next(iter(logs.values())).metadata()["model"], analysed.last_step)
    content = findings_of(about, **analysed.parts, behaviour=behaved, attribution=_attribution(study, folder, analysed))
    write_json(folder.results_file, json_safe(content))
    return "; ".join(
        f"{effect['group']}: {effect['verdict']}"
        for effect in content["analysis"]["effects"]
        if effect["metric"] == study.analyze.primary_metric and effect["judging"]
    )


def analyze_files(study: Study, folder: StudyFolder, *, drift: Sequence[Path], group_files: Sequence[Path]) -> Findings:
    """Findings and report from drift logs (one per training seed) and groups of neurons that were made elsewhere.

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
    analysed = analysis(logs, chosen, {}, study.analyze, bins=study.groups.bins, rng_seed=study.seed)
    made = record()
    about = StudyFacts(
        name=folder.root.resolve().name,
        model=f"fingerprint {logs[0].metadata()['model']}",
        model_fingerprint=logs[0].metadata()["model"],
        seeds=list(logs),
        steps=analysed.last_step,
        versions=made["versions"],
        created=made["created"],
    )
    content = findings_of(about, **analysed.parts, behaviour=None)
    write_json(folder.results_file, json_safe(content))
    report(study, folder)
    return content


def _attribution(study: Study, folder: StudyFolder, analysed: Analysed) -> AttributionFindings | None:
    """What the change does, group by group; None where the study does not ask."""
    if not study.attribute.enabled:
        return None
    model = DriftLog(folder.drift(study.seed)).metadata()["model"]
    folders = {seed: folder.attribution(seed) for seed in study.seeds}
    return compare_groups(read_measured(folders, analysed.compared.population, model), analysed.compared)


def outputs(study: Study, folder: StudyFolder) -> list[Path]:
    return [folder.results_file]


def _arithmetic(study: Study, folder: StudyFolder) -> dict[str, str]:
    """Stage -> what it was computed in, as its manifest says; of each seed in turn where they differ."""
    found = {}
    for stage in ("align", "score", "finetune", "evaluate", "attribute"):
        manifests = [folder.manifest(stage), *(folder.manifest(stage, seed) for seed in study.seeds)]
        said = [read_json(path).get("details", {}).get("arithmetic") for path in manifests if path.exists()]
        if any(said):
            found[stage] = "; ".join(dict.fromkeys(words or "not recorded" for words in said))
    return found


def _describe(study: Study, folder: StudyFolder, fingerprint: str, steps: int) -> StudyFacts:
    made = record()
    tune = study.finetune
    # The optimiser is said even where the configuration leaves it unsaid.
    optimiser = {"optimiser": tune.optimiser} | ({} if tune.optimiser == "adamw" else {"momentum": tune.momentum})
    score_settings = study.score
    return {
        "name": study.name,
        "model": study.model.reference,
        "aligned_first": study.align.enabled,
        "model_fingerprint": fingerprint,
        "seeds": study.seeds,
        "steps": steps,
        "finetune": tune.model_dump(mode="json") | optimiser | {"data": tune.data.title},
        "optimiser": tune.optimiser,
        "score": {
            "method": score_settings.method,
            "safety": score_settings.safety.source,
            "utility": score_settings.utility.source,
            "examples": {name: len(purpose.examples) for name, purpose in purposes(study).items()},
            **({"style": score_settings.style.source} if score_settings.style else {}),
        },
        "versions": made["versions"],
        "created": made["created"],
        "commit": made.get("commit"),
        "threads": torch.get_num_threads(),
        "arithmetic": _arithmetic(study, folder),
    }
