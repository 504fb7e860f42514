"""Ops on CuPy's arrays: what sharing them costs the host, and the same norm written in CuPy.

python -m benchmarks.kernels.bench_dlpack
"""

from __future__ import annotations

import time
from collections.abc import Callable

import cupy
import torch

from benchmarks.harness import Report, Roofs, Timing, main
from tgi_kernels.dlpack import on_arrays
from tgi_kernels.norm import rms_norm

HIDDEN, EPS = 4096, 1e-5
CALLS = 200


def host_time(call: Callable[[], object]) -> Timing:
    """Seconds of the calling thread per call; the GPU is idle before and not waited for."""
    taken = []
    for _ in range(20):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(CALLS):
            call()
        taken.append((time.perf_counter() - begin) / CALLS)
    return Timing.of(taken[1:])


def device_time(call: Callable[[], object]) -> Timing:
    """Seconds per call from event to event, calls back to back."""
    taken = []
    for _ in range(20):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(20):
            call()
        end.record()
        end.synchronize()
        taken.append(begin.elapsed_time(end) / 20e3)
    return Timing.of(taken[1:])


def in_cupy(x: cupy.ndarray, weight: cupy.ndarray) -> cupy.ndarray:
    """The norm as CuPy's users write it."""
    wide = x.astype(cupy.float32)
    scale = cupy.sqrt((wide * wide).mean(axis=1, keepdims=True) + EPS)
    return (wide / scale).astype(x.dtype) * weight


def bench(report: Report, roofs: Roofs) -> None:
    shared = on_arrays(rms_norm)
    for tokens in (1, 8192):
        x = cupy.random.standard_normal((tokens, HIDDEN), dtype=cupy.float32).astype(cupy.float16)
        weight = cupy.ones(HIDDEN, cupy.float16)
        out = cupy.empty_like(x)
        tensors = [torch.from_dlpack(array) for array in (x, weight, out)]
        ours = shared(x, weight, EPS, out=out)
        assert cupy.allclose(ours, in_cupy(x, weight), rtol=2e-3, atol=2e-3)
        case = f"rms_norm fp16 {tokens}x{HIDDEN} CuPy arrays"
        plain = host_time(lambda: rms_norm(tensors[0], tensors[1], EPS, tensors[2]))
        other = host_time(lambda: in_cupy(x, weight))
        ours_host = host_time(lambda: shared(x, weight, EPS, out=out))
        report.add(
            "dlpack", case, ours_host.median_s * 1e6, metric="host time",
            baselines={"torch tensors": plain.median_s * 1e6, "in cupy": other.median_s * 1e6},
        )  # fmt: skip
        moved = 2 * x.nbytes / roofs.copy
        report.add(
            "dlpack", case, device_time(lambda: shared(x, weight, EPS, out=out)).median_s * 1e6,
            metric="back to back", roof=moved * 1e6 if tokens > 1 else None,
            baselines={
                "torch tensors": device_time(lambda: rms_norm(tensors[0], tensors[1], EPS, tensors[2])).median_s * 1e6,
                "in cupy": device_time(lambda: in_cupy(x, weight)).median_s * 1e6,
            },
        )  # fmt: skip


if __name__ == "__main__":
    main(bench)
