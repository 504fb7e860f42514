"""Every public op takes arrays of other libraries: NumPy's here, CuPy's on a GPU; results are the op's own bits."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import tgi_kernels
from tgi_kernels import (
    activation,
    attention,
    attention_cuda,
    columns,
    fp8,
    hopper_matmul,
    int8,
    matmul,
    norm,
    quant,
    quant_cuda,
    quant_runs,
    rope,
    sampling,
    step,
)
from tgi_kernels.dlpack import on_arrays
from tgi_kernels.quant_weight import QuantWeight

Call = tuple[Callable[..., Any], list[Any], dict[str, Any]]
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 64


def floats(device: str, *shape: int) -> Tensor:
    """CPUs compute in float32, and CuPy has no bfloat16."""
    dtype = torch.float32 if device == "cpu" else torch.float16
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).to(device, dtype)


def ints(device: str, values: Any, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=device)


def calls(device: str) -> Iterator[Call]:
    """Each op on the device, with arguments that fit."""
    x, weight, matrix = floats(device, 3, 64), floats(device, 64), floats(device, 96, 64)
    logits = floats(device, 3, 200).float()
    q, k, v = (floats(device, 3, heads, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS))
    pages = floats(device, 4, 2, KV_HEADS, 16, HEAD_DIM)
    table, lens = ints(device, [[1], [2]]), ints(device, [9, 4])
    yield norm.rms_norm, [x, weight, 1e-5], {"out": torch.empty_like(x)}
    yield norm.add_rms_norm, [x, x.clone(), weight, 1e-5], {}
    order = torch.arange(64, dtype=torch.int32, device=device).flip(0).contiguous()
    yield columns.gather_columns, [x, order], {}
    yield norm.layer_norm, [x, weight, weight, 1e-5], {}
    yield norm.add_layer_norm, [x, x.clone(), weight, None, 1e-5], {}
    for gated in (activation.silu_and_mul, activation.gelu_and_mul, activation.gelu_tanh_and_mul):
        yield gated, [x], {}
    yield (
        rope.rotary_kv_write,
        [
            q, k, v, pages, floats(device, 16, 64).float(), ints(device, [0, 1, 2]),
            ints(device, [0, 17, -1], torch.int64),
        ],
        {"q_norm": floats(device, HEAD_DIM), "k_norm": floats(device, HEAD_DIM)},
    )  # fmt: skip
    if device == "cpu":
        yield attention.attention, [q, pages, table, ints(device, [0, 2, 3]), lens, 0.125], {}
    else:
        yield attention_cuda.attention_prefill, [q, pages, table, ints(device, [0, 2, 3]), lens, 0.125], {}
        memory = attention_cuda.attention_decode_workspace(2, pages, HEADS, 1)
        yield attention_cuda.attention_decode, [q[:2], pages, table, lens, 0.125, memory], {}
        yield hopper_matmul.skinny_matmul, [x, matrix], {"gate": "silu"}
        yield hopper_matmul.gemm, [x, matrix], {"gate": "silu"}
        yield hopper_matmul.matmul, [x, matrix], {"gate": "silu"}
        rows, last_ids = ints(device, [1, -1, 0]), ints(device, [7, 8, 9], torch.int64)
        tables = ints(device, [[3, 0], [2, 0], [1, 0]])
        filled = {
            "token_ids": torch.zeros_like(last_ids),
            "positions": torch.zeros_like(rows),
            "slots": torch.zeros_like(last_ids),
            "page_tables": torch.zeros_like(tables),
        }
        yield (
            step.decode_inputs,
            [rows, ints(device, [17, 0, 5]), ints(device, [5, -1, -1]), last_ids, tables],
            filled,
        )
        yield step.keep_ids, [ints(device, [4, 5, 6], torch.int64), rows, last_ids], {}
    yield from few_bits_calls(device, x, matrix)
    yield step.embed, [ints(device, [5, 0, 95], torch.int64), matrix], {}
    yield matmul.linear, [x, matmul.pack_linear(matrix)], {"bias": floats(device, 96)}
    yield sampling.greedy, [logits], {}
    settings = sampling.Settings.neutral(3, 8, 2, device)
    settings.numbers[:, 0] = 0.7
    rows = ints(device, [0, 1, 2], torch.int64)
    yield sampling.sample, [logits, rows, rows, settings], {}
    yield sampling.top_logprobs, [logits, 5], {}
    yield sampling.token_logprobs, [logits, rows], {}


def few_bits_calls(device: str, x: Tensor, matrix: Tensor) -> Iterator[Call]:
    """Those of weights of few bits. x: [3, 64]; matrix: [96, 64]."""
    codes = torch.arange(96 * 64).view(96, 64).remainder(16).to(device, torch.uint8)
    few_bits = QuantWeight(
        codes, floats(device, 96, 2).half(), torch.full((96, 2), 8, dtype=torch.int16, device=device), 32, 4
    )
    packed = quant.pack_quant(few_bits, x.dtype)
    yield quant.quant_linear, [x, packed], {"bias": floats(device, 96)}
    if device == "cpu":
        zeros = torch.full((96, 1), 128, dtype=torch.int16)
        eight_bits = QuantWeight(codes, torch.full((96, 1), 0.1), zeros, 64, 8, inputs="rows")
        yield int8.int8_linear, [x, int8.pack_int8(eight_bits)], {"bias": floats(device, 96)}
    if isinstance(packed, quant_cuda.PackedCuda):
        yield quant_cuda.quant_matmul, [x, packed], {"residual": floats(device, 3, 96)}
        runs = quant_runs.pack_runs(few_bits, x.dtype)
        yield quant_runs.runs_matmul, [x, runs], {"residual": floats(device, 3, 96)}
        codes, scales = fp8.quantise_e4m3(matrix)
        yield fp8.quantise_e4m3, [x], {}
        yield fp8.fp8_matmul, [*fp8.quantise_e4m3(x), codes, scales], {"dtype": x.dtype}
        eight_bits = QuantWeight(codes, scales.unsqueeze(1), None, 64, 8, values="e4m3", inputs="rows")
        yield fp8.fp8_linear, [x, fp8.pack_fp8(eight_bits)], {"residual": floats(device, 3, 96)}
        yield fp8.rms_norm_e4m3, [x, matrix[0], 1e-5, fp8.pack_fp8(eight_bits)], {}


# What makes arguments for the ops, or asks about them; `calls` above uses them as they are.
_NOT_OPS = {
    "workspace", "green_tokens", "attention_decode_workspace", "attention_prefill_workspace", "takes",
    "pack_linear", "pack_quant", "pack_cuda", "pack_cpu", "dequantise_packed", "fits_kernels", "fits_cuda",
    "fits_cpu", "has_fused_product", "pack_runs", "fits_runs", "dequantise_runs", "pack_fp8", "fits_fp8",
    "fits_rms_norm_e4m3", "fits_int8", "pack_int8", "has_vnni", "vnni", "set_vnni", "set_num_threads",
    "num_threads", "available_isas", "isa", "set_isa", "on_arrays",
}  # fmt: skip
_NO_OPS_IN = {"quant_weight", "quant_segments", "quant_size"}  # weights before they are packed, and sizes


def public_ops() -> dict[str, Callable[..., Any]]:
    """All public functions of the package's modules by name."""
    found = {}
    for module_info in pkgutil.iter_modules(tgi_kernels.__path__):
        if module_info.name.startswith("_") or module_info.name in {"reference", *_NO_OPS_IN}:
            continue
        module = importlib.import_module(f"tgi_kernels.{module_info.name}")
        for name, function in inspect.getmembers(module, inspect.isfunction):
            if function.__module__ == module.__name__ and not name.startswith("_") and name not in _NOT_OPS:
                found[name] = function
    return found


