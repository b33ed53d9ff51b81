"""`neurondrift dose-response`: out of sample, how much of the lost margin do the neurons carry that the budget names?

Owns the halves of the harmful prompts (rankings are made on one, outcomes taken on the other), the rankings, and the
runs: their top shares are put back or patched, beside those of the rankings permuted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from neurondrift.attribution.changes import Change, change_along
from neurondrift.attribution.margin import Margin
from neurondrift.attribution.measures.scores import squares
from neurondrift.attribution.openings import Openings
from neurondrift.attribution.paths import Attribution, budget, path_attribution
from neurondrift.base.errors import DataError, ModelError
from neurondrift.base.files import atomic_path, json_safe, read_json, write_json
from neurondrift.base.progress import progress
from neurondrift.groups.doses import nested, permuted
from neurondrift.groups.group import Group
from neurondrift.interventions.measures import MARGIN_ROWS
from neurondrift.interventions.trials import ACTIONS, REFERENCES, Subject
from neurondrift.models.data import Example, encode, load_examples
from neurondrift.models.sites import Sites, magnitudes_of
from neurondrift.report.change.doses import dose_response_findings
from neurondrift.report.findings.dose_response import DoseResponse
from neurondrift.statistics.inference import holm
from neurondrift.statistics.null import compare_with_null, draws_needed, empirical_p, smallest_p
from neurondrift.study.base_model import change_of_alignment, load_base
from neurondrift.study.experiments.intervene import subject_of
from neurondrift.study.folder import StudyFolder, last_step, record, saved_step, saved_steps
from neurondrift.study.settings import DoseResponseSection, InterveneSection, Study
from neurondrift.study.stages.attribution.measuring import openings_of_seed
from neurondrift.study.stages.scoring import purposes, scores_for

SCHEMA_VERSION = 1
Say = Callable[[str], None]
FloatArray = npt.NDArray[np.float64]
Ranking = dict[str, npt.NDArray[np.float32]]  # site -> [out]

#: What is ranked by; the first is what the question is about.
ARMS = ("budget", "norm", "safety_score")
#: Whose permuted rankings: of the budget within site and |w|, and of any ranking within the site.
NULLS = ("matched", "uniform")


class Halves(NamedTuple):
    """Harmful prompts that rankings are made on, those that outcomes are taken on, and ordinary prompts."""

    ranking: list[Example]
    outcome: list[Example]
    ordinary: list[Example]


class Run(NamedTuple):
    """One group that is acted on: of an arm itself (`null` is empty), or the `draw`-th permuted ranking of a null."""

    arm: str
    null: str
    draw: int
    dose: float
    intervention: str
    group: Group


def of_study(study: Study, folder: StudyFolder, *, say: Say) -> str:
    """The optional stage: the dose-response that the study's section `dose_response` asks for."""
    found = dose_response(study, folder, study.dose_response, say=say)
    doses = ", ".join(f"{100 * dose:g} %" for dose in found["settings"]["doses"])
    return f"{', '.join(found['settings']['interventions'])} of {doses} by {', '.join(ARMS)}"


def outputs(study: Study, folder: StudyFolder) -> list[Path]:
    return [results_file(folder), table_file(folder)]


def lacks(study: Study, folder: StudyFolder) -> None:
    """Raise `ArtifactError` where there is no fine-tuned model at all."""
    last_step(folder, study.seed_of(study.dose_response))


def results_file(folder: StudyFolder) -> Path:
    """Where the findings lie."""
    return folder.results / "dose_response.json"


def table_file(folder: StudyFolder) -> Path:
    """Where the margin of every prompt in every run lies."""
    return folder.results / "dose_response.parquet"


def show(folder: StudyFolder, *, say: Say) -> None:
    """What `results/dose_response.json` holds, as tables on the screen."""
    from neurondrift.report.change.doses import section
    from neurondrift.report.text import render_tables

    say("\n".join(render_tables(section(read_json(results_file(folder))))))
    say(f"written to {results_file(folder)}")


