"""The stage report: the findings as text, figures and a page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from neurondrift.base.files import read_json, sha256_of_file, sha256_of_value, write_text
from neurondrift.study.folder import StudyFolder
from neurondrift.study.population import read_table
from neurondrift.study.settings import Study
from neurondrift.study.training import saved_step


def report(study: Study, folder: StudyFolder) -> str:
    """The findings as text, figures and a page."""
    from neurondrift.report.figures.draw import draw_figures
    from neurondrift.report.page import render_page
    from neurondrift.report.text import render_text

    results = read_json(folder.results_file)
    if (ranks := folder.results / "subspaces.json").exists():
        results["subspaces"] = read_json(ranks)
    if (causes := folder.results / "interventions.json").exists():
        found = read_json(causes)
        tuned = saved_step(folder.adapters(found["training_seed"]), found["training_step"] or 0)  # 0: made elsewhere
        is_current = found["adapter"] == weights_digest(tuned)
        results["interventions"] = found if is_current else found | {"model_fingerprint": "other weights"}
    write_text(folder.results / "drift_analysis_report.txt", render_text(results))
    figures = draw_figures(results, folder.results / "figures")
    write_text(folder.results / "report.html", render_page(results, figures))
    return str(folder.results / "drift_analysis_report.txt")


def report_with_responses(study: Study, folder: StudyFolder) -> list[Path]:
    """The report once more with the answers to harmful requests in it, in files of its own.

    Those at the first and the last evaluated step of every seed, and before the alignment. Returns the files; raises
    `ArtifactError` where the study has no findings yet.
    """
    from neurondrift.report.page import render_page
    from neurondrift.report.text import render_text

    results = read_json(folder.results_file)
    answers: list[dict[str, Any]] = []
    for seed in study.seeds:
        files = sorted(folder.behaviour(seed).glob("step=*.parquet"))
        early = folder.behaviour(seed) / "before_alignment.parquet"
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


def report_outputs(study: Study, folder: StudyFolder) -> list[Path]:
    names = ("drift_analysis_report.txt", "report.html", "figures")
    return [folder.results / name for name in names]
