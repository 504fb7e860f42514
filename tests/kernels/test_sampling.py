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
from tgi_kernels import cpu, sampling
from tgi_kernels._library import ops
from tgi_kernels.reference import sampling as oracle
from tgi_kernels.sampling import NUMBERS, WHOLES, Settings

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


def test_a_temperature_of_zero_takes_the_likeliest_token_after_penalties(device: str) -> None:
    logits = torch.tensor([3.0, 2.9, 1.0, 2.9], device=device)
    tables = settings_of(1, tokens=2, device=device)
    assert draw(logits, tables).item() == 0
    tables = settings_of(1, tokens=2, device=device, repetition_penalty=1.5)
    assert draw(logits, tables, 2).item() == 1  # history holds token 0


def test_drawing_and_greedy_give_the_likeliest_token_the_same_logprob(
    isa: str, noise: torch.Generator
) -> None:
    logits = normal(noise, 9, 1003)
    tables = settings_of(9)
    ids, logprobs = sampling.sample(logits, torch.arange(9), torch.zeros(9, dtype=torch.int64), tables)
    want_ids, want = sampling.greedy(logits)
    assert isa and torch.equal(ids, want_ids)
    assert_same_bits(logprobs, want)


@pytest.mark.parametrize(
    "asked", [{}, {"top_k": 3}, {"top_p": 0.5}, {"typical_p": 0.5}, {"min_p": 0.5}], ids=str
)
@pytest.mark.parametrize("temperature", [0.0, 1e-38, 1e-4, 1.0, 100.0])
def test_rows_that_cannot_be_trusted_give_a_valid_id(
    device: str, asked: dict[str, float], temperature: float
) -> None:
    logits = torch.zeros(5, 200, device=device)
    logits[0] = torch.nan
    logits[1] = -torch.inf
    logits[2] = -torch.inf
    logits[2, 9], logits[2, 10] = torch.nan, 50.0
    logits[3, 11] = torch.inf
    logits[4] = -torch.inf
    logits[4, 77] = -3.0e38
    tables = settings_of(5, temperature=temperature, device=device, **asked)
    rows = torch.arange(5, device=device)
    ids, logprobs = sampling.sample(logits, rows, torch.zeros_like(rows), tables)
    assert ids.tolist() == [0, 0, 10, 11, 77]
    assert logprobs.isnan().tolist() == [True, True, True, True, False]
    assert logprobs[4] == 0


def test_masking_every_token_gives_id_zero_and_nan(device: str) -> None:
    tables = settings_of(1, edit_room=3, edits=3, device=device, temperature=1.0, min_new_tokens=1)
    tables.edit_ids[0] = torch.arange(3)
    tables.edit_values[:] = -torch.inf
    logits = torch.zeros(1, 3, device=device)
    zero = torch.zeros(1, dtype=torch.int64, device=device)
    ids, logprobs = sampling.sample(logits, zero, zero, tables)
    assert ids.tolist() == [0] and logprobs.isnan().all()
    tables.edit_ids[0] = 1
    assert sampling.sample(logits, zero, zero, tables)[0].item() != 1
    tables.wholes[:, WHOLES.index("min_new_tokens")] = 0
    assert sampling.sample(logits, zero, zero, tables)[1].item() == pytest.approx(-1.0986, abs=1e-4)


def test_a_watermarked_text_has_more_green_tokens_than_chance_allows(device: str) -> None:
    logits = torch.zeros(400, device=device)
    green = sampling.green_tokens(77, 400)
    assert 150 < green.sum() < 250
    assert not torch.equal(green, sampling.green_tokens(78, 400))
    tables = settings_of(1000, tokens=1, device=device, temperature=1.0, watermark=2.0)
    tables.history[:] = 77
    share = green[draw(logits, tables, 1).cpu()].double().mean().item()
    assert share == pytest.approx(torch.tensor(2.0).sigmoid().item(), abs=0.06)


