"""Sampling at its edges: no temperature, no numbers, nothing left to draw; logprobs; what is refused."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.compare import assert_same_bits, normal
from tests.kernels.sampling_cases import draw, settings_of
from tgi_kernels import sampling
from tgi_kernels._library import ops
from tgi_kernels.reference import sampling as oracle
from tgi_kernels.sampling import WHOLES, Settings


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
