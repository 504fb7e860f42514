"""As `benchmarks.decode`, of Llama 3.1 8B's shape with matrices of a few bits, their codes random.

python -m benchmarks.decode_quantised
"""

from __future__ import annotations

import gc
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from benchmarks.decode import (
    FLOPS_PER_TOKEN,
    KV_TOKEN_BYTES,
    LAYER_BYTES,
    MEAN_CONTEXT,
    decode_step,
    first_id,
)
from benchmarks.harness import Report, Roofs, main
from benchmarks.in_process import LLAMA_3_1_8B, llama_8b_on_gpu

HEAD_BYTES = 2 * 4096 * 128256  # stays bf16
PROMPT = 8192


@dataclass(frozen=True)
class Format:
    """How a checkpoint's matrices are stored, and what vLLM 0.24 takes for a step on an H100."""

    config: Mapping[str, object]
    weight_bytes: float  # of a weight, its share of scales included
    vllm_ms: Mapping[int, float]  # by sequences
    deterministic: bool = False


_GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False}
FORMATS = {
    "gptq-int4-g128": Format(_GPTQ, 0.5 + 4 / 128, {1: 4.20, 64: 8.69}),
    "gptq-int4-g128 deterministic": Format(_GPTQ, 0.5 + 4 / 128, {}, deterministic=True),
    "gptq-int4-g128 desc_act": Format(_GPTQ | {"desc_act": True}, 0.5 + 4 / 128, {}),
}


def bench(report: Report, roofs: Roofs) -> None:
    for name, form in FORMATS.items():
        bench_format(report, roofs, f"llama-3.1-8b {name}", form)
        # The next one takes what memory is free.
        gc.collect()
        torch.cuda.empty_cache()


def bench_format(report: Report, roofs: Roofs, name: str, form: Format) -> None:
    engine = llama_8b_on_gpu(256, 16384, PROMPT, quantization=form.config, deterministic=form.deterministic)
    print(f"{name}: {engine.runner.matrices}")
    engine.warm_up(PROMPT)
    for batch in (1, 64):
        read = LAYER_BYTES / 2 * form.weight_bytes + HEAD_BYTES + batch * MEAN_CONTEXT * KV_TOKEN_BYTES
        baselines = {"vllm 0.24 on H100": form.vllm_ms[batch]} if batch in form.vllm_ms else None
        ms = decode_step(engine, batch) * 1e3
        report.add(
            "decode_step",
            f"{name} B={batch}",
            ms,
            unit="ms",
            roof=read / roofs.read * 1e3,
            baselines=baselines,
        )
    attention_flops = 2 * PROMPT**2 * 4096 * int(str(LLAMA_3_1_8B["num_hidden_layers"]))
    floor_s = (PROMPT * FLOPS_PER_TOKEN + attention_flops) / roofs.matmul
    seconds = min(first_id(engine, 1, PROMPT) for _ in range(3))
    report.add("prefill", f"{name} 1x{PROMPT}", seconds * 1e3, unit="ms", roof=floor_s * 1e3)


if __name__ == "__main__":
    main(bench)
