"""Oracle of `tgi_kernels.rope`."""

from __future__ import annotations

import torch
from torch import Tensor

from tgi_kernels.reference.norm import rms_norm


def rotate(x: Tensor, cos_sin: Tensor, positions: Tensor, *, interleaved: bool = False) -> Tensor:
    """x: [tokens, heads, head_dim]; cos_sin: [positions, rot_dim]. Returns x rotated, in float64."""
    table = cos_sin.double()[positions.long()].unsqueeze(1)  # [tokens, 1, rot_dim]
    cos, sin = table.chunk(2, dim=-1)
    turned, rest = x.double().split([cos_sin.shape[1], x.shape[-1] - cos_sin.shape[1]], dim=-1)
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        turned = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
    else:
        a, b = turned.chunk(2, dim=-1)
        turned = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
    return torch.cat((turned, rest), dim=-1)


def rotary_kv_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_pages: Tensor,
    cos_sin: Tensor,
    positions: Tensor,
    slots: Tensor,
    *,
    interleaved: bool = False,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """Returns (q rotated, the pages after the write), both float64."""
    wide_q = q.double() if q_norm is None else rms_norm(q, q_norm, eps)
    wide_k = k.double() if k_norm is None else rms_norm(k, k_norm, eps)
    new_k = rotate(wide_k, cos_sin, positions, interleaved=interleaved)
    pages = kv_pages.double()
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            page, row = divmod(slot, kv_pages.shape[3])
            pages[page, 0, :, row] = new_k[token]
            pages[page, 1, :, row] = v[token].double()
    return rotate(wide_q, cos_sin, positions, interleaved=interleaved), pages
