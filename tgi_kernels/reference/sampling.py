"""Oracle of `tgi_kernels.sampling`, whose docstring holds the definition; on GPUs also its stand-in."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from tgi_kernels.sampling import Settings

_WORD = 0xFFFFFFFF
_WATERMARK_PRIME = 15485863


def greedy(logits: Tensor) -> tuple[Tensor, Tensor]:
    """logits: [rows, vocab]. Returns ids [rows] int64 and logprobs [rows] float64."""
    ids = _first_largest(_choosable(logits.double()))
    return ids, token_logprobs(logits, ids)


def sample(logits: Tensor, rows: Tensor, positions: Tensor, settings: Settings) -> tuple[Tensor, Tensor]:
    """logits: [draws, vocab]; rows, positions: [draws]. Returns ids [draws] int64 and logprobs [draws] float64."""
    scores = adjusted(logits, rows, positions, settings)
    temperature = settings.numbers[rows, 0].double()[:, None]
    temperature = temperature.where(temperature >= 1e-6, 0.0)
    allowed = kept(scores, rows, settings) | (temperature == 0)
    drawn = scores + temperature * gumbel(rows, positions, settings, logits.shape[1])
    ids = _first_largest(drawn.where(allowed & scores.isfinite() | scores.isposinf(), -torch.inf))
    nothing = scores.amax(-1) == -torch.inf
    return ids, token_logprobs(logits, ids).masked_fill(nothing, torch.nan)


def top_logprobs(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """logits: [rows, vocab]. Returns ids [rows, count] int64 (−1: none) and logprobs [rows, count] float32."""
    logprobs = logits.double().log_softmax(-1)
    order = _choosable(logits.double()).sort(dim=-1, descending=True, stable=True)
    ids = order.indices[:, :count]
    missing = order.values[:, :count] == -torch.inf
    values = logprobs.gather(-1, ids).masked_fill(missing, -torch.inf)
    return ids.masked_fill(missing, -1), values.float()


def token_logprobs(logits: Tensor, ids: Tensor) -> Tensor:
    """logits: [rows, vocab]; ids: [rows]. Returns [rows] float64."""
    return logits.double().log_softmax(-1).gather(-1, ids[:, None])[:, 0]


def adjusted(logits: Tensor, rows: Tensor, positions: Tensor, settings: Settings) -> Tensor:
    """Logits after penalties, biases, masks and watermark: [draws, vocab] float64."""
    scores = _penalised(_choosable(logits.double()), rows, positions, settings)
    wholes, vocab = settings.wholes[rows], logits.shape[1]
    entries = torch.arange(settings.edit_ids.shape[1], device=logits.device)
    values = settings.edit_values[rows].double()
    ending_allowed = positions >= wholes[:, 3] + wholes[:, 4]
    used = (entries < wholes[:, 5:6]) & ~((values == -torch.inf) & ending_allowed[:, None])
    scores = scores.scatter_add(1, settings.edit_ids[rows].long(), values.where(used, 0.0))
    before = settings.history[rows, (positions - 1).clamp(min=0)].long()
    delta = settings.numbers[rows, 7].double()[:, None]
    return scores + delta * (green_tokens(before, vocab) & (positions > 0)[:, None])


def _penalised(scores: Tensor, rows: Tensor, positions: Tensor, settings: Settings) -> Tensor:
    repetition, frequency, presence = settings.numbers[rows, 4:7].double().unsqueeze(-1).unbind(1)
    places = torch.arange(settings.history.shape[1], device=scores.device)
    past = places < positions[:, None]
    history = settings.history[rows].long().where(past, 0)
    answer = past & (places >= settings.wholes[rows, 3:4])
    zeros = torch.zeros_like(scores)
    seen = zeros.scatter_add(1, history, past.double()) > 0
    count = zeros.scatter_add(1, history, answer.double())
    repeated = torch.where(scores > 0, scores / repetition, scores * repetition)
    return repeated.where(seen, scores) - frequency * count - presence * (count > 0)


def kept(scores: Tensor, rows: Tensor, settings: Settings) -> Tensor:
    """Which of `scores` [draws, vocab] the filters leave: [draws, vocab] bool."""
    temperature, top_p, typical_p, min_p = settings.numbers[rows, :4].double().unsqueeze(-1).unbind(1)
    top_k = settings.wholes[rows, :1]
    scaled = scores / temperature.where(temperature > 0, 1.0)
    order = scaled.sort(dim=-1, descending=True, stable=True)
    left = order.values > -torch.inf
    rank = torch.arange(scores.shape[1], device=scores.device)
    left &= (rank < top_k) | (top_k == 0)
    left &= (_mass_before(order.values, left) < top_p) | (top_p >= 1)
    # A hair is left for equality: min_p is a float32 and the product with it rounds.
    likeliest = order.values[:, :1]
    left &= (order.values - likeliest >= min_p.log() - 1e-12) | (min_p == 0)
    masked = order.values.where(left, -torch.inf)
    log_p = masked.log_softmax(-1)
    entropy = -(log_p.exp() * log_p.where(left, 0.0)).sum(-1, keepdim=True)
    distance = (-log_p - entropy).abs().where(left, torch.inf)
    by_id = order.indices.argsort(-1)  # so that ties go by id: back to the vocabulary's order first
    typical = distance.gather(-1, by_id).sort(dim=-1, stable=True)
    kept_by_id = left.gather(-1, by_id)
    p = log_p.exp().gather(-1, by_id).gather(-1, typical.indices)
    near = (p.cumsum(-1) - p < typical_p) | (typical_p >= 1)
    return kept_by_id & torch.zeros_like(left).scatter(-1, typical.indices, near)


def _mass_before(ordered: Tensor, left: Tensor) -> Tensor:
    p = ordered.where(left, -torch.inf).softmax(-1)
    return p.cumsum(-1) - p


def gumbel(rows: Tensor, positions: Tensor, settings: Settings, vocab: int) -> Tensor:
    """The noise of each draw: [draws, vocab] float64."""
    seed, choice = settings.wholes[rows, 1], settings.wholes[rows, 2]
    counters = torch.zeros((len(rows), -(-vocab // 4), 4), dtype=torch.int64, device=rows.device)
    counters[..., 0] = torch.arange(counters.shape[1], device=rows.device)
    counters[..., 1] = positions[:, None]
    counters[..., 2] = choice[:, None]
    words = philox(counters, seed[:, None]).flatten(1)[:, :vocab]
    return -(-(1 - (words.double() + 0.5) / 2**32).log()).log()


def green_tokens(before: Tensor, vocab: int) -> Tensor:
    """[draws, vocab] bool: what the watermark favours after each of the tokens `before` [draws]."""
    counters = torch.zeros((len(before), -(-vocab // 128), 4), dtype=torch.int64, device=before.device)
    counters[..., 0] = torch.arange(counters.shape[1], device=before.device)
    words = philox(counters, before.long()[:, None] * _WATERMARK_PRIME)
    bits = words.unsqueeze(-1) >> torch.arange(32, device=before.device) & 1
    return bits.flatten(1)[:, :vocab].bool()


def philox(counters: Tensor, keys: Tensor) -> Tensor:
    """Philox4x32-10. counters: [..., 4] int64, 32 bits each; keys: [...] int64, all 64 bits. Returns as counters."""
    first, second, third, fourth = (counters & _WORD).unbind(-1)
    low, high = keys & _WORD, keys >> 32 & _WORD
    for _ in range(10):
        one, two = first * 0xD2511F53, third * 0xCD9E8D57  # mod 2^64, as int64 has it
        first, second, third, fourth = (
            (two >> 32 & _WORD) ^ second ^ low,
            two & _WORD,
            (one >> 32 & _WORD) ^ fourth ^ high,
            one & _WORD,
        )
        low, high = low + 0x9E3779B9 & _WORD, high + 0xBB67AE85 & _WORD
    return torch.stack((first, second, third, fourth), -1)


def _choosable(logits: Tensor) -> Tensor:
    return logits.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)


def _first_largest(scores: Tensor) -> Tensor:
    largest = scores.amax(-1, keepdim=True)
    return (scores == largest).int().argmax(-1)  # argmax gives the first of equal values
