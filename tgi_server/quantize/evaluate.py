"""How good a model is at text it has not seen, and how far from another it is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from tgi_server.quantize.forward import Forward

# Perplexity beside the base's, and mean divergence in nats: from here on answers differ for everybody to see.
GOOD: Final = (1.02, 0.02)
FAIR: Final = (1.10, 0.10)


@dataclass(frozen=True)
class Quality:
    """Over `tokens` predictions. Divergences are of this model from the base, in nats; absent without a base."""

    tokens: int
    perplexity: float
    base_perplexity: float | None = None
    mean_divergence: float | None = None
    worst_divergence: float | None = None
    agreement: float | None = None  # share of tokens on whose likeliest successor both agree

    @property
    def verdict(self) -> str:
        """One sentence for people who do not read tables."""
        if not math.isfinite(self.perplexity):
            return "garbled: probabilities are not numbers; do not serve this model"
        if self.base_perplexity is None or self.mean_divergence is None:
            return "no base to compare with; give one with --against"
        ratio = self.perplexity / self.base_perplexity
        change = f"perplexity {ratio - 1:+.1%}, divergence {self.mean_divergence:.3f} nats a token"
        if ratio <= GOOD[0] and self.mean_divergence <= GOOD[1]:
            return f"good: hardly to be told from the base ({change})"
        if ratio <= FAIR[0] and self.mean_divergence <= FAIR[1]:
            return f"fair: close to the base ({change})"
        return (
            f"poor: clearly worse than the base ({change}); use more bits, smaller groups or a better method"
        )

    def lines(self) -> list[str]:
        """The table, and the verdict last."""
        rows = [("tokens", f"{self.tokens}"), ("perplexity", f"{self.perplexity:.3f}")]
        if self.base_perplexity is not None:
            rows.append(("perplexity of the base", f"{self.base_perplexity:.3f}"))
            rows.append(("mean divergence", f"{self.mean_divergence:.4f} nats"))
            rows.append(("worst divergence", f"{self.worst_divergence:.3f} nats"))
            rows.append(("same likeliest token", f"{self.agreement:.1%}"))
        return [f"{name:<24}{value:>14}" for name, value in rows] + [f"verdict: {self.verdict}"]


def evaluate(model: Forward, texts: Sequence[Tensor], base: Forward | None = None) -> Quality:
    """texts: pieces of token ids, [tokens] each."""
    tokens = sum(len(ids) - 1 for ids in texts)
    loss = base_loss = divergence = worst = 0.0
    agreeing = 0
    for ids in texts:
        own = model.log_probabilities(ids)
        loss -= float(own.gather(1, ids[1:, None]).double().sum())
        if base is None:
            continue
        theirs = base.log_probabilities(ids)
        base_loss -= float(theirs.gather(1, ids[1:, None]).double().sum())
        apart = (theirs.exp() * (theirs - own)).sum(1)
        divergence += float(apart.double().sum())
        worst = max(worst, float(apart.max()))
        agreeing += int((own.argmax(1) == theirs.argmax(1)).sum())
    perplexity = _exponential(loss / tokens)
    if base is None:
        return Quality(tokens, perplexity)
    return Quality(
        tokens, perplexity, _exponential(base_loss / tokens), divergence / tokens, worst, agreeing / tokens
    )


def _exponential(mean: float) -> float:
    return math.exp(mean) if mean < 700 else torch.inf
