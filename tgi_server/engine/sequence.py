"""A request on its way through the scheduler. Plain Python."""

from __future__ import annotations

from dataclasses import dataclass, field

from tgi_server.config import PAGE_TOKENS
from tgi_server.engine.pages import PageKey, page_key
from tgi_server.engine.plan import Asked, Sampled, Work
from tgi_server.engine.request import GenerationRequest


@dataclass(eq=False, slots=True)
class Sequence:
    """Counts, in tokens:  0 ≤ computed ≤ scheduled ≤ len(tokens) + pending, and guesses beyond while they are verified.

        tokens:  | computed: KV is in the cache | scheduled: a step is under way | not planned yet |
        pages:   | shared prefix and full pages (published) | partly filled |

    `pending` tokens are being sampled by steps under way; their ids are on the device only.
    """

    request: GenerationRequest
    key: tuple[float, int]  # smaller runs first; no two are equal
    root: PageKey  # the parent of its first page
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
    prompt_logprobs: list[float] = field(default_factory=list)  # of prompt_ids[1:], as far as known
    prompt_top: list[list[tuple[int, float]]] = field(default_factory=list)
    _keys: list[PageKey] = field(default_factory=list)

    @property
    def generated(self) -> int:
        return len(self.tokens) - len(self.request.prompt_ids)

    @property
    def wanted(self) -> int:
        """How many tokens could be computed next; 0 when the last is being sampled, or guesses are being verified."""
        request, known = self.request, len(self.tokens) + self.pending
        if known - len(request.prompt_ids) >= request.max_new_tokens or known < self.scheduled:
            return 0
        return known - self.scheduled

    @property
    def scores_prompt(self) -> bool:
        """Whether the logprobs of its prompt are still to be reported."""
        return self.request.prompt_logprobs and self.generated + self.pending == 0

    def asked(self) -> Asked:
        """What its sampler must know before the next step."""
        request = self.request
        asked = Asked(
            request.sampling,
            len(request.prompt_ids),
            request.min_new_tokens,
            request.stop_token_ids if request.min_new_tokens else [],
        )
        if asked.remembers:
            asked.before = self.tokens[: self.scheduled]
        return asked

    def take_prompt_logprobs(self, start: int, result: Sampled) -> None:
        """Those of prompt_ids[start + 1:]; what an earlier epoch computed is known already."""
        known = len(self.prompt_logprobs) - start
        self.prompt_logprobs += result.prompt_logprobs[known:]
        self.prompt_top += result.prompt_top[known:]

    def take_back(self, work: Work) -> None:
        """Forget the work that was planned last: it was not computed. What it handed over is handed over again."""
        self.scheduled -= work.count
        self.pending -= work.samples
        self.fed = not work.token_ids
        self.handed_over = work.first_page

    def key_of_page(self, index: int) -> PageKey:
        """The prefix-index key of full page `index`; all its tokens must be known."""
        while len(self._keys) <= index:
            at = len(self._keys) * PAGE_TOKENS
            self._keys.append(
                page_key(self.parent_of_page(len(self._keys)), self.tokens[at : at + PAGE_TOKENS])
            )
        return self._keys[index]

    def will_publish(self, index: int, key: PageKey) -> bool:
        """Whether its page `index` is the one named `key`, all of it known, and not in the prefix index yet."""
        return self.published <= index < len(self.tokens) // PAGE_TOKENS and self.key_of_page(index) == key

    def parent_of_page(self, index: int) -> PageKey:
        return self._keys[index - 1] if index else self.root

    def page_tokens(self, index: int) -> list[int]:
        return self.tokens[index * PAGE_TOKENS : (index + 1) * PAGE_TOKENS]


def pages_for(tokens: int) -> int:
    return -(-tokens // PAGE_TOKENS)
