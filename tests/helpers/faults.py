"""Commands in processes of their own that are killed or refused a write, and whether what they leave is as it should be.

Each command is a fork of a server that has everything imported, so that a try takes as long as its work.
"""

import importlib.util
import multiprocessing
import os
import re
import resource
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from helpers.paths import REPOSITORY

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        "torch",
        "transformers.trainer",
        "peft",
        "pandas",
        "matplotlib.backends.backend_agg",
        "matplotlib.backends.backend_svg",
        "neurondrift.cli.__main__",
        "neurondrift.drift.difference",
        "neurondrift.drift.kernels",
        "neurondrift.models.masked_lora",
        "neurondrift.study.runner",
        "neurondrift.study.experiments.evaluate_model",
        "neurondrift.report.figures.draw",
        "neurondrift.report.page",
        "neurondrift.report.text",
    ]
)

SMOKE = ("run", "--preset", "smoke")
INTERVENE = (
    *("intervene", "--group", "safety_top", "--draws", "2", "--dose-draws", "1", "--freeze-draws", "1"),
    *("--doses", "0.5,1", "--prompts", "4", "--ordinary", "2", "--tokens", "4"),
)
SUBSPACES = ("subspaces", "--rank", "4", "--utility-rank", "4", "--draws", "1", "--limit", "4")
STABILITY = ("stability", "--draws", "2")
DIFF = ("diff", "{}/finetuned_models/aligned", "{}/finetuned_models/lora/step=000006", "--output-dir", "{}/diff")
ALONE = ("evaluate", "tiny:llama", "--limit", "2", "--max-new-tokens", "4", "--output-dir", "{}/alone")
WHOLE = (SMOKE, INTERVENE, SUBSPACES, STABILITY, DIFF, ALONE)


class Job(NamedTuple):
    """What is made again in a copy of the reference: by which commands, and the files that are taken away before."""

    commands: tuple[tuple[str, ...], ...]
    gone: tuple[str, ...]


#: Every stage by its own command, every experiment, and what is asked of a model alone.
JOBS = {
    "align": Job((("align",),), (".neurondrift/align.json", "finetuned_models/aligned")),
    "score and groups": Job(
        (("score",), ("groups",)), (".neurondrift/score.json", ".neurondrift/groups.json", "neuron_groups")
    ),
    "finetune": Job((("finetune",),), (".neurondrift/finetune*", "finetuned_models/lora", "drift")),
    "evaluate": Job((("evaluate",),), (".neurondrift/evaluate*", "behaviour")),
    "attribute": Job((("attribute",),), (".neurondrift/attribute*", "attribution")),
    "analyze": Job((("analyze",),), (".neurondrift/analyze.json", "results/statistical_results.json")),
    "report": Job((("report",),), (".neurondrift/report.json", "results/*.txt", "results/*.html", "results/figures")),
    "intervene": Job((INTERVENE,), (".neurondrift/intervene.json", "results/interventions.*")),
    "subspaces": Job((SUBSPACES,), (".neurondrift/subspaces.json", "results/subspaces.json")),
    "stability": Job((STABILITY,), (".neurondrift/stability.json", "results/stability.json")),
    "diff": Job((DIFF,), ("diff",)),
    "evaluate a model": Job((ALONE,), ("alone",)),
}
FROM_NOTHING = Job(WHOLE, ("*",))
NOT_COMPARED = {"seconds", "versions"}  # of interventions
KILLED = 0  # no number of an error: the process is killed instead


class Refusal(NamedTuple):
    """Every write below a folder or in its scratch after the first `after` is answered with this error number, or is the process's last
    (`KILLED`); None: only counted."""

    below: Path
    after: int = 0
    number: int | None = None


class Outcome(NamedTuple):
    """How a command ended: its exit code (negative: the signal), what it wrote, and how often it wrote to disk."""

    code: int
    out: str
    err: str
    writes: int
    seconds: float


