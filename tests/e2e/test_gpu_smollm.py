"""The demo model on a GPU, in bf16, says what it says on a CPU in fp32."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.e2e.conftest import NEW_TOKENS
from tests.e2e.prompts import PROMPTS
from tests.engine.agreement import Said, opinion, say
from tests.engine.gpu_rig import engine, engine_on_cpu
from tests.server import DEMO

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

SIZES = {"max_total_tokens": 4096, "max_batch_tokens": 4096, "num_pages": 1024}


def logprobs_of_transformers(said: list[Said], dtype: torch.dtype) -> Tensor:
    """Of every token that was said: [tokens of all]."""
    model = AutoModelForCausalLM.from_pretrained(DEMO, dtype=dtype).cuda()
    found = []
    for one in said:
        ids = torch.tensor([one.prompt + one.ids[:-1]], device="cuda")
        with torch.inference_mode():
            logits = model(ids, logits_to_keep=len(one.ids)).logits[0]
        found.append(logits.float().log_softmax(-1)[range(len(one.ids)), one.ids])
    return torch.cat(found).cpu()


def test_tokens_are_those_of_the_cpu_but_where_two_are_as_likely_within_rounding() -> None:
    """Rounding is what transformers' own logprobs lose in bf16."""
    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    prompts = [encoding.ids for encoding in tokenizer.encode_batch(PROMPTS)]
    said = say(engine_on_cpu(DEMO, **SIZES), prompts, NEW_TOKENS)
    exact = logprobs_of_transformers(said, torch.float32)
    ours = torch.tensor([logprob for one in said for logprob in one.logprobs])
    assert (ours - exact).abs().max() <= 1e-3, (ours - exact).abs().max()
    lost = (logprobs_of_transformers(said, torch.bfloat16) - exact).abs()
    found = opinion(engine(DEMO, **SIZES), said)
    errors = found.errors.abs()
    print(
        f"\n{len(PROMPTS)} prompts, {len(ours)} tokens. Errors of logprobs, mean and largest: "
        f"{errors.mean():.4f}, {errors.max():.3f}; of transformers in bf16: {lost.mean():.4f}, {lost.max():.3f}"
    )
    for what, places in (("another is likeliest", found.others), ("answers part", found.parted)):
        print(f"{what} (prompt, token, nats between the CPU's two best): {len(places)}")
        print("  " + ", ".join(f"({prompt}, {at}, {gap:.4f})" for prompt, at, gap in places))
    assert errors.mean() <= 1.5 * lost.mean() and errors.max() <= 2 * lost.max()
    assert all(gap <= 2 * lost.max() for *_, gap in found.others + found.parted)
