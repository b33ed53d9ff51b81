"""Which rows and columns of an attention's weights belong to which of its heads, told by its configuration.

Knows names and shapes of sites; no weights. A head is its query rows, its key and value rows where no other head shares
them, and its columns of the output projection.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

OUTPUTS = ("o_proj", "out_proj", "dense", "c_proj", "wo")
SEPARATE = (("q_proj", "k_proj", "v_proj"), ("wq", "wk", "wv"))
#: A fused projection -> whether a head's query, key and value rows lie together (GPT-NeoX), or all queries come first.
FUSED = {"qkv_proj": False, "c_attn": False, "Wqkv": False, "query_key_value": True}


@dataclass(frozen=True, kw_only=True)
class Heads:
    """The heads of one attention.

    Head h has rows `offset + step * h` and the `size - 1` next ones of each of `ups` (site, offset, step), and columns
    `size * h` to `size * (h + 1)` of the site `down`.
    """

    count: int
    size: int
    ups: tuple[tuple[str, int, int], ...]
    down: str


def attention_heads(config: Any, shapes: Mapping[str, tuple[int, int]]) -> dict[str, Heads]:
    """The module that holds an attention's sites -> its heads; attentions whose weights do not lie in a known way are
    left out.

    Parameters
    ----------
    config
        The model's configuration: how many heads there are, and how many of keys and values.
    shapes
        Site name -> `(out, in)`.
    """
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    count = getattr(text, "num_attention_heads", None)
    if not isinstance(count, int) or count < 1:
        return {}
    shared = getattr(text, "num_key_value_heads", None)
    own_keys = not isinstance(shared, int) or shared == count
    found: dict[str, Heads] = {}
    for down, (_, width) in shapes.items():
        holder, _, leaf = down.rpartition(".")
        if leaf not in OUTPUTS or "att" not in holder.rpartition(".")[2].lower() or width % count:
            continue
        size = width // count
        ups = _projections(holder, shapes, width, size, count, own_keys=own_keys)
        if ups:
            found[holder] = Heads(count=count, size=size, ups=ups, down=down)
    return found


def _projections(
    holder: str, shapes: Mapping[str, tuple[int, int]], width: int, size: int, count: int, *, own_keys: bool
) -> tuple[tuple[str, int, int], ...]:
    for query, *others in SEPARATE:
        if shapes.get(f"{holder}.{query}", (0,))[0] == width:
            chosen = [query, *(others if own_keys else [])]
            present = [f"{holder}.{leaf}" for leaf in chosen if shapes.get(f"{holder}.{leaf}", (0,))[0] == width]
            return tuple((site, 0, size) for site in present)
    for leaf, together in FUSED.items():
        site = f"{holder}.{leaf}"
        rows = shapes.get(site, (0,))[0]
        if rows == 3 * width and together:
            return tuple((site, part * size, 3 * size) for part in range(3))
        if rows == 3 * width and own_keys:
            return tuple((site, part * width, size) for part in range(3))
        if rows >= width and not together:
            return ((site, 0, size),)
    return ()