class _Writes:
    def __init__(self, refusal):
        from neurondrift.base.files import _scratch_candidates

        self.refusal, self.count = refusal, 0
        self.below = (str(refusal.below), *map(str, _scratch_candidates(refusal.below)))

    def meet(self, path):
        """Count a write; refuse it where it is its turn."""
        if not isinstance(path, str | bytes | os.PathLike):
            return
        path = os.path.abspath(os.fsdecode(path))
        if path.startswith(self.below):
            self.count += 1
            if self.refusal.number is not None and self.count > self.refusal.after:
                if self.refusal.number == KILLED:
                    os.kill(os.getpid(), signal.SIGKILL)
                raise OSError(self.refusal.number, os.strerror(self.refusal.number), path)

    def watch(self):
        """Meet what Python writes, and what libraries write past it, which fail in words of their own."""
        import pyarrow.parquet as pq
        import safetensors.torch
        import torch
        from safetensors import SafetensorError

        writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT

        def hook(event, arguments):
            if (event == "open" and isinstance(arguments[2], int) and arguments[2] & writing) or event == "os.mkdir":
                self.meet(arguments[0])
            elif event in ("os.rename", "os.link", "os.symlink"):
                self.meet(arguments[1])

        sys.addaudithook(hook)
        write_table, serialize, save = pq.write_table, safetensors.torch.serialize_file, torch.save

        def table(content, where, *rest, **how):
            self.meet(where)
            return write_table(content, where, *rest, **how)

        def tensors(content, name, *rest, **how):
            try:
                self.meet(name)
            except OSError as error:
                words = f"Error while serializing: I/O error: {error.strerror} (os error {error.errno})"
                raise SafetensorError(words) from None
            return serialize(content, name, *rest, **how)

        def saved(content, name, *rest, **how):
            try:
                self.meet(name)
            except OSError:
                raise RuntimeError(
                    "[enforce fail at inline_container.cc:858] . PytorchStreamWriter failed writing file data/0"
                ) from None
            return save(content, name, *rest, **how)

        pq.write_table, safetensors.torch.serialize_file, torch.save = table, tensors, saved


