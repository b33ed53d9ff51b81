"""The stage report: the findings as text, figures and a page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from neurondrift.base.files import read_json, sha256_of_file, sha256_of_value, write_text
from neurondrift.report.findings.dose_response import DoseResponse
from neurondrift.report.findings.interventions import Interventions
from neurondrift.report.findings.statistical import Findings
from neurondrift.report.findings.subspaces import Subspaces
from neurondrift.study.folder import StudyFolder, saved_step, saved_steps
from neurondrift.study.population import read_table
from neurondrift.study.settings import Study

#: The fingerprint that the report meets where findings are of weights that are not the study's any more.
OTHER_WEIGHTS = "other weights"


def report(study: Study, folder: StudyFolder) -> str:
    """The findings as text, figures and a page."""
    from neurondrift.report.figures.draw import draw_figures
    from neurondrift.report.page import render_page
    from neurondrift.report.text import render_text

    results = read_findings(folder)
    write_text(folder.results / "drift_analysis_report.txt", render_text(results))
    figures = draw_figures(results, folder.results / "figures")
    write_text(folder.results / "report.html", render_page(results, figures))
    return str(folder.results / "drift_analysis_report.txt")


def read_findings(folder: StudyFolder) -> Findings:
    """All that the report is made from: the analysis, and what lies there of interventions, of the rank level
    and of re-drawn groups.

    Those of weights that are not the study's any more are marked as of another model. Raises `ArtifactError` where the
    study has no findings yet.
    """
    results: Findings = read_json(folder.results_file)
    if (ranks := folder.results / "subspaces.json").exists():
        results["subspaces"] = _subspaces(read_json(ranks), folder)
    if (causes := folder.results / "interventions.json").exists():
        results["interventions"] = _interventions(read_json(causes), folder)
    if (doses := folder.results / "dose_response.json").exists():
        results["dose_response"] = _dose_response(read_json(doses), folder)
    if (redrawn := folder.results / "stability.json").exists():
        results["stability"] = read_json(redrawn)
    return results


def _interventions(findings: Interventions, folder: StudyFolder) -> Interventions:
    tuned = saved_step(folder.adapters(findings["training_seed"]), findings["training_step"] or 0)  # 0: made elsewhere
    is_current = findings["adapter"] == weights_digest(tuned)
    return findings if is_current else findings | {"model_fingerprint": OTHER_WEIGHTS}


def _dose_response(findings: DoseResponse, folder: StudyFolder) -> DoseResponse:
    tuned = saved_step(folder.adapters(findings["training_seed"]), findings["training_step"])
    is_current = findings["adapter"] == weights_digest(tuned)
    return findings if is_current else findings | {"model_fingerprint": OTHER_WEIGHTS}


def _subspaces(findings: Subspaces, folder: StudyFolder) -> Subspaces:
    about = findings["study"]
    is_current = all(
        digest == weights_digest(saved_step(folder.adapters(int(seed)), about["steps"][seed]))
        for seed, digest in about.get("adapters", {}).items()  # older versions wrote none
    )
    return findings if is_current else findings | {"study": about | {"model_fingerprint": OTHER_WEIGHTS}}


def report_with_responses(study: Study, folder: StudyFolder) -> list[Path]:
    """The report once more with the answers to harmful requests in it, in files of its own.

    Those at the first and the last evaluated step of every seed, and before the alignment. Returns the files; raises
    `ArtifactError` where the study has no findings yet.
    """
    from neurondrift.report.page import render_page
    from neurondrift.report.text import render_text

    results = read_findings(folder)
    answers: list[dict[str, Any]] = []
    for seed in study.seeds:
        behaviour = folder.behaviour(seed)
        files = [saved_step(behaviour, step, ".parquet") for step in saved_steps(behaviour, ".parquet")]
        early = behaviour / "before_alignment.parquet"
        for file in [early] * early.exists() + files[:1] + files[1:][-1:]:
            rows = read_table(file)
            answers += [row for row in rows if row["kind"] == "harmful" and row.get("primary", True)]
    figures = sorted((folder.results / "figures").glob("*.svg"))
    written = {
        folder.results / "report_with_responses.txt": render_text(results, answers),
        folder.results / "report_with_responses.html": render_page(results, figures, answers),
    }
    for path, text in written.items():
        write_text(path, text)
    return list(written)


def weights_digest(path: Path) -> str:
    """What tells one fine-tuned model from another: the checksums of its weights; empty where there are none."""
    sums = [sha256_of_file(file) for file in sorted(path.glob("*.safetensors"))]
    return sha256_of_value(sums)[:16] if sums else ""


def outputs(study: Study, folder: StudyFolder) -> list[Path]:
    names = ("drift_analysis_report.txt", "report.html", "figures")
    return [folder.results / name for name in names]
