"""Choosing the next token from logits."""

from __future__ import annotations

import torch
from torch import Tensor

from tgi_kernels._check import check_shape
from tgi_kernels._library import ops, register_fakes

register_fakes("greedy")


def greedy(
    logits: Tensor, ids: Tensor | None = None, logprobs: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The likeliest token of each row, the lowest id of several, and its log-probability.

    logits: [rows, vocab], rows contiguous; float32, on GPUs also bfloat16 and float16. ids: [rows] int64 and
    logprobs: [rows] float32, allocated when not given. Returns (ids, logprobs).
    A NaN is never chosen, but makes its row's logprob NaN; a row with nothing above −∞ gives id 0 and NaN.
    """
    check_shape("logits", logits, ("rows", "vocab"))
    rows = logits.shape[0]
    if ids is None:
        ids = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if logprobs is None:
        logprobs = torch.empty(rows, dtype=torch.float32, device=logits.device)
    ops.greedy(logits, ids, logprobs)
    return ids, logprobs
