"""The stage score: importance for safety and utility, and of each neuron for a style; gradients of the fine-tuning."""

from __future__ import annotations

import collections
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from neurondrift.attribution.changes import Change
from neurondrift.attribution.measures.material import Material
from neurondrift.attribution.measures.registry import get_measure, take
from neurondrift.base.errors import ConfigError, ResourceError
from neurondrift.base.files import remove_scratch, require_space, scratch_directory
from neurondrift.base.processes import is_first_process, joined, process_count
from neurondrift.base.progress import progress
from neurondrift.importance.methods import METHODS
from neurondrift.importance.scores import iterate_scores, score_header, write_scores
from neurondrift.models.batches import Batch
from neurondrift.models.data import DataReference, Example, encode, load_examples
from neurondrift.models.sites import Sites
from neurondrift.study.base_model import change_of_alignment, load_base
from neurondrift.study.folder import StudyFolder
from neurondrift.study.parallel.checks import cut_on, enough_for_each
from neurondrift.study.parallel.sharding import shard
from neurondrift.study.settings import Study


class Purpose(NamedTuple):
    """What is scored: on which examples, cut to how many tokens, by which method, and whether of neurons only (the sum
    over each row is kept then)."""

    source: str
    examples: list[Example]
    max_length: int
    method: str
    of_neurons: bool


def purpose_names(study: Study) -> tuple[str, ...]:
    """What a study scores for: safety and utility, and (of neurons) a style, unless it has none, and the gradient."""
    return ("safety", "utility", *(["style"] if study.score.style else []), "gradient")


def purposes(study: Study, *, seed: int = 0) -> dict[str, Purpose]:
    """By name, as in `purpose_names`. `seed`: of the draw of fine-tuning examples."""
    settings, tune = study.score, study.finetune

    def of(reference: DataReference, *, of_neurons: bool) -> Purpose:
        examples = load_examples(reference)
        return Purpose(reference.title, examples, settings.max_length, settings.method, of_neurons)

    found = {
        "safety": of(settings.safety, of_neurons=False),
        "utility": of(settings.utility, of_neurons=False),
        "gradient": Purpose(tune.data.title, fine_tuning_examples(study, seed), tune.max_length, "gradient", True),
    }
    if settings.style:
        found["style"] = of(settings.style, of_neurons=True)
    return {name: found[name] for name in purpose_names(study)}


def fine_tuning_examples(study: Study, seed: int = 0) -> list[Example]:
    """The fine-tuning examples that the gradient scale is taken from: `gradient_examples` of them, drawn without
    replacement, as sets are often sorted by subject; in their order."""
    examples = load_examples(study.finetune.data)
    count = min(study.score.gradient_examples, len(examples))
    return [examples[index] for index in sorted(random.Random(seed).sample(range(len(examples)), count))]


