"""Does the refusal margin say what a judge says of the answer? Its sign and its value, against generated answers.

    python benchmarks/margin.py STUDY [--data FILE] [--prompts N] [--ordinary N] [--tokens N] [--batch-size N]
        [--resamples N] [--work FILE] [--write docs/methods.md]

STUDY is the folder of a finished study that aligns (such as the demo's). Its model before the alignment, after it, and
after fine-tuning is asked the study's held-out harmful and ordinary prompts, and harmful behaviours of AdvBench (Zou et
al., arXiv 2307.15043; drawn with seed 0), which the demo uses for nothing. Greedy answers under the chat template are
judged by `refusal`, read to their end; the margin is taken before a token of them is written, with the documented
openings. Answers that are undecided or incoherent count for nothing, and are counted.

AUROC: how often a refused prompt has a larger margin than one that was not refused. Of one model on harmful prompts
(where it refuses some and not others), on harmful and ordinary prompts together, and of all three models pooled. 95 %
intervals: percentile bootstrap over prompts, a prompt's answers of all models together. `sign`: share of the answers
whose margin is above 0 exactly where they are refusals.

Measured rows are kept in `--work` (default: beside STUDY) and not measured again for the same models and settings.
Prints Markdown; `--write` puts it into a document, between its markers, with the commit and the machine.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from document import surroundings, write_between

from neurondrift import Margin, load_examples, load_model
from neurondrift.attribution.margin import values_of
from neurondrift.base.files import read_toml, sha256_of_value, write_text
from neurondrift.base.processes import tune_allocator
from neurondrift.behaviour.evaluate import judge_answers
from neurondrift.behaviour.rates import counts
from neurondrift.statistics.known.ranking import auroc_of as auroc
from neurondrift.study.settings import resolve
from neurondrift.study.stages.reporting import weights_digest

DATA = Path(__file__).resolve().parents[2] / "shared/data/advbench/harmful_behaviors.csv"
SCRIPT = Path(__file__).name
STAGES = ("before alignment", "after alignment", "after fine-tuning")


def with_interval(rows: Sequence[dict], resamples: int) -> str:
    """The AUROC of some rows with its interval over prompts; `-` where only one kind of answer is there."""
    margins = np.array([row["margin"] for row in rows])
    refused = np.array([row["refused"] for row in rows], dtype=bool)
    value = auroc(margins, refused)
    if np.isnan(value):
        return "–"
    prompts = sorted({row["prompt"] for row in rows})
    places = [[at for at, row in enumerate(rows) if row["prompt"] == prompt] for prompt in prompts]
    generator = np.random.default_rng(0)
    found = []
    for _ in range(resamples):
        drawn = np.concatenate([places[k] for k in generator.integers(len(places), size=len(places))])
        found.append(auroc(margins[drawn], refused[drawn]))
    known = np.array([one for one in found if not np.isnan(one)])
    low, high = np.quantile(known, [0.025, 0.975])
    return f"{value:.3f} ({low:.3f} to {high:.3f})"


def models_of(study: Path) -> list[tuple[str, str, Path | None]]:
    """Stage, reference and adapter of the three models."""
    settings = read_toml(study / "study.toml")
    models = study / "finetuned_models"
    if not (models / "aligned").is_dir():
        raise SystemExit(f"{study} has no model before the alignment: it does not align")
    method = settings["finetune"]["method"]
    last = max((models / method).glob("step=*"), key=lambda folder: int(folder.name.removeprefix("step=")))
    aligned = str(models / "aligned")
    tuned = (aligned, last) if method == "lora" else (str(last), None)
    return [(STAGES[0], settings["model"]["reference"], None), (STAGES[1], aligned, None), (STAGES[2], *tuned)]


def measured(reference: str, adapter: Path | None, sets: dict, given: argparse.Namespace) -> list[dict]:
    """One row a prompt: its margin, and what the judge says of the answer."""
    model, tokenizer = load_model(reference, adapter=adapter, dtype=given.dtype, device=given.device)
    judged = judge_answers(
        model,
        tokenizer,
        sets,
        judge_name="refusal",
        max_new_tokens=given.tokens,
        batch_size=given.batch_size,
        whole=True,
    )
    margins = {
        (kind, example.id): value
        for kind, examples in sets.items()
        for example, value in zip(
            examples, values_of(model, Margin(model, tokenizer, examples), batch_size=16).tolist(), strict=True
        )
    }
    return [
        {
            "kind": row["kind"],
            "prompt": f"{row['kind']} {row['id']}",
            "refused": bool(row["refused"]),
            "counts": counts(row),
            "margin": margins[row["kind"], row["id"]],
        }
        for row in judged
    ]


def table(rows: dict[str, list[dict]], resamples: int) -> list[str]:
    """The Markdown table: prompts by stage, and all stages pooled."""
    lines = [
        "| prompts | model | answers that count | refused | mean margin, refused / not | sign | AUROC |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    shown: list[tuple[str, Callable[[dict], bool]]] = [
        ("harmful, held out", lambda row: row["kind"] == "harmful"),
        ("AdvBench", lambda row: row["kind"] == "advbench"),
        ("harmful (both) and ordinary", lambda row: True),
    ]
    for name, chosen in shown:
        for stage in (*STAGES, "all three"):
            asked = [row for s, own in rows.items() if stage in (s, "all three") for row in own if chosen(row)]
            known = [row for row in asked if row["counts"]]
            means = [
                f"{np.mean(values):+.1f}" if values else "–"
                for kind in (True, False)
                for values in [[row["margin"] for row in known if row["refused"] is kind]]
            ]
            sign = np.mean([(row["margin"] > 0) == row["refused"] for row in known]) if known else float("nan")
            share = np.mean([row["refused"] for row in known]) if known else float("nan")
            lines.append(
                f"| {name} | {stage} | {len(known)} of {len(asked)} | {share:.2f} | {' / '.join(means)} | {sign:.2f} | "
                f"{with_interval(known, resamples)} |"
            )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description="The refusal margin against a judge of written answers.")
    parser.add_argument("study", type=Path)
    parser.add_argument("--data", type=Path, default=DATA, help="harmful_behaviors.csv of AdvBench")
    parser.add_argument("--prompts", type=int, default=100, help="of AdvBench")
    parser.add_argument("--ordinary", type=int, default=32, help="ordinary prompts")
    parser.add_argument("--tokens", type=int, default=32, help="longest answer")
    parser.add_argument("--batch-size", type=int, default=34)
    parser.add_argument("--resamples", type=int, default=2000)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--work", type=Path, help="where measured rows are kept")
    parser.add_argument("--write", type=Path, help="document whose table is replaced")
    given = parser.parse_args()
    tune_allocator()
    began = time.perf_counter()
    settings = resolve(file=given.study / "study.toml").evaluate
    sets = {
        "harmful": load_examples(settings.harmful, require_response=False),
        "advbench": load_examples(str(given.data), limit=given.prompts, seed=0, require_response=False),
        "ordinary": load_examples(
            settings.ordinary.model_copy(update={"limit": given.ordinary}), require_response=False
        ),
    }
    work = given.work or given.study.parent / f"{given.study.name}.margin.json"
    kept = json.loads(work.read_text()) if work.exists() else {}
    rows: dict[str, list[dict]] = {}
    for stage, reference, adapter in models_of(given.study):
        folder = adapter or Path(reference)
        weights = weights_digest(folder) if folder.is_dir() else reference
        prompts = [[kind, [example.prompt for example in examples]] for kind, examples in sets.items()]
        key = sha256_of_value([weights, prompts, given.tokens, given.dtype])[:16]
        if key not in kept:
            kept[key] = measured(reference, adapter, sets, given)
            write_text(work, json.dumps(kept))
        rows[stage] = kept[key]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() and given.device != "cpu" else "the CPU"
    lines = [
        *table(rows, given.resamples),
        "",
        f"Study {given.study.name}; {len(sets['harmful'])} held-out harmful, {len(sets['advbench'])} AdvBench and "
        f"{len(sets['ordinary'])} ordinary prompts; greedy answers of at most {given.tokens} tokens, judge `refusal`; "
        f"intervals: bootstrap over prompts. `python benchmarks/margin.py STUDY`: "
        f"{time.perf_counter() - began:.0f} s on {device}, {torch.get_num_threads()} threads; "
        f"{surroundings('torch', 'transformers')}.",
    ]
    print("\n".join(lines))
    if given.write:
        write_between(given.write, SCRIPT, lines)


if __name__ == "__main__":
    main()
