"""The tiny model and its tokenizer, loaded once per module."""

import pytest

from neurondrift.models.loading import load_model


@pytest.fixture(scope="module")
def tiny():
    return load_model("tiny:llama", dtype="float32", device="cpu")
