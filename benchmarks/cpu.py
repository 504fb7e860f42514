"""The CPU path beside torch and transformers: matrix products, decode, prefill, and the host side of a step.

    python -m benchmarks.cpu --model models/SmolLM2-135M-Instruct [--isa avx2] [--threads 2]

Figures through HTTP are those of `benchmarks.cpu_serving`.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.harness import ROOT, Report, cpu_name, csrc_sha256, time_cpu
from tgi_kernels import cpu
from tgi_kernels.matmul import linear, pack_linear
from tgi_server.config import EngineConfig
from tgi_server.engine.batch import BatchBuilder
from tgi_server.engine.limits import Limits
from tgi_server.engine.pages import PagePool
from tgi_server.engine.plan import Sampled
from tgi_server.engine.request import GenerationRequest
from tgi_server.engine.runner import CpuRunner
from tgi_server.engine.scheduler import Scheduler

SHAPES = ((576, 3072), (2048, 8192))  # in, out features: gate and up of SmolLM2-135M, and of a model of 1.2 B
PROMPT_TOKENS = 1024
NEW_TOKENS = 64
HOST_SEQUENCES = 256


def read_roof() -> float:
    """Bytes a second that all threads together read from memory."""
    source = torch.zeros(1 << 27, dtype=torch.int64)
    return source.nbytes / time_cpu(lambda: torch.amax(source), samples=5).low_s


def matmul_roof() -> float:
    """Flops a second of a large fp32 product by torch."""
    a = torch.randn(1536, 1536)
    return 2 * 1536**3 / time_cpu(lambda: a @ a, samples=5).low_s


def bench_matmul(report: Report, flops: float) -> None:
    for in_features, out_features in SHAPES:
        weight = torch.randn(out_features, in_features).bfloat16()
        wide, packed = weight.float(), pack_linear(weight)
        for tokens in (1, 16, 256):
            x = torch.randn(tokens, in_features)
            narrow = x.bfloat16()
            work = 2 * tokens * in_features * out_features

            def rate(call: Callable[[], object], work: int = work) -> float:
                # A thread that starts on the caller's core is moved away within milliseconds: let samples outlast that.
                return work / time_cpu(call, samples=15, least_s=0.01).median_s / 1e9

            report.add(
                "matmul",
                f"bf16 weights, {tokens} x {in_features} x {out_features}",
                rate(lambda x=x, packed=packed: linear(x, packed)),
                metric="rate",
                unit="GFLOP/s",
                better="higher",
                roof=flops / 1e9,
                baselines={
                    "torch fp32": rate(lambda x=x, wide=wide: functional.linear(x, wide)),
                    "torch bf16": rate(lambda x=narrow, weight=weight: functional.linear(x, weight)),
                },
            )


class Engine:
    """Scheduler and runner without a process around them."""

    def __init__(self, model: Path, threads: int, quantize: str = "") -> None:
        self.config = EngineConfig(
            model=model,
            max_total_tokens=2048,
            max_batch_tokens=256,
            max_sequences=64,
            max_queue=1000,
            num_pages=1024,
            num_threads=threads,
            quantize=quantize,
        )
        self.runner = CpuRunner(self.config)

    def steps(self, sequences: int, prompt_tokens: int, new_tokens: int) -> list[tuple[float, int]]:
        """Seconds and tokens of each step that answers so many random prompts."""
        limits = Limits(self.config.max_batch_tokens, 64, 1000)
        scheduler = Scheduler(PagePool(self.runner.num_pages), limits, time.monotonic)
        add_random(scheduler, sequences, prompt_tokens, new_tokens)
        taken = []
        while scheduler.running or scheduler.waiting:
            begin = time.perf_counter()
            plan = scheduler.plan()
            scheduler.commit(plan, self.runner.launch(plan).result())
            taken.append((time.perf_counter() - begin, plan.tokens))
        return taken


def add_random(scheduler: Scheduler, sequences: int, prompt_tokens: int, new_tokens: int) -> None:
    random = np.random.default_rng(0)
    for i in range(sequences):
        prompt = random.integers(100, 40000, prompt_tokens).tolist()
        scheduler.add(GenerationRequest(id=str(i), prompt_ids=prompt, max_new_tokens=new_tokens))


class Transformers:
    """The same work by transformers, with its own cache."""

    def __init__(self, model: Path, dtype: torch.dtype) -> None:
        self.model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)

    @torch.inference_mode()
    def decode_rate(self, sequences: int, tokens: int) -> float:
        """Tokens a second of greedy decoding, after prompts of 16 tokens."""
        cached = self.model(torch.randint(100, 40000, (sequences, 16)), use_cache=True)
        ids = cached.logits[:, -1:].argmax(-1)
        begin = time.perf_counter()
        for _ in range(tokens):
            cached = self.model(ids, past_key_values=cached.past_key_values, use_cache=True)
            ids = cached.logits[:, -1:].argmax(-1)
        return sequences * tokens / (time.perf_counter() - begin)

    @torch.inference_mode()
    def prefill_rate(self) -> float:
        ids = torch.randint(100, 40000, (1, PROMPT_TOKENS))
        return PROMPT_TOKENS / time_cpu(lambda: self.model(ids, logits_to_keep=1), samples=3).median_s


def weight_bytes(model: Path) -> int:
    return sum(file.stat().st_size for file in model.glob("*.safetensors"))


def bench_model(report: Report, model: Path, threads: int, read: float) -> None:
    engine = Engine(model, threads)
    engine.steps(1, 16, 8)
    others = {name: Transformers(model, getattr(torch, name)) for name in ("float32", "bfloat16")}
    for sequences in (1, 16):
        steps = engine.steps(sequences, 16, NEW_TOKENS)
        decode_s = statistics.median(seconds for seconds, tokens in steps if tokens == sequences)
        report.add(
            "decode",
            f"{sequences} streams, {model.name}",
            sequences / decode_s,
            metric="rate",
            unit="tok/s",
            better="higher",
            roof=sequences * read / weight_bytes(model) if sequences == 1 else None,
            baselines={
                f"transformers {name}": other.decode_rate(sequences, 24) for name, other in others.items()
            },
        )
    prefill_s = min(sum(s for s, _ in engine.steps(1, PROMPT_TOKENS, 1)) for _ in range(3))
    report.add(
        "prefill",
        f"{PROMPT_TOKENS} tokens, {model.name}",
        PROMPT_TOKENS / prefill_s,
        metric="rate",
        unit="tok/s",
        better="higher",
        baselines={f"transformers {name}": other.prefill_rate() for name, other in others.items()},
    )


def bench_host(report: Report) -> None:
    """What a step of 256 decoding sequences costs beside the model: plan, batch arrays, commit.

    In CPU time, which other processes on the machine do not lengthen.
    """
    scheduler = Scheduler(PagePool(8192), Limits(4096, HOST_SEQUENCES, 1000), time.monotonic)
    builder = BatchBuilder(HOST_SEQUENCES, 64)
    add_random(scheduler, HOST_SEQUENCES, 16, 600)
    taken: dict[str, list[float]] = {"plan": [], "batch": [], "commit": []}
    for _ in range(400):
        begin = time.thread_time()
        plan = scheduler.plan()
        planned = time.thread_time()
        builder.build(plan).on_cpu()
        built = time.thread_time()
        sampled = [Sampled([7], [-1.0]) for work in plan.work if work.samples]
        sampled_at = time.thread_time()
        scheduler.commit(plan, sampled, 0.02)
        end = time.thread_time()
        if plan.tokens == HOST_SEQUENCES:
            for name, seconds in zip(
                taken, (planned - begin, built - planned, end - sampled_at), strict=True
            ):
                taken[name].append(seconds)
    # The mean: every sixteenth step fills a page of each sequence, and has all of them to hash.
    parts = {name: 1000 * statistics.mean(seconds) for name, seconds in taken.items()}
    case = f"step of {HOST_SEQUENCES} sequences"
    report.add("host", case, sum(parts.values()), metric="time", unit="ms", baselines=parts)


def parser_of(doc: str | None) -> argparse.ArgumentParser:
    """The options of benchmarks in one process."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "SmolLM2-135M-Instruct")
    parser.add_argument("--isa", choices=cpu.available_isas(), default=cpu.isa())
    parser.add_argument("--threads", type=int, default=cpu.num_threads())
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    return parser


def use(isa: str, threads: int) -> None:
    """Compute with these from now on."""
    cpu.set_isa(isa)
    cpu.set_num_threads(threads)
    torch.set_num_threads(threads)


def main() -> None:
    args = parser_of(__doc__).parse_args()
    use(args.isa, args.threads)
    report = Report(cpu_name(), csrc_sha256())
    read, flops = read_roof(), matmul_roof()
    report.add("roof", "read", read / 1e9, metric="rate", unit="GB/s", better="higher")
    report.add("roof", "torch fp32 1536³", flops / 1e9, metric="rate", unit="GFLOP/s", better="higher")
    with torch.inference_mode():
        bench_matmul(report, flops)
    bench_model(report, args.model, args.threads, read)
    gc.collect()
    gc.freeze()  # what was loaded for the comparison is not the scheduler's: the collector shall not walk it
    bench_host(report)
    report.write(args.out / report.device / "cpu.jsonl")
    print(report.table())


if __name__ == "__main__":
    main()
