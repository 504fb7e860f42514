from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from tests.kernels.compare import assert_same_bits, normal
from tests.kernels.sampling_cases import draw, logits_of, p_value, probabilities, settings_of
from tgi_kernels import cpu, sampling
from tgi_kernels.reference import sampling as oracle
from tgi_kernels.sampling import Settings

ALPHA = (
    1e-6  # a χ² test fails a right sampler this often; the seeds are fixed, so that it fails always or never
)
FILTERS: dict[str, dict[str, float]] = {
    "top_k": {"top_k": 17},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.05},
    "typical_p": {"typical_p": 0.7},
}
COMBINATIONS = [
    combination for size in range(len(FILTERS) + 1) for combination in itertools.combinations(FILTERS, size)
]


def test_philox_gives_the_words_of_its_authors() -> None:
    """Known answers of the Random123 library, philox4x32 with ten rounds."""
    counters = torch.tensor([[0] * 4, [0xFFFFFFFF] * 4, [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344]])
    keys = torch.tensor([0, -1, 0x299F31D0A4093822])
    assert oracle.philox(counters, keys).tolist() == [
        [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8],
        [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ]


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
@pytest.mark.parametrize("combination", COMBINATIONS, ids="+".join)
def test_draws_have_the_oracles_distribution(
    device: str, combination: tuple[str, ...], temperature: float
) -> None:
    asked = {name: value for filter_ in combination for name, value in FILTERS[filter_].items()}
    tables = settings_of(20_000, temperature=temperature, device=device, **asked)
    logits = logits_of(len(combination), 300)
    assert p_value(draw(logits.to(device), tables), probabilities(logits, tables)) > ALPHA


@pytest.mark.parametrize(
    "combination", [(), ("top_k", "top_p"), ("typical_p",), tuple(FILTERS)], ids="+".join
)
def test_penalised_biased_and_marked_draws_have_the_oracles_distribution(
    device: str, combination: tuple[str, ...]
) -> None:
    asked = {name: value for filter_ in combination for name, value in FILTERS[filter_].items()}
    tables = settings_of(
        20_000, tokens=40, edit_room=8, device=device, temperature=1.2, repetition_penalty=1.3,
        frequency_penalty=0.4, presence_penalty=-0.2, watermark=2.0, prompt_tokens=15, edits=5,
        min_new_tokens=30, **asked,
    )  # fmt: skip
    logits = logits_of(7, 300)
    likely = logits.topk(60).indices
    tables.history[:] = likely[torch.arange(40) * 7 % 31].int()
    tables.edit_ids[:] = likely[::7][:8].int()
    tables.edit_values[:] = torch.tensor([3.0, -2.0, -torch.inf, 0.5, 1.0, 50.0, 50.0, 50.0])
    expected = probabilities(logits, tables, 40)
    assert expected[likely[14]] == 0
    assert p_value(draw(logits.to(device), tables, 40), expected) > ALPHA


@pytest.mark.parametrize("vocab", [1, 5, 63, 64, 65, 1000, 5003])
def test_every_draw_is_the_oracles(device: str, vocab: int) -> None:
    """The same tokens, not only as often: with every setting in every mixture."""
    rows = 96
    noise = torch.Generator().manual_seed(vocab)

    def some(share: float, values: Tensor, neutral: float) -> Tensor:
        return values.where(torch.rand(rows, generator=noise) < share, neutral)

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(rows, generator=noise) * (high - low) + low

    tables = settings_of(
        rows, tokens=200, edit_room=16,
        temperature=some(0.9, uniform(0.1, 2.0), 0.0), top_p=some(0.5, uniform(0.0, 1.0), 1.0),
        typical_p=some(0.3, uniform(0.0, 1.0), 1.0), min_p=some(0.3, uniform(0.0, 0.2), 0.0),
        repetition_penalty=some(0.3, uniform(0.5, 2.0), 1.0), frequency_penalty=some(0.3, uniform(-2, 2), 0.0),
        presence_penalty=some(0.3, uniform(-2, 2), 0.0), watermark=some(0.2, uniform(1, 3), 0.0),
        top_k=some(0.5, uniform(1, vocab + 10), 0.0), prompt_tokens=uniform(0, 150), choice=uniform(0, 16),
        min_new_tokens=uniform(0, 100), edits=some(0.5, uniform(0, 17), 0.0),
    )  # fmt: skip
    tables.history[:] = torch.randint(vocab, (rows, 200), generator=noise)
    tables.edit_ids[:] = torch.randint(vocab, (rows, 16), generator=noise)
    tables.edit_values[:] = torch.randn(rows, 16, generator=noise) * 5
    tables.edit_values[:, ::5] = -torch.inf
    for _ in range(5):
        logits = torch.randn(rows, vocab, generator=noise) * uniform(0.5, 6.0)[:, None]
        positions = torch.randint(150, 201, (rows,), generator=noise)
        order = torch.randperm(rows, generator=noise)
        want, want_logprobs = oracle.sample(logits, order, positions, tables)
        there = Settings(*(getattr(tables, name).to(device) for name in Settings.__dataclass_fields__))
        ids, logprobs = sampling.sample(logits.to(device), order.to(device), positions.to(device), there)
        assert torch.equal(ids.cpu(), want)
        torch.testing.assert_close(
            logprobs.cpu().double(), want_logprobs, rtol=2e-6, atol=4e-6, equal_nan=True
        )


@pytest.mark.parametrize(
    "asked",
    [
        {"top_k": 9},
        {"top_p": 0.75},
        {"min_p": 0.3},
        {"typical_p": 0.6},
        {"top_k": 12, "top_p": 0.9, "min_p": 0.2},
    ],
    ids=str,
)
@pytest.mark.parametrize("ties", [False, True])
def test_the_tokens_that_are_kept_are_exactly_the_oracles(
    device: str, asked: dict[str, float], ties: bool
) -> None:
    """Each kept token has 1 % at least, so that 4000 draws miss one with a probability under 1e-15."""
    logits = logits_of(3, 24, 0.7)
    if ties:
        logits = (logits * 2).round() / 2
    tables = settings_of(4000, temperature=1.0, device=device, **asked)
    expected = probabilities(logits, tables)
    assert expected[expected > 0].min() > 0.01
    drawn = set(draw(logits.to(device), tables).tolist())
    assert drawn == set(expected.nonzero()[:, 0].tolist())


@pytest.mark.parametrize(
    "asked", [{"top_p": 0.95}, {"top_k": 700, "top_p": 0.9}, {"typical_p": 0.9}], ids=str
)
def test_flat_rows_with_masked_tokens_and_nans_are_drawn_as_the_oracle_draws(
    device: str, asked: dict[str, float]
) -> None:
    """Filters then keep tens of thousands of tokens."""
    logits = logits_of(5, 40_013, 0.5).repeat(6, 1)
    logits[1, ::3] = -torch.inf
    logits[2, 1::2] = torch.nan
    logits[3, 5:] = -torch.inf
    logits[4] = 0.0
    tables = settings_of(6, temperature=1.5, device=device, **asked)
    rows = torch.arange(6, device=device)
    ids, _ = sampling.sample(logits.to(device), rows, rows * 0, tables)
    here = Settings(*(getattr(tables, name).cpu() for name in Settings.__dataclass_fields__))
    assert torch.equal(ids.cpu(), oracle.sample(logits, rows.cpu(), rows.cpu() * 0, here)[0])


@pytest.mark.parametrize(
    ("asked", "theirs"),
    [
        ({"top_k": 20}, [TopKLogitsWarper(20)]),
        ({"top_p": 0.7}, [TopPLogitsWarper(0.7)]),
        ({"min_p": 0.1}, [MinPLogitsWarper(0.1)]),
        ({"typical_p": 0.6}, [TypicalLogitsWarper(0.6)]),
        (
            {"top_k": 50, "top_p": 0.9, "min_p": 0.02, "typical_p": 0.95},
            [TopKLogitsWarper(50), TopPLogitsWarper(0.9), MinPLogitsWarper(0.02), TypicalLogitsWarper(0.95)],
        ),
        ({"repetition_penalty": 1.7}, [RepetitionPenaltyLogitsProcessor(1.7)]),
        (
            {"repetition_penalty": 0.6, "top_p": 0.8},
            [RepetitionPenaltyLogitsProcessor(0.6), TopPLogitsWarper(0.8)],
        ),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_the_oracles_distribution_is_transformers(
    asked: dict[str, float], theirs: list[LogitsProcessor]
) -> None:
    for noise in range(20):
        logits = logits_of(noise, 500)
        tables = settings_of(1, tokens=30, temperature=0.8, **asked)
        tables.history[:] = logits.topk(30).indices.flip(0)[torch.arange(30) // 2]
        scores = logits[None].double()
        # Penalties come before the temperature, filters after it.
        warm = TemperatureLogitsWarper(0.8)
        first = 1 if isinstance(theirs[0], RepetitionPenaltyLogitsProcessor) else 0
        for processor in (*theirs[:first], warm, *theirs[first:]):
            scores = processor(tables.history.long(), scores)
        torch.testing.assert_close(
            probabilities(logits, tables, 30), scores.softmax(-1)[0], rtol=1e-6, atol=0
        )


def test_frequency_and_presence_penalties_are_openais() -> None:
    logits = torch.zeros(1, 6)
    tables = settings_of(
        1, tokens=8, frequency_penalty=0.5, presence_penalty=0.25, prompt_tokens=3, temperature=1.0
    )
    tables.history[0] = torch.tensor([5, 5, 4, 1, 2, 2, 1, 2])
    scores = oracle.adjusted(logits, torch.tensor([0]), torch.tensor([7]), tables)
    assert scores[0].tolist() == [0, -1.25, -1.25, 0, 0, 0]


@pytest.mark.usefixtures("isa")
def test_draws_do_not_depend_on_threads_neighbours_or_instruction_set(
    thread_counts: tuple[int, ...], noise: torch.Generator
) -> None:
    logits = normal(noise, 33, 3001) * 2
    tables = settings_of(33, temperature=1.1, top_p=0.9, repetition_penalty=1.2, tokens=9)
    rows, positions = torch.arange(33), torch.full((33,), 9)
    alone = [sampling.sample(logits[i : i + 1], rows[i : i + 1], positions[:1], tables) for i in range(33)]
    best = cpu.isa()
    for threads in thread_counts:
        cpu.set_num_threads(threads)
        ids, logprobs = sampling.sample(logits, rows, positions, tables)
        assert torch.equal(ids, torch.cat([one for one, _ in alone]))
        assert_same_bits(logprobs, torch.cat([one for _, one in alone]))
    for isa in cpu.available_isas():
        cpu.set_isa(isa)
        assert torch.equal(sampling.sample(logits, rows, positions, tables)[0], ids)
    cpu.set_isa(best)
