"""What a layer keeps between steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tgi_server.config import PAGE_TOKENS


@dataclass(frozen=True)
class CacheSpec:
    """What one layer keeps of a sequence; the pool and the memory plan sum these."""

    kind: str  # "pages": keys and values of every token, in pages of 16 tokens
    kv_heads: int
    head_dim: int

    def page_values(self) -> int:
        """Numbers in one page of this layer: [k and v, kv_heads, 16, head_dim]."""
        return 2 * self.kv_heads * PAGE_TOKENS * self.head_dim


def pool_shape(specs: Sequence[CacheSpec], pages: int) -> tuple[int, ...]:
    """Of the tensor that holds the pages of all layers: [layers, pages, 2, kv_heads, 16, head_dim].

    Raises ValueError for layers that keep different things, which one tensor cannot hold.
    """
    first = specs[0]
    for layer, spec in enumerate(specs):
        if spec != first:
            raise ValueError(
                f"layer {layer} keeps {spec}, layer 0 {first}; one pool of pages holds layers that are alike"
            )
    return len(specs), pages, 2, first.kv_heads, PAGE_TOKENS, first.head_dim
