"""What the plan says of memory, against numbers worked out by hand and against what is then loaded."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.server import DEMO
from tgi_kernels.quant_size import QuantKind
from tgi_server import cli, memory
from tgi_server.checkpoint.headers import stored_tensors
from tgi_server.checkpoint.safetensors import Checkpoint
from tgi_server.config import ModelConfig
from tgi_server.engine.gpu_runner import _pages_that_fit, room_bytes
from tgi_server.errors import StartupError
from tgi_server.layers.embedding import Embedding
from tgi_server.layers.linear import Linear
from tgi_server.layers.norm import RMSNorm
from tgi_server.layers.product import Dense
from tgi_server.memory_plan import (
    PLANNED_TYPES,
    Asked,
    MemoryPlan,
    advice,
    can_split,
    check_pages,
    pages_within,
    plan_memory,
    table,
)
from tgi_server.models import ARCHITECTURES, load_model
from tgi_server.quantization.contents import Contents, contents_of
from tgi_server.start_times import start_times

LLAMA_31_8B = {
    "model_type": "llama",
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
}
GIB = 1 << 30
PARAMETERS = 8_030_261_248


def plan_8b(
    memory_gib: float, *, total_tokens: int = 131072, on_gpu: bool = True, ranks: int = 1, **changes: object
) -> MemoryPlan:
    model = ModelConfig.from_dict({**LLAMA_31_8B, **changes}, {})
    asked = Asked(total_tokens, sequences=64, batch_tokens=256)
    return plan_memory(model, Contents(), asked, int(memory_gib * GIB), on_gpu=on_gpu, ranks=ranks)


def test_llama_8b_takes_two_bytes_a_parameter_and_128_kib_a_token() -> None:
    plan = plan_8b(80)
    assert plan.weights_bytes == 2 * PARAMETERS  # 16.06 GB
    assert plan.page_bytes == 16 * 128 * 1024
    tables = 131072 * 128 * 4 + 64 * 4 * (131072 + 2 * 8192)
    step = 2 * (256 * (3 * 4096 + 3 * 14336) + 3 * 64 * 128256)
    assert plan.activations_bytes == tables + step
    assert plan.beside_bytes == 4 * GIB
    assert plan.pages == (80 * GIB - plan.weights_bytes - plan.beside_bytes) // plan.page_bytes
    assert plan.fits and 0 <= plan.left_bytes < plan.page_bytes


def test_a_tied_head_is_held_a_second_time() -> None:
    assert plan_8b(80, tie_word_embeddings=True).weights_bytes == plan_8b(80).weights_bytes


def test_types_other_than_bf16_are_narrowed_on_gpus_and_widened_on_cpus() -> None:
    embedding = 128256 * 4096
    assert plan_8b(80, torch_dtype="float16").weights_bytes == 2 * PARAMETERS
    assert plan_8b(80, torch_dtype="float32").weights_bytes == 2 * PARAMETERS
    assert plan_8b(80, torch_dtype="float16", on_gpu=False).weights_bytes == 4 * PARAMETERS - 2 * embedding
    norms = 65 * 4096
    assert plan_8b(80, on_gpu=False).weights_bytes == 2 * PARAMETERS + 2 * norms
    assert plan_8b(80, on_gpu=False).page_bytes == 16 * 256 * 1024


def test_ranks_share_matrices_and_copy_norms_and_kv_heads_that_are_too_few() -> None:
    norms = 65 * 4096 * 2
    whole = plan_8b(80).weights_bytes - norms
    assert [plan_8b(80, ranks=n).weights_bytes - norms for n in (2, 4, 8)] == [whole // n for n in (2, 4, 8)]
    assert [plan_8b(80, ranks=n).page_bytes // 16384 for n in (1, 2, 4, 8)] == [128, 64, 32, 16]
    few = [plan_8b(80, ranks=n, num_key_value_heads=2).page_bytes // 16384 for n in (1, 2, 4, 8)]
    assert few == [32, 16, 16, 16]


def test_heads_that_cannot_be_split_are_said_so() -> None:
    model = ModelConfig.from_folder(DEMO)  # 9 heads over 3
    assert [n for n in (1, 2, 3, 4, 8, 9) if can_split(model, n)] == [1, 3, 9]
    plan = plan_memory(model, Contents(), Asked(8192, 64, 256), 80 * GIB, on_gpu=True)
    assert advice([plan]) == ["The heads cannot be split evenly over 2, 4, 8 devices."]


def test_what_does_not_fit_names_what_would() -> None:
    tight, hopeless = plan_8b(24), plan_8b(16)
    assert not tight.fits and not hopeless.fits
    assert plan_8b(24, total_tokens=tight.tokens).fits
    assert not plan_8b(24, total_tokens=tight.tokens + 1).fits
    assert plan_8b(tight.needed_bytes / GIB).fits
    lines = advice([tight, replace(hopeless, ranks=2)])
    assert (
        lines[0]
        == f"1 of 24.00 GiB: --max-total-tokens {tight.tokens} fits; --max-total-tokens 131072 needs 34.96 GiB"
    )
    assert "there is no room for KV cache" in lines[1]
    with pytest.raises(StartupError, match=f"--max-total-tokens {tight.tokens} would fit"):
        tight.check()
    with pytest.raises(StartupError, match=r"weights take 14\.96 GiB.*only 16\.00 GiB of memory are usable"):
        hopeless.check()
    assert "NO" in table([tight]) and "NO" not in table([plan_8b(80)])


def test_a_cpus_cache_takes_a_quarter_of_memory_unless_weights_leave_less() -> None:
    roomy, tight = plan_8b(256, on_gpu=False), plan_8b(20, on_gpu=False, total_tokens=1024)
    assert roomy.kv_bytes == 64 * GIB
    assert 0 <= tight.left_bytes < tight.page_bytes and tight.kv_bytes < 5 * GIB
    for plan in (plan_8b(64, on_gpu=False), plan_8b(17, on_gpu=False)):
        assert not plan.fits
        assert plan_8b(plan.needed_bytes / GIB, on_gpu=False).fits
        with pytest.raises(StartupError):
            plan.check()


def test_pages_are_bounded_by_what_all_sequences_could_fill_and_never_negative() -> None:
    assert pages_within(1000, 10, pages_per_sequence=4, sequences=5) == 20
    assert pages_within(99, 10, pages_per_sequence=4, sequences=5) == 9
    assert pages_within(-1, 10, pages_per_sequence=4, sequences=5) == 0
    check_pages(4, 10, 4, "")
    with pytest.raises(StartupError, match="not one page of 16 tokens fits"):
        check_pages(0, 10, 4, "after all")


@pytest.mark.parametrize("free_gib", [0, 3, 5, 10, 61.3, 140])
@pytest.mark.parametrize("max_pages", [1, 64, 8192])
def test_the_engine_on_a_gpu_takes_what_is_free_but_the_reserve(free_gib: float, max_pages: int) -> None:
    free, page_bytes, rows = int(free_gib * GIB), 2 << 20, 256
    pages = min((free - 4 * GIB) // page_bytes, rows * max_pages)
    if pages >= max_pages:
        assert _pages_that_fit(free, page_bytes, max_pages, rows) == pages
        return
    with pytest.raises(StartupError, match=r"after the weights and a reserve of 4 GiB, .* are left for it"):
        _pages_that_fit(free, page_bytes, max_pages, rows)


def test_a_share_of_a_gpus_memory_bounds_what_the_engine_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (100 * GIB, 140 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _device: 16 * GIB)
    device = torch.device("cuda")
    assert room_bytes(1.0, device) == 100 * GIB
    assert room_bytes(0.5, device) == 54 * GIB


def test_a_float8_cache_holds_twice_the_tokens() -> None:
    model, asked = ModelConfig.from_dict(LLAMA_31_8B, {}), Asked(131072, sequences=64, batch_tokens=256)
    wide, narrow = (
        plan_memory(model, Contents(), replace(asked, fp8_cache=fp8), 80 * GIB, on_gpu=True)
        for fp8 in (False, True)
    )
    assert narrow.page_bytes * 2 == wide.page_bytes
    assert narrow.pages // 2 == wide.pages


def test_the_dense_matrix_of_a_product_of_many_tokens_is_counted_unless_none_is_made() -> None:
    model = ModelConfig.from_dict(LLAMA_31_8B, {})
    gate_up = 2 * 2 * 14336 * 4096

    def activations(kind: QuantKind, asked: Asked) -> int:
        return plan_memory(model, Contents({}, "gptq", kind), asked, 80 * GIB, on_gpu=True).activations_bytes

    for kind, fused in ((QuantKind(4, 128), 1024), (QuantKind(3, 128), 64)):
        for tokens, widened in ((fused, 0), (fused + 1, gate_up)):
            asked = Asked(8192, sequences=16, batch_tokens=tokens)
            same = replace(asked, deterministic=True)
            assert activations(kind, asked) == activations(kind, same) + widened


def test_the_plan_counts_what_is_then_loaded() -> None:
    config = ModelConfig.from_folder(DEMO)
    plan = plan_memory(
        config, contents_of(config.raw, DEMO, stored_tensors(DEMO)), Asked(512, 1, 64), 8 * GIB, on_gpu=False
    )
    tensors = []
    for layer in load_model(Checkpoint(DEMO), config, torch.device("cpu"), torch.float32).modules():
        if isinstance(layer, Linear):
            assert isinstance(layer.product, Dense)
            tensors.append(layer.product.packed.data)
        elif isinstance(layer, (Embedding, RMSNorm)):
            tensors.append(layer.table if isinstance(layer, Embedding) else layer.weight)
    assert plan.weights_bytes == sum(tensor.nbytes for tensor in tensors)


def test_every_architecture_that_is_served_can_be_planned() -> None:
    assert set(PLANNED_TYPES) == set(ARCHITECTURES)


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (
            ["--device-memory", "80GiB"],
            0,
            [
                "14.96 GiB",
                "128 KiB",
                "a start, about",
                "  weights                        3.2 s",
                "A server uses one device so far",
            ],
        ),
        (["--device-memory", "24G"], 1, ["NO", "fits; --max-total-tokens 131072 needs"]),
        (["--device-memory", "24G", "--max-model-len", "8192"], 0, ["sequences of 8192"]),
        (["--device", "cpu", "--device-memory", "80GB"], 1, ["74.51 GiB", "256 KiB"]),
    ],
)
def test_the_command_needs_a_config_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], status: int, words: list[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_31_8B))
    assert cli.main(["plan", "--model-id", str(tmp_path), *arguments]) == status
    output = capsys.readouterr().out
    assert all(word in output for word in words), output


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"model_type": "mamba"}, "'mamba'"),
        (
            {"quantization_config": {"quant_method": "aqlm"}},
            "dense or of gptq, marlin, awq, compressed-tensors, bitsandbytes",
        ),
        ({"max_position_embeddings": 4096}, None),
    ],
)
def test_models_that_are_not_served_are_not_planned(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, object], complaint: str | None
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA_31_8B, **changes}))
    command = ["plan", str(tmp_path), "--device-memory", "80GiB", "--max-total-tokens", "8192"]
    assert cli.main(command) == 2
    assert (complaint or "made for 4096 positions at most") in capsys.readouterr().err


@pytest.mark.parametrize("size", ["80", "GiB", "80TiB", "-1GiB", "0G", "nanG", "1e999G", "80 gib", "80GGiB"])
def test_a_size_without_its_unit_is_refused(size: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["plan", "x", f"--device-memory={size}"])
    assert "such as 80GiB" in capsys.readouterr().err


def test_files_in_memory_do_not_count_against_a_control_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text("100000\n")
    (tmp_path / "memory.current").write_text("90000\n")
    assert memory.usable_memory_bytes() == 10_000
    (tmp_path / "memory.stat").write_text("anon 20000\ninactive_file 60000\nactive_file 10000\n")
    assert memory.usable_memory_bytes() == 70_000


def test_the_phases_of_a_start_follow_from_what_has_to_be_read_and_zeroed() -> None:
    gpu, cpu = start_times(plan_8b(80)), start_times(plan_8b(256, on_gpu=False))
    assert list(gpu) == ["libraries", "weights", "cache and graphs"]
    assert list(cpu) == ["libraries", "weights", "cache"]
    assert gpu["weights"] == pytest.approx(3.21, abs=0.01), "16.06 GB at 5 GB/s"
    assert gpu["weights"] == pytest.approx(2 * start_times(plan_8b(80, ranks=2))["weights"], rel=1e-3)
    assert cpu["weights"] > 10 * gpu["weights"]
    assert cpu["cache"] == pytest.approx(64 * GIB / 2e9, rel=0.01)
