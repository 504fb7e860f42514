"""Attention over paged sequences, for each kind of step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tgi_kernels.attention import attention
from tgi_kernels.attention_cuda import attention_decode, attention_prefill


@dataclass(frozen=True)
class AnySequences:
    """Any mix of prompts and decoding, on any device. Padding tokens are sequences of their own, at the end."""

    page_table: Tensor  # [seqs, max_pages] int32
    query_starts: Tensor  # [seqs + 1] int32: sequence i has tokens query_starts[i] to query_starts[i + 1]
    kv_lens: Tensor  # [seqs] int32, this step's tokens included

    def __call__(self, q: Tensor, kv_pages: Tensor, scale: float, *, window: int) -> Tensor:
        return attention(q, kv_pages, self.page_table, self.query_starts, self.kv_lens, scale, window=window)


@dataclass(frozen=True)
class Decoding:
    """One token of each sequence, on a GPU. A kv_len of 0 marks an idle row."""

    page_table: Tensor  # [seqs, max_pages] int32
    kv_lens: Tensor  # [seqs] int32
    workspace: Tensor  # of tgi_kernels.attention_cuda.attention_decode_workspace

    def __call__(
        self, q: Tensor, kv_pages: Tensor, scale: float, *, window: int, out: Tensor | None = None
    ) -> Tensor:
        return attention_decode(
            q, kv_pages, self.page_table, self.kv_lens, scale, self.workspace, window=window, out=out
        )


@dataclass(frozen=True)
class Prompts:
    """Several tokens of each sequence, on a GPU."""

    page_table: Tensor  # [seqs, max_pages] int32
    query_starts: Tensor  # [seqs + 1] int32
    kv_lens: Tensor  # [seqs] int32
    workspace: Tensor  # of tgi_kernels.attention_cuda.attention_prefill_workspace

    def __call__(
        self, q: Tensor, kv_pages: Tensor, scale: float, *, window: int, out: Tensor | None = None
    ) -> Tensor:
        return attention_prefill(
            q,
            kv_pages,
            self.page_table,
            self.query_starts,
            self.kv_lens,
            scale,
            workspace=self.workspace,
            window=window,
            out=out,
        )


@dataclass(frozen=True)
class DecodingThenPrompts:
    """A step's first tokens are one each of sequences that decode, the others belong to prompts; on a GPU."""

    decoding: Decoding
    prompts: Prompts

    def __call__(self, q: Tensor, kv_pages: Tensor, scale: float, *, window: int) -> Tensor:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        first = len(self.decoding.kv_lens)
        self.decoding(q[:first], kv_pages, scale, window=window, out=out[:first])
        self.prompts(q[first:], kv_pages, scale, window=window, out=out[first:])
        return out