def score(study: Study, folder: StudyFolder) -> str:
    """Importance of every weight for safety and for utility, of every neuron for a style, and the root mean square
    length of its gradient on fine-tuning examples, into scratch files.

    Under torchrun every process scores its share of the examples, and the first writes.
    """
    settings = study.score
    wanted = purposes(study)
    shard_on = None if _beyond_methods(study) else cut_on(study, folder.base_model)
    model, tokenizer = load_base(study, folder, device=None if shard_on is None else "cpu")
    if shard_on is not None:
        shard(model.requires_grad_(False), shard_on)
    sites = Sites(model)
    sites.fingerprint  # noqa: B018  # gathered by all, for what the first writes
    change = None
    # A base that does not fit is told before scores are taken.
    if study.score.of_change or (study.model.base is not None and shard_on is None):
        change = change_of_alignment(study, folder, sites, tokenizer)
    weights = sum(site.shape[0] * site.shape[1] for site in sites.values())
    if is_first_process():
        needed = 4 * (2 * weights + 2 * sum(site.shape[0] for site in sites.values()))
        scratch = scratch_directory(folder.root, needed=needed)
        require_space(scratch, needed, purpose="the scores")
    for name, purpose in wanted.items():
        encoded = encode(purpose.examples, tokenizer, max_length=purpose.max_length)
        with progress(f"score {name}", -(-len(encoded) // joined().total)) as advance:
            scores = scores_for(name, wanted, study, sites, tokenizer, change, encoded, _advancing(advance))
            if not is_first_process():
                collections.deque(scores, maxlen=0)  # the sums are shared; one process writes them
                continue
            _write(folder, name, purpose, scores, sites, encoded)
    return f"{settings.method}, {weights / 1e6:.1f} million weights in {len(sites)} sites; {_of_neurons(wanted)}"


def scores_for(
    name: str,
    wanted: Mapping[str, Purpose],
    study: Study,
    sites: Sites,
    tokenizer: Any,
    change: Change | None,
    encoded: Sequence[Mapping[str, Any]],
    on_batch: Callable[[Batch], None] = lambda batch: None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """The scores of a purpose, site by site: `[out, in]`, or `[out]` by a method of neurons.

    A score that sets two kinds of text side by side has the purpose's own on one side, and on the other ordinary text;
    for `utility` safety, or the style where the score is the same with both exchanged. `change` is needed by
    methods that need a base.
    """
    purpose, settings = wanted[name], study.score
    if purpose.method in METHODS:
        yield from iterate_scores(
            sites.model,
            encoded,
            method=purpose.method,
            batch_size=settings.batch_size,
            sites=sites,
            seed=study.seed,
            checkpoint_activations=settings.checkpoint_activations,
            on_batch=on_batch,
        )
        return
    beside = "style" if get_measure(purpose.method).two_sided else "safety"
    other = wanted[beside if name == "utility" else "utility"]
    material = Material(
        model=sites,
        tokenizer=tokenizer,
        safety=purpose.examples,
        utility=other.examples,
        base=change,
        batch_size=settings.batch_size,
        max_length=settings.max_length,
        seed=study.seed,
        on_batch=on_batch,
    )
    yield from take(purpose.method, material).items()


def _write(
    folder: StudyFolder,
    name: str,
    purpose: Purpose,
    scores: Iterable[tuple[str, torch.Tensor]],
    sites: Sites,
    encoded: Sequence[Mapping[str, Any]],
) -> None:
    header = score_header(sites, encoded, method=purpose.method, purpose=name, source=purpose.source)
    shapes: dict[str, tuple[int, ...]] = dict(sites.shapes)
    if purpose.of_neurons or not get_measure(purpose.method).weights:
        scores, shapes = _row_sums(scores), {site: shape[:1] for site, shape in shapes.items()}
    try:
        write_scores(folder.score_file(name), scores, header=header, shapes=shapes)
    except ResourceError:  # shared memory that has filled: the next run finds another place
        remove_scratch(folder.root)
        raise


def _row_sums(scores: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """The scores of neurons: what `[out, in]` sums up to over each row, as groups of neurons are selected by."""
    for site, values in scores:
        yield site, values if values.ndim == 1 else values.sum(dim=1, dtype=torch.float64).float()


def _of_neurons(wanted: Mapping[str, Purpose]) -> str:
    """What is scored of neurons only, for the stage's line."""
    style, gradient = wanted.get("style"), wanted["gradient"]
    placebo = f"style of {len(style.examples)} examples ({style.source}); " if style else ""
    return f"{placebo}gradients of {len(gradient.examples)} fine-tuning examples"


def _advancing(advance: Callable[[int], None]) -> Callable[[Batch], None]:
    return lambda batch: advance(len(batch.names))


def outputs(study: Study, folder: StudyFolder) -> list[Path]:
    return [folder.score_file(purpose) for purpose in purpose_names(study)]


def _beyond_methods(study: Study) -> bool:
    """Whether a score is none of a pass over one set of examples, so that it needs the whole model."""
    return study.score.of_change or study.score.method not in METHODS


def check(study: Study) -> None:
    """Raise `ConfigError` where there are more processes than examples to score, or FSDP2 cannot do it."""
    if process_count() > 1:
        if study.parallel.strategy == "fsdp2" and _beyond_methods(study):
            raise ConfigError(
                "Scores of this kind need the whole model in each process",
                received=f'score.method = "{study.score.method}", parallel.strategy = "fsdp2"',
                allowed=", ".join(METHODS),
                fix='set parallel.strategy = "ddp"',
            )
        for name, purpose in purposes(study).items():
            enough_for_each(len(purpose.examples), f"{name} examples", _setting_of(name))


def _setting_of(purpose: str) -> str:
    return "score.gradient_examples" if purpose == "gradient" else f"score.{purpose}"
