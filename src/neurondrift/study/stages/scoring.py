"""The stage score: importance of every weight for safety and for utility."""

from __future__ import annotations

import collections
from collections.abc import Callable
from pathlib import Path

from neurondrift.base.errors import ResourceError
from neurondrift.base.files import remove_scratch, require_space, scratch_directory
from neurondrift.base.processes import is_first_process, joined_processes, process_count
from neurondrift.base.progress import progress
from neurondrift.importance.scores import iterate_scores, score_header, score_shapes, write_scores
from neurondrift.models.batches import Batch
from neurondrift.models.data import encode, load_examples
from neurondrift.models.sites import Sites
from neurondrift.study.base_model import load_base
from neurondrift.study.folder import StudyFolder
from neurondrift.study.settings import Study


def score(study: Study, folder: StudyFolder) -> str:
    """Importance of every weight for safety and for utility, into scratch files.

    Under torchrun every process scores its share of the examples, and the first writes.
    """
    settings = study.score
    model, tokenizer = load_base(study, folder)
    sites = Sites(model)
    weights = sum(site.shape[0] * site.shape[1] for site in sites.values())
    if is_first_process():
        scratch = scratch_directory(folder.root, needed=2 * 4 * weights)
        require_space(scratch, 2 * 4 * weights, purpose="the scores")
    with joined_processes():
        for purpose, reference in (("safety", settings.safety), ("utility", settings.utility)):
            encoded = encode(load_examples(reference), tokenizer, max_length=settings.max_length)
            with progress(f"score {purpose}", -(-len(encoded) // process_count())) as advance:
                scores = iterate_scores(
                    model,
                    encoded,
                    method=settings.method,
                    batch_size=settings.batch_size,
                    sites=sites,
                    seed=study.seed,
                    checkpoint_activations=settings.checkpoint_activations,
                    on_batch=_advancing(advance),
                )
                if not is_first_process():
                    collections.deque(scores, maxlen=0)  # the sums are shared; one process writes them
                    continue
                header = score_header(sites, encoded, method=settings.method, purpose=purpose, source=reference.source)
                shapes = score_shapes(settings.method, sites)
                try:
                    write_scores(folder.score_file(purpose), scores, header=header, shapes=shapes)
                except ResourceError:  # shared memory that has filled: the next run finds another place
                    remove_scratch(folder.root)
                    raise
    return f"{settings.method}, {weights / 1e6:.1f} million weights in {len(sites)} sites"


def _advancing(advance: Callable[[int], None]) -> Callable[[Batch], None]:
    return lambda batch: advance(len(batch.names))


def outputs(study: Study, folder: StudyFolder) -> list[Path]:
    return [folder.score_file(purpose) for purpose in ("safety", "utility")]
