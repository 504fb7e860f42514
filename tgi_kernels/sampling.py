"""Choosing the next token from logits.

What `sample` computes, row by row, from the logits x of a row:

1. Log-probabilities that are reported are those of x itself: log softmax(x), whatever follows.
2. Repetition penalty r, once for every token t in prompt or answer: x[t] becomes x[t] / r if it is positive, else
   x[t] · r. Frequency f and presence p penalties over the answer alone, in which t occurs n times: x[t] − n·f, and
   − p if n > 0. Then logit biases are added, and while fewer than `min_new_tokens` have been generated the tokens
   that would end the answer are masked (−∞). Then the watermark adds its δ to the green tokens (Kirchenbauer et al.
   2023 with γ = 1/2): bit t % 32 of word t / 32 % 4 of Philox(key = 15485863 · token before, counter = t / 128).
   These steps are computed in float32; a NaN counts as −∞.
3. At temperature T = 0 (below 1e-6) the likeliest token is taken. Else tokens are ordered by score, the lowest id
   first among equals, and each filter is applied to what the one before it left, with p = softmax(score / T) over
   what is left: top-k keeps the first k; top-p the shortest beginning that holds at least `top_p`; min-p those with
   p ≥ min_p · max p; typical-p (Meister et al. 2022) the tokens whose −log p lies nearest to the entropy, the
   shortest beginning of that order (ties by id) that holds at least `typical_p`. The order is transformers'. Sums of
   probabilities are sums of whole numbers in units of 2^-30 of the likeliest token's, hence the same everywhere.
4. The token with the largest score + T · g is drawn, which is a draw from softmax(score / T) (Gumbel-max).
   g = −log(−log(1 − u)) in float64 with u = (w + 1/2) / 2^32, where w is word t % 4 of Philox4x32-10(key = seed,
   counter = (t / 4, position, choice, 0)). It depends on seed, choice, position and logits alone: the same token
   comes on CPUs and GPUs, in any batch, whether it was drawn step by step or ahead.

A NaN logit is never chosen, but makes its row's logprob NaN. +∞ is chosen, the first of several, with logprob NaN. A
row with nothing above −∞ gives id 0 and NaN.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tgi_kernels import cpu
from tgi_kernels._check import check_shape
from tgi_kernels._library import ops, register_fakes
from tgi_kernels.reference import sampling as composed

# Columns of `Settings.numbers` and `Settings.wholes`.
NUMBERS = (
    "temperature", "top_p", "typical_p", "min_p",
    "repetition_penalty", "frequency_penalty", "presence_penalty", "watermark",
)  # fmt: skip
WHOLES = ("top_k", "seed", "choice", "prompt_tokens", "min_new_tokens", "edits")

WATERMARK_DELTA = 2.0  # what TGI adds to the logits of green tokens

_GPU_ROWS = 16  # that are computed at once: they take 30 temporaries of vocab × 8 bytes each

_GPU_MAX_VOCAB = 400 * 1024  # kSampleMaxVocab of csrc/sampling/cuda.h
_GPU_MOST_TOP = 1024  # kTopMostTokens, there

register_fakes("greedy", "sample", "top_logprobs", "token_logprobs")


@dataclass(frozen=True)
class Settings:
    """How tokens are drawn: tables by row, a row for each sequence that is running."""

    numbers: Tensor  # [rows, 8] float32: columns NUMBERS; `watermark` is δ, 0 without
    wholes: (
        Tensor  # [rows, 6] int64: columns WHOLES; `seed` is the 64 bits, `edits` how many entries are used
    )
    history: Tensor  # [rows, tokens] int32: prompt and answer; read by penalties and watermark alone
    edit_ids: (
        Tensor  # [rows, edits] int32: the tokens of logit biases, and of masks that end with min_new_tokens
    )
    edit_values: Tensor  # [rows, edits] float32: what is added; −∞ for masks

    @classmethod
    def neutral(cls, rows: int, tokens: int, edits: int, device: torch.device | str) -> Settings:
        """Tables that ask for nothing: every row takes the likeliest token."""
        numbers = torch.zeros((rows, len(NUMBERS)), device=device)
        numbers[:, [NUMBERS.index(name) for name in ("top_p", "typical_p", "repetition_penalty")]] = 1.0
        return cls(
            numbers,
            torch.zeros((rows, len(WHOLES)), dtype=torch.int64, device=device),
            torch.zeros((rows, tokens), dtype=torch.int32, device=device),
            torch.zeros((rows, edits), dtype=torch.int32, device=device),
            torch.zeros((rows, edits), device=device),
        )


def workspace(vocab: int) -> Tensor:
    """Memory for the CPU's `sample` and `top_logprobs`, for as many rows at once as there are threads."""
    blocks = -(-vocab // 64)
    return torch.empty((cpu.num_threads(), blocks * 128 + -(-blocks // 16) * 8), dtype=torch.int64)


def greedy(
    logits: Tensor, ids: Tensor | None = None, logprobs: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The likeliest token of each row, the lowest id of several, and its log-probability.

    logits: [rows, vocab], rows contiguous; float32, on GPUs also bfloat16 and float16. ids: [rows] int64 and
    logprobs: [rows] float32, allocated when not given. Returns (ids, logprobs).
    A NaN is never chosen, but makes its row's logprob NaN; a row with nothing above −∞ gives id 0 and NaN.
    """
    check_shape("logits", logits, ("rows", "vocab"))
    ids, logprobs = _results(logits, ids, logprobs)
    ops.greedy(logits, ids, logprobs)
    return ids, logprobs


def sample(
    logits: Tensor,
    rows: Tensor,
    positions: Tensor,
    settings: Settings,
    memory: Tensor | None = None,
    ids: Tensor | None = None,
    logprobs: Tensor | None = None,
    *,
    places: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """A token for each draw, as its row of settings says, and its log-probability before all of them.

    logits: [draws, vocab], rows contiguous; float32, on GPUs also bfloat16 and float16: the bits are those of the
    same values in float32. rows: [draws] int64, each draw's row of `settings`.
    positions: [draws] int64, how many tokens are before the one to draw: that many of the row's history are read.
    memory: `workspace(vocab)`, on CPUs. ids: [draws] int64 and logprobs: [draws] float32, allocated when not given.
    places: [draws] int64, which row of logits, ids and logprobs a draw is of, no two the same; the other rows,
    of which there may then be more, are left alone. Without it, draw i is of row i.
    Returns (ids, logprobs). The module's docstring defines the result.
    """
    check_shape("logits", logits, ("draws", "vocab"))
    draws = logits.shape[0] if places is None else len(places)
    check_shape("rows", rows, (draws,))
    check_shape("positions", positions, (draws,))
    ids, logprobs = _results(logits, ids, logprobs)
    if logits.is_cuda and not _has_sampler(logits):
        where = torch.arange(draws, device=logits.device) if places is None else places
        for part in range(0, draws, _GPU_ROWS):
            some = slice(part, part + _GPU_ROWS)
            at = where[some]
            ids[at], drawn = composed.sample(logits[at], rows[some], positions[some], settings)
            logprobs[at] = drawn.float()
        return ids, logprobs
    if memory is None:
        memory = logits.new_empty(0) if logits.is_cuda else workspace(logits.shape[1])
    tables = (settings.numbers, settings.wholes, settings.history, settings.edit_ids, settings.edit_values)
    ops.sample(logits, rows, positions, *tables, memory, places, ids, logprobs)
    return ids, logprobs


def top_logprobs(logits: Tensor, count: int, memory: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The `count` likeliest tokens of each row, likeliest first, the lowest id first among equals.

    logits: [rows, vocab], rows contiguous; float32, on GPUs also bfloat16 and float16. count: 1 … vocab.
    memory: `workspace(vocab)`, on CPUs.
    Returns ids [rows, count] int64 and log-probabilities [rows, count] float32; where a row has fewer logits above
    −∞, the id is −1.
    """
    check_shape("logits", logits, ("rows", "vocab"))
    if not 0 < count <= logits.shape[1]:
        raise ValueError(
            f"count is {count}; 1 to {logits.shape[1]}, the size of the vocabulary, are possible"
        )
    if logits.is_cuda and not (count <= _GPU_MOST_TOP and _has_sampler(logits)):
        parts = [composed.top_logprobs(part, count) for part in logits.split(_GPU_ROWS)]
        return torch.cat([ids for ids, _ in parts]), torch.cat([logprobs for _, logprobs in parts])
    shape = (logits.shape[0], count)
    ids = torch.empty(shape, dtype=torch.int64, device=logits.device)
    logprobs = torch.empty(shape, device=logits.device)
    if memory is None:
        memory = logits.new_empty(0) if logits.is_cuda else workspace(logits.shape[1])
    ops.top_logprobs(logits, memory, ids, logprobs)
    return ids, logprobs


def token_logprobs(logits: Tensor, ids: Tensor) -> Tensor:
    """[rows] float32: the log-probability of token ids[row] in each row of logits.

    logits: [rows, vocab], rows contiguous; float32, on GPUs also bfloat16 and float16. ids: [rows] int64.
    """
    check_shape("logits", logits, ("rows", "vocab"))
    check_shape("ids", ids, (logits.shape[0],))
    if logits.is_cuda:
        return composed.token_logprobs(logits, ids).float()
    logprobs = torch.empty(logits.shape[0])
    ops.token_logprobs(logits, ids, logprobs)
    return logprobs


def green_tokens(before: int, vocab: int) -> Tensor:
    """[vocab] bool: the tokens the watermark favours after token `before`. A text that has more of them than half,
    by more than chance allows, was watermarked."""
    return composed.green_tokens(torch.tensor([before]), vocab)[0]


def _has_sampler(logits: Tensor) -> bool:
    """Whether the GPU's own `sample` runs: on Hopper, whose clusters of CTAs hold a row in shared memory."""
    capability = torch.cuda.get_device_capability(logits.device)
    return capability == (9, 0) and logits.shape[1] <= _GPU_MAX_VOCAB


def _results(logits: Tensor, ids: Tensor | None, logprobs: Tensor | None) -> tuple[Tensor, Tensor]:
    rows = logits.shape[0]
    if ids is None:
        ids = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if logprobs is None:
        logprobs = torch.empty(rows, dtype=torch.float32, device=logits.device)
    return ids, logprobs
