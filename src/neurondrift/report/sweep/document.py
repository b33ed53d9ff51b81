"""The order of a sweep's report: the answer on one screen, the studies, what they differ by, the methods."""

from __future__ import annotations

from neurondrift.report import wording
from neurondrift.report.blocks import Block, Document, Items, Paragraph, Section, Table, table
from neurondrift.report.sweep.conclusion import done, judging, verdict_words
from neurondrift.report.sweep.findings import OneEffect, OneStudy, PooledEffect, SweepFindings
from neurondrift.report.wording import Footnotes, clean, finite, metric_name, ratio

QUESTION = (
    "Question: over these models and settings, do the neurons that keep a model safe move further, as far, or less far "
    "than comparable neurons when it is fine-tuned?"
)
PASSED = {True: "passed", False: "FAILED", None: "open"}
METHODS = (
    "Each study gives the log of the ratio of its group to comparable neurons, by the comparison that judges in it, "
    "and a standard error: that of the study, or the half width of its 95 % interval over 1.96 where that is more, so "
    "that a study with few degrees of freedom does not claim more here than in its own report.",
    "The mean over studies is the random-effects mean of DerSimonian and Laird with the interval of Hartung and Knapp, "
    "whose standard error is not let fall below DerSimonian and Laird's.",
    "Studies of one model share its weights. So where there are several models each is first the mean of its studies, "
    "and the models are combined; where there is one, the interval over its studies is never narrower than the one "
    "that holds however closely their errors go together.",
    "Verdicts follow the rule of one study: the 90 % interval inside the band is as far; otherwise the 95 % interval "
    "wholly above 1 is further, wholly below less far; else inconclusive.",
    "The prediction interval is where the true ratio of a further study (model) would be expected. τ is the standard "
    "deviation of the true log ratios, I² the share of the variance between studies that is not sampling error.",
    "The regression on refusals lost is weighted by the inverse of each study's variance plus what is left of the "
    "heterogeneity, with Knapp and Hartung's errors, and treats the studies as independent.",
)


def build_document(findings: SweepFindings) -> Document:
    """The whole report of a sweep as data, from the content of `sweep_results.json`."""
    about, ended = findings["sweep"], done(findings)
    models = {study["model"] for study in ended}
    return Document(
        title=f"neurondrift sweep: {clean(about['name'])}",
        subtitle=f"{len(ended)} of {len(findings['studies'])} studies, "
        f"{len(models)} model{'' if len(models) == 1 else 's'}, "
        f"{metric_name(about['primary_metric'])}, band ×/÷ {about['band']:g}",
        answer=_answer(findings),
        sections=(_studies(findings), _subgroups(findings), _metrics(findings), _refusals(findings), *_rest(findings)),
    )


def _answer(findings: SweepFindings) -> Section:
    blocks: list[Block] = [Paragraph(QUESTION), Paragraph(f"Answer: {findings['sentences'][0]}")]
    blocks.append(Paragraph(wording.LENGTHS_ALONE))
    about = judging(findings)
    if about:
        blocks.append(_pooled_table(f"Ratio of {_primary(findings)} to comparable neurons, over the studies:", about))
    if findings["controls"]:
        blocks.append(_controls(findings))
    if findings["weaknesses"]:
        blocks += [Paragraph("What weakens this:"), Items(tuple(map(clean, findings["weaknesses"])), ordered=True)]
    return Section(title="The answer", blocks=tuple(blocks), figures=("sweep_forest",))


def _primary(findings: SweepFindings) -> str:
    return metric_name(findings["sweep"]["primary_metric"])


def _pooled_table(title: str, effects: list[PooledEffect], *, within: bool = False) -> Table:
    notes = Footnotes()
    rows = []
    for effect in effects:
        words = verdict_words(effect)
        rows.append(
            (
                *([_where(effect)] if within else []),
                clean(effect["group"]),
                words.upper() if effect["judging"] and not within else words,
                notes.ratio(effect),
                *([] if within else [wording.interval(effect["ratio_prediction95"], ratio) or "–"]),
                "–" if finite(effect["tau"]) is None else f"{effect['tau']:.3f}",
                "–" if finite(effect["i2"]) is None else f"{100 * (effect['i2'] or 0):.0f} %",
                str(effect["models"]),
                str(effect["points"]),
                str(effect["left_out"]),
            )
        )
    return table(
        title,
        (
            *(["where"] if within else []),
            "group",
            "moved",
            "ratio [95 %]",
            *([] if within else ["a further one [95 %]"]),
            "τ",
            "I²",
            "models",
            "studies",
            "left out",
        ),
        rows,
        "lllrrrrrr" if within else "llrrrrrrr",
        notes.notes(),
    )


