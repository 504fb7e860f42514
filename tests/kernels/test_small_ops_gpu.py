"""CUDA norms, rotary embedding and gated activations against the float64 oracles."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.kernels.compare import assert_near
from tgi_kernels import activation, norm, rope
from tgi_kernels.reference import activation as activation_reference
from tgi_kernels.reference import norm as norm_reference
from tgi_kernels.reference import rope as rope_reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
EPS = 1e-5


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, device="cuda").to(dtype)


def poisoned(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.full(shape, torch.nan, device="cuda", dtype=dtype)


def assert_rounded(out: Tensor, exact: Tensor) -> None:
    """`out` is `exact` rounded to its dtype, give or take one step; nearly all of it exactly so."""
    assert out.isfinite().all()
    if out.dtype == torch.float32:
        torch.testing.assert_close(out.double(), exact, rtol=4e-6, atol=1e-7 * exact.abs().max().item())
        return
    step = torch.finfo(out.dtype).eps
    noise = max(
        torch.finfo(out.dtype).tiny, 1e-13 * exact.abs().max().item()
    )  # gelu's oracle cancels far below 0
    assert ((out.double() - exact).abs() <= step * exact.abs() + noise).all()
    assert ((out != exact.to(out.dtype)) & (exact.abs() > noise)).double().mean() <= 0.002


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 3, 17, 300])
@pytest.mark.parametrize("hidden", [64, 576, 1000, 4096, 16384, 16392, 33, 20001])
def test_a_norm_is_the_float64_norm_rounded_once(dtype: torch.dtype, tokens: int, hidden: int) -> None:
    x, weight = random(tokens, hidden, dtype=dtype), random(hidden, dtype=dtype)
    out = norm.rms_norm(x, weight, EPS, out=poisoned(tokens, hidden, dtype=dtype))
    assert_rounded(out, norm_reference.rms_norm(x, weight, EPS))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [576, 4096, 33, 20001])
def test_a_norm_after_an_add_is_of_the_stored_sum(dtype: torch.dtype, hidden: int) -> None:
    x, residual = random(2, 19, hidden, dtype=dtype)
    weight = random(hidden, dtype=dtype)
    exact, total = norm_reference.add_rms_norm(x, residual, weight, EPS)
    out = norm.add_rms_norm(x, residual, weight, EPS, out=poisoned(19, hidden, dtype=dtype))
    assert torch.equal(residual, total)
    assert_rounded(out, exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [64, 576, 1000, 4096, 16384, 16392, 33, 20001])
def test_a_layer_norm_is_of_the_stored_sum_and_near_float64(dtype: torch.dtype, hidden: int) -> None:
    x, residual = random(2, 19, hidden, dtype=dtype)
    weight, bias = random(2, hidden, dtype=dtype)
    plain = norm.layer_norm(x, weight, bias, EPS, out=poisoned(19, hidden, dtype=dtype))
    assert_near(plain, norm_reference.layer_norm(x, weight, bias, EPS), times=4)
    exact, total = norm_reference.add_layer_norm(x, residual, weight, None, EPS)
    out = norm.add_layer_norm(x, residual, weight, None, EPS, out=poisoned(19, hidden, dtype=dtype))
    assert torch.equal(residual, total)
    assert_near(out, exact, times=4)
    alone = torch.cat([norm.layer_norm(row[None], weight, bias, EPS) for row in x])
    assert torch.equal(plain, alone)


def test_a_norm_takes_rows_that_lie_apart_and_may_overwrite_them() -> None:
    wide = random(9, 4096 + 128, dtype=torch.bfloat16)
    x, weight = wide[:, 128:], random(4096, dtype=torch.bfloat16)
    exact = norm_reference.rms_norm(x, weight, EPS)
    assert_rounded(norm.rms_norm(x, weight, EPS), exact)
    own = x.contiguous()
    assert_rounded(norm.rms_norm(own, weight, EPS, out=own), exact)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_of_a_norm_has_the_same_bits_in_every_batch(dtype: torch.dtype) -> None:
    x, weight = random(257, 4096, dtype=dtype), random(4096, dtype=dtype)
    alone = torch.cat([norm.rms_norm(row[None], weight, EPS) for row in x])
    assert torch.equal(norm.rms_norm(x, weight, EPS), alone)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["silu_and_mul", "gelu_and_mul", "gelu_tanh_and_mul"])
@pytest.mark.parametrize(("tokens", "inner"), [(1, 14336), (7, 1536), (130, 8), (5, 33), (3, 2049)])
def test_a_gated_activation_is_the_float64_one_rounded_once(
    dtype: torch.dtype, name: str, tokens: int, inner: int
) -> None:
    x = random(tokens, 2 * inner, dtype=dtype) * 4
    out = getattr(activation, name)(x, out=poisoned(tokens, inner, dtype=dtype))
    assert_rounded(out, getattr(activation_reference, name)(x))


def test_a_gated_activation_of_extreme_gates_is_what_torch_says() -> None:
    gate = torch.tensor(
        [-torch.inf, -3e4, -100.0, -0.0, 0.0, 100.0, 3e4, torch.inf, torch.nan], device="cuda"
    )
    x = torch.cat([gate, torch.ones_like(gate)])[None].bfloat16()
    torch.testing.assert_close(
        activation.silu_and_mul(x), torch.nn.functional.silu(gate)[None].bfloat16(), equal_nan=True
    )


def rotary_case(dtype: torch.dtype, tokens: int, heads: int, kv_heads: int, head_dim: int, rot_dim: int):
    qkv = random(tokens, heads + 2 * kv_heads, head_dim, dtype=dtype)
    q, k, v = qkv.split([heads, kv_heads, kv_heads], dim=1)
    pages = random(tokens // 16 + 3, 2, kv_heads, 16, head_dim, dtype=dtype)
    angles = random(512, rot_dim // 2)
    cos_sin = torch.cat([angles.cos(), angles.sin()], -1)
    positions = torch.randint(0, 512, (tokens,), dtype=torch.int32, device="cuda")
    slots = torch.randperm(pages.shape[0] * 16, device="cuda")[:tokens]
    slots[::5] = -1
    return q, k, v, pages, cos_sin, positions, slots


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "rot_dim"),
    [
        (32, 8, 128, 128),
        (9, 3, 64, 64),
        (4, 4, 96, 24),
        (3, 1, 80, 32),
        (2, 1, 256, 64),
        (5, 5, 36, 18),
        (1, 1, 512, 512),
    ],
)
@pytest.mark.parametrize("tokens", [1, 37])
def test_rotation_and_kv_write_follow_the_oracle(
    dtype: torch.dtype,
    interleaved: bool,
    normed: bool,
    heads: int,
    kv_heads: int,
    head_dim: int,
    rot_dim: int,
    tokens: int,
) -> None:
    q, k, v, pages, cos_sin, positions, slots = rotary_case(dtype, tokens, heads, kv_heads, head_dim, rot_dim)
    norms = (
        {"q_norm": random(head_dim, dtype=dtype), "k_norm": random(head_dim, dtype=dtype)} if normed else {}
    )
    exact_q, exact_pages = rope_reference.rotary_kv_write(
        q, k, v, pages, cos_sin, positions, slots, interleaved=interleaved, **norms
    )
    before = pages.clone()
    rope.rotary_kv_write(q, k, v, pages, cos_sin, positions, slots, interleaved=interleaved, **norms)
    # A rotation subtracts: compare with the size of its head, not of the element.
    for ours, exact in ((q, exact_q), (pages, exact_pages)):
        step = 1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
        scale = exact.abs().amax(-1, keepdim=True).expand_as(exact)
        assert ((ours.double() - exact).abs() <= step * scale).all()
    if dtype != torch.float32:
        assert (pages != exact_pages.to(dtype)).double().mean() <= 0.005
    written = torch.zeros(pages.shape[0] * 16, dtype=torch.bool, device="cuda")
    written[slots[slots >= 0]] = True
    untouched = ~written.view(-1, 1, 1, 16, 1).expand_as(pages)
    assert torch.equal(pages[untouched], before[untouched])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("head_dim", "rot_dim"), [(128, 128), (64, 32), (80, 80), (36, 34)])
@pytest.mark.parametrize("normed", [False, True])
def test_keys_and_values_go_to_a_float8_cache_rounded_once_and_bounded(
    dtype: torch.dtype, head_dim: int, rot_dim: int, normed: bool
) -> None:
    q, k, v, pages, cos_sin, positions, slots = rotary_case(dtype, 19, 8, 2, head_dim, rot_dim)
    v[1] *= 1e5
    narrow = torch.zeros(pages.shape, dtype=torch.uint8, device="cuda").view(torch.float8_e4m3fn)
    norms = (
        {"q_norm": random(head_dim, dtype=dtype), "k_norm": random(head_dim, dtype=dtype)} if normed else {}
    )
    exact_q, exact = rope_reference.rotary_kv_write(
        q, k, v, narrow.double(), cos_sin, positions, slots, **norms
    )
    rope.rotary_kv_write(q, k, v, narrow, cos_sin, positions, slots, **norms)
    ours = narrow.double()
    # Half a step: 2^-4 of the value, or of the smallest normal number, 2^-6.
    bounded = exact.clamp(-448, 448)
    assert ((ours - bounded).abs() <= (bounded.abs() * 2**-4).clamp(min=2**-10) * 1.01).all()
    assert ours.isfinite().all() and ours.abs().max() == 448
    step = torch.finfo(dtype).eps
    scale = exact_q.abs().amax(-1, keepdim=True).expand_as(exact_q)
    assert ((q.double() - exact_q).abs() <= step * scale).all()
