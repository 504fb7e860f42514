"""What a layer keeps between steps."""

from __future__ import annotations

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