def _where(effect: PooledEffect) -> str:
    """The setting and the value that the studies have in common: `lora_r 8`."""
    path, value = effect["within"] or ["", ""]
    return f"{clean({'model.reference': 'model', 'seeds': 'seed'}.get(path, path.rpartition('.')[2]))} {clean(value)}"


def _controls(findings: SweepFindings) -> Table:
    notes = Footnotes()
    rows = [
        (
            clean(control["group"]),
            "negative: as far" if control["expected"] == "similar" else "positive: further",
            verdict_words(control["effect"]),
            notes.ratio(control["effect"]),
            PASSED[control["passed"]],
        )
        for control in findings["controls"]
    ]
    return table(
        "Controls of known answer, over the studies:",
        ("control", "expected", "moved", "ratio [95 %]", "outcome"),
        rows,
        "lllrl",
        notes.notes(),
    )


def _studies(findings: SweepFindings) -> Section:
    groups = [effect["group"] for effect in judging(findings)]
    ended = done(findings)
    blocks: list[Block] = []
    for group in groups:
        notes = Footnotes()
        rows = [_study_row(study, group, notes) for study in ended]
        blocks.append(
            table(
                f"{clean(group)}, {_primary(findings)}:",
                ("", "study", "refused before", "after", "moved", "ratio [95 %]"),
                rows,
                "rlrrlr",
                notes.notes(),
            )
        )
    missing = [study for study in findings["studies"] if study["state"] != "done"]
    if missing:
        blocks.append(Paragraph("Studies that have not ended:"))
        blocks.append(
            Items(
                tuple(
                    f"{study['name']} ({study['state']}): {clean(study['message'], 'not begun')}" for study in missing
                )
            )
        )
    return Section(title="The studies", blocks=tuple(blocks) or (Paragraph("No study has ended."),))


def _study_row(study: OneStudy, group: str, notes: Footnotes) -> tuple[str, ...]:
    found: OneEffect | None = next((each for each in study["effects"] if each["group"] == group), None)
    before, after = finite(study["harmful_before"]), finite(study["harmful_after"])
    return (
        str(study["index"]),
        clean(study["name"]).replace("__", "  "),
        "–" if before is None else wording.share(before),
        "–" if after is None else wording.share(after),
        wording.verdict(found) if found else "not analysed",
        notes.ratio(found),
    )


def _subgroups(findings: SweepFindings) -> Section:
    rows = findings["subgroups"]
    made = _pooled_table("Over the studies that have a value in common (exploratory, not adjusted):", rows, within=True)
    blocks: tuple[Block, ...] = (made,) if rows else (Paragraph("No setting has two values with two studies each."),)
    return Section(title="By setting", blocks=blocks)


def _metrics(findings: SweepFindings) -> Section:
    blocks: list[Block] = []
    primary = findings["sweep"]["primary_metric"]
    metrics = sorted(dict.fromkeys(each["metric"] for each in findings["pooled"]), key=lambda name: name != primary)
    for metric in metrics:
        chosen = [each for each in findings["pooled"] if each["metric"] == metric]
        blocks.append(_pooled_table(f"All groups in {metric_name(metric)}:", chosen))
    return Section(title="All groups and metrics", blocks=tuple(blocks) or (Paragraph("Nothing was analysed."),))


def _refusals(findings: SweepFindings) -> Section:
    notes = Footnotes()
    rows = [
        (
            clean(each["group"]),
            notes.number(each, "slope", wording.effect),
            wording.interval(each["ci95"], wording.effect) or "–",
            "–" if finite(each["p"]) is None else wording.probability(each["p"] or 0.0),
            str(each["k"]),
        )
        for each in findings["regressions"]
    ]
    blocks: list[Block] = [
        table(
            "Slope of the log ratio over the share of harmful requests whose refusal was lost:",
            ("group", "slope", "[95 %]", "p", "studies"),
            rows,
            "lrrrr",
            (*notes.notes(), "an association over studies shows no cause"),
        )
    ]
    if not rows:
        blocks = [Paragraph("No group judges, or refusals were not measured.")]
    return Section(title="Drift and lost refusals", blocks=tuple(blocks), figures=("sweep_refusals",))


def _rest(findings: SweepFindings) -> tuple[Section, ...]:
    about = findings["sweep"]
    varied = [f"{clean(path)}: {', '.join(map(clean, values))}" for path, values in about["axes"].items()]
    made = [
        f"made {clean(about['created'])} with neurondrift {clean(about['versions'].get('neurondrift'))}"
        + (f", commit {clean(about['commit'])}" if about["commit"] else "")
    ]
    return (
        Section(title="What was varied", blocks=(Items((*varied, *made)),)),
        Section(title="Conclusion in full", blocks=(Items(tuple(map(clean, findings["sentences"]))),)),
        Section(title="Methods", blocks=(Items(METHODS),)),
    )
