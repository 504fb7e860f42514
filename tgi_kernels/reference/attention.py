"""Oracle of `tgi_kernels.attention`."""

from __future__ import annotations

import torch
from torch import Tensor


def attention(
    q: Tensor,
    kv_pages: Tensor,
    page_table: Tensor,
    query_starts: Tensor,
    kv_lens: Tensor,
    scale: float,
    *,
    window: int = 0,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
    bias_by_distance: bool = False,
) -> Tensor:
    """Shapes as `tgi_kernels.attention.attention`. Returns float64 like q; rows of no sequence are zero."""
    out = torch.zeros(q.shape, dtype=torch.float64, device=q.device)
    group = q.shape[1] // kv_pages.shape[2]
    for seq, kv_len in enumerate(kv_lens.tolist()):
        first, stop = query_starts[seq : seq + 2].tolist()
        keys, values = (_gather(kv_pages[:, kind], page_table[seq], kv_len, group) for kind in (0, 1))
        scores = torch.einsum("qhd,hkd->hqk", q[first:stop].double(), keys) * scale
        if softcap > 0:
            scores = softcap * torch.tanh(scores / softcap)
        key_at = torch.arange(kv_len, device=q.device)
        distance = key_at - torch.arange(kv_len - (stop - first), kv_len, device=q.device).unsqueeze(1)
        if alibi_slopes is not None:
            scores = scores + alibi_slopes.double().view(-1, 1, 1) * distance
        if bias is not None:
            columns = -distance.clamp(max=0) if bias_by_distance else key_at.expand_as(distance)
            rows = bias if bias.shape[0] == 1 else bias[first:stop]
            rows = rows.double().expand(stop - first, q.shape[1], -1).transpose(0, 1)
            picked = columns.clamp(max=bias.shape[2] - 1).expand(q.shape[1], -1, -1)
            scores = scores + rows.gather(2, picked)
        seen = distance <= 0
        if window > 0:
            seen = seen & (distance > -window)
        scores = scores.masked_fill(~seen, float("-inf"))
        if sinks is not None:
            sink = sinks.double().view(-1, 1, 1).expand(-1, stop - first, 1)
            weights = torch.cat((scores, sink), dim=-1).softmax(-1)[..., :-1]
        else:
            nothing = scores.isneginf().all(-1, keepdim=True)
            weights = scores.softmax(-1).masked_fill(nothing, 0.0)
        out[first:stop] = torch.einsum("hqk,hkd->qhd", weights, values)
    return out


def _gather(pages: Tensor, table: Tensor, kv_len: int, group: int) -> Tensor:
    """pages: [pages, kv_heads, 16, head_dim] → [heads, kv_len, head_dim] float64."""
    used = pages[table[: -(-kv_len // pages.shape[2])].long()]  # [used pages, kv_heads, 16, head_dim]
    rows = used.transpose(0, 1).flatten(1, 2)[:, :kv_len].double()
    return rows.repeat_interleave(group, dim=0)