def _command(arguments, told, refusal, environment, files, before):
    """The child: the command as from a shell."""
    for number, name in ((1, "out"), (2, "err")):
        descriptor = os.open(f"{told}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.environ.update(environment)
    encoding = environment.get("PYTHONIOENCODING", "utf-8")
    sys.stdout = open(1, "w", encoding=encoding, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding=encoding, errors="backslashreplace", closefd=False)  # noqa: SIM115
    import torch

    from neurondrift.cli.__main__ import main
    from neurondrift.report.figures import draw

    torch.set_num_threads(1)
    draw.FIGURES = draw.FIGURES[:1]  # of six: to draw them takes longer than all the rest
    if before is not None:
        before()
    writes = None
    if refusal is not None:
        writes = _Writes(refusal)
        writes.watch()
    if files is not None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
    code = 0
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as ended:
        code = int(ended.code or 0)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    if writes is not None:
        Path(f"{told}.writes").write_text(str(writes.count))
    os._exit(code)


def attempt(arguments, told, *, refusal=None, kill_after=None, environment=None, files=None, before=None):
    """Run a command; `told` is where its output goes, `kill_after` when it is killed, `files` how many it may open,
    `before` what the child does first."""
    Path(f"{told}.writes").unlink(missing_ok=True)
    began = time.perf_counter()
    child = FORKS.Process(target=_command, args=(arguments, told, refusal, environment or {}, files, before))
    child.start()
    child.join(kill_after)
    if child.is_alive():
        os.kill(child.pid, signal.SIGKILL)
        child.join()
    seconds = time.perf_counter() - began
    out, err, writes = (
        Path(f"{told}.{name}").read_text(errors="replace") if Path(f"{told}.{name}").exists() else ""
        for name in ("out", "err", "writes")
    )
    return Outcome(child.exitcode, out, err, int(writes or 0), seconds)


def start_server(told):
    """Import everything once, so that the first try takes as long as the others."""
    attempt(["--version"], told)


def complaint(outcome):
    """What is wrong with how a command was refused; empty where it ended with 2 and one message."""
    if outcome.code != 2:
        return f"exit code {outcome.code}: {outcome.err[-1500:]}"
    if "Traceback" in outcome.err:
        return "a traceback: " + outcome.err[-1500:]
    return "" if outcome.err.count("neurondrift: ") == 1 else "not one message: " + outcome.err[-1500:]


def partial_files(folder):
    """What writes have left under temporary names."""
    return [str(path) for path in Path(folder).rglob(".*.partial")]


def _same_results():
    spec = importlib.util.spec_from_file_location("same_results", REPOSITORY / "benchmarks" / "same_results.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def differences(first, second):
    """Where two studies differ, by `benchmarks/same_results.py`; of interventions all but their times."""
    import pyarrow.parquet as pq

    same, found = _same_results(), []
    kinds = ("*.parquet", "*.safetensors", "neuron_groups/*.json", "results/statistical_results.json")
    files = sorted({file.relative_to(first) for kind in kinds for file in Path(first).rglob(kind)})
    for file in files:
        if not (second / file).exists():
            found.append(f"{file} is gone")
        elif file.name == "interventions.parquet":
            one, other = (pq.read_table(folder / file).drop_columns(["seconds"]) for folder in (first, second))
            found += [] if one.equals(other) else [f"{file}: the tables differ"]
        else:
            found += [f"{file}: {line}" for line in same.of_file(first / file, second / file, Counter())]
    causes = Path("results") / "interventions.json"
    if (first / causes).exists():
        import json

        one, other = (
            {k: v for k, v in json.loads((folder / causes).read_text()).items() if k not in NOT_COMPARED}
            for folder in (first, second)
        )
        found += list(same.differences(one, other, "", Counter()))
    for file in sorted(file for kind in ("*.txt", "*.html", "figures/*") for file in (first / "results").glob(kind)):
        other = second / "results" / file.relative_to(first / "results")
        if not other.exists():
            found.append(f"{other.name} is gone")
        elif _report(file) != _report(other):
            found.append(f"{other.name}: the reports differ")
    extra = {file.relative_to(second) for file in Path(second).rglob("*") if file.is_file()}
    found += [f"{file} is left over" for file in sorted(extra) if "trainer" in file.parts or file.name.endswith("lock")]
    return found


def _report(file):
    """What a file of the report says, but for when and from which commit the study was made."""
    return re.sub(rb"20\d\d-\d\d-\d\dT[\d:]{8}\+00:00|\b[0-9a-f]{40}\b", b"", file.read_bytes())


def copy_of(folder, target):
    """A copy of a study that a try may spoil."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(folder, target)
    return target


def to_be_done_again(folder, stage):
    """Take away the mark that a stage is done."""
    for manifest in (folder / ".neurondrift").glob(f"{stage}*.json"):
        manifest.unlink()


def filled(command, folder):
    """A command with its folder."""
    command = [part.format(folder) for part in command]
    return command if "--output-dir" in command else [*command, "--output-dir", str(folder)]


def without(job, reference, target):
    """A copy of the reference from which what a job makes has been taken away."""
    folder = copy_of(reference, target)
    for pattern in job.gone:
        for path in list(folder.glob(pattern)):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return folder


def writes_of(name, reference, work):
    """How often each command of a job writes to the study's folder and its scratch."""
    job = JOBS[name]
    folder = without(job, reference, work / "study")
    counts = []
    for command in job.commands:
        done = attempt(filled(command, folder), work / "told", refusal=Refusal(folder))
        assert done.code == 0, done.err
        counts.append(done.writes)
    return counts


def disturbed_write(name, disturbed, after, numbers, reference, work):
    """A job whose command of that index fails after so many writes, once for each of the `numbers`, and is then done.

    Returns what is wrong, in words. Right is: of a refused write one message, exit code 2 and no partial file; of a
    kill nothing but that; in the end no partial file, and the results of the reference.
    """
    job, problems = JOBS[name], []
    folder = without(job, reference, work / "study")
    for index, command in enumerate(job.commands):
        for turn, number in enumerate(numbers if index == disturbed else ()):
            failed = attempt(filled(command, folder), work / "told", refusal=Refusal(folder, after, number))
            if number == KILLED:
                # What went on from where the refused attempt had come may have ended before that many writes.
                ended = turn > 0 and failed.code == 0 and failed.writes <= after
                killed = failed.code == -signal.SIGKILL or ended
                problems += [] if killed else [f"not killed, but exit code {failed.code}"]
            else:
                problems += [wrong] if (wrong := complaint(failed)) else []
                problems += [f"left over: {left}"] if (left := partial_files(folder)) and KILLED not in numbers else []
        done = attempt(filled(command, folder), work / "told")
        problems += [f"does not go on: {done.err[-1500:]}"] if done.code else []
    problems += [f"left over: {left}"] if (left := partial_files(folder)) else []
    return problems + differences(reference, folder)


def killed_job(job, reference, work, rng, seconds, most=100):
    """A job whose commands are killed at random moments until they end, or so often: how often, and what is wrong.

    `seconds` is what each command takes undisturbed, by its first two words; it is adapted to the machine's pace.
    """
    folder = without(job, reference, work / "killed")
    kills, problems = 0, []
    for command in job.commands:
        name = " ".join(command[:2])
        for number in range(most + 1):
            moment = None if number == most else rng.uniform(0.02, seconds.setdefault(name, 3.0))
            done = attempt(filled(command, folder), work / "told", kill_after=moment)
            killed = done.code == -signal.SIGKILL
            seconds[name] *= 1.03 if killed else 1 if moment is None else 0.9
            if not killed:
                break
            kills += 1
        if done.code:
            return kills, [f"{command[0]} after a kill: {done.err[-1500:]}"]
    problems += [f"left over: {left}" for left in partial_files(folder)]
    return kills, problems + differences(reference, folder)


def stages_alone(folder):
    """Beside the reference: the same study before any experiment."""
    return folder.with_name("stages")


def make_reference(folder, work):
    """A study that nothing has disturbed, with all experiments.

    Returns the seconds of each command, by its first two words.
    """
    start_server(work / "told")
    seconds = {}
    for command in WHOLE:
        done = attempt(filled(command, folder), work / "told")
        assert done.code == 0, done.err
        seconds[" ".join(command[:2])] = done.seconds
        if command == SMOKE:
            copy_of(folder, stages_alone(folder))
    return seconds


def steps_of(folder):
    """Every step of a study with its manifest and its root, as the commands above leave it."""
    from neurondrift.study.runner import STAGES as ALWAYS
    from neurondrift.study.runner import StudyRun
    from neurondrift.study.settings import resolve

    run = StudyRun(resolve(file=folder / "study.toml"), folder)
    steps = [step for name in (*ALWAYS, "intervene", "subspaces", "stability") for step in run.steps(name)]
    return [
        (step, run.folder.manifest(step.stage.name, step.seed), step.stage.root(run.folder))
        for step in steps
        if run.folder.manifest(step.stage.name, step.seed).exists() and step.stage.scratch_until is None
    ]


def damaged(content, rng):
    """The same bytes with one flipped, or cut off somewhere: what was done, and the bytes."""
    at = rng.randrange(len(content))
    kind = rng.randrange(4)
    if kind == 0:
        return f"cut off at {at}", content[:at]
    if kind == 1:
        return "one byte longer", content + b"\0"
    changed = bytearray(content)
    changed[at] ^= 1 << rng.randrange(8)
    return f"byte {at} flipped", bytes(changed)


def unnoticed_damage(folder, steps, rng):
    """One byte of one artifact changed and changed back: what was done, and which stage notices; None where none does.

    The file that is said to have changed must be the one that has.
    """
    from neurondrift.base.files import changed_file

    files = [(step, manifest, root, file) for step, manifest, root in steps for file in _listed(manifest, root)]
    step, manifest, root, file = rng.choice(files)
    whole = file.read_bytes()
    what, content = damaged(whole, rng) if whole else ("made longer", b"x")
    file.write_bytes(content)
    try:
        named = changed_file(manifest, root=root, inputs=step.inputs)
    finally:
        file.write_bytes(whole)
    name = str(file.relative_to(root))
    return None if named == name else f"{name}, {what}: {named or 'nothing'} is said to have changed"


def _listed(manifest, root):
    import json

    return [root / name for name in json.loads(manifest.read_text())["files"]]