@pytest.mark.parametrize("vocab", [1, 7, 64, 1000, 50257])
def test_top_logprobs_are_the_likeliest_first_with_ties_by_id(
    device: str, noise: torch.Generator, vocab: int
) -> None:
    logits = (normal(noise, 5, vocab) * 4).round() / 4
    logits[3, vocab // 2 :] = -torch.inf
    count = min(20, vocab)
    ids, logprobs = sampling.top_logprobs(logits.to(device), count)
    want_ids, want = oracle.top_logprobs(logits, count)
    assert torch.equal(ids.cpu(), want_ids)
    torch.testing.assert_close(logprobs.cpu(), want, rtol=2e-6, atol=4e-6, equal_nan=True)


def test_token_logprobs_are_the_oracles(device: str, noise: torch.Generator) -> None:
    logits, ids = normal(noise, 7, 1003) * 3, torch.randint(1003, (7,), generator=noise)
    got = sampling.token_logprobs(logits.to(device), ids.to(device))
    torch.testing.assert_close(got.cpu().double(), oracle.token_logprobs(logits, ids), rtol=2e-6, atol=4e-6)


def test_what_does_not_fit_is_refused_with_the_numbers() -> None:
    logits, tables = torch.zeros(2, 8), settings_of(2)
    zeros = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"rows has shape \[1\]; it needs \[2\]"):
        sampling.sample(logits, zeros[:1], zeros, tables)
    with pytest.raises(RuntimeError, match=r"rows\[0\] is 2; the tables have 2 rows"):
        sampling.sample(logits, zeros + 2, zeros, tables)
    with pytest.raises(RuntimeError, match=r"positions\[0\] is 2; history holds 1 tokens"):
        sampling.sample(logits, zeros, zeros + 2, tables)
    with pytest.raises(ValueError, match="count is 9; 1 to 8"):
        sampling.top_logprobs(logits, 9)
    with pytest.raises(RuntimeError, match=r"ids\[0\] is 8; logits has 8 columns"):
        sampling.token_logprobs(logits, zeros + 8)


@pytest.mark.usefixtures("isa")
def test_draws_of_some_rows_leave_the_others_alone(noise: torch.Generator) -> None:
    logits, tables = normal(noise, 9, 300), settings_of(9, temperature=1.0, top_k=20)
    places, rows = torch.tensor([7, 0, 4]), torch.tensor([2, 8, 5])
    positions = torch.zeros(3, dtype=torch.int64)
    want_ids, want = sampling.sample(logits[places], rows, positions, tables)
    ids, logprobs = torch.full((9,), -7), torch.full((9,), -7.0)
    sampling.sample(logits, rows, positions, tables, ids=ids, logprobs=logprobs, places=places)
    assert torch.equal(ids[places], want_ids) and torch.equal(logprobs[places], want)
    others = [i for i in range(9) if i not in places.tolist()]
    assert (ids[others] == -7).all() and (logprobs[others] == -7.0).all()
    with pytest.raises(RuntimeError, match=r"places\[1\] is 9; there are 9 rows of logits"):
        sampling.sample(logits, rows, positions, tables, places=torch.tensor([0, 9, 1]))


def test_the_schemas_of_sampling_tell_what_is_written(noise: torch.Generator) -> None:
    logits, tables = normal(noise, 3, 100), settings_of(3, temperature=1.0)
    rows, memory = torch.arange(3), sampling.workspace(100).zero_()
    ids, logprobs = torch.empty(3, dtype=torch.int64), torch.empty(3)
    columns = [getattr(tables, name) for name in Settings.__dataclass_fields__]
    # What a worker leaves in its workspace depends on who took which row.
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(
        ops.sample,
        (logits, rows, torch.zeros_like(rows), *columns, memory, rows, ids, logprobs),
        test_utils=tests,
    )
    torch.library.opcheck(
        ops.top_logprobs, (logits, memory, ids.new_empty(3, 4), torch.empty(3, 4)), test_utils=tests
    )
    torch.library.opcheck(ops.token_logprobs, (logits, rows, logprobs))
    torch.library.opcheck(ops.greedy, (logits, ids, logprobs))
