"""Choosing tokens on the GPU: greedy against the float64 oracle, draws against the CPU's, token by token."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from torch import Tensor

from tgi_kernels import sampling
from tgi_kernels.reference import sampling as reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 7, 1000, 49152, 50257, 128256, 262144])
@pytest.mark.parametrize("rows", [1, 5, 33])
def test_greedy_is_the_first_largest_logit_and_its_log_probability(
    dtype: torch.dtype, vocab: int, rows: int
) -> None:
    logits = (torch.randn(rows, vocab, device="cuda") * 3).to(dtype)
    ids, logprobs = sampling.greedy(logits)
    exact_ids, exact = reference.greedy(logits)
    assert torch.equal(ids, exact_ids)
    torch.testing.assert_close(logprobs.double(), exact, rtol=2e-6, atol=2e-6)


def test_of_equal_logits_the_lowest_id_wins() -> None:
    logits = torch.zeros(4, 128256, device="cuda")
    logits[1, 77777] = logits[1, 128255] = 1.0
    logits[2, 16031] = logits[2, 16032] = 1.0
    logits[3] = -torch.inf
    logits[3, 5] = -3.0
    ids, logprobs = sampling.greedy(logits)
    assert ids.tolist() == [0, 77777, 16031, 5]
    assert logprobs[3] == 0.0


def test_a_row_that_cannot_be_trusted_has_logprob_nan_and_a_valid_id() -> None:
    logits = torch.randn(5, 4096, device="cuda")
    logits[0] = torch.nan
    logits[1] = -torch.inf
    logits[2, 9] = torch.nan
    logits[2, 10] = 50.0
    logits[3, 11] = torch.inf
    ids, logprobs = sampling.greedy(logits)
    assert ids.tolist()[:4] == [0, 0, 10, 11]
    assert logprobs.isnan().tolist() == [True, True, True, True, False]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_rows_choice_has_the_same_bits_in_every_batch(dtype: torch.dtype) -> None:
    logits = torch.randn(65, 128256, device="cuda").to(dtype)
    _, together = sampling.greedy(logits)
    alone = torch.cat([sampling.greedy(row[None])[1] for row in logits])
    assert torch.equal(together, alone)


def settings_of(rows: int, history: int, **columns: float | list[float]) -> sampling.Settings:
    """Tables on the CPU, the named columns set for all rows or one by one."""
    settings = sampling.Settings.neutral(rows, history, 4, "cpu")
    settings.wholes[:, sampling.WHOLES.index("seed")] = torch.randint(-(2**62), 2**62, (rows,))
    settings.wholes[:, sampling.WHOLES.index("choice")] = torch.randint(0, 4, (rows,))
    for name, value in columns.items():
        table, names = (
            (settings.numbers, sampling.NUMBERS)
            if name in sampling.NUMBERS
            else (settings.wholes, sampling.WHOLES)
        )
        table[:, names.index(name)] = torch.as_tensor(value, dtype=table.dtype)
    return settings


def on_gpu(settings: sampling.Settings) -> sampling.Settings:
    return sampling.Settings(*(getattr(settings, field.name).cuda() for field in fields(settings)))


def assert_like_cpu(logits: Tensor, settings: sampling.Settings, positions: Tensor | None = None) -> None:
    """The GPU draws the CPU's tokens; their log-probabilities are float64's, rounded."""
    draws = len(logits)
    rows = torch.randperm(draws)
    if positions is None:
        positions = torch.randint(0, settings.history.shape[1] + 1, (draws,))
    want_ids, _ = sampling.sample(logits, rows, positions, settings)
    ids = torch.full((draws,), -7, device="cuda")
    logprobs = torch.full((draws,), -7.0, device="cuda")
    sampling.sample(
        logits.cuda(), rows.cuda(), positions.cuda(), on_gpu(settings), ids=ids, logprobs=logprobs
    )
    assert ids.tolist() == want_ids.tolist()
    exact = reference.token_logprobs(logits.cuda(), ids)
    torch.testing.assert_close(logprobs.double(), exact, rtol=3e-6, atol=3e-6, equal_nan=True)


FILTERS: dict[str, dict[str, float]] = {
    "none": {},
    "top-k": {"top_k": 50},
    "top-k of one": {"top_k": 1},
    "a large top-k": {"top_k": 640},
    "a top-k that is binned": {"top_k": 3000},
    "a top-k and top-p that are binned": {"top_k": 30000, "top_p": 0.3},
    "top-p": {"top_p": 0.9},
    "a tiny top-p": {"top_p": 1e-9},
    "a top-p near one": {"top_p": 0.9995},
    "top-k and top-p": {"top_k": 40, "top_p": 0.8},
    "a large top-k and top-p": {"top_k": 5000, "top_p": 0.7},
    "min-p": {"min_p": 0.05},
    "typical-p": {"typical_p": 0.4},
    "all": {"top_k": 60, "top_p": 0.95, "min_p": 0.01, "typical_p": 0.7},
}


@pytest.mark.parametrize("filters", FILTERS.values(), ids=FILTERS.keys())
@pytest.mark.parametrize("vocab", [3, 1000, 50257, 128256])
@pytest.mark.parametrize(("spread", "temperature"), [(0.02, 1.0), (1.0, 1.3), (4.0, 0.7), (3.0, 0.01)])
def test_the_gpu_draws_the_cpus_tokens(
    filters: dict[str, float], vocab: int, spread: float, temperature: float
) -> None:
    logits = torch.randn(12, vocab) * spread
    assert_like_cpu(logits, settings_of(12, 20, temperature=temperature, **filters))


@pytest.mark.parametrize("filters", FILTERS.values(), ids=FILTERS.keys())
def test_ties_go_to_the_lowest_ids_as_on_the_cpu(filters: dict[str, float]) -> None:
    logits = (torch.randn(8, 128256) * 2).round()
    assert_like_cpu(logits, settings_of(8, 20, temperature=1.0, **filters))
    assert_like_cpu(torch.zeros(4, 128256), settings_of(4, 20, temperature=1.0, **filters))


def test_penalties_edits_and_watermark_are_the_cpus() -> None:
    rows, vocab, history = 24, 32000, 700
    for drawn in (0.0, 0.8):
        settings = settings_of(
            rows,
            history,
            temperature=drawn,
            top_k=30,
            repetition_penalty=(torch.rand(rows) + 0.7).tolist(),
            frequency_penalty=(torch.rand(rows) - 0.3).tolist(),
            presence_penalty=(torch.rand(rows) - 0.3).tolist(),
            watermark=([0.0, 2.0] * rows)[:rows],
            prompt_tokens=torch.randint(0, 300, (rows,)).tolist(),
            min_new_tokens=([0, 500] * rows)[:rows],
            edits=torch.randint(0, 5, (rows,)).tolist(),
        )
        settings.history[:] = torch.randint(0, 60, (rows, history))  # so that tokens come back often
        settings.edit_ids[:] = torch.randint(0, 40, (rows, 4))
        settings.edit_values[:] = torch.randn(rows, 4) * 4
        settings.edit_values[:, 3] = -torch.inf
        logits = torch.randn(rows, vocab)
        logits[:, :60] += 4
        logits[5, 3] = torch.nan
        assert_like_cpu(logits, settings, torch.randint(300, history + 1, (rows,)))


def test_rows_that_cannot_be_drawn_from_are_as_on_the_cpu() -> None:
    logits = torch.randn(6, 5000)
    logits[0] = torch.nan
    logits[1] = -torch.inf
    logits[2, 7] = torch.inf
    logits[3, 7] = torch.nan
    logits[4, 100:] = -torch.inf
    for filters in ({}, {"top_k": 200}, {"top_p": 0.5}, {"temperature": 0.0}):
        settings = settings_of(6, 20, **{"temperature": 1.0, **filters})
        rows, positions = torch.arange(6), torch.full((6,), 3)
        want_ids, want = sampling.sample(logits, rows, positions, settings)
        ids, logprobs = sampling.sample(logits.cuda(), rows.cuda(), positions.cuda(), on_gpu(settings))
        assert ids.tolist() == want_ids.tolist()
        torch.testing.assert_close(logprobs.cpu(), want, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_a_draw_does_not_depend_on_its_batch() -> None:
    settings = on_gpu(settings_of(65, 20, temperature=1.0, top_p=0.95))
    logits = torch.randn(65, 128256, device="cuda") * 3
    rows, positions = torch.arange(65, device="cuda"), torch.arange(65, device="cuda") % 20
    ids, logprobs = sampling.sample(logits, rows, positions, settings)
    for i in range(0, 65, 7):
        alone = slice(i, i + 1)
        one, its = sampling.sample(logits[alone], rows[alone], positions[alone], settings)
        assert one == ids[alone] and its == logprobs[alone]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("vocab", [1000, 50257, 128256])
def test_a_draw_from_16_bit_logits_has_the_bits_of_their_values_in_float32(
    dtype: torch.dtype, vocab: int
) -> None:
    logits = (torch.randn(20, vocab, device="cuda") * 3).to(dtype)
    settings = on_gpu(
        settings_of(
            20,
            9,
            temperature=[0.0, 1.0, 0.7, 1.2] * 5,
            top_p=[1.0, 0.9] * 10,
            top_k=[0, 50, 0, 0, 0] * 4,
            repetition_penalty=[1.0, 1.0, 1.3, 1.0] * 5,
        )
    )
    rows, positions = torch.arange(20, device="cuda"), torch.arange(20, device="cuda") % 9
    ids, logprobs = sampling.sample(logits, rows, positions, settings)
    wide_ids, wide_logprobs = sampling.sample(logits.float(), rows, positions, settings)
    assert torch.equal(ids, wide_ids) and torch.equal(logprobs, wide_logprobs)


def test_draws_of_some_rows_are_those_of_these_rows_alone() -> None:
    logits = torch.randn(40, 128256, device="cuda", dtype=torch.bfloat16)
    settings = on_gpu(settings_of(40, 9, temperature=1.0, top_p=0.95))
    places = torch.tensor([39, 3, 17], device="cuda")
    rows, positions = torch.tensor([5, 0, 33], device="cuda"), torch.tensor([1, 8, 9], device="cuda")
    want_ids, want = sampling.sample(logits[places], rows, positions, settings)
    ids, logprobs = torch.full((40,), -7, device="cuda"), torch.full((40,), -7.0, device="cuda")
    sampling.sample(logits, rows, positions, settings, ids=ids, logprobs=logprobs, places=places)
    assert torch.equal(ids[places], want_ids) and torch.equal(logprobs[places], want)
    assert (ids == -7).sum() == (logprobs == -7.0).sum() == 37


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("vocab", "count"), [(1, 1), (7, 7), (1000, 5), (1500, 1024), (50257, 20), (128256, 1024)]
)
def test_the_likeliest_tokens_are_the_oracles_in_order(dtype: torch.dtype, vocab: int, count: int) -> None:
    for rows, spread in ((1, 3.0), (9, 0.01), (40, 1.0)):
        logits = (torch.randn(rows, vocab, device="cuda") * spread).to(dtype)
        if vocab > 100:
            logits[0, 3:9] = -torch.inf
        ids, logprobs = sampling.top_logprobs(logits, count)
        exact_ids, exact = reference.top_logprobs(logits, count)
        assert torch.equal(ids, exact_ids)
        torch.testing.assert_close(logprobs, exact, rtol=3e-6, atol=3e-6)


def test_of_equal_likeliest_tokens_the_lowest_ids_come_first_and_missing_ones_are_marked() -> None:
    logits = torch.zeros(5, 128256, device="cuda")
    logits[1] = -torch.inf
    logits[1, [5, 70000]] = torch.tensor([1.0, 2.0], device="cuda")
    logits[2] = -torch.inf
    logits[3, 9] = torch.nan
    logits[4, 100000:] = 1.0
    ids, logprobs = sampling.top_logprobs(logits, 20)
    assert ids[0].tolist() == list(range(20))
    assert ids[1].tolist() == [70000, 5] + [-1] * 18
    assert logprobs[1, 2:].isneginf().all() and logprobs[1, :2].isfinite().all()
    assert ids[2].tolist() == [-1] * 20
    assert ids[3].tolist() == [i for i in range(21) if i != 9]
    assert ids[4].tolist() == list(range(100000, 100020))


def test_draws_follow_the_distribution() -> None:
    draws, vocab = 200_000, 24
    logits = torch.randn(1, vocab, device="cuda")
    settings = on_gpu(settings_of(1, draws, temperature=0.9, seed=1))
    ids, _ = sampling.sample(
        logits.expand(draws, vocab).contiguous(),
        torch.zeros(draws, dtype=torch.int64, device="cuda"),
        torch.arange(draws, device="cuda"),
        settings,
    )
    share = torch.bincount(ids, minlength=vocab) / draws
    expected = (logits[0] / 0.9).softmax(-1)
    assert (share - expected).abs().sum() / 2 < 0.01
