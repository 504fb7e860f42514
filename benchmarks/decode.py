"""Steps of Llama 3.1 8B (random weights) through the engine: time of a decode step, time to a prompt's first id.

python -m benchmarks.decode
"""

from __future__ import annotations

import gc
import logging
import time

import torch

from benchmarks.harness import Report, Roofs, main
from benchmarks.in_process import LLAMA_3_1_8B, InProcess, llama_8b_on_gpu

MEAN_CONTEXT = 1108
STEPS = 128
LAYER_BYTES = 2 * 32 * 4096 * (4096 * 2 + 1024 * 2 + 14336 * 3)
WEIGHT_BYTES = LAYER_BYTES + 2 * 4096 * 128256
KV_TOKEN_BYTES = 2 * 32 * 8 * 128 * 2
FP8: dict[str, dict[str, object]] = {
    "fp8-w8a8": {"quant_method": "fp8", "activation_scheme": "dynamic"},
    "fp8-w8a8 128x128": {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    },
}
FLOPS_PER_TOKEN = LAYER_BYTES  # two per weight of two bytes; the head runs on last tokens only


def decode_step(engine: InProcess, batch: int) -> float:
    """Seconds a step takes while `batch` sequences decode around the mean context."""
    names = [engine.ask(MEAN_CONTEXT - STEPS // 2, STEPS + 8) for _ in range(batch)]
    engine.finish()
    # Only the part in which all sequences decode: from the last first token to the first last one.
    times = [engine.wire.token_times[name] for name in names]
    begin, end = max(t[0] for t in times), min(t[-1] for t in times)
    longest = [t for t in times[0] if begin <= t <= end]
    return (longest[-1] - longest[1]) / (len(longest) - 2)


def host_step(engine: InProcess, batch: int, steps: int = 64) -> float:
    """Seconds of a decode step in which the host is busy: planning, launching, reporting, but not waiting."""
    names = [engine.ask(8, steps + 16) for _ in range(batch)]
    while any(name not in engine.wire.token_times for name in names):
        engine.engine.step()
    began, waited_s = time.perf_counter(), engine.watched.waited_s
    for _ in range(steps):
        engine.engine.step()
    busy_s = time.perf_counter() - began - (engine.watched.waited_s - waited_s)
    engine.finish()
    return busy_s / steps


def first_id(engine: InProcess, prompts: int, tokens: int) -> float:
    """Seconds from handing over the prompts to the last one's first id."""
    begin = time.perf_counter()
    names = [engine.ask(tokens, 1) for _ in range(prompts)]
    engine.finish()
    return max(engine.wire.token_times[name][0] for name in names) - begin


def bench(report: Report, roofs: Roofs) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    begin = time.perf_counter()
    engine = _engine()
    loaded = time.perf_counter()
    engine.warm_up(8192)
    print(f"weights and graphs {loaded - begin:.1f} s, warm-up {time.perf_counter() - loaded:.1f} s")
    for batch, theirs in ((1, 6.64), (8, 7.03), (64, 10.16), (256, 21.4)):
        case, baselines = f"llama-3.1-8b bf16 B={batch}", {"vllm 0.24 on H100": theirs}
        ms, floor_ms = decode_step(engine, batch) * 1e3, _decode_floor_s(batch, roofs) * 1e3
        report.add("decode_step", case, ms, unit="ms", roof=floor_ms, baselines=baselines)
        report.add("host_step", case, host_step(engine, batch) * 1e3, unit="ms")
    for prompts, tokens, theirs in ((1, 1024, 36.8), (1, 8192, 213.0), (16, 2048, 769.0)):
        attention_flops = prompts * 2 * tokens**2 * 4096 * int(LLAMA_3_1_8B["num_hidden_layers"])
        floor_s = (prompts * tokens * FLOPS_PER_TOKEN + attention_flops) / roofs.matmul
        seconds = min(first_id(engine, prompts, tokens) for _ in range(3))
        report.add(
            "prefill", f"llama-3.1-8b bf16 {prompts}x{tokens}", seconds * 1e3, unit="ms", roof=floor_s * 1e3,
            baselines={"vllm 0.24 on H100": theirs},
        )  # fmt: skip
    # The next one takes what memory is free, so the first must be gone.
    del engine
    gc.collect()
    torch.cuda.empty_cache()
    engine = _engine(fp8_cache=True)
    engine.warm_up(8192)
    ms, floor_ms = decode_step(engine, 256) * 1e3, _decode_floor_s(256, roofs, kv_share=0.5) * 1e3
    report.add("decode_step", "llama-3.1-8b bf16 fp8-kv B=256", ms, unit="ms", roof=floor_ms)
    del engine
    gc.collect()
    torch.cuda.empty_cache()
    for name, config in FP8.items():
        bench_fp8(report, roofs, name, config)


def bench_fp8(report: Report, roofs: Roofs, name: str, config: dict[str, object]) -> None:
    """Weights and inputs of the blocks in float8; embedding, head and cache stay bf16."""
    engine = _engine(quantization=config)
    engine.warm_up(8192)
    for batch in (1, 64):
        ms = decode_step(engine, batch) * 1e3
        floor_ms = (_decode_floor_s(batch, roofs) - LAYER_BYTES / 2 / roofs.read) * 1e3
        report.add("decode_step", f"llama-3.1-8b {name} B={batch}", ms, unit="ms", roof=floor_ms)
    seconds = min(first_id(engine, 1, 8192) for _ in range(3))
    report.add("prefill", f"llama-3.1-8b {name} 1x8192", seconds * 1e3, unit="ms")
    del engine
    gc.collect()
    torch.cuda.empty_cache()


def _engine(*, fp8_cache: bool = False, quantization: dict[str, object] | None = None) -> InProcess:
    return llama_8b_on_gpu(
        max_sequences=256,
        max_total_tokens=16384,
        max_batch_tokens=8192,
        fp8_cache=fp8_cache,
        quantization=quantization,
    )


def _decode_floor_s(batch: int, roofs: Roofs, kv_share: float = 1.0) -> float:
    return (WEIGHT_BYTES + batch * MEAN_CONTEXT * KV_TOKEN_BYTES * kv_share) / roofs.read


if __name__ == "__main__":
    main(bench)