def dose_response(study: Study, folder: StudyFolder, options: DoseResponseSection, *, say: Say) -> DoseResponse:
    """Rank the neurons on one half of the harmful prompts, act on the top shares, and measure on the other half.

    Raises
    ------
    ArtifactError
        A study that is not fine-tuned.
    DataError
        Fewer than four harmful prompts.
    ModelError
        A change whose parts do not add up.
    """
    began = time.perf_counter()
    seed = study.seed_of(study.dose_response)
    prompts = halves(study, options)
    say(f"{len(prompts.ranking)} harmful prompts to rank by, {len(prompts.outcome)} others to measure on")
    rankings, attributed = ranked(study, folder, options, prompts.ranking, seed)
    subject, adapter = subject_of(study, folder, InterveneSection(seed=seed), seed)
    magnitudes = magnitudes_of(subject.sites_before, "neuron")
    runs = list(planned(rankings, magnitudes, options, study.seed))
    say(f"{len(runs)} runs by the margin: {', '.join(ARMS)}, and permuted rankings ({', '.join(NULLS)})")
    rows, margins = measured(subject, runs, prompts, openings_of_seed(study, folder, seed))
    found: DoseResponse = json_safe(
        {
            "schema_version": SCHEMA_VERSION,
            "model_fingerprint": subject.sites_before.fingerprint,
            "adapter": adapter,
            "training_seed": seed,
            "training_step": last_step(folder, seed),
            "settings": options.model_dump(mode="json", exclude={"enabled"})
            | {
                "prompts": {"ranking": len(prompts.ranking), "outcome": len(prompts.outcome)},
                "safety_score": study.score.method,
                "sites": len(rankings["budget"]),
                "neurons": sum(map(len, rankings["budget"].values())),
                "rng_seed": study.seed,
                "resamples": study.analyze.resamples,
            },
            "attributed": attributed,
            **dose_response_findings(summarise(margins, runs, options, study.analyze.resamples, study.seed)),
            "seconds": round(time.perf_counter() - began, 1),
            "versions": record()["versions"],
        }
    )
    _write_table(table_file(folder), rows)
    write_json(results_file(folder), found)
    return found


def halves(study: Study, options: DoseResponseSection) -> Halves:
    """The harmful prompts of `evaluate`, each text once, cut in two by chance; and ordinary ones."""

    def of(reference: Any, count: int, kind: Any) -> list[Example]:
        limit = count if reference.limit is None else min(count, reference.limit)
        examples = load_examples(reference.model_copy(update={"limit": limit}), require_response=False, kind=kind)
        return list({example.prompt: example for example in examples}.values())

    harmful = of(study.evaluate.harmful, options.harmful, "harmful")
    if len(harmful) < 4:
        raise DataError(
            "There are too few harmful prompts to rank by one half and measure on the other",
            received=len(harmful),
            allowed="4 or more",
            fix="raise dose_response.harmful, or the limit of evaluate.harmful",
        )
    order = np.random.default_rng(study.seed).permutation(len(harmful)).tolist()
    half = len(harmful) // 2
    return Halves(
        [harmful[index] for index in sorted(order[:half])],
        [harmful[index] for index in sorted(order[half:])],
        of(study.evaluate.ordinary, options.ordinary, "ordinary"),
    )


def ranked(
    study: Study, folder: StudyFolder, options: DoseResponseSection, prompts: Sequence[Example], seed: int
) -> tuple[dict[str, Ranking], dict[str, Any]]:
    """Arm -> its ranking of the neurons of all sites that have moved, highest first to be taken; and how far the parts
    of the margin add up. The budget: minus what a neuron contributed to the margin on these prompts."""
    model, tokenizer = load_base(study, folder)
    steps = saved_steps(folder.adapters(seed))
    change = change_along(model, [saved_step(folder.adapters(seed), step) for step in steps])
    function = {"harmful": Margin(model, tokenizer, prompts, openings_of_seed(study, folder, seed))}
    if options.ranking == "budget":
        parts = budget(change, function, points=1, batch_size=options.batch_size, tolerance=None)["harmful"]
    else:
        parts = path_attribution(change, function, points=3, batch_size=options.batch_size, tolerance=None)["harmful"]
    wanted, sites = purposes(study), Sites(model)
    purpose = wanted["safety"]
    encoded = encode(purpose.examples, tokenizer, max_length=purpose.max_length)
    aligned = change_of_alignment(study, folder, sites, tokenizer) if study.score.of_change else None
    scores = dict(scores_for("safety", wanted, study, sites, tokenizer, aligned, encoded))
    names = list(parts.rows)
    if not names:
        raise ModelError("No linear weight has moved: there is nothing to rank", received=str(folder.adapters(seed)))
    rankings: dict[str, Ranking] = {
        "budget": {name: -parts.rows[name].numpy() for name in names},
        "norm": _norms(change, names),
        "safety_score": {name: _of_rows(scores[name]) for name in names},
    }
    return rankings, _attributed(parts, names)


