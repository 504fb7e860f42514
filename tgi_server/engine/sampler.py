"""From logits to tokens: every running sequence's settings as tables by row, and what else is asked of logits.

The tables change when a row gets a new sequence. From step to step only the history grows, by ids that are on the
device already, so the host may plan a step before it has seen what the last one drew.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tgi_kernels.sampling import (
    NUMBERS,
    WATERMARK_DELTA,
    WHOLES,
    Settings,
    greedy,
    sample,
    token_logprobs,
    top_logprobs,
    workspace,
)
from tgi_server.engine.plan import Asked, Plan, Sampled, Work

# Of one sequence: the front ends take 1024 logit biases and 256 stop tokens beside the model's own.
MAX_EDITS = 1536
# Rows of logits that are in memory at once while a prompt's log-probabilities are computed: as many as are drawn from
# in a step, for which the memory plan has room, but no more than make the product quick, nor so few that it crawls.
_FEWEST_PROMPT_ROWS, _MOST_PROMPT_ROWS = 8, 64

Copy = Callable[[Tensor], Tensor]
Head = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Likeliest:
    """The likeliest tokens of some rows of logits, on the device."""

    ids: Tensor  # [rows, most] int64
    logprobs: Tensor  # [rows, most] float32
    counts: list[int]  # how many of each row were asked for

    def on(self, copy: Copy) -> Likeliest:
        """With tensors that `copy` made of these: for instance pinned ones, on their way."""
        return Likeliest(copy(self.ids), copy(self.logprobs), self.counts)

    def lists(self) -> list[list[tuple[int, float]]]:
        """(id, logprob) of each row, likeliest first; those that do not exist (id −1) left out."""
        rows = zip(self.ids.tolist(), self.logprobs.tolist(), self.counts, strict=True)
        return [
            [pair for pair in zip(ids[:count], logprobs[:count], strict=True) if pair[0] >= 0]
            for ids, logprobs, count in rows
        ]


@dataclass(frozen=True)
class Drawn:
    """What a step drew, on the device."""

    ids: Tensor  # [draws] int64
    logprobs: Tensor  # [draws] float32
    likeliest: Likeliest | None = None  # of those draws that ask for them

    def on(self, copy: Copy) -> Drawn:
        """As `Likeliest.on`."""
        likeliest = self.likeliest and self.likeliest.on(copy)
        return Drawn(copy(self.ids), copy(self.logprobs), likeliest)


@dataclass(frozen=True)
class Scored:
    """What a step found out of a part of a prompt, on the device."""

    logprobs: Tensor  # [tokens] float32
    likeliest: Likeliest | None

    def on(self, copy: Copy) -> Scored:
        """As `Likeliest.on`."""
        return Scored(copy(self.logprobs), self.likeliest and self.likeliest.on(copy))


def results(plan: Plan, drawn: Drawn, scored: Mapping[int, Scored]) -> list[Sampled]:
    """What each work item that samples or is scored got, in the plan's order.

    scored: by place in the plan. Waits for the device, if the tensors are on one.
    """
    draws = zip(drawn.ids.tolist(), drawn.logprobs.tolist(), strict=True)
    if drawn.likeliest is None and not scored:  # the usual step: half the time of what follows
        return [Sampled([token], [logprob]) for token, logprob in draws]
    tops = iter(drawn.likeliest.lists() if drawn.likeliest else ())
    found = []
    for place, work in enumerate(plan.work):
        if not work.samples and not work.scored:
            continue
        if work.samples:
            token, logprob = next(draws)
            sampled = Sampled([token], [logprob], [next(tops)] if work.top_logprobs else [])
        else:
            sampled = Sampled([], [])
        if work.scored:
            part = scored[place]
            sampled.prompt_logprobs = part.logprobs.tolist()
            sampled.prompt_top = part.likeliest.lists() if part.likeliest else []
        found.append(sampled)
    return found


class Sampler:
    """Draws tokens for sequences that keep their row as long as they run."""

    def __init__(self, rows: int, tokens: int, vocab: int, device: torch.device) -> None:
        """rows: sequences that run at once. tokens: the most one of them can have."""
        self._device = device
        self._settings = Settings.neutral(rows, tokens, MAX_EDITS, device)
        self._workspace = workspace(vocab) if device.type == "cpu" else None
        self._prompt_rows = min(max(rows, _FEWEST_PROMPT_ROWS), _MOST_PROMPT_ROWS)
        self._asked: list[Asked | None] = [None] * rows  # None: nothing but the likeliest token

    def read(self, plan: Plan) -> None:
        """Take note of what the plan's new sequences ask for. Call it once for each plan, in order."""
        for work in plan.work:
            if work.asked is not None:
                self._admit(work, work.asked)
            asked = self._asked[work.row]
            if asked is not None and asked.remembers and work.token_ids:
                self._remember(work.row, work.start, work.token_ids)

    def asks(self, plan: Plan) -> bool:
        """Whether the plan needs `draw`: if not, `greedy` does."""
        return any(
            work.samples and (work.top_logprobs or self._asked[work.row] is not None) for work in plan.work
        )

    def draw(self, plan: Plan, logits: Tensor, likeliest: tuple[Tensor, Tensor] | None = None) -> Drawn:
        """A token for each work item of `plan` that samples.

        logits: [draws, vocab], in the plan's order, float32 on CPUs. likeliest: ids and logprobs of `greedy`, if they
        are known; those of rows that ask for something else are replaced in place.
        """
        works = [work for work in plan.work if work.samples]
        tops = self._likeliest(logits, [work.top_logprobs for work in works])
        asking = [i for i, work in enumerate(works) if self._asked[work.row] is not None]
        if likeliest is None and len(asking) == len(works):
            likeliest = logits.new_empty(len(works), dtype=torch.int64), logits.new_empty(len(works)).float()
        ids, logprobs = likeliest or greedy(logits)
        if asking:
            drawing = [(i, works[i].row, works[i].start + works[i].count) for i in asking]
            places, rows, positions = self._numbers(list(zip(*drawing, strict=True)))
            sample(
                logits, rows, positions, self._settings, self._workspace, ids, logprobs, places=places
            )  # fmt: skip
            if any(asked.remembers for i in asking if (asked := self._asked[works[i].row])):
                self._settings.history[rows, positions] = ids[places].int()
        return Drawn(ids, logprobs, tops)

    def score(self, plan: Plan, hidden: Tensor, head: Head) -> dict[int, Scored]:
        """The log-probabilities of the tokens that work items have `scored`, by place in the plan.

        hidden: [tokens, hidden size], the step's. head: makes logits [rows, vocab] of some rows of it.
        """
        found = {}
        first = 0
        for place, work in enumerate(plan.work):
            if work.scored:
                found[place] = self._score(work, hidden[first : first + len(work.scored)], head)
            first += work.count
        return found

    def _score(self, work: Work, hidden: Tensor, head: Head) -> Scored:
        ids = self._numbers(work.scored)
        logprobs, tops = [], []
        for part in range(0, len(ids), self._prompt_rows):
            logits = head(hidden[part : part + self._prompt_rows])
            logprobs.append(token_logprobs(logits, ids[part : part + self._prompt_rows]))
            if work.top_logprobs:
                most = min(work.top_logprobs, logits.shape[1])
                tops.append(top_logprobs(logits, most, self._workspace))
        likeliest = None
        if tops:
            top_ids, top = (torch.cat(parts) for parts in zip(*tops, strict=True))
            likeliest = Likeliest(top_ids, top, [work.top_logprobs] * len(ids))
        return Scored(torch.cat(logprobs), likeliest)

    def _likeliest(self, logits: Tensor, counts: list[int]) -> Likeliest | None:
        wanted = [i for i, count in enumerate(counts) if count]
        if not wanted:
            return None
        chosen = logits if len(wanted) == len(counts) else logits[self._numbers(wanted)]
        most = min(max(counts), logits.shape[1])
        return Likeliest(*top_logprobs(chosen, most, self._workspace), [counts[i] for i in wanted])

    def _admit(self, work: Work, asked: Asked) -> None:
        self._asked[work.row] = asked if asked.anything else None
        if asked.anything:
            self._write(work.row, asked)
        if asked.remembers:
            self._remember(work.row, 0, asked.before)

    def _write(self, row: int, asked: Asked) -> None:
        settings, sampling = self._settings, asked.sampling
        numbers = {name: getattr(sampling, name) for name in NUMBERS if name != "watermark"}
        numbers["watermark"] = WATERMARK_DELTA if sampling.watermark else 0.0
        edits = [*sampling.logit_bias.items(), *((token, -math.inf) for token in asked.masked)]
        if len(edits) > MAX_EDITS:
            raise ValueError(f"{len(edits)} logit biases and stop tokens; at most {MAX_EDITS} are possible")
        wholes = {
            "top_k": sampling.top_k,
            "seed": sampling.seed - (sampling.seed >> 63 << 64),  # as a signed number with the same bits
            "choice": sampling.choice,
            "prompt_tokens": asked.prompt_tokens,
            "min_new_tokens": asked.min_new_tokens,
            "edits": len(edits),
        }
        settings.numbers[row] = self._numbers([numbers[name] for name in NUMBERS], torch.float32)
        settings.wholes[row] = self._numbers([wholes[name] for name in WHOLES])
        if edits:
            ids, values = zip(*edits, strict=True)
            settings.edit_ids[row, : len(edits)] = self._numbers(ids, torch.int32)
            settings.edit_values[row, : len(edits)] = self._numbers(values, torch.float32)

    def _remember(self, row: int, start: int, token_ids: Sequence[int]) -> None:
        if token_ids:
            ids = self._numbers(token_ids, torch.int32)
            self._settings.history[row, start : start + len(token_ids)] = ids

    def _numbers(self, values: Sequence[object], dtype: torch.dtype = torch.int64) -> Tensor:
        """As a tensor where the sampler is. A copy to a GPU is queued; torch keeps its source until it is done."""
        on_gpu = self._device.type != "cpu"
        return torch.tensor(values, dtype=dtype, pin_memory=on_gpu).to(self._device, non_blocking=on_gpu)
