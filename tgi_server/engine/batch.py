"""A plan as the arrays of one forward pass, on the host."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tgi_server.config import PAGE_TOKENS
from tgi_server.engine.plan import Plan
from tgi_server.layers.batch import Batch
from tgi_server.layers.paged import AnySequences

Ints = NDArray[np.integer[Any]]


@dataclass(frozen=True)
class HostBatch:
    """The fields of `layers.batch.Batch`, and where tables that live as long as a sequence are read and written."""

    token_ids: Ints  # [tokens] int64, 0 where an earlier step sampled the id
    positions: Ints  # [tokens] int32
    adapters: NDArray[np.int32]  # [tokens]: what each goes through; 0: none
    slots: Ints  # [tokens] int64
    page_table: NDArray[np.int32]  # [seqs, pages of the longest]
    query_starts: Ints  # [seqs + 1] int32
    kv_lens: Ints  # [seqs] int32
    logit_rows: Ints  # [logit rows] int64
    rows: Ints  # [seqs] int64: each sequence's row
    fed_at: Ints  # [fed] int64: the tokens whose ids an earlier step sampled …
    fed_rows: Ints  # [fed] int64: … for these rows
    sampling_rows: Ints  # [logit rows] int32: the row behind each row of logits

    def on_cpu(self) -> Batch:
        return Batch(
            token_ids=torch.from_numpy(self.token_ids),
            positions=torch.from_numpy(self.positions).unsqueeze(0),
            adapters=torch.from_numpy(self.adapters),
            slots=torch.from_numpy(self.slots),
            attend=AnySequences(
                torch.from_numpy(self.page_table),
                torch.from_numpy(self.query_starts),
                torch.from_numpy(self.kv_lens),
            ),
            logit_rows=torch.from_numpy(self.logit_rows),
        )


class BatchBuilder:
    """Keeps every running sequence's page table; each plan only adds pages to it."""

    def __init__(self, max_sequences: int, max_pages: int) -> None:
        self._pages: NDArray[np.int32] = np.zeros((max_sequences, max_pages), np.int32)

    def extend(self, plan: Plan) -> None:
        """Take note of the pages that `plan` adds."""
        for work in plan.work:
            if work.new_pages:
                end = work.first_page + len(work.new_pages)
                self._pages[work.row, work.first_page : end] = work.new_pages

    def build(self, plan: Plan) -> HostBatch:
        """The arrays for `plan`, which must not be empty."""
        self.extend(plan)
        rows = np.array([work.row for work in plan.work])
        starts = np.array([work.start for work in plan.work])
        counts = np.array([work.count for work in plan.work])
        query_starts = np.concatenate(([0], np.cumsum(counts)))
        sequence_of = np.repeat(np.arange(len(rows)), counts)
        positions = np.arange(query_starts[-1]) - query_starts[sequence_of] + starts[sequence_of]
        pages = self._pages[rows[sequence_of], positions // PAGE_TOKENS].astype(np.int64)
        adapters = np.array([work.adapter for work in plan.work], np.int32)
        last = query_starts[1:] - 1
        samples = np.array([work.samples for work in plan.work])
        fed = np.array([not work.token_ids for work in plan.work])
        kv_lens = starts + counts
        return HostBatch(
            token_ids=_token_ids(plan),
            positions=positions.astype(np.int32),
            adapters=adapters[sequence_of],
            slots=pages * PAGE_TOKENS + positions % PAGE_TOKENS,
            page_table=self._pages[rows, : -(-int(kv_lens.max()) // PAGE_TOKENS)],
            query_starts=query_starts.astype(np.int32),
            kv_lens=kv_lens.astype(np.int32),
            logit_rows=last[samples],
            rows=rows,
            fed_at=last[fed],
            fed_rows=rows[fed],
            sampling_rows=rows[samples].astype(np.int32),
        )


def _token_ids(plan: Plan) -> Ints:
    blank = (0,)
    return np.fromiter(chain.from_iterable(work.token_ids or blank for work in plan.work), np.int64)
