from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from tests.kernels.compare import activation_dtypes, assert_near, assert_same_bits, normal, poisoned
from tgi_kernels import cpu
from tgi_kernels._library import ops
from tgi_kernels.reference import rope as oracle
from tgi_kernels.rope import PAGE_TOKENS, rotary_kv_write


@dataclass(frozen=True)
class Shape:
    tokens: int
    heads: int
    kv_heads: int
    head_dim: int
    rot_dim: int


SHAPES = [
    Shape(1, 1, 1, 2, 2),
    Shape(1, 9, 3, 64, 64),
    Shape(17, 9, 3, 64, 64),
    Shape(33, 4, 4, 80, 32),
    Shape(7, 8, 1, 40, 10),
    Shape(70, 2, 2, 128, 128),
]


@dataclass(frozen=True)
class Case:
    q: Tensor
    k: Tensor
    v: Tensor
    kv_pages: Tensor
    cos_sin: Tensor
    positions: Tensor
    slots: Tensor

    def args(self) -> tuple[Tensor, ...]:
        return (self.q, self.k, self.v, self.kv_pages, self.cos_sin, self.positions, self.slots)

    def clone(self) -> Case:
        return Case(*(tensor.clone() for tensor in self.args()))


def make(noise: torch.Generator, shape: Shape, device: str, dtype: torch.dtype) -> Case:
    """q, k and v as views of one buffer; every third token is padding; pages are poisoned."""
    pages, positions = shape.tokens // 8 + 2, 100
    total = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
    qkv = normal(noise, shape.tokens, total, dtype=dtype, device=device)
    q, k, v = (
        part.unflatten(1, (-1, shape.head_dim))
        for part in qkv.split(
            [n * shape.head_dim for n in (shape.heads, shape.kv_heads, shape.kv_heads)], dim=1
        )
    )
    angles = torch.rand(positions, shape.rot_dim // 2, generator=noise) * 6.3
    slots = torch.randperm(pages * PAGE_TOKENS, generator=noise)[: shape.tokens]
    slots[2::3] = -1
    return Case(
        q,
        k,
        v,
        poisoned(pages, 2, shape.kv_heads, PAGE_TOKENS, shape.head_dim, dtype=dtype, device=device),
        torch.cat([angles.cos(), angles.sin()], dim=1).to(device),
        torch.randint(positions, (shape.tokens,), generator=noise).to(device=device, dtype=torch.int32),
        slots.to(device),
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize("head_norms", [False, True], ids=["plain", "head norms"])
def test_rotation_and_write_are_the_oracles(
    noise: torch.Generator, device: str, shape: Shape, interleaved: bool, head_norms: bool
) -> None:
    for dtype in activation_dtypes(device):
        case = make(noise, shape, device, dtype)
        norms = {
            name: normal(noise, shape.head_dim, dtype=dtype, device=device) if head_norms else None
            for name in ("q_norm", "k_norm")
        }
        want_q, want_pages = oracle.rotary_kv_write(*case.args(), interleaved=interleaved, **norms)
        k_before, v_before = case.k.clone(), case.v.clone()
        rotary_kv_write(*case.args(), interleaved=interleaved, **norms)
        assert_near(case.q, want_q, times=4)
        written = ~want_pages.isnan()
        assert torch.equal(written, ~case.kv_pages.isnan())
        assert_near(case.kv_pages[written], want_pages[written], times=4)
        assert_same_bits(case.k, k_before)
        assert_same_bits(case.v, v_before)


def test_a_tokens_rotation_does_not_depend_on_the_other_tokens(noise: torch.Generator, device: str) -> None:
    case = make(noise, SHAPES[-1], device, activation_dtypes(device)[0])
    together, alone = case.clone(), case.clone()
    rotary_kv_write(*together.args())
    for token in range(case.q.shape[0]):
        at = slice(token, token + 1)
        rotary_kv_write(
            alone.q[at],
            alone.k[at],
            alone.v[at],
            alone.kv_pages,
            alone.cos_sin,
            alone.positions[at],
            alone.slots[at],
        )
    assert_same_bits(alone.q, together.q)
    assert_same_bits(alone.kv_pages.nan_to_num(), together.kv_pages.nan_to_num())


@pytest.mark.usefixtures("isa")
def test_rotation_does_not_depend_on_the_number_of_threads(
    noise: torch.Generator, thread_counts: tuple[int, ...]
) -> None:
    case = make(noise, Shape(200, 9, 3, 64, 64), "cpu", torch.float32)
    results = []
    for threads in thread_counts:
        cpu.set_num_threads(threads)
        results.append(case.clone())
        rotary_kv_write(*results[-1].args())
    for result in results[1:]:
        assert_same_bits(result.q, results[0].q)
        assert_same_bits(result.kv_pages.nan_to_num(), results[0].kv_pages.nan_to_num())


def test_a_position_past_the_table_is_refused_with_the_numbers(noise: torch.Generator) -> None:
    case = make(noise, SHAPES[1], "cpu", torch.float32)
    case.positions[0] = 100
    with pytest.raises(RuntimeError, match=r"positions\[0\] is 100; cos_sin has rows for 0 to 99"):
        rotary_kv_write(*case.args())


def test_a_slot_past_the_pages_is_refused_with_the_numbers(noise: torch.Generator) -> None:
    case = make(noise, SHAPES[1], "cpu", torch.float32)
    case.slots[0] = 32
    with pytest.raises(RuntimeError, match=r"slots\[0\] is 32; kv_pages has 0 to 31"):
        rotary_kv_write(*case.args())


def test_pages_for_other_heads_are_refused_with_both_shapes(noise: torch.Generator) -> None:
    case = make(noise, SHAPES[1], "cpu", torch.float32)
    with pytest.raises(
        ValueError, match=r"kv_pages has shape \[2, 2, 2, 16, 64\]; it needs \[pages, 2, 3, 16, 64\]"
    ):
        rotary_kv_write(case.q, case.k, case.v, case.kv_pages[:, :, :2], *case.args()[4:])


def test_the_schema_of_rotation_tells_what_is_written(noise: torch.Generator) -> None:
    case = make(noise, SHAPES[1], "cpu", torch.float32)
    # Padded views are no contiguous tensors, which opcheck cannot copy faithfully.
    args = (case.q.contiguous(), case.k.contiguous(), case.v.contiguous(), case.kv_pages.nan_to_num())
    torch.library.opcheck(ops.rotary_kv_write, (*args, *case.args()[4:], False, None, None, 1e-6))
