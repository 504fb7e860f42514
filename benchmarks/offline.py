"""Throughput with everything queued at once: 512 requests of 512 tokens in, 256 out, Llama 3.1 8B's shape.

python -m benchmarks.offline
"""

from __future__ import annotations

import time

from benchmarks.harness import Report, Roofs, main
from benchmarks.in_process import llama_8b_on_gpu

REQUESTS, INPUT_TOKENS, OUTPUT_TOKENS = 512, 512, 256


def bench(report: Report, roofs: Roofs) -> None:
    del roofs
    engine = llama_8b_on_gpu(max_sequences=256, max_total_tokens=2048, max_batch_tokens=8192)
    engine.warm_up(2000)
    begin = time.perf_counter()
    for _ in range(REQUESTS):
        engine.ask(INPUT_TOKENS, OUTPUT_TOKENS)
    engine.finish()
    seconds = time.perf_counter() - begin
    report.add(
        "offline",
        f"llama-3.1-8b bf16 {REQUESTS} requests {INPUT_TOKENS}/{OUTPUT_TOKENS}",
        REQUESTS * OUTPUT_TOKENS / seconds,
        metric="output_tokens",
        unit="tok/s",
        better="higher",
        baselines={"vllm 0.24 on H100": 9770, "transformers on H100": 474},
    )


if __name__ == "__main__":
    main(bench)
