"""How much memory a decoder's weights take once loaded: the part of the memory plan that knows matrices.

GPUs hold dense matrices in 16 bits; CPUs hold bf16 as it is and widen all else to fp32. Matrices of a few bits lie as
their kernels read them, or dense where no kernel does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Final

from tgi_kernels.quant_size import (
    FUSED_PIECES_TOKENS,
    FUSED_RUNS_TOKENS,
    QuantKind,
    packed_bytes,
    takes_pieces,
)
from tgi_server.config import ModelConfig
from tgi_server.quantization.contents import Contents

_CPU_PANEL: Final = 32  # rows of a dense matrix that lie together
_ITEM_BYTES: Final = {"BF16": 2, "F16": 2, "F32": 4, "": 2}  # an embedding in codes becomes bf16
_STORED: Final = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}  # config.json's words for them


@dataclass(frozen=True)
class _Matrix:
    """`name` is without ".weight". One rank has so many rows and columns of all."""

    name: str
    rows: int
    columns: int
    all_rows: int
    all_columns: int


def weights_bytes(model: ModelConfig, contents: Contents, ranks: int, *, on_gpu: bool) -> int:
    """What the weights of one rank take. Biases are counted as far as the checkpoint has them."""
    word = model.raw.get("dtype", model.raw.get("torch_dtype"))
    default = _STORED.get(str(word), "F32")
    vector_item = 2 if on_gpu else 4
    table = -(-model.vocab_size // ranks) * model.hidden_size
    embedding = contents.dtype("model.embed_tokens.weight", default)
    total = table * (2 if on_gpu else _ITEM_BYTES.get(embedding, 4))
    total += (1 + 2 * model.num_layers) * model.hidden_size * vector_item  # norms
    for run in _runs(model, ranks):
        total += _run_bytes(run, contents, default, on_gpu=on_gpu)
        total += sum(m.rows * vector_item for m in run if f"{m.name}.bias" in contents.tensors)
    return total


def widened_bytes(
    model: ModelConfig, contents: Contents, ranks: int, block_tokens: int, head_tokens: int
) -> int:
    """The largest matrix of few bits that a GPU makes dense for products of so many tokens."""
    head, *blocks = _runs(model, ranks)
    return max(
        _widened_run_bytes(head, contents, head_tokens),
        *(_widened_run_bytes(run, contents, block_tokens) for run in blocks),
    )


def _widened_run_bytes(run: list[_Matrix], contents: Contents, tokens: int) -> int:
    kinds = [contents.kind(m.name, m.all_rows, m.all_columns) for m in run]
    return sum(
        2 * m.rows * m.columns
        for m, kind in zip(run, kinds, strict=True)
        if kind is not None and not _is_rounded(kind) and tokens > _most_fused(kind, m.columns)
    )


def _is_rounded(kind: QuantKind) -> bool:
    """Whether GPUs multiply such a matrix by rounded inputs."""
    return kind.inputs != "exact" and kind.values == "e4m3"


def _most_fused(kind: QuantKind, columns: int) -> int:
    """Tokens up to which a GPU makes no dense matrix."""
    return FUSED_PIECES_TOKENS if takes_pieces(kind, columns) else FUSED_RUNS_TOKENS


def kv_heads_of(model: ModelConfig, ranks: int) -> int:
    """Those of one rank."""
    return max(1, model.num_kv_heads // ranks)


def _runs(model: ModelConfig, ranks: int) -> Iterator[list[_Matrix]]:
    """Matrices that are rows of one product, product by product. A head tied to the embedding is a second copy."""

    def matrix(name: str, rows: int, columns: int) -> _Matrix:
        """Split by rows."""
        return _Matrix(name, -(-rows // ranks), columns, rows, columns)

    def across(name: str, rows: int, columns: int) -> _Matrix:
        """Split by columns."""
        return _Matrix(name, rows, -(-columns // ranks), rows, columns)

    hidden, inner = model.hidden_size, model.intermediate_size
    q, kv = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    kv_rows = kv_heads_of(model, ranks) * model.head_dim
    head = "model.embed_tokens" if model.tie_embeddings else "lm_head"
    yield [matrix(head, model.vocab_size, hidden)]
    for layer in range(model.num_layers):
        attention, mlp = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"
        keys, values = (_Matrix(f"{attention}.{x}_proj", kv_rows, hidden, kv, hidden) for x in "kv")
        yield [matrix(f"{attention}.q_proj", q, hidden), keys, values]
        yield [across(f"{attention}.o_proj", hidden, q)]
        yield [matrix(f"{mlp}.gate_proj", inner, hidden), matrix(f"{mlp}.up_proj", inner, hidden)]
        yield [across(f"{mlp}.down_proj", hidden, inner)]


def _run_bytes(run: list[_Matrix], contents: Contents, default: str, *, on_gpu: bool) -> int:
    """Neighbours of one kind are packed as one."""
    total = 0
    kinds = [(contents.kind(m.name, m.all_rows, m.all_columns), m) for m in run]
    for kind, group in groupby(kinds, lambda item: item[0]):
        matrices = [m for _, m in group]
        rows, columns = sum(m.rows for m in matrices), matrices[0].columns
        packed = None if kind is None else packed_bytes(kind, rows, columns, on_gpu=on_gpu)
        if packed is None:
            types = {contents.dtype(f"{m.name}.weight", default) if kind is None else "" for m in matrices}
            packed = _dense_bytes(rows, columns, types, on_gpu=on_gpu)
        total += packed
    return total


def _dense_bytes(rows: int, columns: int, types: set[str], *, on_gpu: bool) -> int:
    """types: those that the checkpoint stores the rows in."""
    if on_gpu:
        return 2 * rows * columns
    return -(-rows // _CPU_PANEL) * _CPU_PANEL * columns * (2 if types == {"BF16"} else 4)