def _attributed(parts: Attribution, names: Sequence[str]) -> dict[str, Any]:
    rows = [parts.rows[name] for name in names]
    return {
        "before": parts.values[0],
        "after": parts.values[-1],
        "attributed": parts.attributed,
        "missed": parts.missed,
        "neurons": float(sum(part.double().sum() for part in rows)),
        "elsewhere": float(sum(parts.elsewhere.values())),
        "points": list(parts.points),
    }


def _norms(change: Change, names: Sequence[str]) -> Ranking:
    """‖Δw‖ of each row of each site, float32 `[out]`."""
    first, last = change.states[0], change.states[-1]
    deltas = ((name, change.vessel.delta(first, last, name)) for name in names)
    return {name: squares(delta, change.sites[name])[0].sqrt().float().numpy() for name, delta in deltas}


def _of_rows(scores: Any) -> npt.NDArray[np.float32]:
    values = np.asarray(scores, dtype=np.float64)
    rows: npt.NDArray[np.float32] = (values if values.ndim == 1 else values.sum(axis=1)).astype(np.float32)
    return rows


def planned(
    rankings: Mapping[str, Ranking], magnitudes: Mapping[str, Any], options: DoseResponseSection, seed: int
) -> Iterator[Run]:
    """Every run: the arms, then the budget permuted within site and |w|, then within the site."""
    bins = {"matched": options.bins, "uniform": 1}
    counts = {"matched": options.draws, "uniform": options.uniform_draws}

    def of(arm: str, null: str, draw: int, ranking: Mapping[str, Any]) -> Iterator[Run]:
        for dose, group in nested(ranking, options.doses).items():
            for intervention in options.interventions:
                yield Run(arm, null, draw, dose, intervention, group)

    for arm in ARMS:
        yield from of(arm, "", 0, rankings[arm])
    for number, null in enumerate(NULLS):
        for draw in range(counts[null]):
            made = permuted(rankings["budget"], magnitudes, bins=bins[null], seed=seed + number, draw=draw)
            yield from of("", null, draw, made)


Key = tuple[str, str, int, float, str]  # of a run; of a reference only its name, as the intervention
Margins = dict[Key, dict[str, FloatArray]]  # kind of prompt -> the margin of each


def key_of(run: Run) -> Key:
    return run.arm, run.null, run.draw, run.dose, run.intervention


def measured(
    subject: Subject, runs: Sequence[Run], prompts: Halves, openings: Openings | None
) -> tuple[list[dict[str, Any]], Margins]:
    """The margins of both references and of every run: as rows of the table, and by run. Ordinary prompts are asked
    of the references and of the arms."""
    sets = {"harmful": prompts.outcome, "ordinary": prompts.ordinary}
    functions = {kind: Margin(subject.after, subject.tokenizer, own, openings) for kind, own in sets.items()}
    rows: list[dict[str, Any]] = []
    found: Margins = {}

    def take(model: Any, key: Key, members: int, kinds: Sequence[str]) -> None:
        found[key] = {kind: functions[kind].quick_values(model, batch_size=MARGIN_ROWS).numpy() for kind in kinds}
        arm, null, draw, dose, intervention = key
        for kind, values in found[key].items():
            for example, value in zip(sets[kind], values.tolist(), strict=True):
                rows.append(
                    {
                        "arm": arm,
                        "null": null,
                        "draw": draw if null else None,
                        "dose": dose,
                        "intervention": intervention,
                        "members": members,
                        "kind": kind,
                        "id": example.id,
                        "margin": value,
                    }
                )

    for name, reference in REFERENCES.items():
        with reference(subject) as (model, _):
            take(model, ("", "", 0, 0.0, name), 0, list(sets))
    with progress("dose-response", len(runs)) as advance:
        for run in runs:
            with ACTIONS[run.intervention](subject, run.group, "zero") as (model, _):
                take(model, key_of(run), len(run.group), ["harmful"] if run.null else list(sets))
            advance(1)
    return rows, found


