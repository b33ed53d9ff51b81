"""H1, H2 or undecided: the rule, from shares of the lost margin and from what patching brings back, and its sentences.

H1: the judging groups carry more of the lost margin than comparable neurons, by more than the band. H2: they do not,
and putting their original activations back brings no refusals back. Else it is undecided, and the sentence says why.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from neurondrift.base.roles import ALIGNMENT_GROUPS
from neurondrift.report import wording
from neurondrift.report.findings.attribution import AttributionFindings, GroupAttribution, MarginTotals, ShareEffect
from neurondrift.report.findings.interventions import InterventionEffect
from neurondrift.report.findings.statistical import Findings
from neurondrift.report.reading import attribution_of, interventions_of, margin_changes_of, whole_groups
from neurondrift.report.wording import clean, finite, listed

Hypothesis = Literal["H1", "H2", "undecided"]
Returned = Literal["returns", "none", "unknown", "missing"]
#: The intervention that puts a group's original activations into the fine-tuned model.
PATCH = "patch"
NAMES = {"H1": "H1 (fragile safety)", "H2": "H2 (pathway creation)"}
NOT_MEASURED = "what the change does was not measured (neurondrift attribute)"


class Decision(NamedTuple):
    """Which hypothesis the data support, and the sentences that say so: the first is the answer."""

    hypothesis: Hypothesis
    sentences: tuple[str, ...]


def decision(results: Findings) -> Decision:
    """The rule applied to a study's findings: to the groups of the alignment's change where they are there, else to all
    that judge."""
    return _decision(results, published=False)


def decision_of_published(results: Findings) -> Decision | None:
    """The same by the other groups that judge, where there are groups of the alignment's change: their sentences name
    those of Wei et al. so. None where the answer rests on them already, or on nothing."""
    found = attribution_of(results)
    if found is None or not judging_groups(found, published=True) or nothing_to_share(results, found):
        return None
    return _decision(results, published=True)


def _decision(results: Findings, *, published: bool) -> Decision:
    found = attribution_of(results)
    if found is None:
        return _undecided(NOT_MEASURED)
    if why := nothing_to_share(results, found):
        return _undecided(why)
    about = judging_groups(found, published=published)
    if not about:
        return _undecided("there is no group whose role is safety")
    shares = {group["group"]: share_of(group, found) for group in about}
    comparable = {name: share for name, share in shares.items() if share["comparable"]}
    apart = [name for name in shares if name not in comparable]
    withheld = f"{listed(list(map(clean, apart)))} cannot be judged, for want of comparable neurons"
    if not comparable:
        return _undecided(withheld)
    said = [f"{clause(name, share)}." for name, share in comparable.items()]
    said += [f"{wording.sentence_case(withheld)}."] if apart else []
    said += _incomplete(found)
    verdicts = {share["verdict"] for share in comparable.values()}
    plural = len(comparable) > 1
    if verdicts == {"more"}:
        carry = "the safety groups carry" if plural else "the safety group carries"
        text = f"{NAMES['H1']} is supported: {carry} more of the lost margin than comparable neurons, beyond the band."
        return Decision("H1", (text, *said))
    if "more" in verdicts:
        more = [clean(name) for name, share in comparable.items() if share["verdict"] == "more"]
        return _undecided(f"the groups differ: only {listed(more)} carries more, beyond the band", said)
    if "inconclusive" in verdicts:
        open_ = [_would_have(name, share) for name, share in comparable.items() if share["verdict"] == "inconclusive"]
        return _undecided(f"the intervals are too wide: {'; '.join(open_)}", said)
    return _by_patching(results, list(comparable), said)


def _undecided(why: str, said: Sequence[str] = ()) -> Decision:
    return Decision("undecided", (f"Undecided between H1 and H2: {why}.", *said))


def nothing_to_share(results: Findings, found: AttributionFindings) -> str:
    """Why there is no loss to share out: none that can be told from none, or parts that do not sum to it."""
    changes = [change for change in margin_changes_of(results) if change["kind"] == "harmful"]
    for change in changes:
        high = finite(change["ci95"][1])
        if high is None or high >= 0:
            limits = wording.interval(change["ci95"], wording.effect)
            return (
                "no refusal margin was lost that can be told from none (seed "
                f"{clean(change['seed'])}: {wording.number(change, 'change', wording.effect)} nats"
                + (f", 95 % interval {limits})" if limits else ")")
            )
    if not found["lost"]:
        return "on the prompts that the margin was attributed on, none was lost in at least one seed"
    worst = max((_missed(total) for total in judged_totals(found)), default=0.0)
    if worst > found["band"] - 1:
        return f"the parts do not add up: they miss {worst:.0%} of the lost margin, more than the band is wide"
    return ""


def _missed(total: MarginTotals) -> float:
    value = finite(total["missed"])
    return 1.0 if value is None else value


def _incomplete(found: AttributionFindings) -> list[str]:
    """A sentence where parts miss more than was asked for."""
    missed = [_missed(total) for total in judged_totals(found) if total["adds_up"] is False]
    return [f"The parts miss {max(missed):.1%} of the lost margin, more than the 2 % asked for."] if missed else []


def judged_totals(found: AttributionFindings) -> list[MarginTotals]:
    """The totals of the margin that judges, one a seed."""
    return [total for total in found["totals"] if (total["way"], total["prompts"]) == (found["way"], "harmful")]


def judging_groups(found: AttributionFindings, *, published: bool = False) -> list[GroupAttribution]:
    """The groups that the answer rests on: of those that judge the ones of the alignment's change, where there are any,
    and with `published` the others; where none judges, those whose role is safety."""
    judging = [group for group in found["groups"] if group["judging"]]
    judging = judging or [group for group in found["groups"] if group["role"] == "safety"]
    first = [group for group in judging if group["group"] in ALIGNMENT_GROUPS]
    if published:
        return [group for group in judging if group not in first] if first else []
    return first or judging


def share_of(group: GroupAttribution, found: AttributionFindings) -> ShareEffect:
    """The share of a group along the way that judges."""
    return group["shares"][found["way"]]


def clause(name: str, share: ShareEffect) -> str:
    """What a group carries, beside what comparable neurons do."""
    difference = share["difference"]
    limits = wording.interval(difference["ci95"], wording.effect)
    return (
        f"{clean(name)}, {percent(share['share_of_neurons'])} of the neurons, carries "
        f"{wording.number(share, 'share', signed_percent)} of the lost margin, comparable neurons "
        f"{wording.number(share, 'expected', signed_percent)} (difference "
        f"{wording.number(difference, 'value', signed_percent)}, 95 % interval "
        f"{wording.interval(difference['ci95'], signed_percent) if limits else 'undefined'}): {share_verdict(share)}"
    )


def share_verdict(share: ShareEffect) -> str:
    """The verdict on a share in words."""
    if not share["comparable"]:
        return wording.NOT_COMPARABLE
    return {"more": "more, beyond the band", "not_more": "no more"}.get(share["verdict"], "inconclusive")


def percent(value: float) -> str:
    """A share in percent: 2.4 %."""
    return f"{100 * value:.1f} %"


def signed_percent(value: float) -> str:
    """A share that may be negative: +2.4 %."""
    text = f"{100 * value:+.1f} %"
    return text.replace("-0.0", "+0.0") if text.startswith("-0.0") else text


def _would_have(name: str, share: ShareEffect) -> str:
    return (
        f"{clean(name)} would be called more with 80 % power from a share of "
        f"{wording.number(share, 'smallest_more', signed_percent)} on"
    )


def _by_patching(results: Findings, groups: Sequence[str], said: Sequence[str]) -> Decision:
    """None carries more: what patching says decides between H2 and undecided."""
    acted = interventions_of(results)
    effects = {e["group"]: e for e in whole_groups(acted) if e["intervention"] == PATCH} if acted else {}
    found: dict[str, Returned] = {group: returned(effects.get(group)) for group in groups}
    named = {kind: listed([clean(g) for g in groups if found[g] == kind]) for kind in set(found.values())}
    carry = "the safety groups carry no more of the lost margin than comparable neurons, up to the band"
    if "returns" in named:
        text = f"{carry}, but the original activations of {named['returns']} bring refusals back"
        return _undecided(text, said)
    if set(named) == {"none"}:
        text = f"{NAMES['H2']} is supported: {carry}, and their original activations bring no refusals back."
        return Decision("H2", (text, *said))
    if "missing" in named:
        why = f"whether the original activations of {named['missing']} bring refusals back was not measured"
        return _undecided(f"{carry}, and {why} (neurondrift intervene --intervention {PATCH})", said)
    why = f"a return of all lost refusals by the original activations of {named['unknown']} might have been missed"
    return _undecided(f"{carry}, and {why}", said)


def returned(effect: InterventionEffect | None) -> Returned:
    """Whether patching a group brings refusals back, beside matched random groups.

    `none` only where a return would have been found: a missing difference shows nothing.
    """
    if effect is None:
        return "missing"
    match effect.get("standing"):
        case "stands_out":
            return "returns"
        case "opposite" | "small":
            return "none"
        case "not":
            found = effect.get("found")
            return "none" if found is not None and finite(found["share"]) is not None else "unknown"
    return "unknown"
