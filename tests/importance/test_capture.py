"""A pass over the data leaves nothing behind."""

import gc
import weakref

import pytest
import torch

from helpers.families import FAMILIES, build, examples
from neurondrift.importance.capture import run
from neurondrift.models.batches import make_batches
from neurondrift.models.sites import linear_sites


class Kept:
    """What a pass records into."""


@pytest.mark.parametrize("backward", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_was_recorded_into_is_free_afterwards(family, dtype, backward):
    """Accumulators are as large as the model: none may be held by a graph that nobody goes back through any more."""
    model, kept = build(family).to(dtype), Kept()
    batches = make_batches(examples(), model=model, batch_size=3, pad_token_id=0)
    run(model, linear_sites(model), batches, lambda site, tokens, kept=kept: None, backward=backward)
    known = weakref.ref(kept)
    del kept
    gc.collect()
    assert known() is None
