"""Tables of sampling settings, draws from them, and how far draws are from a distribution."""

from __future__ import annotations

import torch
from torch import Tensor

from tgi_kernels import sampling
from tgi_kernels.reference import sampling as oracle
from tgi_kernels.sampling import NUMBERS, WHOLES, Settings


def settings_of(
    rows: int, *, tokens: int = 1, edit_room: int = 1, device: str = "cpu", **asked: float | Tensor
) -> Settings:
    """Neutral tables, each row with a seed of its own, and what is asked, by column."""
    tables = Settings.neutral(rows, tokens, edit_room, device)
    tables.wholes[:, WHOLES.index("seed")] = torch.arange(rows) * 0x9E3779B97F4A7C1
    for name, value in asked.items():
        if name in NUMBERS:
            tables.numbers[:, NUMBERS.index(name)] = torch.as_tensor(
                value, dtype=torch.float32, device=device
            )
        else:
            tables.wholes[:, WHOLES.index(name)] = torch.as_tensor(value, device=device).long()
    return tables


def draw(logits: Tensor, tables: Settings, position: int = 0) -> Tensor:
    """A token for every row of the tables, all from the same logits [vocab]."""
    rows = torch.arange(len(tables.numbers), device=logits.device)
    return sampling.sample(logits.expand(len(rows), -1), rows, torch.full_like(rows, position), tables)[0]


def probabilities(logits: Tensor, tables: Settings, position: int = 0) -> Tensor:
    """The oracle's distribution of row 0: [vocab] float64."""
    rows, positions = torch.zeros(1, dtype=torch.int64), torch.tensor([position])
    one = logits[None].cpu()
    tables = Settings(*(getattr(tables, name)[:1].cpu() for name in Settings.__dataclass_fields__))
    scores = oracle.adjusted(one, rows, positions, tables)
    kept = oracle.kept(scores, rows, tables)
    return (scores / tables.numbers[0, 0].double()).where(kept, -torch.inf).softmax(-1)[0]


def p_value(ids: Tensor, expected: Tensor) -> float:
    """Of a χ² test of draws against probabilities [vocab]; rare tokens count as one."""
    counts = torch.bincount(ids.cpu(), minlength=len(expected)).double()
    wanted = expected * len(ids)
    assert counts[expected == 0].sum() == 0, "a token that is filtered out was drawn"
    rare = wanted < 5
    counts = torch.cat((counts[~rare], counts[rare].sum()[None]))
    wanted = torch.cat((wanted[~rare], wanted[rare].sum()[None]))
    statistic = ((counts - wanted) ** 2 / wanted.clamp(min=1e-9)).sum()
    degrees = torch.tensor(max(1, int((wanted > 0).sum()) - 1), dtype=torch.float64)
    return torch.special.gammaincc(degrees / 2, statistic / 2).item()


def logits_of(noise: int, vocab: int, spread: float = 2.0) -> Tensor:
    return torch.randn(vocab, generator=torch.Generator().manual_seed(noise)) * spread
