"""Steps of Llama 3.1 8B (random weights) through the engine: time of a decode step, time to a prompt's first id.

python -m benchmarks.decode
"""

from __future__ import annotations

import logging
import time

from benchmarks.harness import Report, Roofs, main
from benchmarks.in_process import LLAMA_3_1_8B, InProcess, llama_8b_on_gpu

MEAN_CONTEXT = 1108
STEPS = 128
LAYER_BYTES = 2 * 32 * 4096 * (4096 * 2 + 1024 * 2 + 14336 * 3)
WEIGHT_BYTES = LAYER_BYTES + 2 * 4096 * 128256
KV_TOKEN_BYTES = 2 * 32 * 8 * 128 * 2
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
    engine = llama_8b_on_gpu(max_sequences=256, max_total_tokens=16384, max_batch_tokens=8192)
    loaded = time.perf_counter()
    engine.warm_up(8192)
    print(f"weights and graphs {loaded - begin:.1f} s, warm-up {time.perf_counter() - loaded:.1f} s")
    layers = LLAMA_3_1_8B["num_hidden_layers"]
    for batch in (1, 8, 64, 256):
        floor_s = (WEIGHT_BYTES + batch * MEAN_CONTEXT * KV_TOKEN_BYTES) / roofs.read
        seconds = decode_step(engine, batch)
        report.add(
            "decode_step", f"llama-3.1-8b bf16 B={batch}", seconds * 1e3, unit="ms", roof=floor_s * 1e3,
            baselines={"vllm 0.24 on H100": {1: 6.64, 8: 7.03, 64: 10.16, 256: 21.4}[batch]},
        )  # fmt: skip
        report.add("host_step", f"llama-3.1-8b bf16 B={batch}", host_step(engine, batch) * 1e3, unit="ms")
    for prompts, tokens, theirs in ((1, 1024, 36.8), (1, 8192, 213.0), (16, 2048, 769.0)):
        attention_flops = prompts * 2 * tokens**2 * 4096 * int(layers)
        floor_s = (prompts * tokens * FLOPS_PER_TOKEN + attention_flops) / roofs.matmul
        seconds = min(first_id(engine, prompts, tokens) for _ in range(3))
        report.add(
            "prefill", f"llama-3.1-8b bf16 {prompts}x{tokens}", seconds * 1e3, unit="ms", roof=floor_s * 1e3,
            baselines={"vllm 0.24 on H100": theirs},
        )  # fmt: skip


if __name__ == "__main__":
    main(bench)
