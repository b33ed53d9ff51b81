"""`neurondrift verify`: can this machine run the study, and what will it cost?

Prints what it finds and raises one `UserError` at the end if something is missing. Changes nothing.
"""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from neurondrift import __version__
from neurondrift.base.errors import ModelError, ResourceError, UserError
from neurondrift.base.files import SHARED_MEMORY, free_bytes
from neurondrift.base.processes import leaving_busy_cores
from neurondrift.base.progress import duration
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


class Cost(NamedTuple):
    """An estimate: seconds of each stage, peak bytes of memory (on the device where there is one), bytes on disk."""

    stages: dict[str, float]
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
    say(f"neurondrift {__version__}, Python {platform.python_version()}, {platform.platform()}")
    _packages(say, problems)
    device, dtype = _device(study, say, problems)
    _memory(output_dir, say)
    parameters, positions = _model(study, say, problems)
    _data(study, positions, say, problems)
    if parameters and device:
        with leaving_busy_cores(lambda line: say(f"threads       {line}")):
            cost = estimate(study, parameters, device=device, dtype=dtype, tokenizer=_tokenizer(study))
        size = f"{cost.memory / 1e9:.1f} GB of memory, {cost.disk / 1e9:.1f} GB of disk"
        stages = ", ".join(f"{stage} {duration(seconds)}" for stage, seconds in cost.stages.items())
        whole = duration(sum(cost.stages.values())) if stages else "no time, as no block of this model runs by itself"
        say(f"estimate      {whole}, {size}")
        if stages:
            say(f"              {stages}")
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


def _model(study: Study, say: Say, problems: list[str]) -> tuple[int, int | None]:
    """Parameters, and positions where they are in a table."""
    from neurondrift.models.loading import describe_checkpoint, quiet_transformers

    try:
        with quiet_transformers():
            source = study.model
            found = describe_checkpoint(
                source.reference, revision=source.revision, trust_remote_code=source.trust_remote_code
            )
    except UserError as error:
        problems.append(str(error))
        return 0, None
    say(f"model         {study.model.reference}: {found['parameters'] / 1e6:.1f} million parameters, {found['where']}")
    return int(found["parameters"]), found["positions"]


def data_references(study: Study) -> dict[str, DataReference]:
    """Every data set that a study reads, by the setting that names it."""
    sections = ["score", "finetune", "evaluate", *(["align"] if study.align.enabled else [])]
    return {
        f"{section}.{name}": value
        for section in sections
        for name, value in getattr(study, section)
        if isinstance(value, DataReference)
    }


def _data(study: Study, positions: int | None, say: Say, problems: list[str]) -> None:
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
                if setting not in PROMPTS_ONLY and positions is not None:
                    _fit(examples, tokenizer, _max_length(study, setting), positions)
        except UserError as error:
            problems.append(f"{setting}: {error}")


def _max_length(study: Study, setting: str) -> int:
    length: int = getattr(study, setting.partition(".")[0]).max_length
    return length


def _fit(examples: Sequence[Example], tokenizer: Any, max_length: int, positions: int) -> None:
    """Raise `DataError` where an example is longer than the model has positions, which the setting allows."""
    from neurondrift.models.batches import too_long
    from neurondrift.models.data import encode

    if max_length > positions:
        rows = encode(examples, tokenizer, max_length=max_length)
        length, name = max((len(row["input_ids"]), example.id) for row, example in zip(rows, examples, strict=True))
        if length > positions:
            raise too_long(f"Example {name}", length, positions)


def _tokenizer(study: Study) -> Any:
    """The tokenizer of the study's model; None where it cannot be had without the model, which has its own message."""
    from transformers import AutoTokenizer

    from neurondrift.models.checked.gguf import is_gguf, where_to_read
    from neurondrift.models.loading import byte_tokenizer, quiet_transformers

    reference = study.model.reference
    if reference.startswith("tiny:"):
        return byte_tokenizer()
    try:
        with quiet_transformers():
            if is_gguf(reference):
                folder, how = where_to_read(reference)
                return AutoTokenizer.from_pretrained(folder, **how)
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
    (row,) = encode([example], tokenizer, max_length=_max_length(study, setting))
    start = sum(label == IGNORED for label in row["labels"])
    parts = (row["input_ids"][:start], row["input_ids"][start:])
    return " -> ".join(_shortened(tokenizer.decode(part)) for part in parts)


def _shortened(text: str, limit: int = 240) -> str:
    """A text with its ends, in quotes, on one line."""
    return repr(text if len(text) <= limit else f"{text[: limit // 2]} ... {text[-limit // 2 :]}")


def estimate(study: Study, parameters: int, *, device: str, dtype: str, tokenizer: Any = None) -> Cost:
    """What the study will take: its tokens, stage by stage, at the pace of this machine, of which one block of the
    model and one product with its LM head are timed."""
    import torch

    from neurondrift.study.cost.pace import measured
    from neurondrift.study.cost.work import seconds_of_stages
    from neurondrift.study.sections.finetuning import evaluated_steps, total_steps

    tune = study.finetune
    stages: dict[str, float] = {}
    # Its files have been looked at: it is only its blocks that may be of another kind.
    with contextlib.suppress(ModelError):
        pace = measured(_skeleton(study), device=torch.device(device), dtype=getattr(torch, dtype), rank=tune.lora_r)
        stages = seconds_of_stages(study, pace, tokenizer, parameters=parameters)
    total = total_steps(tune.data.limit or 500, tune)
    points = len(evaluated_steps(total, tune.drift_interval, tune.evaluated_steps))
    full = tune.method == "full" or (study.align.enabled and study.align.method == "full")
    bytes_each = 4 if dtype == "float32" else 2
    memory = parameters * max(bytes_each + 4 + 0.5, 18 if full else 0) + 1.5e9
    adapters = 12 * 0.02 * parameters * (points + 1) if tune.method == "lora" else 4 * parameters * points
    disk = (4 * parameters if study.align.enabled else 0) + len(study.seeds) * adapters + 8 * parameters + 1e8
    return Cost(stages, memory, disk)


def _skeleton(study: Study) -> Any:
    """The study's model with all its modules and no numbers."""
    from transformers import AutoConfig

    from neurondrift.models.architecture.classes import configuration, skeleton
    from neurondrift.models.checked.gguf import is_gguf, where_to_read
    from neurondrift.models.loading import load_model, quiet_transformers

    source = study.model
    reference = source.reference
    with quiet_transformers():
        if reference.startswith("tiny:"):
            return load_model(reference, dtype="float32", device="cpu")[0].to("meta")
        if is_gguf(reference):
            folder, how = where_to_read(reference)
            config = AutoConfig.from_pretrained(folder, **how)
        else:
            config = configuration(reference, revision=source.revision, trust_remote_code=source.trust_remote_code)
        return skeleton(config, reference)


def _compare(cost: Cost, device: str, output_dir: Path, problems: list[str]) -> None:
    if free_bytes(output_dir) < cost.disk:
        problems.append(f"about {cost.disk / 1e9:.1f} GB of disk are needed where the study lies")
    available: float = psutil.virtual_memory().available
    if device == "cuda":
        import torch

        available = torch.cuda.mem_get_info()[0]
    if available < cost.memory:
        problems.append(f"about {cost.memory / 1e9:.1f} GB of memory are needed, {available / 1e9:.1f} GB are free")
