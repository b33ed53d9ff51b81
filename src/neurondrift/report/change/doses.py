"""Out of sample: the sentences, tables and notes on what the top shares of rankings carry of the lost margin."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from neurondrift.report import wording
from neurondrift.report.blocks import Paragraph, Section, Table, table
from neurondrift.report.findings.dose_response import DoseEffect, DoseResponse, OverDoses
from neurondrift.report.reading import is_same_model
from neurondrift.report.wording import Footnotes, clean, finite
from neurondrift.statistics.design.levels import ALPHA

TITLE = "Out of sample: how much of the lost margin the ranked neurons carry"
#: What neurons are ranked by.
ARMS = {
    "budget": "what each contributed to the lost margin (budget)",
    "norm": "how far it moved (norm of the change)",
    "safety_score": "its safety score",
}
SHORT = {"budget": "budget", "norm": "norm of change", "safety_score": "safety score"}
DOES = {"rewind": "putting back", "patch": "patching"}


def dose_response_findings(summary: Mapping[str, Any]) -> dict[str, Any]:
    """What `dose_response.summarise` gives, with its conclusion in words."""
    sentences = dose_response_sentences(summary)
    return {**summary, "conclusion": " ".join(sentences), "sentences": sentences}


def dose_response_sentences(summary: Mapping[str, Any]) -> list[str]:
    """What was lost on the prompts that nothing was ranked by, and what the top shares bring back of it."""
    before, after = (finite(summary["references"][end]["harmful"]) for end in ("before", "after"))
    if before is None or after is None or not before > after:
        return ["On the prompts that nothing was ranked by no margin was lost, so that nothing can come back."]
    effects: list[DoseEffect] = summary["effects"]
    said = [
        f"On harmful prompts that nothing was ranked by, fine-tuning took the refusal margin from {before:+.2f} to "
        f"{after:+.2f} nats."
    ]
    for one in summary["overall"]:
        if one["arm"] == "budget" and one["null"] == "matched":
            said.append(_over_doses(one, [e for e in effects if e["intervention"] == one["intervention"]], summary))
    return said


def _over_doses(one: OverDoses, effects: list[DoseEffect], summary: Mapping[str, Any]) -> str:
    own = {effect["dose"]: effect for effect in effects if effect["arm"] == "budget"}
    shares = ", ".join(f"{_share(own[dose]['share'])} at {100 * dose:g} %" for dose in sorted(own))
    others = "; ".join(
        f"by {SHORT[arm]} {', '.join(_share(e['share']) for e in effects if e['arm'] == arm)}"
        for arm in SHORT
        if arm != "budget" and any(e["arm"] == arm for e in effects)
    )
    p_holm, p = finite(one.get("p_holm")), finite(one["p"])
    said_p = "undefined" if p is None else wording.probability(p)
    text = (
        f"Of it {DOES[one['intervention']]} the neurons that the budget ranks first brings {shares} back ({others}); "
        f"over all doses {_share(one['share'])}, random neurons of the same sites and |w| {_share(one['null_mean'])} "
        f"({_share(one['null_low'])} to {_share(one['null_high'])}; p = {said_p}"
    )
    if p_holm is not None and summary["tests"] > 1:
        text += f", corrected for {summary['tests']} tests {wording.probability(p_holm)}"
    text += f", {one['draws']} permutations)"
    found = p_holm is not None and p_holm <= ALPHA
    if found and (finite(one["share"]) or 0.0) > (finite(one["null_mean"]) or 0.0):
        return f"{text}: the budget names neurons that carry the loss on other prompts too."
    if found:
        return f"{text}: the budget names neurons that carry less of the loss than others do."
    if one["draws"] < summary["draws_needed"]:
        return f"{text}: too few permutations to tell; {summary['draws_needed']} are needed."
    return f"{text}: that the budget names neurons that carry the loss on other prompts was not shown."


def _share(value: float | None) -> str:
    known = finite(value)
    return "undefined" if known is None else f"{round(known, 2) + 0.0:.2f}"


def section(found: DoseResponse, fingerprint: str | None = None) -> Section:
    """The whole section, from the content of `dose_response.json`; `fingerprint` is that of the report's model."""
    if not is_same_model(found["model_fingerprint"], fingerprint):
        text = "The dose-response that lies here is of another model or adapter: run neurondrift dose-response again."
        return Section(title=TITLE, blocks=(Paragraph(text),))
    blocks = (Paragraph(clean(" ".join(found["sentences"]))), dose_table(found), over_table(found))
    return Section(title=TITLE, blocks=blocks, figures=("out_of_sample_doses",))


