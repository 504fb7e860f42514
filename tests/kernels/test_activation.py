from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.kernels.compare import activation_dtypes, assert_near, assert_same_bits, normal, poisoned
from tgi_kernels import activation, cpu
from tgi_kernels._library import ops
from tgi_kernels.reference import activation as oracle

NAMES = ["silu_and_mul", "gelu_and_mul", "gelu_tanh_and_mul"]
Gated = Callable[..., Tensor]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("tokens", "inner"), [(0, 4), (1, 1), (1, 7), (7, 17), (33, 64), (5, 1536), (65, 1025)]
)
def test_gated_activations_are_the_oracles(
    noise: torch.Generator, device: str, name: str, tokens: int, inner: int
) -> None:
    op: Gated = getattr(activation, name)
    for dtype in activation_dtypes(device):
        x = 3 * normal(noise, tokens, 2 * inner, dtype=dtype, device=device)
        out = op(x, poisoned(tokens, inner, dtype=dtype, device=device))
        assert_near(out, getattr(oracle, name)(x))


@pytest.mark.parametrize("name", NAMES)
def test_gated_activations_hold_for_every_size_of_gate(device: str, name: str) -> None:
    dtype = activation_dtypes(device)[0]
    gate = torch.cat([torch.linspace(-110, 110, 4411), torch.tensor([0.0, -0.0, 1e-30, -1e-30, 3e4, -3e4])])
    gate = gate.to(device=device, dtype=dtype).unsqueeze(1)
    out = getattr(activation, name)(torch.cat([gate, torch.ones_like(gate)], dim=1))
    want = getattr(oracle, name)(torch.cat([gate, torch.ones_like(gate)], dim=1))
    error = (out.double() - want).abs() / want.abs().clamp_min(1.0)
    assert error.max().item() < (1e-6 if dtype == torch.float32 else 2e-3)


@pytest.mark.parametrize("name", NAMES)
def test_an_activation_does_not_depend_on_the_other_rows(
    noise: torch.Generator, device: str, name: str
) -> None:
    op: Gated = getattr(activation, name)
    x = normal(noise, 129, 2 * 77, dtype=activation_dtypes(device)[0], device=device)
    assert_same_bits(op(x), torch.cat([op(row) for row in x.split(1)]))


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("name", NAMES)
def test_activations_do_not_depend_on_the_number_of_threads(
    noise: torch.Generator, thread_counts: tuple[int, ...], name: str
) -> None:
    x = normal(noise, 300, 2 * 515)
    results = []
    for threads in thread_counts:
        cpu.set_num_threads(threads)
        results.append(getattr(activation, name)(x))
    for result in results[1:]:
        assert_same_bits(result, results[0])


def test_a_nan_gate_gives_nan(device: str) -> None:
    x = torch.tensor([[float("nan"), 1.0]], dtype=activation_dtypes(device)[0], device=device)
    for name in NAMES:
        assert getattr(activation, name)(x).isnan().all()


def test_an_odd_number_of_columns_is_refused() -> None:
    with pytest.raises(ValueError, match="x has 7 columns; gate and up side by side make an even number"):
        activation.silu_and_mul(torch.zeros(2, 7))


@pytest.mark.parametrize("name", NAMES)
def test_the_schemas_of_activations_tell_what_is_written(noise: torch.Generator, name: str) -> None:
    torch.library.opcheck(getattr(ops, name), (normal(noise, 3, 20), torch.empty(3, 10)))
