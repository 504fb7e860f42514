"""Scales of columns that cost nothing: what they multiply in a matrix is divided out of what makes its inputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tgi_server.layers.norm import RMSNorm
from tgi_server.models.decoder import Block


@dataclass(frozen=True)
class Source:
    """What makes the inputs of a linear, number by number: a norm, or rows of a matrix before it."""

    name: str  # of the norm's weight, or of the matrix, without ".weight"
    norm: RMSNorm | None


def sources(layer: str, block: Block) -> dict[str, Source]:
    """By the first matrix of each linear of a block that has one.

    Values that several heads share make more than one input each, and a bias would have to be divided as well: the
    output projection then has none.
    """
    attention, mlp = block.attention, block.mlp
    found: dict[str, Source] = {}
    for norm, name, linear in (
        (block.attention_norm, "input_layernorm", attention.qkv),
        (block.mlp_norm, "post_attention_layernorm", mlp.gate_up),
    ):
        if type(norm) is RMSNorm:
            found[linear.names[0]] = Source(f"{layer}.{name}.weight", norm)
    if attention.heads[0] == attention.heads[2] and attention.qkv.bias is None:
        found[attention.o.names[0]] = Source(attention.qkv.names[2], None)
    if mlp.gate_up.bias is None:
        found[mlp.down.names[0]] = Source(mlp.gate_up.names[1], None)
    return found


def divided(norm: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """A norm's weight over `scales`, in its own type, and the scales that this has exactly. [in] each.

    What the type rounds away is so made up for by the matrix.
    """
    less = (norm.float() / scales).to(norm.dtype)
    usable = less.isfinite() & (less != 0)
    less = torch.where(usable, less, norm)
    return less, torch.where(usable, norm.float() / less.float(), 1.0)
