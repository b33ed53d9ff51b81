"""Importance of weights and neurons: SNIP, Wanda, Fisher, Taylor, magnitude, random."""

from neurondrift.importance.methods import METHODS, Method, Tokens, get_method
from neurondrift.importance.scoring import ScoreFile, iterate_scores, plan_passes, score, score_header, write_scores

__all__ = [
    "METHODS",
    "Method",
    "ScoreFile",
    "Tokens",
    "get_method",
    "iterate_scores",
    "plan_passes",
    "score",
    "score_header",
    "write_scores",
]
