"""How numbers, verdicts and names are put into words. Computes nothing; knows no layout."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence

from neurondrift.base.roles import CONTROLS, NEGATIVE_CONTROLS, ROLES, WEI_GROUPS, Role, role_of_name

#: Part of the findings, read field by field: a TypedDict of `report.findings`, or any mapping.
Record = Mapping[str, object]
Form = Callable[[float], str]

ALL = "all"
NOT_RECORDED = "not recorded"
NO_REASON = "no reason recorded"

METRICS = {
    "relative": "relative drift ‖Δw‖/‖w₀‖",
    "l2": "L2 drift ‖Δw‖",
    "cosine_distance": "cosine distance 1 − cos(w₀, wₜ)",
}
OPTIMISERS = {"adamw": "AdamW", "sgd": "SGD"}
KINDS = {"harmful": "harmful requests", "borderline": "borderline-but-safe prompts", "ordinary": "ordinary prompts"}
#: How far a group moved, beside comparable neurons. No verdict names a hypothesis: a length decides between none.
VERDICTS = {"more": "further", "similar": "as far", "protected": "less far", "inconclusive": "inconclusive"}
NOT_COMPARABLE = "not comparable"
#: What is matched on.
COVARIATES = {
    "norm": "row norm",
    "utility_score": "utility score",
    "safety_score": "safety score",
    "gradient_scale": "gradient scale",
    "alignment_change": "change of the alignment",
}
LENGTHS_ALONE = (
    "Lengths of drift alone do not decide between H1 (fragile safety) and H2 (pathway creation), which are no "
    "complements: under AdamW every weight moves about as far, whatever its gradient. What follows for either needs "
    "what the change does."
)
OLDER = (
    "none by this version: these findings were made by an older one, which judged by g and without controls of known "
    "answer; run neurondrift analyze again"
)


def clean(value: object, fallback: str = NOT_RECORDED) -> str:
    """A name or free text from the results as one line without control characters; `fallback` where empty."""
    text = "" if value is None else str(value)
    text = "".join(c if c.isprintable() else " " for c in text)
    return re.sub(r"\s+", " ", text).strip() or fallback


def role_of(record: Record) -> Role | None:
    """What the group that a record is about is to the study: its `role`, or what its name tells of in older files."""
    if "role" not in record:
        return role_of_name(str(record["group"]))
    return next((role for role in ROLES if role == record["role"]), None)


def is_safety(record: Record) -> bool:
    """Whether the question is about the group of this record."""
    return role_of(record) == "safety"


def is_negative_control(record: Record) -> bool:
    """Whether only chance chose the group of this record."""
    return role_of(record) in NEGATIVE_CONTROLS


def is_control(record: Record) -> bool:
    """Whether the answer of this record's group is known before."""
    return role_of(record) in CONTROLS


def metric_words(metric: str) -> str:
    """A metric's name in plain words, with its formula where known."""
    return METRICS.get(metric) or clean(metric)


def metric_name(metric: str) -> str:
    """A metric's name in plain words: relative drift."""
    return METRICS[metric].rsplit(" ", 1)[0] if metric in ("relative", "l2") else clean(metric).replace("_", " ")


def optimiser_words(name: str, momentum: object = None) -> str:
    """An optimiser as it is written: AdamW, SGD with momentum 0.9."""
    return (OPTIMISERS.get(name) or clean(name)) + (f" with momentum {clean(momentum)}" if momentum else "")


def sentence_case(text: str) -> str:
    """With a capital first letter, the rest as it is (a Δ stays one)."""
    return text[:1].upper() + text[1:]


def seeds_words(count: int) -> str:
    """`1 seed`, `3 seeds`."""
    return f"{count} seed{'' if count == 1 else 's'}"


def finite(value: object) -> float | None:
    """The number, or None where it is missing, null or not finite."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def effect(value: float) -> str:
    """A standardised effect with its sign: +0.12."""
    if abs(value) >= 100:
        return f"{value:+.3g}"
    text = f"{value:+.2f}"
    return "+0.00" if text == "-0.00" else text


def drift(value: float) -> str:
    """Three significant digits; scientific where small or large: 5.12e-05."""
    if value == 0:
        return "0"
    if not 1e-3 <= abs(value) < 1e4:
        return f"{value:.2e}"
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def ratio(value: float) -> str:
    """A ratio: 1.03."""
    return f"{value:.2f}" if 0.01 <= abs(value) < 100 else f"{value:.2e}"


def probability(value: float) -> str:
    """A p-value with two significant digits: 0.031, or <0.0001."""
    if value < 1e-4:
        return "<0.0001"
    return f"{value:.{max(2, 1 - math.floor(math.log10(value)))}f}"


def share(value: float) -> str:
    """A share of 1 with two decimals: 0.92."""
    return f"{value:.2f}"


def plain(value: float) -> str:
    """A number as people write it: 8, 16, 0.0001, 12.4."""
    return f"{value:,.0f}" if value == int(value) and abs(value) < 1e15 else f"{value:.3g}"


def verdict(record: Record) -> str:
    """How far a group moved, in words, from its ratio: further, as far, less far, inconclusive, not comparable."""
    if record.get("comparable") is False:
        return NOT_COMPARABLE
    found = clean(record.get("verdict"))
    value = finite(record.get("ratio"))
    if record.get("below_band") and found == "similar" and value is not None:
        return f"{'further' if value > 1 else 'less far'}, by less than the band"
    return VERDICTS.get(found, found)


def moved(words: str) -> str:
    """The words of a verdict as what a group did, before "comparable neurons"."""
    return {
        "further": "moved further than",
        "as far": "moved as far as",
        "less far": "moved less far than",
        "inconclusive": "cannot be told apart from, nor shown to move as far as,",
        NOT_COMPARABLE: "has no",
        "further, by less than the band": "moved further, by less than the band, than",
        "less far, by less than the band": "moved less far, by less than the band, than",
    }.get(words, words)


def published_words(names: Sequence[str] = WEI_GROUPS) -> str:
    """How groups are called that are chosen by what matters for refusals, beside those of the alignment's change."""
    published = listed([name for name in names if name in WEI_GROUPS])
    return "groups of what matters for refusals" + (f" (those of Wei et al.: {published})" if published else "")


