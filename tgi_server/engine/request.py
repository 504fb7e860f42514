"""What crosses the border between front ends and the engine: msgpack of these types, and nothing else."""

from __future__ import annotations

from enum import Enum
from typing import Final

import msgspec


class FinishReason(Enum):
    """Why the engine stopped a sequence. Stop strings are the front end's business: it cancels."""

    LENGTH = "length"
    EOS = "eos"
    FAILED = "failed"  # this request's computation failed; `TokenEvent.error` says how
    REJECTED = "rejected"  # the queue is full
    WAITED = "waited"  # not begun within the limit of waiting
    EXHAUSTED = "exhausted"  # the device has too little memory for it now; trying later may help


class Sampling(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How the next token is drawn. The defaults ask for nothing: the likeliest token of the raw logits."""

    temperature: float = 0.0  # 0 takes the likeliest token
    top_k: int = 0  # 0 keeps all
    top_p: float = 1.0
    typical_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0  # over prompt and output
    frequency_penalty: float = 0.0  # over the output, as presence_penalty
    presence_penalty: float = 0.0
    logit_bias: dict[int, float] = {}  # token id: added to its logit
    watermark: bool = False
    seed: int = 0  # unsigned, 64 bits
    choice: int = 0  # which of a request's answers: part of the noise's counter, so that they differ

    @property
    def penalised(self) -> bool:
        """Whether tokens that have occurred are less likely, or likelier, to occur again."""
        return (self.repetition_penalty, self.frequency_penalty, self.presence_penalty) != (1.0, 0.0, 0.0)


# The fields of GenerationRequest and Sampling the engine acts on. A front end refuses the others by the name the
# client gave them, so that nothing is ignored; add a field here with the code that honours it.
HONOURED: Final[frozenset[str]] = frozenset(
    (*Sampling.__struct_fields__, "min_new_tokens", "top_logprobs", "prompt_logprobs")
)


class GenerationRequest(msgspec.Struct, frozen=True, kw_only=True, tag="generate"):
    """One sequence to generate. Every API flavour maps its body to this; all bounds are already checked."""

    id: str  # unique among requests in flight
    prompt_ids: list[int]  # at least one
    max_new_tokens: int  # at least one; prompt and answer fit max_total_tokens
    stop_token_ids: list[int] = []  # end-of-sequence ids; the id itself is still reported
    min_new_tokens: int = 0  # stop_token_ids cannot be drawn before
    sampling: Sampling = Sampling()
    top_logprobs: int = 0  # likeliest tokens to report beside each drawn one
    prompt_logprobs: bool = False  # report those of prompt_ids[1:], with the first token
    priority: int = 0  # smaller is more urgent; -100 … 100
    adapter: int = 0  # index of the adapter that every token goes through; 0: none
    salt: str = ""  # cached prefixes are found only by requests of the same salt (and adapter)


class Cancel(msgspec.Struct, frozen=True, tag="cancel"):
    """Forget a request; nothing more is said about it."""

    id: str


class TokenEvent(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """News of one request: the tokens one step gave it (several under speculation), perhaps its end."""

    id: str
    token_ids: list[int] = []
    logprobs: list[float] = []  # of the raw logits, one per token
    finish: FinishReason | None = None  # comes with the last token, or alone with an `error`
    error: str = ""
    top: list[list[tuple[int, float]]] = []  # per token: the likeliest (id, logprob), best first
    prompt_logprobs: list[float] = []  # of prompt_ids[1:]; with the first token
    prompt_top: list[
        list[tuple[int, float]]
    ] = []  # the likeliest instead of each of prompt_ids[1:], as `top`
    queued_s: float | None = None  # with the first token: how long the request waited for its first step


class StepEvents(msgspec.Struct, frozen=True, tag="events"):
    """All that one step has to say."""

    events: list[TokenEvent]


STEP_BOUNDS_S: Final = tuple(0.00015 * 1.5**i for i in range(35))  # those of TGI's histograms of durations
STEP_SIZE_BOUNDS: Final = tuple(1 << i for i in range(11))  # sequences


class EngineStatus(msgspec.Struct, frozen=True, kw_only=True, tag="status"):
    """Sent whenever the phase changes and at least every half second; its absence means a stuck loop."""

    phase: str  # "loading", "ready"
    waiting: int = 0
    running: int = 0
    free_pages: int = 0
    total_pages: int = 0
    detail: str = ""
    cpu_isa: str = ""  # the instruction set of the kernels on a CPU
    matrices: dict[str, str] = {}  # format and kernel by group of matrices; see `layers.kinds`
    device_bytes: int = (
        0  # of a GPU's memory: held for weights, cache and steps, kernels and driver not counted
    )
    # Counted since the engine started, for `/metrics`.
    prompt_tokens: int = 0  # of prompts begun
    prefix_hit_tokens: int = 0  # of those, found in the cache
    preemptions: int = 0
    prefill_steps: int = 0  # computed steps with prompt tokens, perhaps beside answers'
    decode_steps: int = 0
    failed_prefill_steps: int = 0
    failed_decode_steps: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    stepped_sequences: int = 0  # over all steps
    # How many steps were at most as long, or as large, as each of the bounds below, and longer than the one before.
    prefill_step_buckets: list[int] = []
    decode_step_buckets: list[int] = []
    step_size_buckets: list[int] = []


ToEngine = GenerationRequest | Cancel
FromEngine = StepEvents | EngineStatus
