"""What a GPU's memory is then taken for, against the plan: a wide model of few layers, its largest steps."""

from __future__ import annotations

import gc
import json
from pathlib import Path

import pytest
import torch

from benchmarks.in_process import LLAMA_3_1_8B, on_gpu
from tgi_server.config import EngineConfig, ModelConfig
from tgi_server.memory_plan import Asked, MemoryPlan, plan_memory
from tgi_server.quantization.contents import Contents

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.alone,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

TOTAL, SEQUENCES = 4096, 64


def used_bytes() -> int:
    """Of the whole device, by whomever."""
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    return total - free


def plan_of(model: ModelConfig, batch_tokens: int) -> MemoryPlan:
    asked = Asked(TOTAL, SEQUENCES, batch_tokens)
    return plan_memory(model, Contents(), asked, torch.cuda.mem_get_info()[0], on_gpu=True)


@pytest.mark.parametrize("batch_tokens", [1024, 8192])
def test_a_gpu_holds_what_the_plan_said_within_three_percent(tmp_path: Path, batch_tokens: int) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({**LLAMA_3_1_8B, "num_hidden_layers": 8, "torch_dtype": "bfloat16"})
    )
    torch.mm(
        *torch.ones(2, 64, 64, device="cuda", dtype=torch.bfloat16)
    )  # cuBLAS and its workspace are there
    gc.collect()  # engines of tests before
    torch.cuda.empty_cache()
    model = ModelConfig.from_folder(tmp_path)
    plan = plan_of(model, batch_tokens)
    before, allocated = used_bytes(), torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    engine = on_gpu(
        EngineConfig(
            model=tmp_path, max_total_tokens=TOTAL, max_batch_tokens=batch_tokens, max_sequences=SEQUENCES,
            max_queue=4096, num_pages=plan.pages, num_threads=1, target_s=100.0, device="cuda", dummy_weights=True,
        )
    )  # fmt: skip
    loaded, still = used_bytes(), torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2 * batch_tokens // 128):
        engine.ask(128, 4)
    engine.finish()
    peak = torch.cuda.max_memory_allocated()
    planned = plan.weights_bytes + plan.activations_bytes + plan.graphs_bytes + plan.kv_bytes
    used = used_bytes() - before
    print(
        f"\n{batch_tokens} tokens a step, MiB: weights {plan.weights_bytes >> 20}, KV {plan.kv_bytes >> 20}, "
        f"activations {plan.activations_bytes >> 20}, graphs {plan.graphs_bytes >> 20}, planned {planned >> 20}; "
        f"used {used >> 20} after {loaded - before >> 20} at rest, allocated {still - allocated >> 20}, "
        f"steps {peak - still >> 20} more"
    )
    assert engine.engine._pool.total == plan.pages
    del engine
    assert used == pytest.approx(planned, rel=0.03)
