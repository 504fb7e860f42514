"""The engine on a GPU: right against transformers, and a token's bits depend on its own sequence alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from benchmarks.in_process import InProcess
from tests.engine.gpu_rig import answers, engine, events, prompts
from tgi_server.engine.request import Sampling

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

# As many as there are prompts, greedy ones among them.
SETTINGS = (
    Sampling(),
    Sampling(temperature=1.0),
    Sampling(temperature=0.7, top_k=40),
    Sampling(temperature=1.3, top_p=0.9),
    Sampling(temperature=0.9, top_k=50, top_p=0.95, min_p=0.02, repetition_penalty=1.2),
    Sampling(temperature=1.0, typical_p=0.8),
    Sampling(repetition_penalty=1.3),
    Sampling(temperature=1.0, frequency_penalty=0.7, presence_penalty=0.3, logit_bias={260: 2.0, 198: -3.0}),
    Sampling(temperature=0.8, watermark=True),
    Sampling(),
)
PROMPTS = prompts(2 * len(SETTINGS))
FIELDS: list[dict[str, Any]] = [
    {"sampling": Sampling(**{name: getattr(chosen, name) for name in chosen.__struct_fields__} | {"seed": i})}
    for i, chosen in enumerate(SETTINGS * 2)
]


def test_logprobs_are_as_near_to_fp32_as_those_of_transformers_in_bf16(llama: Path) -> None:
    exact = LlamaForCausalLM.from_pretrained(llama, dtype=torch.float32).cuda()
    rounded = LlamaForCausalLM.from_pretrained(llama, dtype=torch.bfloat16).cuda()
    ours, theirs, missed = [], [], []
    for prompt, answer in zip(prompts(12), answers(engine(llama), prompts(12)), strict=True):
        ids = [token for token, _ in answer]
        inputs = torch.tensor([prompt + ids[:-1]], device="cuda")
        with torch.inference_mode():
            expected, eager = (
                model(inputs).logits[0, len(prompt) - 1 :].float().log_softmax(-1)
                for model in (exact, rounded)
            )
        chosen = expected[range(len(ids)), ids]
        ours.append(torch.tensor([logprob for _, logprob in answer], device="cuda") - chosen)
        theirs.append(eager[range(len(ids)), ids] - chosen)
        missed.append(expected.max(-1).values - chosen)
    assert torch.cat(ours).abs().max() <= 2 * torch.cat(theirs).abs().max()
    assert torch.cat(ours).square().mean() <= 2 * torch.cat(theirs).square().mean()
    assert torch.cat(missed).max() <= 4 * torch.cat(theirs).abs().max(), (
        "a chosen token is not among the best"
    )


@pytest.mark.parametrize("depth", [0, 1])
def test_alone_and_in_a_crowd_the_bits_are_the_same(llama: Path, depth: int) -> None:
    crowd = answers(engine(llama, depth), PROMPTS, fields=FIELDS)
    rig = engine(llama, depth)
    for prompt, fields, expected in zip(PROMPTS, FIELDS, crowd, strict=True):
        assert answers(rig, [prompt], fields=[fields]) == [expected]


def eager(rig: InProcess) -> InProcess:
    """The same engine without graphs: decode steps run kernel by kernel."""
    for graph in rig.runner._graphs:
        graph._graph = SimpleNamespace(replay=graph.step)
    return rig


def test_graphs_and_kernels_one_by_one_give_the_same_bits(llama: Path) -> None:
    expected = answers(engine(llama), PROMPTS, fields=FIELDS)
    assert answers(eager(engine(llama)), PROMPTS, fields=FIELDS) == expected


def test_depth_does_not_change_the_bits(llama: Path) -> None:
    expected = answers(engine(llama, 0), PROMPTS, fields=FIELDS)
    assert answers(engine(llama, 1), PROMPTS, fields=FIELDS) == expected


def cached(llama: Path) -> InProcess:
    """An engine that has answered all the prompts before: each finds its pages."""
    rig = engine(llama)
    answers(rig, PROMPTS, fields=FIELDS)
    return rig


OTHER_WAYS: dict[str, Callable[[Path], InProcess]] = {
    "in chunks": lambda llama: engine(llama, max_batch_tokens=64),
    "in odd chunks": lambda llama: engine(llama, max_batch_tokens=61),
    "cached": cached,
    "preempted": lambda llama: engine(llama, num_pages=80),
}


@pytest.mark.parametrize("way", OTHER_WAYS)
def test_chunks_preemption_and_cached_prefixes_keep_the_bits(llama: Path, way: str) -> None:
    whole = answers(engine(llama), PROMPTS, fields=FIELDS)
    rig = OTHER_WAYS[way](llama)
    assert answers(rig, PROMPTS, fields=FIELDS) == whole
    assert (way == "preempted") == (rig.engine._scheduler.counts.preemptions > 0)


def prompt_logprobs(rig: InProcess) -> torch.Tensor:
    """Of all prompts, each cut into pieces, so that later ones read what earlier ones left in the cache."""
    names = [rig.submit(prompt, 30, prompt_logprobs=True) for prompt in PROMPTS]
    rig.finish()
    return torch.tensor([logprob for name in names for logprob in events(rig, name)[0].prompt_logprobs])


def prompt_logprobs_of_transformers(llama: Path, dtype: torch.dtype) -> torch.Tensor:
    model = LlamaForCausalLM.from_pretrained(llama, dtype=dtype, attn_implementation="sdpa").cuda()
    with torch.inference_mode():
        logits = [model(torch.tensor([p], device="cuda")).logits[0].float() for p in PROMPTS]
    theirs = [row.log_softmax(-1).cpu() for row in logits]
    return torch.cat([row[range(len(p) - 1), p[1:]] for row, p in zip(theirs, PROMPTS, strict=True)])


def test_a_float8_cache_rounds_keys_and_values_and_nothing_else(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As near to fp32 with such keys and values as transformers is in bf16 with such ones."""
    narrow = prompt_logprobs(engine(llama, max_batch_tokens=64, fp8_cache=True))
    plain = prompt_logprobs_of_transformers(llama, torch.float32)
    attention = torch.nn.functional.scaled_dot_product_attention

    def rounding(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **more: Any) -> torch.Tensor:
        k, v = (x.to(torch.float8_e4m3fn).to(x.dtype) for x in (k, v))
        return attention(q, k, v, **more)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", rounding)
    rounded = prompt_logprobs_of_transformers(llama, torch.float32)
    eager = prompt_logprobs_of_transformers(llama, torch.bfloat16)
    assert (rounded - plain).abs().mean() > 0.1
    assert (narrow - rounded).abs().mean() <= 1.5 * (eager - rounded).abs().mean()
    assert (narrow - rounded).abs().mean() < 0.75 * (narrow - plain).abs().mean()


def test_float16_is_nearer_to_fp32_than_bfloat16(llama: Path) -> None:
    expected = prompt_logprobs_of_transformers(llama, torch.float32)
    errors = [
        (prompt_logprobs(engine(llama, dtype=dtype)) - expected).abs().mean()
        for dtype in ("float16", "bfloat16")
    ]
    assert errors[0] < errors[1] / 2
