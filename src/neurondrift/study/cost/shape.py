"""What of a model its cost depends on: sizes, read from its modules without any numbers."""

from __future__ import annotations

from typing import Any, NamedTuple

from neurondrift.models.architecture.blocks import decoder_blocks


class Shape(NamedTuple):
    """Sizes of a model.

    Attributes
    ----------
    parameters
        All weights.
    blocks
        The weights of all decoder blocks.
    layers
        How many blocks there are.
    vocabulary, hidden
        The LM head's rows and columns.
    widths
        Numbers that one token leaves behind in one block for the backward pass, about: inputs and outputs of all
        products; of experts those that a token is sent to.
    cached
        Numbers of a token's keys and values, in all blocks.
    """

    parameters: int
    blocks: int
    layers: int
    vocabulary: int
    hidden: int
    widths: int
    cached: int

    def trained(self, rank: int | None) -> int:
        """How many weights are trained: those of an adapter of this rank on all products; None: all."""
        return self.parameters if rank is None else rank * self.widths * self.layers


def shape_of(model: Any) -> Shape:
    """The sizes of a causal language model, which may be on the meta device.

    Raises `ModelError` where no decoder blocks are found.
    """
    blocks = [block for each in decoder_blocks(model) for block in each.modules]
    config = model.config.get_text_config()
    vocabulary, hidden = model.get_input_embeddings().weight.shape
    heads = getattr(config, "num_attention_heads", None) or 1
    keys = getattr(config, "num_key_value_heads", None) or heads
    head = getattr(config, "head_dim", None) or hidden // heads
    used = getattr(config, "num_experts_per_tok", None) or 1
    widths = sum(
        (used if weight.dim() == 3 else 1) * sum(weight.shape[-2:])
        for weight in blocks[0].parameters()
        if weight.dim() > 1
    )
    return Shape(
        parameters=sum(weight.numel() for weight in model.parameters()),
        blocks=sum(weight.numel() for block in blocks for weight in block.parameters()),
        layers=len(blocks),
        vocabulary=vocabulary,
        hidden=hidden,
        widths=widths,
        cached=2 * keys * head * len(blocks),
    )
