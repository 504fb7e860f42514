"""The attention half of a block over a paged cache."""

from __future__ import annotations

from torch import Tensor, nn

from tgi_kernels.fp8 import Fp8Rows
from tgi_kernels.rope import rotary_kv_write
from tgi_server.config import ModelConfig
from tgi_server.layers.batch import Batch
from tgi_server.layers.cache import CacheSpec
from tgi_server.layers.linear import Linear
from tgi_server.layers.weights import Weights


class HeadNorms(nn.Module):
    """RMS norms over head_dim that some models apply to every q and k head before the rotary embedding."""

    def __init__(self, weights: Weights, config: ModelConfig) -> None:
        super().__init__()
        self.q = weights.at("q_norm").parameter("weight", config.head_dim)
        self.k = weights.at("k_norm").parameter("weight", config.head_dim)


class Attention(nn.Module):
    """Causal attention with rotary embedding. `window`: how many tokens one sees, itself included; 0 is all.

    `cos_sin` is the rotary table of `layers.rope`; layers share it.
    """

    def __init__(
        self,
        weights: Weights,
        config: ModelConfig,
        cos_sin: Tensor,
        *,
        window: int = 0,
        head_norms: HeadNorms | None = None,
    ) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.heads = [config.num_heads, config.num_kv_heads, config.num_kv_heads]  # of q, k and v
        outs = [heads * self.head_dim for heads in self.heads]
        self.qkv = Linear(weights, ["q_proj", "k_proj", "v_proj"], config.hidden_size, outs)
        self.o = Linear(weights, ["o_proj"], outs[0], [config.hidden_size])
        self.cos_sin = cos_sin
        self.window = window
        self.head_norms = head_norms
        self.eps = config.norm_eps
        self.cache_spec = CacheSpec("pages", config.num_kv_heads, self.head_dim)

    def forward(self, x: Tensor | Fp8Rows, residual: Tensor, batch: Batch, kv_pages: Tensor) -> None:
        """x: [tokens, hidden]; the result is added to `residual`, of the same shape, in place.

        kv_pages: this layer's [pages, 2, kv_heads, 16, head_dim], written to.
        """
        qkv: Tensor = self.qkv(x)
        q, k, v = qkv.view(len(x), -1, self.head_dim).split_with_sizes(self.heads, 1)
        norms = self.head_norms
        rotary_kv_write(
            q,
            k,
            v,
            kv_pages,
            self.cos_sin,
            batch.positions[0],
            batch.slots,
            q_norm=norms.q if norms else None,
            k_norm=norms.k if norms else None,
            eps=self.eps,
        )
        out = batch.attend(q, kv_pages, self.head_dim**-0.5, window=self.window)
        self.o.add_to(residual, out.flatten(1))