def summarise(
    margins: Margins, runs: Sequence[Run], options: DoseResponseSection, resamples: int, rng_seed: int
) -> dict[str, Any]:
    """References, effects at each dose, and the mean over doses, each beside the permuted rankings.

    `share`: (margin - after) / (before - after). `tests`: how many p-values judge: those of the mean over doses of the
    budget beside the rankings permuted within site and |w|, which `p_holm` is corrected for; all others describe.
    """
    ends = {name: {k: float(v.mean()) for k, v in margins["", "", 0, 0.0, name].items()} for name in REFERENCES}
    before, after = ends["before"]["harmful"], ends["after"]["harmful"]
    lost = before - after

    def share(margin: float) -> float:
        return (margin - after) / lost if lost > 0 else float("nan")

    why = {} if lost > 0 else {"reason": "no margin was lost on these prompts"}
    counts = {"matched": options.draws, "uniform": options.uniform_draws}
    effects: list[dict[str, Any]] = []
    overall: list[dict[str, Any]] = []
    sizes = {key_of(run): len(run.group) for run in runs}
    for arm in ARMS:
        nulls = NULLS if arm == "budget" else NULLS[1:]
        for intervention in options.interventions:
            for dose in sorted(options.doses):
                key = (arm, "", 0, dose, intervention)
                own = margins[key]
                random: dict[str, Any] = {}
                for null in nulls:
                    drawn = [margins["", null, draw, dose, intervention]["harmful"] for draw in range(counts[null])]
                    compared = compare_with_null(own["harmful"], drawn, resamples=resamples, rng_seed=rng_seed)
                    random[null] = compared._asdict() | {
                        "ci95": list(compared.ci95),
                        "share": share(compared.null_mean),
                        "share_low": share(compared.null_low),
                        "share_high": share(compared.null_high),
                        **why,
                    }
                effects.append(
                    {
                        "arm": arm,
                        "intervention": intervention,
                        "dose": dose,
                        "members": sizes[key],
                        "margin": float(own["harmful"].mean()),
                        "margin_ordinary": float(own["ordinary"].mean()),
                        "share": share(float(own["harmful"].mean())),
                        "random": random,
                        **why,
                    }
                )
            for null in nulls:

                def mean_share(arm: str, null: str, draw: int, intervention: str = intervention) -> float:
                    keys = [(arm, null, draw, dose, intervention) for dose in options.doses]
                    return share(float(np.mean([margins[key]["harmful"].mean() for key in keys])))

                value = mean_share(arm, "", 0)
                drawn_shares = [mean_share("", null, draw) for draw in range(counts[null])]
                overall.append(
                    {
                        "arm": arm,
                        "intervention": intervention,
                        "null": null,
                        "share": value,
                        "null_mean": float(np.mean(drawn_shares)),
                        "null_low": float(np.min(drawn_shares)),
                        "null_high": float(np.max(drawn_shares)),
                        "p": empirical_p(value, drawn_shares),
                        "p_floor": smallest_p(counts[null]),
                        "draws": counts[null],
                        **why,
                    }
                )
    judging = [one for one in overall if one["arm"] == "budget" and one["null"] == "matched"]
    for one, p in zip(judging, holm([one["p"] for one in judging]).tolist(), strict=True):
        one["p_holm"] = p
    return {
        "references": ends,
        "effects": effects,
        "overall": overall,
        "tests": len(judging),
        "draws_needed": draws_needed(len(judging)),
    }


def _write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    kinds = {"draw": pa.int32(), "dose": pa.float64(), "members": pa.int64(), "margin": pa.float64()}
    schema = pa.schema([(name, kinds.get(name, pa.string())) for name in rows[0]])
    with atomic_path(path) as partial:
        table = pa.Table.from_pylist(list(rows), schema=schema)
        pq.write_table(table, partial, compression="zstd", write_page_checksum=True)