def flat(value: Any) -> list[Any]:
    if isinstance(value, fp8.Fp8Rows):
        return [value.codes, value.scales]
    return list(value) if isinstance(value, tuple) else [] if value is None else [value]


def check_same_bits(call: Call, to_array: Callable[[Tensor], Any], kind: type) -> None:
    """The op on arrays gives what it gives on tensors, as arrays, and writes what it writes."""
    op, args, kwargs = call
    mine = [_changed(arg, Tensor.clone) for arg in (*args, *kwargs.values())]
    arrays = [_changed(arg, lambda tensor: to_array(tensor.clone())) for arg in (*args, *kwargs.values())]
    positional, named = len(args), list(kwargs)
    expected = flat(op(*mine[:positional], **dict(zip(named, mine[positional:], strict=True))))
    got = flat(on_arrays(op)(*arrays[:positional], **dict(zip(named, arrays[positional:], strict=True))))
    assert all(isinstance(one, kind) for one in got)
    written = [array for array in arrays if isinstance(array, kind)]
    for theirs, ours in zip(
        (torch.from_dlpack(array) for array in (*got, *written)),
        (*expected, *(arg for arg in mine if isinstance(arg, Tensor))),
        strict=True,
    ):
        assert theirs.dtype == ours.dtype
        torch.testing.assert_close(theirs, ours, rtol=0, atol=0, equal_nan=True)


