"""What each stage of a study does: it reads the files of the stages above it and writes its own.

One module a stage: a function that does it, and one that names the files that it makes. `study.py` decides when a
stage runs.
"""

from neurondrift.stages.alignment import align, align_outputs
from neurondrift.stages.analysis import analyze, analyze_files, analyze_outputs
from neurondrift.stages.base import load_base, load_named
from neurondrift.stages.evaluation import evaluate, evaluate_outputs
from neurondrift.stages.finetuning import finetune, finetune_outputs
from neurondrift.stages.grouping import groups, groups_outputs
from neurondrift.stages.reporting import report, report_outputs, report_with_responses, weights_digest
from neurondrift.stages.scoring import score, score_outputs

__all__ = [
    "align",
    "align_outputs",
    "analyze",
    "analyze_files",
    "analyze_outputs",
    "evaluate",
    "evaluate_outputs",
    "finetune",
    "finetune_outputs",
    "groups",
    "groups_outputs",
    "load_base",
    "load_named",
    "report",
    "report_outputs",
    "report_with_responses",
    "score",
    "score_outputs",
    "weights_digest",
]
