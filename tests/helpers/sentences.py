"""Effects of interventions as `interventions.outcomes` makes them, and what the report says of them."""

import copy
import math

from neurondrift.interventions.outcomes import causes, judge, scale_of
from neurondrift.report.causes import intervention_findings, intervention_sentences

REFERENCES = {"before": {"harmful": {"rate": 0.9, "n": 32}}, "after": {"harmful": {"rate": 0.4, "n": 32}}}


def effect(
    what, value, null, p, *, half=0.1, sd=0.05, group="safety_top", role="safety", draws=20, planned=None, dose=1.0, own=0.0
):  # fmt: skip
    """One effect on refusals of 32 harmful requests; its interval is `half` to either side."""
    start, end = {"transplant": (0.9, 0.4), "prune": (0.9, 0.0)}.get(what, (0.4, 0.9))
    stopped = draws < (planned or draws)
    change = math.nan if stopped else value - null
    direction = "equal" if stopped or not change else "higher" if change > 0 else "lower"
    measure = {
        "value": value,
        "null_mean": math.nan if stopped else null,
        "null_sd": math.nan if stopped else sd,
        "null_low": null - sd,
        "null_high": null + sd,
        "effect": change,
        "ci95": [change - half, change + half],
        "p": p,
        "p_floor": 1 / (1 + (planned or draws)),
        "direction": direction,
        "draws": draws,
        "n": 32,
        "reason": "",
    }
    return {
        "intervention": what,
        "group": group,
        "role": role,
        "dose": dose,
        "draws": draws,
        "draws_planned": planned or draws,
        "stopped_early": stopped,
        "support": {"members": 100, "left_out": 0, "sites": 9, "sites_left_out": 0, "members_per_candidate": 0, "own": own},
        "measures": {"harmful": measure},
        "share": {"group": (value - start) / (end - start), "null": (null - start) / (end - start)},
    }  # fmt: skip


def judged(effects, references=REFERENCES, smallest_effect=0.1):
    """What `summarise` makes of such effects."""
    effects = copy.deepcopy(effects)
    scale = scale_of("refusals", references, smallest_effect)
    tests = judge(effects, scale)
    found = [cause._asdict() for cause in causes(effects, scale)]
    return {
        "effects": effects,
        "references": references,
        "causes": found,
        "holm_tests": tests,
        "smallest_effect": smallest_effect,
    }


def paragraph(effects, references=REFERENCES):
    """The sentences on such effects, as one paragraph."""
    return " ".join(intervention_sentences(judged(effects, references)))


def findings(effects, references=REFERENCES):
    """The findings with their conclusion."""
    return intervention_findings(judged(effects, references))
