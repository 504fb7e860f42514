"""A request on its way through the scheduler. Plain Python."""

from __future__ import annotations

from dataclasses import dataclass, field

from tgi_server.config import PAGE_TOKENS
from tgi_server.engine.pages import PageKey, page_key
from tgi_server.engine.request import GenerationRequest


@dataclass(eq=False, slots=True)
class Sequence:
    """Counts, in tokens:  0 ≤ computed ≤ scheduled ≤ len(tokens) + pending.

        tokens:  | computed: KV is in the cache | scheduled: a step is under way | not planned yet |
        pages:   | shared prefix and full pages (published) | partly filled |

    `pending` tokens are being sampled by steps under way; their ids are on the device only.
    """

    request: GenerationRequest
    key: float  # smaller runs first
    arrived_s: float
    tokens: list[int]
    computed: int = 0
    scheduled: int = 0
    pending: int = 0
    epoch: int = 0
    queued_s: float | None = None  # how long it waited for its first step
    row: int = -1  # -1: not running
    pages: list[int] = field(default_factory=list)
    fed: bool = False  # its next input is the id its row sampled last, on the device
    handed_over: int = 0  # leading pages that plans have told the runner of
    published: int = 0  # leading pages that are in the prefix index
    _keys: list[PageKey] = field(default_factory=list)

    @property
    def generated(self) -> int:
        return len(self.tokens) - len(self.request.prompt_ids)

    @property
    def wanted(self) -> int:
        """How many tokens could be computed next; 0 when the last token is already being sampled."""
        if self.generated + self.pending >= self.request.max_new_tokens:
            return 0
        return len(self.tokens) + self.pending - self.scheduled

    @property
    def salt(self) -> PageKey:
        return b""

    def key_of_page(self, index: int) -> PageKey:
        """The prefix-index key of full page `index`; all its tokens must be known."""
        while len(self._keys) <= index:
            at = len(self._keys) * PAGE_TOKENS
            self._keys.append(
                page_key(self.parent_of_page(len(self._keys)), self.tokens[at : at + PAGE_TOKENS])
            )
        return self._keys[index]

    def parent_of_page(self, index: int) -> PageKey:
        return self._keys[index - 1] if index else self.salt

    def page_tokens(self, index: int) -> list[int]:
        return self.tokens[index * PAGE_TOKENS : (index + 1) * PAGE_TOKENS]


def pages_for(tokens: int) -> int:
    return -(-tokens // PAGE_TOKENS)
