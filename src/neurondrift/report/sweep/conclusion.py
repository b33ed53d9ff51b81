"""The sentences about a sweep: the answer over its studies, what it leaves open, and what weakens it."""

from __future__ import annotations

import math
from collections import Counter

from neurondrift.report import wording
from neurondrift.report.sweep.findings import OneStudy, PooledEffect, Regression, SweepFindings
from neurondrift.report.wording import clean, finite, ratio

#: Fewer units than this say little about how much they differ.
FEW_UNITS = 5


def done(findings: SweepFindings) -> list[OneStudy]:
    """The studies that ended."""
    return [study for study in findings["studies"] if study["state"] == "done"]


def judging(findings: SweepFindings) -> list[PooledEffect]:
    """The groups that judge, in the primary metric."""
    primary = findings["sweep"]["primary_metric"]
    return [each for each in findings["pooled"] if each["judging"] and each["metric"] == primary]


def verdict_words(effect: PooledEffect) -> str:
    """The verdict over the studies: further, as far, less far, inconclusive, not comparable."""
    if effect["points"] == 0:
        return wording.NOT_COMPARABLE
    return wording.verdict({"verdict": effect["verdict"], "below_band": effect["below_band"], "ratio": effect["ratio"]})


def over_words(effect: PooledEffect) -> str:
    """`3 models (12 studies)`, or `6 studies of one model`."""
    studies = f"{effect['points']} {'study' if effect['points'] == 1 else 'studies'}"
    return f"{effect['models']} models ({studies})" if effect["unit"] == "model" else f"{studies} of one model"


def sentences(findings: SweepFindings) -> list[str]:
    """The answer first; then each group that judges, each study by itself, the refusals, and what weakens it."""
    about = judging(findings)
    said = [_overall(about), wording.LENGTHS_ALONE]
    said += [_effect(effect, findings) for effect in about]
    said += [_alone(effect["group"], findings) for effect in about]
    said += [text for each in findings["regressions"] if (text := _regression(each))]
    weak = weaknesses(findings)
    return [*said, *([f"What weakens this: {'; '.join(weak)}."] if weak else [])]


def _overall(about: list[PooledEffect]) -> str:
    """The answer of the groups that judge."""
    if not about:
        return "None: no study of this sweep has ended with a group that judges."
    found = {effect["group"]: verdict_words(effect) for effect in about}
    alone = [group for group, words in found.items() if words == wording.NOT_COMPARABLE]
    judged = [effect for effect in about if effect["group"] not in alone]
    withheld = f"{wording.listed(alone)} cannot be judged, for want of comparable neurons in any study"
    if not judged:
        return f"Inconclusive: {withheld}."
    over = f"Over {over_words(judged[0])}"
    verdicts = list(dict.fromkeys(found[effect["group"]] for effect in judged))
    names = wording.listed([effect["group"] for effect in judged])
    if len(verdicts) > 1:
        each = "; ".join(f"{group}: {words}" for group, words in found.items() if group not in alone)
        text = f"{over} the groups differ ({each})"
    elif verdicts == ["inconclusive"]:
        text = f"Inconclusive: {over.lower()} {names} {wording.moved('inconclusive')} comparable neurons"
    else:
        text = f"{over} {names} {wording.moved(verdicts[0])} comparable neurons"
    return f"{text}{f'; {withheld}' if alone else ''}."


def _effect(effect: PooledEffect, findings: SweepFindings) -> str:
    name, words = clean(effect["group"]), verdict_words(effect)
    if effect["points"] == 0:
        return f"{name}: no study has comparable neurons for it and an interval."
    value, limits = finite(effect["ratio"]), wording.interval(effect["ratio_ci95"], ratio)
    metric = wording.metric_name(effect["metric"])
    if value is None or limits is None:
        return (
            f"{name}: inconclusive, there is no interval over studies ({clean(effect['reason'], wording.NO_REASON)})."
        )
    text = (
        f"In {metric}, {name} {wording.moved(words)} comparable neurons "
        f"(×{ratio(value)}, 95 % interval {_to(limits)}; {over_words(effect)}"
    )
    tau, i2 = finite(effect["tau"]), finite(effect["i2"])
    if tau is not None and i2 is not None:
        text += f"; the true ratios differ by a factor of about {ratio(math.exp(tau))} (τ), I² = {100 * i2:.0f} %"
    if (ahead := wording.interval(effect["ratio_prediction95"], ratio)) is not None:
        one = "model" if effect["unit"] == "model" else "study"
        text += f"; in a further {one} the ratio would be expected within {_to(ahead)}"
    if effect["bounded"]:
        text += "; the interval holds however closely the studies' errors go together"
    return text + ")."


def _to(limits: str) -> str:
    """`[0.9, 1.1]` as `0.9 to 1.1`."""
    return limits[1:-1].replace(", ", " to ")


def _alone(group: str, findings: SweepFindings) -> str:
    """How the studies come out by themselves."""
    verdicts = Counter(
        wording.verdict(effect) for study in done(findings) for effect in study["effects"] if effect["group"] == group
    )
    counted = ", ".join(f"{words} {count}" for words, count in verdicts.most_common())
    return f"Each study by itself, of {clean(group)}: {counted}."


def _regression(found: Regression) -> str | None:
    slope, limits = finite(found["slope"]), wording.interval(found["ci95"], wording.effect)
    if slope is None or limits is None:
        return None
    low, high = (finite(limit) or 0.0 for limit in found["ci95"])
    name = clean(found["group"])
    if low > 0 or high < 0:
        side = "larger" if slope > 0 else "smaller"
        head = f"Where more refusals were lost the ratio of {name} was {side}, which shows no cause"
    else:
        head = f"No association of the ratio of {name} with the refusals that were lost was found"
    return f"{head} (log ratio {wording.effect(slope / 10)} for each tenth of the requests, 95 % interval " + (
        f"{wording.effect(low / 10)} to {wording.effect(high / 10)}; {found['k']} studies)."
    )


def weaknesses(findings: SweepFindings) -> list[str]:
    """What weakens the answer, the worst first, as clauses."""
    about, ended = judging(findings), done(findings)
    found = []
    for control in findings["controls"]:
        if control["passed"] is False:
            kind = "negative control" if control["expected"] == "similar" else "positive control"
            found.append(
                f'{clean(control["group"])}, a {kind}, came out "{verdict_words(control["effect"])}" over the studies'
            )
    missing = [study for study in findings["studies"] if study["state"] != "done"]
    if missing:
        found.append(
            f"{len(missing)} of {len(findings['studies'])} studies have not ended, and are not in these figures"
        )
    found += [
        f"{effect['left_out']} of {len(ended)} studies have no comparable neurons for {clean(effect['group'])}, or no "
        "interval, and are not in its figures"
        for effect in about
        if effect["left_out"]
    ]
    models = {study["model"] for study in ended}
    if len(models) == 1:
        found.append(
            "one model: its studies share weights, and where nothing else differs groups too, so that they say nothing "
            "of other models"
        )
    units = max((effect["k"] for effect in about), default=0)
    if 0 < units < FEW_UNITS:
        found.append(f"{units} {'models' if len(models) > 1 else 'studies'}: how much they differ is hardly known")
    if len({study["steps"] for study in ended}) > 1:
        found.append("the studies were not trained for the same number of steps")
    return found