def dose_table(found: DoseResponse) -> Table:
    """The margin of the other half of the prompts, with the top shares of each ranking put back or patched."""
    notes, rows = Footnotes(), []
    for effect in found["effects"]:
        random = effect["random"].get("matched") or effect["random"]["uniform"]
        rows.append(
            (
                clean(SHORT.get(effect["arm"], effect["arm"])),
                clean(effect["intervention"]),
                f"{100 * effect['dose']:g} %",
                f"{effect['members']:,}",
                notes.number(effect, "margin", wording.effect),
                notes.number(effect, "share", wording.effect),
                notes.number(random, "share", wording.effect),
                notes.number(random, "p", wording.probability),
                notes.number(effect, "margin_ordinary", wording.effect),
            )
        )
    settings, parts, ends = found["settings"], found["attributed"], found["references"]
    prompts = settings["prompts"]
    change = " → ".join(wording.number(ends[end], "harmful", wording.effect) for end in ("before", "after"))
    ordinary = " → ".join(wording.number(ends[end], "ordinary", wording.effect) for end in ("before", "after"))
    return table(
        f"Refusal margin of {prompts['outcome']} harmful prompts ({change} nats by fine-tuning), neurons ranked on "
        f"{prompts['ranking']} others:",
        ("ranked by", "intervention", "dose", "neurons", "margin", "share", "random", "p", "ordinary"),
        rows,
        "llrrrrrrr",
        (
            "dose: top share of each site's neurons; share: of the margin that fine-tuning took, what comes back; "
            "random: mean share of permuted rankings, of the budget within site and |w|, of others within the site; "
            "p of each line by itself, which judges nothing",
            f"ordinary: margin of ordinary prompts ({ordinary} by fine-tuning); what raises both is no return",
            f"the contributions of all neurons and of what is no site "
            f"({wording.number(parts, 'elsewhere', wording.effect)}) add up to "
            f"{wording.number(parts, 'attributed', wording.effect)} nats, which misses the true change by "
            f"{wording.number(parts, 'missed', _percent)} of it",
            *notes.notes(),
        ),
    )


def over_table(found: DoseResponse) -> Table:
    """The mean over doses, which judges the budget beside permutations within site and |w|."""
    notes, rows = Footnotes(), []
    nulls = {"matched": "site and |w|", "uniform": "site"}
    for one in found["overall"]:
        judges = "p_holm" in one
        rows.append(
            (
                clean(SHORT.get(one["arm"], one["arm"])),
                clean(one["intervention"]),
                nulls.get(one["null"], clean(one["null"])),
                notes.number(one, "share", wording.effect),
                notes.number(one, "null_mean", wording.effect),
                wording.interval([one["null_low"], one["null_high"]], wording.effect) or "-",
                notes.number(one, "p", wording.probability),
                notes.number(one, "p_holm", wording.probability) if judges else "–",
                str(one["draws"]),
            )
        )
    return table(
        "Mean over doses of the share of the lost margin that comes back:",
        ("ranked by", "intervention", "permuted within", "share", "random", "range", "p", "corrected", "draws"),
        rows,
        "lllrrrrrr",
        (
            "p: two-sided, exact: the ranking is permuted within strata, at all doses together; corrected: by Holm's "
            f"procedure for the {found['tests']} tests that judge, which takes {found['draws_needed']} permutations to "
            "reach 0.05",
            *notes.notes(),
        ),
    )


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"
