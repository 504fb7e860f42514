"""How good a model is at text it has not seen, and how far from another it is."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Final

import torch
from torch import Tensor

from tgi_server.quantize.forward import Forward

# Perplexity beside the base's, and mean divergence in nats: from here on answers differ for everybody to see.
GOOD: Final = (1.02, 0.02)
FAIR: Final = (1.10, 0.10)
_WORST: Final = 3  # layers that the table names


@dataclass(frozen=True)
class Quality:
    """Over `tokens` predictions. Divergences are of this model from the base, in nats; absent without a base."""

    tokens: int
    perplexity: float
    base_perplexity: float | None = None
    mean_divergence: float | None = None
    worst_divergence: float | None = None
    agreement: float | None = None  # share of tokens on whose likeliest successor both agree
    # By layer: how far what it adds is from what the base's adds, as a share of that. Errors before it are in it.
    layer_errors: tuple[float, ...] = ()

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
            worst = sorted(range(len(self.layer_errors)), key=lambda layer: -self.layer_errors[layer])
            rows.extend(
                (f"error of layer {layer}", f"{self.layer_errors[layer]:.1%}") for layer in worst[:_WORST]
            )
        return [f"{name:<24}{value:>14}" for name, value in rows] + [f"verdict: {self.verdict}"]

    def as_json(self) -> str:
        """All of it as one object on one line; numbers that JSON does not have are null."""
        named = asdict(self) | {"verdict": self.verdict}
        found = {
            name: None if isinstance(it, float) and not math.isfinite(it) else it
            for name, it in named.items()
        }
        return json.dumps(found)


def evaluate(model: Forward, texts: Sequence[Tensor], base: Forward | None = None) -> Quality:
    """texts: pieces of token ids, [tokens] each."""
    tokens = sum(len(ids) - 1 for ids in texts)
    if base is None:
        loss = sum(_loss(model.log_probabilities(ids), ids) for ids in texts)
        return Quality(tokens, _exponential(loss / tokens))
    loss = base_loss = divergence = worst = 0.0
    agreeing = 0
    layers = _LayerErrors()
    for ids in texts:
        (own, added), (theirs, base_added) = model.traced(ids), base.traced(ids)
        loss, base_loss = loss + _loss(own, ids), base_loss + _loss(theirs, ids)
        apart = (theirs.exp() * (theirs - own)).sum(1)
        divergence += float(apart.double().sum())
        worst = max(worst, float(apart.max()))
        agreeing += int((own.argmax(1) == theirs.argmax(1)).sum())
        layers.add(added, base_added)
    return Quality(
        tokens,
        _exponential(loss / tokens),
        _exponential(base_loss / tokens),
        divergence / tokens,
        worst,
        agreeing / tokens,
        layers.shares(),
    )


class _LayerErrors:
    """Squares of what layers add, summed, and of its distance from what the base's layers add."""

    def __init__(self) -> None:
        self._sums: list[tuple[float, float]] = []

    def add(self, own: Sequence[Tensor], base: Sequence[Tensor]) -> None:
        """One piece of text. Nothing is compared where the models have different shapes."""
        if [part.shape for part in own] != [part.shape for part in base]:
            return
        self._sums = self._sums or [(0.0, 0.0)] * len(own)
        self._sums = [
            (apart + float((mine - theirs).square().sum()), size + float(theirs.square().sum()))
            for (apart, size), mine, theirs in zip(self._sums, own, base, strict=True)
        ]

    def shares(self) -> tuple[float, ...]:
        return tuple(math.sqrt(apart / size) if size else 0.0 for apart, size in self._sums)


def _loss(log_probabilities: Tensor, ids: Tensor) -> float:
    """Of all tokens but the first, in nats."""
    return -float(log_probabilities.gather(1, ids[1:, None]).double().sum())


def _exponential(mean: float) -> float:
    return math.exp(mean) if mean < 700 else torch.inf
