"""A decode step's beginning and end: inputs from what the GPU keeps, the embedding, what was drawn."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.kernels.conftest import CUDA
from tgi_kernels import step
from tgi_kernels._library import ops
from tgi_kernels.reference import step as reference

ROWS, MAX_PAGES = 40, 600


def decode_case(seqs: int, kv_lens: Tensor) -> tuple[Tensor, ...]:
    """rows (the last one idle), kv_lens, added, last_ids and page_table of a step, on the CPU."""
    rows = torch.randperm(ROWS)[:seqs].int()
    added = torch.where(kv_lens % 16 == 1, torch.randint(0, 9999, (seqs,)), -1).int()
    if seqs > 1:
        rows[-1], kv_lens[-1], added[-1] = -1, 0, -1
    last_ids = torch.randint(0, 128256, (ROWS,))
    return rows, kv_lens.int(), added, last_ids, torch.randint(0, 9999, (ROWS, MAX_PAGES)).int()


@pytest.mark.parametrize("device", [CUDA])
@pytest.mark.parametrize("seqs", [1, 3, 40])
def test_inputs_of_a_decode_step_follow_the_oracle(device: str, seqs: int) -> None:
    for first in (1, 16, 17, 5000):
        kv_lens = torch.arange(first, first + seqs)
        rows, kv_lens, added, last_ids, page_table = decode_case(seqs, kv_lens)
        want_ids, want_positions, want_slots, want_table = reference.decode_inputs(
            rows, kv_lens, added, last_ids, page_table
        )
        table_there = page_table.to(device)
        ids, slots = (torch.full((seqs,), -7, device=device) for _ in range(2))
        positions = torch.full((seqs,), -7, dtype=torch.int32, device=device)
        tables = torch.full((seqs, MAX_PAGES), -7, dtype=torch.int32, device=device)
        step.decode_inputs(
            *(tensor.to(device) for tensor in (rows, kv_lens, added, last_ids)),
            table_there,
            token_ids=ids,
            positions=positions,
            slots=slots,
            page_tables=tables,
        )
        assert torch.equal(table_there.cpu(), want_table)
        assert torch.equal(ids.cpu(), want_ids)
        assert torch.equal(positions.cpu(), want_positions)
        assert torch.equal(slots.cpu(), want_slots)
        for copy, row, kv_len in zip(tables.cpu(), rows.tolist(), kv_lens.tolist(), strict=True):
            used = -(-kv_len // 16)
            assert torch.equal(copy[:used], want_table[row, :used])
            assert (copy[used:] == -7).all()


@pytest.mark.parametrize("device", [CUDA])
@pytest.mark.parametrize("count", [1, 255, 700])
def test_ids_are_kept_by_row_and_those_of_idle_places_are_not(device: str, count: int) -> None:
    ids, last_ids = torch.randint(0, 9999, (count,)), torch.randint(0, 9999, (1000,))
    rows = torch.randperm(1000)[:count].int()
    rows[::3] = -1
    there = last_ids.to(device)
    step.keep_ids(ids.to(device), rows.to(device), there)
    assert torch.equal(there.cpu(), reference.keep_ids(ids, rows, last_ids))


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("hidden", [1, 7, 576, 4096])
def test_an_embedding_is_the_rows_of_its_table(device: str, dtype: torch.dtype, hidden: int) -> None:
    table = torch.randn(300, hidden, device=device).to(dtype)
    ids = torch.tensor([0, 299, 5, 5, 17], device=device)
    assert torch.equal(step.embed(ids, table), reference.embed(ids, table))
    out = torch.full((5, hidden), torch.nan, dtype=dtype, device=device)
    assert step.embed(ids, table, out) is out
    assert torch.equal(out, reference.embed(ids, table))


def test_an_id_out_of_range_is_an_error_on_the_cpu() -> None:
    with pytest.raises(IndexError):
        step.embed(torch.tensor([300]), torch.randn(300, 8))


@pytest.mark.parametrize("device", [CUDA])
def test_an_id_out_of_range_gives_nan_on_the_gpu(device: str) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        table = torch.randn(300, 32, device=device).to(dtype)
        out = step.embed(torch.tensor([300, 2, -1], device=device), table)
        assert out.isnan().all(-1).tolist() == [True, False, True]


@pytest.mark.parametrize("device", [CUDA])
def test_an_output_of_another_shape_is_refused_with_both(device: str) -> None:
    ids, table = torch.tensor([1, 2], device=device), torch.randn(300, 8, device=device)
    with pytest.raises(ValueError, match=r"out has shape \[3, 8\]; it needs \[2, 8\]"):
        step.embed(ids, table, table.new_empty(3, 8))


@pytest.mark.parametrize("device", [CUDA])
def test_the_schemas_of_step_tell_what_is_written(device: str) -> None:
    rows, kv_lens, added, last_ids, page_table = (
        tensor.to(device) for tensor in decode_case(5, torch.arange(1, 6))
    )
    outs = (last_ids[:5].clone(), kv_lens.clone(), last_ids[:5].clone(), page_table[:5].clone())
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(
        ops.decode_inputs, (rows, kv_lens, added, last_ids, page_table, *outs), test_utils=tests
    )
    torch.library.opcheck(ops.keep_ids, (last_ids[:5].clone(), rows, last_ids), test_utils=tests)
    table = torch.randn(9, 8, device=device)
    torch.library.opcheck(ops.embed, (last_ids[:2] % 9, table, table.new_empty(2, 8)), test_utils=tests)
