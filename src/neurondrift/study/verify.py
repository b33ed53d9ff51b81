"""`neurondrift verify`: can this machine run the study, and what will it cost?

Prints what it finds and raises one `UserError` at the end if something is missing. Changes nothing.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from neurondrift import __version__
from neurondrift.base.errors import ResourceError, UserError
from neurondrift.base.files import SHARED_MEMORY, free_bytes, room_in_shared_memory
from neurondrift.base.processes import leaving_busy_cores
from neurondrift.base.progress import duration
from neurondrift.models.data import DataReference, Example, PromptKind
from neurondrift.study.settings import Study

if TYPE_CHECKING:
    from neurondrift.study.cost.estimate import Cost

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


def verify(study: Study, output_dir: Path, *, say: Say, processes: int = 1) -> None:
    """Check packages, device, memory, disk, model and data, and estimate the study's cost.

    Parameters
    ----------
    study, output_dir
        The resolved configuration, and where it is to lie.
    say
        Is given each line.
    processes
        How many are to share the study: of GPUs like the one that is here each has one, of CPUs its part of the cores.

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
        from neurondrift.study.cost.estimate import estimate

        with leaving_busy_cores(lambda line: say(f"threads       {line}")):
            how: dict[str, Any] = {
                "device": device,
                "dtype": dtype,
                "tokenizer": _tokenizer(study),
                "processes": processes,
            }
            cost = estimate(study, parameters, **how)
        largest = max(cost.memory, key=lambda stage: cost.memory[stage])
        size = f"{cost.peak / 1e9:.1f} GB of memory ({largest}), {cost.disk / 1e9:.1f} GB of disk"
        if processes > 1:
            shared = "fsdp2: each has a part of the model" if cost.is_cut else "ddp: each has the model"
            size += f"; each of {processes} processes ({shared})"
        stages = ", ".join(f"{stage} {duration(seconds)}" for stage, seconds in cost.stages.items())
        whole = duration(sum(cost.stages.values())) if stages else "no time, as no block of this model runs by itself"
        say(f"estimate      {whole}, {size}")
        if stages:
            say(f"              {stages}")
        _compare(cost, device, output_dir, processes, problems)
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
        say(f"/dev/shm      {room_in_shared_memory() / 1e9:.1f} GB free (scratch for scores of half that size)")
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


def _compare(cost: Cost, device: str, output_dir: Path, processes: int, problems: list[str]) -> None:
    if free_bytes(output_dir) < cost.disk:
        problems.append(f"about {cost.disk / 1e9:.1f} GB of disk are needed where the study lies")
    import torch

    from neurondrift.importance.scores import free_memory

    needed, available = cost.peak * (1 if device == "cuda" else processes), free_memory(torch.device(device))
    if available < needed:
        problems.append(f"about {needed / 1e9:.1f} GB of memory are needed, {available / 1e9:.1f} GB are free")
