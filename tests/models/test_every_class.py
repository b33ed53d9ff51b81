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


# What docs/models.md still shows as wrong or as a fault: to be mended, and never to grow.
OPEN = {
    "cpmant",
    "diffusion_gemma",
    "dots3_note",
    "dots3_note_text",
    "git",
    "granitemoehybrid",
    "inkling_text",
    "kosmos-2.5",
    "minicpm_ocr",
    "minicpmv4_6",
    "minicpmv4_7",
    "nemotron_h",
    "paligemma",
    "qwen2_5_omni_thinker",
    "qwen2_5_vl",
    "qwen2_vl",
    "qwen3_5",
    "qwen3_5_moe",
    "qwen3_5_moe_text",
    "qwen3_next",
    "qwen3_omni_moe_thinker",
    "unlimited_ocr",
    "xlm",
}


def test_the_table_of_models_is_of_every_class_and_shows_nothing_wrong_but_what_is_known():
    table = (REPOSITORY / "docs" / "models.md").read_text("utf-8")
    rows = re.findall(r"^\| (\S+) \| (\w+) \| (.+) \|$", table, flags=re.MULTILINE)[1:]
    assert len(rows) >= 85
    assert {kind for kind, _, cells in rows if "WRONG" in cells or "FAULT" in cells} <= OPEN
    left = re.findall(r"^- (\S+), (\w+): ", table, re.MULTILINE)
    assert {(kind, name) for kind, name, _ in rows} | set(left) == set(types())
    whole = sum(cells.split(" | ") == [HOLDS] * len(CHECKS) for _, _, cells in rows)
    assert f"**{whole} pass every check**" in table
