"""Write docs/models.md: what holds on a tiny model of every class of transformers; `--only TYPE ...` prints some.

    PYTHONPATH=tests python docs/make_models.py [--only mamba2 zamba2 [--write]] [--processes 2]

`--write` puts the rows of these types into the page and leaves the others as they are.

The checks and the way in which the tiny models are made are in tests/helpers/every_class.py. About ten minutes on one core.
"""

import argparse
import re
import sys
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from helpers.every_class import CHECKS, HOLDS, LEFT_OUT, check, types

HEAD = """<!-- made by docs/make_models.py: do not edit -->

# Models

What holds on a tiny model with random weights of every class that transformers {version} maps to causal language modelling or to image-text-to-text, found by enumeration. {built} classes of {all} were built from their configuration with small sizes and answer to text alone; of these, **{whole} pass every check**, and each other check ends in the error that the table shows.

- **scores**: SNIP of every site against plain autograd, one example at a time, in float64, to 1e-5.
- **drift**: LoRA on every linear site against PEFT's own merge, and the same names with and without PEFT.
- **diff**: two folders on disk against the two models that are loaded from them, to 1e-6, site by site and in order.
- **answers**: greedy answers in batches against transformers' own `generate`, one prompt at a time. Where `generate` gives other logits than the model's plain forward pass over the whole text, the greedy answer of the latter: it counts positions from 0 for models of RoBERTa's kind (camembert, data2vec-text, roberta, roberta-prelayernorm, xlm-roberta, xlm-roberta-xl), which are trained and scored with positions from `padding_idx` + 1.
- **length**: a text as long as the model has positions, and one that is longer by a token, have the loss of a plain forward pass; where torch cannot do it (positions in a table: GPT-2, OPT, BERT, RoBERTa and others), it is one clear error.
- **left out**: parameters of the blocks that are no matrix of a linear map, or of which it is not known which way round they are stored: they are not measured, and a warning names them. DBRX is not built here; its experts, which lie below each other in one matrix, are left out too.

| type | class | scores | drift | diff | answers | length | left out |
|---|---|---|---|---|---|---|---|
"""
TAIL = """
Not built: a class that needs an image, a recording or another package to answer, or whose sizes cannot be made small in this way.

"""


def run(pair: tuple[str, str]) -> tuple[tuple[str, str], dict[str, str]]:
    """The checks of one class, on one thread."""
    import torch

    torch.set_num_threads(1)
    return pair, check(*pair)


def results(pairs: list[tuple[str, str]], processes: int) -> Iterable[tuple[tuple[str, str], dict[str, str]]]:
    """The checks of all classes, in order."""
    if processes == 1:
        yield from map(run, pairs)
        return
    with ProcessPoolExecutor(processes) as pool:
        yield from pool.map(run, pairs)


def page(found: list[tuple[tuple[str, str], dict[str, str]]]) -> str:
    """The document."""
    import transformers

    built = [(pair, result) for pair, result in found if len(result) > 1]
    whole = sum(all(result[name] == HOLDS for name in CHECKS) for _, result in built)
    lines = []
    for (kind, name), result in built:
        cells = [result.get(one, "").replace("|", "\\|").replace("\n", " ") for one in (*CHECKS, LEFT_OUT)]
        lines.append(f"| {kind} | {name} | " + " | ".join(cells) + " |")
    left = [f"- {kind}, {name}: `{result['built']}`" for (kind, name), result in found if len(result) == 1]
    head = HEAD.format(version=transformers.__version__, built=len(built), all=len(found), whole=whole)
    return head + "\n".join(lines) + "\n" + TAIL + "\n".join(left) + "\n"


def known(page: str) -> dict[tuple[str, str], dict[str, str]]:
    """What a page says of each class."""
    found = {}
    for kind, name, cells in re.findall(r"^\| (\S+) \| (\w+) \| (.+?) ?\|$", page, re.MULTILINE)[1:]:
        values = cells.split(" | ")
        found[kind, name] = {"built": "", **dict(zip((*CHECKS, LEFT_OUT), values, strict=False))}
    left = re.findall(r"^- (\S+), (\w+): `(.*)`$", page, re.MULTILINE)
    return found | {(kind, name): {"built": why} for kind, name, why in left}


def main() -> None:
    """Print the checks of some classes, or write the page of all."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--processes", type=int, default=1)
    asked = parser.parse_args()
    pairs = [pair for pair in types() if not asked.only or pair[0] in asked.only]
    found = []
    for pair, result in results(pairs, asked.processes):
        found.append((pair, result))
        print(*pair, *(f"{key}={value}" for key, value in result.items()), sep=" | ", flush=True)
    file = Path(__file__).parent / "models.md"
    if asked.only and asked.write:
        every = known(file.read_text("utf-8")) | dict(found)
        found = [(pair, every[pair]) for pair in types() if pair in every]
    if asked.write or not asked.only:
        file.write_text(page(found), encoding="utf-8")


if __name__ == "__main__":
    main()
