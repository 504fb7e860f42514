"""Checkpoints of quantised matrices, packed bit by bit as their formats are published; slow and obvious."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

AWQ_OUTPUTS = (0, 2, 4, 6, 1, 3, 5, 7)  # whose codes a word's nibbles are, lowest first


@dataclass
class Matrix:
    """weight[n, k] = (codes[n, k] - zeros[n, group_of[k]]) · scales[n, group_of[k]]"""

    codes: Tensor  # [out, in]
    zeros: Tensor  # [out, groups]
    scales: Tensor  # [out, groups]
    group_of: Tensor  # [in]

    def dense(self) -> Tensor:
        """[out, in] float64, exact."""
        zeros, scales = self.zeros[:, self.group_of], self.scales[:, self.group_of]
        return (self.codes.double() - zeros.double()) * scales.double()


def rounded(weight: Tensor, bits: int, group_size: int, *, sym: bool, shuffled: bool = False) -> Matrix:
    """The nearest codes; `shuffled` deals columns out to groups at random."""
    out, columns = weight.shape
    size = columns if group_size == -1 else group_size
    groups = columns // size
    group_of = torch.arange(columns) // size
    if shuffled:
        group_of = group_of[torch.randperm(columns, generator=torch.Generator().manual_seed(1))]
    top = (1 << bits) - 1
    scales, zeros = torch.empty(out, groups).half(), torch.empty(out, groups, dtype=torch.int64)
    codes = torch.empty(out, columns, dtype=torch.int64)
    for group in range(groups):
        part = weight[:, group_of == group].float()
        low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
        if sym:
            scale = (torch.maximum(high, -low) * 2 / top).half()
            zero = torch.full((out,), 1 << (bits - 1))
        else:
            scale = ((high - low) / top).half()
            zero = (-low / scale.float()).round().clamp(1, top).long()
        scales[:, group], zeros[:, group] = scale, zero
        levels = (part / scale.float()[:, None]).round() + zero[:, None]
        codes[:, group_of == group] = levels.clamp(0, top).long()
    return Matrix(codes, zeros, scales, group_of)


def bit_stream(rows: Tensor, bits: int) -> Tensor:
    """[rows, codes] to int32 words, each row's codes one after another, lowest bits first."""
    flat = np.asarray(rows, dtype=np.uint32)
    every = (
        ((flat[:, :, None] >> np.arange(bits, dtype=np.uint32)) & 1).astype(np.uint8).reshape(len(flat), -1)
    )
    every = np.pad(every, ((0, 0), (0, -every.shape[1] % 32)))
    return torch.from_numpy(np.packbits(every, axis=1, bitorder="little").view(np.int32).copy())


def gptq(matrix: Matrix, bits: int, *, version: int = 1, g_idx: bool = True) -> dict[str, Tensor]:
    tensors = {
        "qweight": bit_stream(matrix.codes.T.contiguous().T, bits).T.contiguous(),
        "qzeros": bit_stream(matrix.zeros.T - (2 - version), bits),
        "scales": matrix.scales.T.contiguous(),
    }
    return tensors | ({"g_idx": matrix.group_of.int()} if g_idx else {})


def awq(matrix: Matrix) -> dict[str, Tensor]:
    def pack(rows: Tensor) -> Tensor:
        words = torch.zeros(len(rows), rows.shape[1] // 8, dtype=torch.int64)
        for place, output in enumerate(AWQ_OUTPUTS):
            words |= rows[:, output::8].long() << (4 * place)
        return torch.where(words >= 1 << 31, words - (1 << 32), words).int()

    return {
        "qweight": pack(matrix.codes.T),
        "qzeros": pack(matrix.zeros.T),
        "scales": matrix.scales.T.contiguous(),
    }


NF4 = torch.tensor(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
     -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
     0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
     0.7229568362236023, 1.0]
)  # fmt: skip


def nf4(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """bitsandbytes' tensors, in blocks of 32 for columns that 64 does not divide, and the matrix they stand for."""
    block = 32 if weight.shape[1] % 64 else 64
    blocks = weight.float().reshape(-1, block)
    scales = blocks.abs().amax(1)
    codes = ((blocks / scales[:, None])[:, :, None] - NF4).abs().argmin(2).flatten()
    state = {"quant_type": "nf4", "blocksize": block, "dtype": "float32", "shape": list(weight.shape)}
    tensors = {
        "weight": (codes[::2] * 16 + codes[1::2]).to(torch.uint8)[:, None],
        "weight.absmax": scales,
        "weight.quant_map": NF4.clone(),
        "weight.quant_state.bitsandbytes__nf4": torch.tensor(
            list(json.dumps(state).encode()), dtype=torch.uint8
        ),
    }
    return tensors, (NF4[codes].reshape(blocks.shape) * scales[:, None]).reshape(weight.shape)


def int8(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """LLM.int8's tensors, and the matrix they stand for."""
    largest = weight.float().abs().amax(1)
    codes = (weight.float() * 127 / largest[:, None]).round().to(torch.int8)
    scales = (largest.double() / 127).float()
    return {"weight": codes, "SCB": largest}, codes * scales[:, None]


def quantise_folder(folder: Path, section: dict[str, object], make: object) -> dict[str, Tensor]:
    """Replace the matrices of the blocks in folder/model.safetensors by `make(name, weight)`'s (tensors, dense).

    Returns all tensors of the dense model that the result stands for.
    """
    assert callable(make)
    path, config_path = folder / "model.safetensors", folder / "config.json"
    stored, dense = load_file(path), {}
    written: dict[str, Tensor] = {}
    for name, tensor in stored.items():
        if not name.endswith("_proj.weight"):
            written[name] = dense[name] = tensor
            continue
        parts, dense[name] = make(name.removesuffix(".weight"), tensor)
        written |= {f"{name.removesuffix('weight')}{leaf}": part.contiguous() for leaf, part in parts.items()}
    save_file(written, path)
    config = json.loads(config_path.read_text())
    config_path.write_text(json.dumps(config | {"quantization_config": section}))
    return dense
