"""The decoder that the architectures share: embedding, blocks of attention and MLP, final norm, head."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from tgi_server.config import ModelConfig
from tgi_server.layers.attention import Attention
from tgi_server.layers.batch import Batch
from tgi_server.layers.cache import CacheSpec
from tgi_server.layers.embedding import Embedding
from tgi_server.layers.linear import Linear
from tgi_server.layers.mlp import GatedMLP
from tgi_server.layers.norm import RMSNorm
from tgi_server.layers.product import take_order
from tgi_server.layers.weights import Weights

# Makes the attention of layer i from the weights of its block.
MakeAttention = Callable[[Weights, int], Attention]


class Block(nn.Module):
    """One layer: attention and MLP, each of a norm of the residual and added to it.

    Where qkv or gate and up have their columns in another order, the norm before them writes in it.
    """

    def __init__(self, weights: Weights, config: ModelConfig, attention: Attention) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(weights.at("input_layernorm"), config.hidden_size, config.norm_eps)
        self.attention = attention
        self.mlp_norm = RMSNorm(weights.at("post_attention_layernorm"), config.hidden_size, config.norm_eps)
        self.mlp = GatedMLP(weights.at("mlp"), config)
        self.attention_norm.order = take_order(attention.qkv.product)
        self.mlp_norm.order = take_order(self.mlp.gate_up.product)

    def forward(self, residual: Tensor, batch: Batch, kv_pages: Tensor) -> None:
        """residual: [tokens, hidden], grows in place."""
        x = self.attention_norm(residual, self.attention.qkv)
        self.attention(x, residual, batch, kv_pages)
        self.mlp(self.mlp_norm(residual, self.mlp.gate_up), residual)


class Decoder(nn.Module):
    """A causal language model of pre-norm blocks; what differs between architectures is their attention."""

    def __init__(self, weights: Weights, config: ModelConfig, make_attention: MakeAttention) -> None:
        super().__init__()
        model = weights.at("model")
        vocab, hidden = config.vocab_size, config.hidden_size
        self.embedding = Embedding(model.at("embed_tokens"), vocab, hidden)
        blocks = []
        for i in range(config.num_layers):
            at = model.at("layers", i)
            blocks.append(Block(at, config, make_attention(at.at("self_attn"), i)))
        self.blocks = nn.ModuleList(blocks)
        self.norm = RMSNorm(model.at("norm"), hidden, config.norm_eps)
        # Tools that quantise the head write it apart from the embedding that it was tied to.
        is_tied = config.tie_embeddings and not weights.is_quantised("lm_head")
        head = "model.embed_tokens" if is_tied else "lm_head"
        self.head = Linear(weights, [head], hidden, [vocab])
        self.num_heads = config.num_heads
        self.vocab_size = vocab
        self.cache_specs: tuple[CacheSpec, ...] = tuple(block.attention.cache_spec for block in blocks)

    def embed(self, batch: Batch) -> Tensor:
        """[tokens, hidden] in the type of activations."""
        embedded: Tensor = self.embedding(batch.token_ids)
        return embedded

    def forward(self, batch: Batch, kv: Tensor) -> Tensor:
        """Run the batch; its keys and values go to kv: [layers, pages, 2, kv_heads, 16, head_dim].

        Returns [tokens, hidden] after the final norm.
        """
        residual = self.embed(batch)
        for block, kv_pages in zip(self.blocks, kv, strict=True):
            block(residual, batch, kv_pages)
        hidden: Tensor = self.norm(residual)
        return hidden

    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """hidden: [rows, hidden], of what `forward` returned. Returns [rows, vocab] of its type: `out` if given."""
        scores: Tensor = self.head(hidden, out=out)
        return scores
