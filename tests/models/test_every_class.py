"""Classes of transformers of every kind, on tiny models: scores, drift, diff and answers, or a clear error.

The whole enumeration is docs/make_models.py, whose table is docs/models.md.
"""

import re

import pytest

from helpers.every_class import CHECKS, HOLDS, check, types
from helpers.paths import REPOSITORY

NAMES = dict(types())
# One of each kind that needed something of its own. Cases of shared/cases/README.md stand beside them.
KINDS = [
    "falcon",  # F1: writes into what a layer gave
    "mamba2",  # F2: its cache is no cache of keys and values
    "gemma3n_text",  # F5: a module used twice
    "jamba",  # F6: A_log beside linear weights
    "mamba",  # F6, and a weight that is used outside of its module
    "rwkv",  # F8: a state of its own
    "minimax",  # F8
    "zamba2",  # F8: blocks that share weights
    "llama4_text",  # M10: experts stored [in, out] that declare nothing
    "gptj",
    "lfm2",
    "longcat_flash",  # two attentions in a block
]


@pytest.mark.parametrize("kind", KINDS)
def test_every_check_holds(kind):
    result = check(kind, NAMES[kind])
    assert {name: result.get(name, result["built"]) for name in CHECKS} == dict.fromkeys(CHECKS, HOLDS)


# Kinds that were wrong once: the names and order of sites in files, what is counted or prepared otherwise.
MENDED = [
    ("qwen2_vl", "Qwen2VLForConditionalGeneration"),  # the class that also takes images has names of its own
    ("qwen3_5", "Qwen3_5ForConditionalGeneration"),  # the model that is loaded is the text model
    ("granitemoehybrid", "GraniteMoeHybridForCausalLM"),  # order of siblings
    ("inkling_text", "InklingForCausalLM"),  # weights that are no linear maps
    ("nemotron_h", "NemotronHForCausalLM"),  # infinity in a configuration
    ("hrm_text", "HrmTextForCausalLM"),  # two lists of blocks
    ("jetmoe", "JetMoeForCausalLM"),  # experts in a class of their own
    ("git", "GitForCausalLM"),  # padding is counted
    ("kosmos-2.5", "Kosmos2_5ForConditionalGeneration"),  # positions of its own
    ("qwen3_next", "Qwen3NextForCausalLM"),  # float32 whatever the dtype
    ("roberta", "RobertaForCausalLM"),  # counts positions from padding_idx + 1, which transformers' `generate` does not
    ("mllama", "MllamaForConditionalGeneration"),  # the text model has no place for what its files hold
    ("llama4", "Llama4ForConditionalGeneration"),  # the same, with experts
    ("mllama", "MllamaForCausalLM"),  # a text model's configuration that no AutoModel knows
]


@pytest.mark.parametrize(("kind", "name"), MENDED, ids=[name for _, name in MENDED])
def test_what_was_wrong_once_holds(kind, name):
    result = check(kind, name)
    assert {one: result.get(one, result["built"]) for one in CHECKS} == dict.fromkeys(CHECKS, HOLDS)


@pytest.mark.parametrize(
    ("kind", "name"),
    [("paligemma", "PaliGemmaForConditionalGeneration"), ("diffusion_gemma", "DiffusionGemmaForBlockDiffusion")],
)
def test_models_that_read_both_ways_are_refused_in_the_same_words(kind, name):
    result = check(kind, name)
    assert result["drift"] == result["diff"] == HOLDS
    assert result["scores"] == result["answers"]
    assert "no causal language model: what comes later in a text changes what it predicts before" in result["scores"]


def test_the_table_of_models_is_of_every_class_and_shows_nothing_wrong():
    table = (REPOSITORY / "docs" / "models.md").read_text("utf-8")
    rows = re.findall(r"^\| (\S+) \| (\w+) \| (.+) \|$", table, flags=re.MULTILINE)[1:]
    assert len(rows) >= 85
    assert not [kind for kind, _, cells in rows if "WRONG" in cells or "FAULT" in cells]
    left = re.findall(r"^- (\S+), (\w+): ", table, re.MULTILINE)
    assert {(kind, name) for kind, name, _ in rows} | set(left) == set(types())
    whole = sum(cells.split(" | ")[: len(CHECKS)] == [HOLDS] * len(CHECKS) for _, _, cells in rows)
    assert f"**{whole} pass every check**" in table