def _changed(value: Any, change: Callable[[Tensor], Any]) -> Any:
    return change(value) if isinstance(value, Tensor) else value


@pytest.mark.parametrize("call", list(calls("cpu")), ids=lambda call: call[0].__name__)
def test_an_op_takes_numpy_arrays_and_gives_them_back(call: Call) -> None:
    check_same_bits(call, lambda tensor: tensor.numpy(), np.ndarray)


def test_what_an_op_writes_is_written_in_the_callers_array() -> None:
    x = np.ones((2, 8), np.float32)
    out = np.zeros_like(x)
    got = on_arrays(norm.rms_norm)(x, np.full(8, 2, np.float32), 0.0, out=out)
    assert (out == 2).all()
    assert got.ctypes.data == out.ctypes.data, "shared, not copied"


def test_tensors_come_back_as_tensors_and_may_stand_beside_arrays() -> None:
    x, weight = torch.ones(2, 8), torch.ones(8)
    assert isinstance(on_arrays(norm.rms_norm)(x, weight, 0.0), Tensor)
    assert isinstance(on_arrays(norm.rms_norm)(x.numpy(), weight, 0.0), np.ndarray)
    assert isinstance(on_arrays(norm.rms_norm)(x, weight.numpy(), 0.0), np.ndarray)


def test_tables_of_settings_may_hold_arrays() -> None:
    settings = sampling.Settings.neutral(1, 4, 1, "cpu")
    tables = {name: getattr(settings, name).numpy() for name in sampling.Settings.__annotations__}
    tables["wholes"][0, sampling.WHOLES.index("seed")] = 7
    logits, row = np.zeros((1, 50), np.float32), np.zeros(1, np.int64)
    ids, _ = on_arrays(sampling.sample)(logits, row, row, sampling.Settings(**tables))
    assert isinstance(ids, np.ndarray) and ids.dtype == np.int64


def test_errors_are_those_of_the_op() -> None:
    with pytest.raises(ValueError, match=r"weight has shape \[7\]"):
        on_arrays(norm.rms_norm)(np.ones((2, 8), np.float32), np.ones(7, np.float32), 0.0)


def test_no_public_op_is_left_out() -> None:
    tried = {call[0].__name__ for call in calls("cpu")} | set(ON_GPUS_ALONE)
    assert tried == set(public_ops())


ON_GPUS_ALONE = (
    "attention_prefill", "attention_decode", "skinny_matmul", "gemm", "matmul", "decode_inputs", "keep_ids",
    "quant_matmul", "runs_matmul", "quantise_e4m3", "fp8_matmul", "fp8_linear",
    "rms_norm_e4m3",
)  # fmt: skip


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_every_op_takes_cupy_arrays_and_gives_them_back() -> None:
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
    torch.cuda.synchronize()
    tried = set()
    for call in calls("cuda"):
        check_same_bits(call, cupy.from_dlpack, cupy.ndarray)
        tried.add(call[0].__name__)
    assert tried == set(public_ops()) - {"attention", "int8_linear"}, "these are for CPUs alone"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_the_op_runs_between_what_the_callers_stream_does_before_and_after() -> None:
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
    weight = cupy.ones(8192, cupy.float16)
    with cupy.cuda.Stream(non_blocking=True):
        for i in range(1, 20):
            x = cupy.zeros((2048, 8192), cupy.float16)
            x += cupy.sin(x) + i  # work that an op which does not wait would overtake
            y = on_arrays(norm.rms_norm)(x, weight, 0.0)
            assert bool((y == 1).all())
            residual = cupy.zeros_like(x)
            on_arrays(norm.add_rms_norm)(x, residual, weight, 0.0)
            assert bool((residual == i).all())