def group_words(names: Sequence[str]) -> str:
    """Names of groups, those of Wei et al. told: `safety_set_difference (of Wei et al.) and safety_residual`."""
    return listed([f"{clean(name)} (of Wei et al.)" if name in WEI_GROUPS else clean(name) for name in names])


def covariate(name: str) -> str:
    """A covariate's name in plain words."""
    return COVARIATES.get(name) or clean(name).replace("_", " ")


def listed(names: Sequence[str]) -> str:
    """`a, b and c`."""
    return " and ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))


def why_not_comparable(
    because: Sequence[str], *, worst: str, difference: float | None, without_control: int, of_members: int
) -> str:
    """Why a group has no counterfactual, with the numbers."""
    size = "undefined" if difference is None else f"{difference:+.2f} SD"
    said = {
        "imbalance": f"{covariate(worst)} differs by {size} after adjustment" if worst else "covariates differ",
        "without_control": f"{without_control:,} of {of_members:,} members have no control",
        "undefined_drift": "too many drifts have no logarithm",
        "nothing_compared": "no member could be compared",
    }
    return "; ".join(said.get(each, clean(each)) for each in because) or NO_REASON


def reason(record: Record, field: str) -> str:
    """Why a field is undefined, as the results say it."""
    return clean(record.get(f"{field}_reason") or record.get("reason"), NO_REASON)


def number(record: Record | None, field: str, form: Form) -> str:
    """A field as text, or `undefined (reason)`."""
    if record is None:
        return f"undefined ({NO_REASON})"
    value = finite(record.get(field))
    return f"undefined ({reason(record, field)})" if value is None else form(value)


def ratio_with_interval(record: Record) -> str | None:
    """`1.02 [1.00, 1.04]` of a record with `ratio` and `ratio_ci95`; None where it is undefined."""
    value = finite(record.get("ratio"))
    limits = interval(record.get("ratio_ci95"), ratio)
    return None if value is None or limits is None else f"{ratio(value)} {limits}"


def hundredths(share: float) -> str:
    """A share that may be negative and small: +0.37 %."""
    return f"{100 * share + 0.0:+.2f} %"


def interval(limits: object, form: Form) -> str | None:
    """`[low, high]`, or None where a limit is undefined."""
    if not isinstance(limits, Sequence) or isinstance(limits, str) or len(limits) != 2:
        return None
    low, high = finite(limits[0]), finite(limits[1])
    return None if low is None or high is None else f"[{form(low)}, {form(high)}]"


def rate(record: Record | None) -> str:
    """A rate with its interval: 0.92 [0.84, 0.96]; `not measured` where there is none."""
    value = finite(record.get("rate")) if record else None
    if record is None or value is None:
        return "not measured"
    limits = interval([record.get("low"), record.get("high")], share)
    return f"{share(value)} {limits}" if limits else share(value)


class Footnotes:
    """Collects the reasons for undefined cells of one table: the cell says `undefined (a)`, a note explains (a)."""

    def __init__(self) -> None:
        self._letters: dict[str, str] = {}

    def undefined(self, why: str) -> str:
        """The cell for something undefined for this reason."""
        return f"undefined ({self._letters.setdefault(why, _letter(len(self._letters)))})"

    def number(self, record: Record | None, field: str, form: Form) -> str:
        """A field as a table cell."""
        value = finite(record.get(field)) if record else None
        return form(value) if value is not None else self.undefined(reason(record or {}, field))

    def interval(self, record: Record, field: str, form: Form) -> str:
        """A pair of limits as a table cell."""
        return interval(record.get(field), form) or self.undefined(reason(record, field))

    def with_interval(self, record: Record | None, form: Form, field: str = "ci95") -> str:
        """An estimate with its interval as one cell: +0.05 [-0.10, +0.20]."""
        value = finite(record.get("value")) if record else None
        if record is None or value is None:
            return self.undefined(reason(record or {}, "value"))
        limits = interval(record.get(field), form)
        return f"{form(value)} {limits}" if limits else f"{form(value)} [{self.undefined(reason(record, field))}]"

    def ratio(self, record: Record | None) -> str:
        """A ratio with its 95 % interval as one cell."""
        if record is None:
            return "–"
        return ratio_with_interval(record) or self.undefined(reason(record, "ratio"))

    def notes(self) -> tuple[str, ...]:
        """One line a reason."""
        return tuple(f"({letter}) undefined ({why})" for why, letter in self._letters.items())


def _letter(index: int) -> str:
    return (_letter(index // 26 - 1) if index >= 26 else "") + chr(ord("a") + index % 26)
