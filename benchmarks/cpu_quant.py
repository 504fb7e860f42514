"""Decode and prefill on CPUs with weights of a few bits, beside the same model in bf16, in one run.

    python -m benchmarks.cpu_quant [--model models/SmolLM2-135M-Instruct] [--gptq FOLDER] [--w8a8 FOLDER] [--isa avx2]
        [--threads 2] [--only int8 w8a8]

Folders are what `tgi-server quantize MODEL FOLDER --bits 4 --group-size 64` and `... --method w8a8` wrote. The other
formats are made here: Q4_1 in the blocks of GGUF with the head in Q8_0, as llama.cpp's own Q4_1 files have it; NF4 and
int8, whose activations stay as they are, while loading.
"""

from __future__ import annotations

import gc
import json
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType
from gguf.quants import quantize
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.cpu import NEW_TOKENS, PROMPT_TOKENS, Engine, parser_of, read_roof, use, weight_bytes
from benchmarks.harness import Report, cpu_name, csrc_sha256

WEIGHTS_ALONE = "int8"
TRIES = 3  # of each figure, formats in turns: what slows the machine for a while slows them all


@dataclass(frozen=True)
class Format:
    """A checkpoint, and what is done to it while it loads."""

    name: str
    model: Path
    quantize: str = ""


def write_q4_1(model: Path, folder: Path) -> None:
    """The model with the blocks of a Q4_1 file: the matrices of its layers, and its head in Q8_0."""
    tensors: dict[str, Tensor] = {}
    for file in model.glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            stem = name.removesuffix(".weight")
            if tensor.dim() != 2:
                tensors[name] = tensor
            elif ".layers." in name:
                tensors[f"{stem}.q4_1.blocks"] = _blocks(tensor, GGMLQuantizationType.Q4_1)
            else:
                tensors[f"{stem}.q8_0.blocks"] = _blocks(tensor, GGMLQuantizationType.Q8_0)
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {"quant_method": "gguf", "types": ["Q4_1", "Q8_0"]}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def _blocks(weight: Tensor, kind: GGMLQuantizationType) -> Tensor:
    """[out_features, blocks, bytes of a block] uint8."""
    packed = quantize(weight.float().numpy(), kind)
    return torch.from_numpy(np.ascontiguousarray(packed)).view(len(weight), weight.shape[1] // 32, -1)


class Figures:
    """The best of several tries of one format."""

    def __init__(self, form: Format, threads: int) -> None:
        self.form = form
        self.engine = Engine(form.model, threads, form.quantize)
        self.engine.steps(1, 16, 8)
        self.rates: dict[str, float] = {}

    def measure(self) -> None:
        for streams in (1, 16):
            steps = self.engine.steps(streams, 16, NEW_TOKENS)
            step_s = statistics.median(seconds for seconds, tokens in steps if tokens == streams)
            self._keep(f"decode {streams}", streams / step_s)
        prefill_s = sum(seconds for seconds, _ in self.engine.steps(1, PROMPT_TOKENS, 1))
        self._keep("prefill", PROMPT_TOKENS / prefill_s)

    def _keep(self, what: str, rate: float) -> None:
        self.rates[what] = max(rate, self.rates.get(what, 0.0))


def add(report: Report, all_figures: list[Figures], model: str, read: float) -> None:
    dense, *others = all_figures
    of_weights = [figures for figures in others if figures.form.name == WEIGHTS_ALONE]
    cases = {
        "decode 1": f"1 stream, {model}",
        "decode 16": f"16 streams, {model}",
        "prefill": f"{PROMPT_TOKENS} tokens, {model}",
    }
    for what, case in cases.items():
        for figures in others:
            baselines = {"bf16": dense.rates[what]}
            if figures.form.name == "w8a8":
                baselines |= {f"{WEIGHTS_ALONE}, weights alone": own.rates[what] for own in of_weights}
            reads_known = what == "decode 1" and not figures.form.quantize
            report.add(
                "quant cpu",
                f"{figures.form.name}, {what.split()[0]} {case}",
                figures.rates[what],
                metric="rate",
                unit="tok/s",
                better="higher",
                roof=read / weight_bytes(figures.form.model) if reads_known else None,
                baselines=baselines,
            )


def main() -> None:
    parser = parser_of(__doc__)
    for name in ("--gptq", "--w8a8"):
        parser.add_argument(name, type=Path, help="the same model, quantised by `tgi-server quantize`")
    parser.add_argument("--only", nargs="+", help="of these formats, by name, beside bf16")
    args = parser.parse_args()
    use(args.isa, args.threads)
    report = Report(cpu_name(), csrc_sha256())
    read = read_roof()
    with tempfile.TemporaryDirectory() as folder:
        write_q4_1(args.model, Path(folder))
        formats = [Format("bf16", args.model)]
        if args.gptq is not None:
            formats.append(Format("gptq int4 g64", args.gptq))
        formats.append(Format("gguf Q4_1", Path(folder)))
        formats.append(Format("nf4 g64", args.model, "bitsandbytes-nf4"))
        formats.append(Format(WEIGHTS_ALONE, args.model, "bitsandbytes"))
        if args.w8a8 is not None:
            formats.append(Format("w8a8", args.w8a8))
        dense, *others = formats
        chosen = [form for form in others if args.only is None or form.name in args.only]
        everything = [Figures(form, args.threads) for form in (dense, *chosen)]
        gc.collect()
        gc.freeze()  # what was loaded is not the scheduler's: the collector shall not walk it
        for _ in range(TRIES):
            for figures in everything:
                figures.measure()
        report.add("roof", "read", read / 1e9, metric="rate", unit="GB/s", better="higher")
        add(report, everything, args.model.name, read)
    report.write(args.out / report.device / "cpu_quant.jsonl")
    print(report.table())


if __name__ == "__main__":
    main()
