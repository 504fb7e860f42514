"""How memory is divided between weights, KV cache and reserve: the arithmetic of the start and of `tgi-server plan`.

Plain numbers in, plain numbers out: no device is asked here and no file is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from tgi_server.config import PAGE_TOKENS, ModelConfig
from tgi_server.errors import StartupError
from tgi_server.quantization.contents import Contents
from tgi_server.weight_bytes import kv_heads_of, weights_bytes, widened_bytes

# A GPU's part that weights and KV cache leave free at least: activations, tables, graphs, the allocator's rounding.
GPU_RESERVE_BYTES: Final = 4 << 30
# Of it, what activations and graphs may not take: workspaces of cuBLAS, rounding, what other processes come to need.
_GPU_SPARE_BYTES: Final = 1 << 30
# Of one decode graph, with its part of the activations that all share: 128 MiB for 12 of Llama 3.1 8B on an H200.
_GRAPH_BYTES: Final = 11 << 20
# Of a CPU's memory; the rest is for weights, activations and the page cache that holds the checkpoint.
KV_SHARE_OF_CPU_MEMORY: Final = 0.25
# What Python, libraries and tokenizers of engine, front end and template renderer allocate: about 182, 77 and 11 MB
# with the demo model, the first up to 20 MB more or less from run to run, as its allocator keeps what was freed.
# Pages of library files are not counted: they count as free, see memory.usable_memory_bytes.
_CPU_PROCESSES_BYTES: Final = 270_000_000
DEGREES: Final = (1, 2, 4, 8)  # tensor-parallel ranks of the table
PLANNED_TYPES: Final = ("llama", "mistral", "qwen2", "qwen3")  # what is built of the matrices counted here

_GIB: Final = 1 << 30


@dataclass(frozen=True)
class Asked:
    """What the options say of sizes."""

    total_tokens: int  # prompt and answer of one request
    sequences: int  # computed in one step
    batch_tokens: int  # computed in one step
    cache_tokens: int = 0  # of KV cache at most; 0: what memory allows
    fp8_cache: bool = False  # on a GPU one byte a number, not two
    deterministic: bool = False  # on a GPU no quantised matrix is made dense

    @property
    def pages_per_sequence(self) -> int:
        return -(-self.total_tokens // PAGE_TOKENS)


@dataclass(frozen=True)
class MemoryPlan:
    """The parts of one device's memory, each rank's the same; `pages` is 0 if nothing is left for them."""

    ranks: int
    on_gpu: bool
    asked: Asked
    memory_bytes: int
    weights_bytes: int
    activations_bytes: int  # of the largest step, and the tables of running sequences
    graphs_bytes: int
    reserve_bytes: int  # on a CPU, what the processes take by themselves
    page_bytes: int
    pages: int

    @property
    def beside_bytes(self) -> int:
        """What neither weights nor KV cache may take."""
        return self.activations_bytes + self.graphs_bytes + self.reserve_bytes

    @property
    def kv_bytes(self) -> int:
        return self.pages * self.page_bytes

    @property
    def left_bytes(self) -> int:
        """Negative if all but the KV cache is too much already."""
        return self.memory_bytes - self.weights_bytes - self.beside_bytes - self.kv_bytes

    @property
    def tokens(self) -> int:
        return self.pages * PAGE_TOKENS

    @property
    def fits(self) -> bool:
        return self.pages >= self.asked.pages_per_sequence

    @property
    def needed_bytes(self) -> int:
        """Memory for one sequence of full length, beside weights and reserve."""
        kv_bytes = self.asked.pages_per_sequence * self.page_bytes
        needed = self.weights_bytes + self.beside_bytes + kv_bytes
        return needed if self.on_gpu else max(needed, int(kv_bytes / KV_SHARE_OF_CPU_MEMORY))

    def check(self) -> None:
        """Raises StartupError with what would fit if not even one sequence of full length does."""
        if self.left_bytes < 0:
            raise StartupError(
                f"weights take {_gib(self.weights_bytes)}, activations and reserve {_gib(self.beside_bytes)}, but "
                f"only {_gib(self.memory_bytes)} of memory are usable; free some, or choose a smaller model"
            )
        check_pages(self.pages, self.page_bytes, self.asked.pages_per_sequence, self._beside)

    @property
    def _beside(self) -> str:
        if self.on_gpu:
            return f"after the weights and a reserve of {_gib(self.beside_bytes)}"
        return f"of {_gib(self.memory_bytes)} usable memory, at {KV_SHARE_OF_CPU_MEMORY:.0%} and after the weights"


def pages_within(budget_bytes: int, page_bytes: int, pages_per_sequence: int, sequences: int) -> int:
    """Pages of KV cache in a budget, never more than all sequences could fill; 0 for a negative budget."""
    return max(0, min(budget_bytes // page_bytes, pages_per_sequence * sequences))


def check_pages(pages: int, page_bytes: int, pages_per_sequence: int, beside: str) -> None:
    """Raises StartupError if one sequence of full length does not fit; `beside` says what the room is after."""
    if pages >= pages_per_sequence:
        return
    fits = (
        f"--max-total-tokens {pages * PAGE_TOKENS} would fit" if pages else "not one page of 16 tokens fits"
    )
    raise StartupError(
        f"{pages_per_sequence * PAGE_TOKENS} tokens of KV cache take {_gib(pages_per_sequence * page_bytes)}; "
        f"{beside}, {_gib(pages * page_bytes)} are left for it: {fits}"
    )


def plan_memory(
    model: ModelConfig,
    contents: Contents,
    asked: Asked,
    memory_bytes: int,
    *,
    on_gpu: bool,
    ranks: int = 1,
) -> MemoryPlan:
    """Divide `memory_bytes`, those of one of `ranks` devices that `can_split` is true of.

    contents: of the checkpoint; without tensors, config.json's type is taken.
    """
    kv_heads = kv_heads_of(model, ranks)
    weights = weights_bytes(model, contents, ranks, on_gpu=on_gpu)
    activations = _activation_bytes(model, asked, ranks, on_gpu) + _table_bytes(model, asked)
    if on_gpu and not asked.deterministic:
        activations += widened_bytes(model, contents, ranks, asked.batch_tokens, asked.sequences)
    graphs = _graph_count(asked.sequences) * _GRAPH_BYTES if on_gpu else 0
    reserve = _CPU_PROCESSES_BYTES
    if on_gpu:
        reserve = max(GPU_RESERVE_BYTES - activations - graphs, _GPU_SPARE_BYTES)
    item_bytes = 4 if not on_gpu else 1 if asked.fp8_cache else 2
    page = model.num_layers * 2 * kv_heads * PAGE_TOKENS * model.head_dim * item_bytes
    room = memory_bytes - weights - activations - graphs - reserve
    budget = room if on_gpu else min(room, int(memory_bytes * KV_SHARE_OF_CPU_MEMORY))
    pages = pages_within(budget, page, asked.pages_per_sequence, asked.sequences)
    if asked.cache_tokens:
        pages = min(pages, asked.cache_tokens // PAGE_TOKENS)
    return MemoryPlan(ranks, on_gpu, asked, memory_bytes, weights, activations, graphs, reserve, page, pages)


def can_plan(model: ModelConfig, contents: Contents) -> bool:
    """Whether the matrices counted here are all that the model has, and how they are stored is known."""
    return model.model_type in PLANNED_TYPES and contents.are_known


def can_split(model: ModelConfig, ranks: int) -> bool:
    """Whether each rank gets as many heads; fewer KV heads than ranks are copied to several."""
    heads, kv_heads = model.num_heads, model.num_kv_heads
    return heads % ranks == 0 and (kv_heads % ranks == 0 or ranks % kv_heads == 0)


def _activation_bytes(model: ModelConfig, asked: Asked, ranks: int, on_gpu: bool) -> int:
    """Values of the largest step that are alive at once: a layer's for each token, three copies of the logits."""
    heads, kv_heads, inner = (
        model.num_heads // ranks,
        kv_heads_of(model, ranks),
        -(-model.intermediate_size // ranks),
    )
    attention = 4 * model.hidden_size + 2 * (heads + kv_heads) * model.head_dim
    mlp = 3 * model.hidden_size + 3 * inner
    values = asked.batch_tokens * max(attention, mlp) + 3 * asked.sequences * model.vocab_size
    return values * (2 if on_gpu else 4)


def _graph_count(sequences: int) -> int:
    """Sizes the engine captures: every eighth up to 64, then ever fewer, 40 at most."""
    return min(40, 4 + min(sequences, 64) // 8 + max(0, sequences - 64) // 16)


def _table_bytes(model: ModelConfig, asked: Asked) -> int:
    """The rotary table; of each running sequence its pages (twice) and, for penalties, its tokens: int32 both."""
    rotary = model.max_positions * model.head_dim * 4
    return rotary + asked.sequences * 4 * (asked.total_tokens + 2 * asked.pages_per_sequence)


def table(plans: Sequence[MemoryPlan]) -> str:
    """One column for each plan. `plans` share the device and what was asked."""
    asked = plans[0].asked
    rows: list[tuple[str, list[str]]] = [
        ("devices", [str(plan.ranks) for plan in plans]),
        ("memory of each", [_gib(plan.memory_bytes) for plan in plans]),
        ("weights", [_gib(plan.weights_bytes) for plan in plans]),
        ("activations, tables", [_gib(plan.activations_bytes) for plan in plans]),
        ("graphs", [_gib(plan.graphs_bytes) for plan in plans]),
        ("reserve", [_gib(plan.reserve_bytes) for plan in plans]),
        ("KV cache", [_gib(plan.kv_bytes) for plan in plans]),
        ("left", [_gib(plan.left_bytes) for plan in plans]),
        ("KV cache of a token", [f"{plan.page_bytes / PAGE_TOKENS / 1024:g} KiB" for plan in plans]),
        ("tokens of cache", [str(plan.tokens) for plan in plans]),
        ("pages of 16 tokens", [str(plan.pages) for plan in plans]),
        (
            f"sequences of {asked.total_tokens}",
            [str(plan.pages // asked.pages_per_sequence) for plan in plans],
        ),
        ("fits", ["yes" if plan.fits else "NO" for plan in plans]),
    ]
    return "\n".join(f"{name:<24}" + "".join(f"{cell:>14}" for cell in cells) for name, cells in rows)


def advice(plans: Sequence[MemoryPlan]) -> list[str]:
    """What to change where a plan does not fit, and what the table does not say by itself, as lines."""
    lines = []
    for plan in plans:
        if not plan.fits:
            fits = f"--max-total-tokens {plan.tokens} fits" if plan.pages else "there is no room for KV cache"
            needs = f"--max-total-tokens {plan.asked.total_tokens} needs {_gib(plan.needed_bytes)}"
            lines.append(f"{plan.ranks} of {_gib(plan.memory_bytes)}: {fits}; {needs}")
    if plans[0].on_gpu:
        degrees = [str(ranks) for ranks in DEGREES if ranks not in {plan.ranks for plan in plans}]
        if degrees:
            lines.append(f"The heads cannot be split evenly over {', '.join(degrees)} devices.")
        if len(plans) > 1:
            lines.append(
                "A server uses one device so far; the other columns are what a split would take of each."
            )
    return lines


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / _GIB:.2f} GiB"
