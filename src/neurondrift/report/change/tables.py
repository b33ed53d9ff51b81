"""The tables of what the change does: outputs and shares of the groups, totals of the margin, the margin over steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from neurondrift.report import wording
from neurondrift.report.blocks import Block, Paragraph, Section, Table, table
from neurondrift.report.change.deciding import (
    NOT_MEASURED,
    decision,
    decision_of_published,
    percent,
    share_of,
    share_verdict,
    signed_percent,
)
from neurondrift.report.findings.attribution import AttributionFindings, GroupAttribution, MarginAt, ShareEffect
from neurondrift.report.findings.ratios import CovariateBalance, RatioEffect
from neurondrift.report.findings.statistical import Findings
from neurondrift.report.reading import (
    attribution_of,
    behaviour_seeds,
    effects_of,
    group_order,
    judged,
    kinds_of,
    margins_of,
    primary_of,
)
from neurondrift.report.wording import Footnotes, clean, finite, metric_name

TITLE = "What the change does"
INPUTS = {"harmful": "harmful inputs", "ordinary": "ordinary inputs"}
WAYS = {"path": "straight way", "budget": "saved steps"}
CONTROLS = ("random", "control", "negative", "positive")
#: How notes begin that say why a group is not comparable; the first screen says so of its lengths already.
GATED = "not comparable: "
WHAT_A_SHARE_IS = (
    "Share: the gradient of the refusal margin of harmful requests along the training, times how far each weight went, "
    "summed over a group's neurons, over the sum of all. Parts have signs: some neurons gained margin, so that shares "
    "may be below 0 or above 1. It says through which weights the loss went, not that another way was closed."
)


def answer_tables(results: Findings) -> list[Table]:
    """For the first screen: outputs and shares of the groups that are no controls."""
    found = attribution_of(results)
    if found is None:
        return []
    groups = [group for group in _ordered(results, found) if group["role"] not in CONTROLS] or found["groups"]
    tables = _outputs(results, groups), _shares(found, groups, found["way"])
    return [replace(each, notes=tuple(n for n in each.notes if not n.startswith(GATED))) for each in tables]


def section(results: Findings) -> Section:
    """All groups, both ways, and what the parts sum to."""
    found = attribution_of(results)
    if found is None:
        return Section(title=TITLE, blocks=(Paragraph(wording.sentence_case(f"{NOT_MEASURED}.")),))
    groups = _ordered(results, found)
    ways = sorted({way for group in groups for way in group["shares"]}, key=lambda way: way != found["way"])
    blocks: list[Block] = [Paragraph(clean(" ".join(decision(results).sentences)))]
    if published := decision_of_published(results):
        blocks.append(Paragraph(f"By {wording.published_words()}: {clean(' '.join(published.sentences))}"))
    blocks += [_outputs(results, groups), *(_shares(found, groups, way) for way in ways)]
    blocks += [_totals(found), _directions(found, groups), Paragraph(WHAT_A_SHARE_IS)]
    return Section(title=TITLE, blocks=tuple(blocks))


def _ordered(results: Findings, found: AttributionFindings) -> list[GroupAttribution]:
    order = group_order(results)
    return sorted(found["groups"], key=lambda group: order(group["group"]))


def _name(group: GroupAttribution) -> str:
    return clean(group["group"]) + "*" * group["judging"]


def _outputs(results: Findings, groups: Sequence[GroupAttribution]) -> Table:
    notes, rows, metric = Footnotes(), [], primary_of(results)
    moved = {effect["group"]: judged(effect) for effect in effects_of(results, metric)}
    not_shown = []
    for group in groups:
        length = moved.get(group["group"])
        cells = [notes.number(length, "ratio", wording.ratio) if length else "–"]
        for name in INPUTS:
            effect = group["outputs"][name]
            cells += [notes.ratio(effect), wording.verdict(effect)]
            if not effect["comparable"]:
                not_shown.append(f"{GATED}{clean(group['group'])}: {_why(effect)}")
        rows.append((_name(group), *cells))
    headers = [part for words in INPUTS.values() for part in (f"outputs, {words} [95 %]", "moved")]
    return table(
        f"How far weights ({metric_name(metric)}) and outputs moved, as ratios to comparable neurons:",
        ("group", "weights", *headers),
        rows,
        "lrrlrl",
        (
            "* judges. Outputs: root mean square of what the change adds to a neuron's output, on answers to harmful "
            "(ordinary) requests, without the directions that the inputs of both share",
            *dict.fromkeys(not_shown),
            *notes.notes(),
        ),
    )


def _shares(found: AttributionFindings, groups: Sequence[GroupAttribution], way: str) -> Table:
    notes, rows, not_shown = Footnotes(), [], []
    for group in groups:
        share = group["shares"][way]
        rows.append(
            (
                _name(group),
                percent(share["share_of_neurons"]),
                notes.number(share, "share", signed_percent),
                notes.number(share, "expected", signed_percent),
                notes.with_interval(share["difference"], signed_percent),
                share_verdict(share),
            )
        )
        if not share["comparable"]:
            not_shown.append(f"{GATED}{clean(group['group'])}: {_why(share)}")
    band = wording.plain(100 * (found["band"] - 1))
    return table(
        f"Share of the lost refusal margin of harmful requests, along the {WAYS.get(way, clean(way))}:",
        ("group", "of the neurons", "of the lost margin", "comparable neurons", "difference [95 %]", "carries"),
        rows,
        "lrrrrl",
        (
            f"* judges. Band: {band} % of what comparable neurons carry, or of the group's share of the neurons where "
            "that is more. More: 95 % interval of the difference beyond it; not more: 90 % interval within or below it",
            *not_shown,
            *notes.notes(),
        ),
    )


def _why(found: RatioEffect | ShareEffect) -> str:
    """Why a comparison has no counterfactual."""
    gated: list[tuple[CovariateBalance, float]] = [
        (each, after) for each in found["balance"] if each["gated"] and (after := finite(each["after"])) is not None
    ]
    worst = max(gated, key=lambda pair: abs(pair[1]), default=None)
    return wording.why_not_comparable(
        found["not_comparable_because"],
        worst=worst[0]["name"] if worst else "",
        difference=worst[1] if worst else None,
        without_control=found["n_without_control"],
        of_members=found["n_compared"] + found["n_without_control"],
    )


def _totals(found: AttributionFindings) -> Table:
    notes, rows = Footnotes(), []
    for total in found["totals"]:
        change, elsewhere = finite(total["change"]), finite(total["elsewhere"])
        outside = "–" if not change or elsewhere is None else signed_percent(elsewhere / change)
        rows.append(
            (
                clean(total["seed"]),
                clean(total["prompts"]),
                WAYS.get(total["way"], clean(total["way"])),
                *(notes.number(total, name, wording.effect) for name in ("before", "after", "change", "attributed")),
                notes.number(total, "missed", percent) + ("" if total["adds_up"] is not False else " (!)"),
                outside,
                str(sum(total["points"])),
            )
        )
    kinds = {kind: value for total in found["totals"] for kind, value in total["elsewhere_by_kind"].items()}
    return table(
        "The refusal margin in nats, and what its parts sum to",
        ("seed", "prompts", "along", "before", "after", "change", "parts", "missed", "no neurons", "points"),
        rows,
        "rllrrrrrrr",
        (
            "no neurons: the part of norms, embeddings, biases and the LM head"
            + (f" ({', '.join(map(clean, kinds))})" if kinds else ", which did not move"),
            *(
                ["(!) misses more than the 2 % asked for"]
                if any(t["adds_up"] is False for t in found["totals"])
                else []
            ),
            *notes.notes(),
        ),
    )


def _directions(found: AttributionFindings, groups: Sequence[GroupAttribution]) -> Table:
    notes, rows = Footnotes(), []
    for group in groups:
        rows.append(
            (
                _name(group),
                notes.number(group, "directional", _cosine),
                notes.number(group, "directional_controls", _cosine),
                notes.number(share_of(group, found), "share_of_group", signed_percent),
                notes.number(group, "harmless", wording.effect),
            )
        )
    return table(
        "Whose update the change resembles, and what all members carry",
        ("group", "cos with safety's loss", "comparable neurons", "all members' share", "ordinary prompts, nats"),
        rows,
        "lrrrr",
        (
            "cos: of the change with the gradient of the loss on safety examples; above 0 it went against refusals, "
            "and its null is 0",
            *notes.notes(),
        ),
    )


def _cosine(value: float) -> str:
    return f"{value + 0.0:+.3f}"


def margin_tables(results: Findings) -> list[Table]:
    """The refusal margin at every evaluated step: one table per seed; none where older versions measured none."""
    out = []
    for seed in behaviour_seeds(results):
        at = {(m["step"], m["kind"]): m for m in margins_of(results, seed)}
        early = {m["kind"]: m for m in margins_of(results, None)}
        kinds = [kind for kind in kinds_of(results) if any(known == kind for _, known in at)]
        rows = [("before alignment", *(_margin(early.get(kind)) for kind in kinds))] if early else []
        steps = dict.fromkeys(step for step, _ in at)
        rows += [(clean(step), *(_margin(at.get((step, kind))) for kind in kinds)) for step in steps]
        if kinds:
            out.append(
                table(
                    f"Refusal margin at each step in nats, seed {clean(seed)}",
                    ("step", *map(clean, kinds)),
                    rows,
                    "r" * (len(kinds) + 1),
                    ("mean over prompts [95 %]; above 0 a refusal is the more probable",),
                )
            )
    return out


def _margin(found: MarginAt | None) -> str:
    value = finite(found["mean"]) if found else None
    if found is None or value is None:
        return "not measured"
    limits = wording.interval([found["low"], found["high"]], wording.effect)
    return f"{wording.effect(value)} {limits}" if limits else wording.effect(value)
