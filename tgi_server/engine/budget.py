"""How many prompt tokens a step may take beside the sequences that decode. Plain Python.

A step of n tokens takes about a + b·n seconds. Both are learned from the steps themselves, with old ones fading,
so the budget fits the machine, the model and the load without a setting.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

# Weight of the past per step: about the last twenty steps count. Late tokens of a long prompt cost several times
# what its first ones did, and that should be noticed while it is read.
_FADING = 0.95
# Weight of the prior on the slope: it counts half when the sizes of steps deviate by a tenth of their mean.
_PRIOR = 0.01
_SMALLEST_CHUNK = 16  # tokens; a prompt always moves on
# When decoding alone takes longer than the target, prompts may add this share of its time to a step:
# streams slow down by less than half while a prompt is read, and the prompt is not starved.
_SHARE_OF_DECODING = 0.5


@dataclass
class StepTimes:
    """Running least squares of seconds over tokens."""

    weight: float = 0.0
    tokens: float = 0.0
    seconds: float = 0.0
    tokens_squared: float = 0.0
    tokens_seconds: float = 0.0

    def observe(self, tokens: int, seconds: float) -> None:
        self.weight = self.weight * _FADING + 1.0
        self.tokens = self.tokens * _FADING + tokens
        self.seconds = self.seconds * _FADING + seconds
        self.tokens_squared = self.tokens_squared * _FADING + tokens * tokens
        self.tokens_seconds = self.tokens_seconds * _FADING + tokens * seconds

    def line(self) -> tuple[float, float] | None:
        """(a, b) of a + b·n, b > 0; None before anything was observed."""
        if not self.tokens or not self.seconds:
            return None
        # Steps that are nearly alike say nothing of the slope but noise: as their spread vanishes it becomes
        # what a token costs if nothing is fixed, the careful reading.
        prior = _PRIOR * self.tokens**2
        spread = self.weight * self.tokens_squared - self.tokens**2 + prior
        trend = self.weight * self.tokens_seconds - self.tokens * self.seconds
        slope = (trend + prior * self.seconds / self.tokens) / spread
        if slope <= 0.0:
            slope = self.seconds / self.tokens
        return max(0.0, (self.seconds - slope * self.tokens) / self.weight), slope


class Budget(Protocol):
    """Says how many prompt tokens a step may take."""

    def observe(self, tokens: int, seconds: float) -> None:
        """A step of so many tokens took so long."""

    def prompt_tokens(self, decoding: int) -> int:
        """Tokens left for prompts in a step in which `decoding` sequences get one token each."""

    def shrink(self, prompt_tokens: int) -> bool:
        """A step with so many found too little memory; whether later ones will have fewer."""


class TokenBudget:
    """Keeps the time between two tokens of a stream near `target_s` while prompts are read."""

    def __init__(self, target_s: float, max_batch_tokens: int) -> None:
        self._target_s = target_s
        self._max_batch_tokens = max_batch_tokens
        self._fitting = max_batch_tokens  # prompt tokens that the device's memory was not too small for
        self._times = StepTimes()

    def observe(self, tokens: int, seconds: float) -> None:
        """A step of so many tokens took so long."""
        self._times.observe(tokens, seconds)
        if tokens >= self._fitting:  # else it says nothing of what would fit
            self._fitting = min(self._max_batch_tokens, self._fitting + _SMALLEST_CHUNK)

    def shrink(self, prompt_tokens: int) -> bool:
        """A step with so many found too little memory: later ones get half, and more again with every step of
        that size. False if they cannot get fewer.
        """
        if prompt_tokens <= _SMALLEST_CHUNK:
            return False
        self._fitting = max(_SMALLEST_CHUNK, prompt_tokens // 2)
        return True

    def prompt_tokens(self, decoding: int) -> int:
        """Tokens left for prompts in a step in which `decoding` sequences get one token each."""
        most = min(self._max_batch_tokens - decoding, self._fitting)
        line = self._times.line()
        if decoding == 0 or line is None:
            return most
        fixed_s, token_s = line
        decoding_s = fixed_s + token_s * decoding
        spare_s = max(self._target_s - decoding_s, _SHARE_OF_DECODING * decoding_s)
        return min(most, max(_SMALLEST_CHUNK, int(spare_s / token_s)))
