"""Who computes what, step by step: plan() and commit(). Plain Python: knows no tensor.

Prefill, decode, chunked prefill and recompute after preemption are one mechanism: a sequence has tokens that
are not computed yet, and each step computes some of them. plan() may be called again before the step it planned
last is committed (scheduling depth 1): the ids being sampled are then fed from device to device.

Pages are released at once, even if a step that is under way still writes to them: steps run in order, so whoever
gets the page next writes after.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter

from tgi_server.config import PAGE_TOKENS
from tgi_server.engine.budget import Budget, TokenBudget
from tgi_server.engine.limits import Limits
from tgi_server.engine.pages import PagePool, root_key
from tgi_server.engine.plan import Plan, Sampled, Work
from tgi_server.engine.request import FinishReason, GenerationRequest, TokenEvent
from tgi_server.engine.sequence import Sequence, pages_for
from tgi_server.engine.verify import Guess

_key = attrgetter("key")

# A request of priority p is served as if it had arrived p × this many seconds later (earlier when p < 0): it is
# overtaken by more urgent ones for that long, and by nobody after.
SECONDS_PER_PRIORITY = 10.0


@dataclass
class Counts:
    """Since the start."""

    prompt_tokens: int = 0  # of prompts begun
    prefix_hit_tokens: int = 0  # of those, found in the cache
    preemptions: int = 0


class Scheduler:
    """Continuous batching over a paged cache, oldest first."""

    def __init__(
        self,
        pool: PagePool,
        limits: Limits,
        clock: Callable[[], float],
        guess: Guess | None = None,
        *,
        model: str = "",
        budget: Budget | None = None,
    ) -> None:
        """clock: seconds, monotonic. guess: by default one token a step. model: whose keys and values the pool holds.
        budget: by default one that learns from the steps what `limits.target_s` has room for.
        """
        self._model = model
        self._pool = pool
        self._guess = guess
        self._limits = limits
        self._clock = clock
        self._budget: Budget = budget or TokenBudget(limits.target_s, limits.max_batch_tokens)
        self._sequences: dict[str, Sequence] = {}
        self._waiting: list[Sequence] = []  # by key
        self._unbegun: deque[str] = deque()  # ids by arrival; those begun or gone are dropped when met
        self._running: list[Sequence] = []  # by key
        self._rows = list(range(limits.max_sequences - 1, -1, -1))
        self.counts = Counts()
        self._added = 0  # requests so far: an order among those that arrive at one instant

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        return len(self._running)

    def add(self, request: GenerationRequest) -> TokenEvent | None:
        """Queue a request; the event that refuses it if it cannot be taken."""
        objection = self._objection(request)
        if objection:
            return _end(request, FinishReason.REJECTED, objection)
        now = self._clock()
        self._added += 1
        key = (now + request.priority * SECONDS_PER_PRIORITY, self._added)
        root = root_key(self._model, request.adapter, request.salt)
        sequence = Sequence(request, key, root, arrived_s=now, tokens=list(request.prompt_ids))
        self._sequences[request.id] = sequence
        insort(self._waiting, sequence, key=_key)
        if self._limits.queue_timeout_s:
            self._unbegun.append(request.id)
        return None

    def _objection(self, request: GenerationRequest) -> str:
        """Why a request cannot be taken; empty if it can."""
        if len(self._sequences) >= self._limits.max_queue:
            return f"{len(self._sequences)} requests are queued or running, the limit; try again later"
        if request.id in self._sequences:
            return f"request id {request.id!r} is already in use"
        longest = len(request.prompt_ids) + request.max_new_tokens - 1  # the last token is never computed
        pages, total = pages_for(longest), self._pool.total
        if pages > total:
            return (
                f"{longest} tokens need {pages} pages of the cache, which has {total}; ask for fewer tokens"
            )
        return ""

    def cancel(self, request_id: str) -> None:
        """Forget a request; unknown ids (already finished) are no error."""
        sequence = self._sequences.get(request_id)
        if sequence is not None:
            self._drop(sequence)

    def expire(self) -> list[TokenEvent]:
        """End the requests that have waited longer than they may for their first step; they hold no page yet."""
        limit_s = self._limits.queue_timeout_s
        events = []
        while self._unbegun:
            oldest = self._sequences.get(self._unbegun[0])
            if oldest is not None and oldest.queued_s is None:
                waited_s = self._clock() - oldest.arrived_s
                if waited_s <= limit_s:
                    break
                self._drop(oldest)
                message = (
                    f"not begun within {waited_s:.1f} s, and {limit_s:g} s are the most; try again later"
                )
                events.append(_end(oldest.request, FinishReason.WAITED, message))
            self._unbegun.popleft()
        return events

    def plan(self) -> Plan:
        """Choose the next step. Oldest first; sequences that decode come before any prefill chunk."""
        self._make_room()
        decodes: list[Work] = []
        chunks: list[Work] = []
        wants = [sequence.wanted for sequence in self._running]
        chunk_budget = self._budget.prompt_tokens(wants.count(1))
        for sequence, wanted in zip(tuple(self._running), wants, strict=True):
            guesses = self._guesses(sequence, chunk_budget) if wanted == 1 and self._guess else []
            count = 1 + len(guesses) if wanted == 1 else min(wanted, chunk_budget)
            if count == 0 or sequence.row < 0 or not self._grow(sequence, sequence.scheduled + count):
                continue
            if wanted == 1 and not guesses:
                decodes.append(self._decode(sequence) if sequence.fed else self._work(sequence, 1))
            else:
                chunk_budget -= count if wanted > 1 else len(guesses)
                chunks.append(self._work(sequence, count - len(guesses), guesses))
        while chunk_budget > 0 and (admitted := self._admit()) is not None:
            count = min(admitted.wanted, chunk_budget)
            if not self._grow(admitted, admitted.scheduled + count):
                raise AssertionError("pages were counted before admission")
            chunk_budget -= count
            chunks.append(self._work(admitted, count))
        return Plan(decodes + chunks)

    def commit(self, plan: Plan, sampled: list[Sampled], seconds: float = 0.0) -> list[TokenEvent]:
        """Take a step's results, one entry of `sampled` for each work item that samples or is scored, in order.

        `seconds`: how long the step took, from which later steps' sizes are derived.
        """
        if seconds > 0.0:
            self._budget.observe(plan.tokens, seconds)
        events: list[TokenEvent] = []
        results = iter(sampled)
        for work in plan.work:
            result = next(results) if work.samples or work.scored else None
            sequence = self._sequences.get(work.id)
            if sequence is None:
                continue  # cancelled or finished since
            if result is not None and not result.is_number:
                self._drop(sequence)
                events.append(_end(sequence.request, FinishReason.FAILED, _NOT_A_NUMBER))
                continue
            if sequence.epoch == work.epoch:
                sequence.computed = work.start + work.count
                if work.guessed and result is not None:
                    # Each token but the last confirms a guess; what was computed for the others is overwritten.
                    sequence.computed -= work.guessed - (len(result.token_ids) - 1)
                    sequence.scheduled = sequence.computed
            if result is not None and work.scored:
                sequence.take_prompt_logprobs(work.start, result)
            finish = None
            if result is not None and work.samples:
                sequence.pending -= 1
                events.append(event := self._extend(sequence, result))
                finish = event.finish
            if sequence.computed >= (sequence.published + 1) * PAGE_TOKENS:
                self._publish(sequence)
            if finish is not None:
                self._drop(sequence)
        return events

    def fail(self, plan: Plan, message: str) -> list[TokenEvent]:
        """End every request of a step that could not be computed."""
        return self._end_all(plan.work, FinishReason.FAILED, message)

    def retreat(self, plan: Plan, message: str) -> list[TokenEvent]:
        """Take back the step that was planned last and not computed: it was too large for the device's memory.

        Steps with fewer prompt tokens will compute its work. If it had as few as a step can have, the requests behind
        these end with `message`; if it had none, all of its requests do.
        """
        for work in plan.work:
            if (sequence := self._sequences.get(work.id)) is not None:
                sequence.take_back(work)
        chunks = [work for work in plan.work if work.token_ids]
        if self._budget.shrink(sum(work.count for work in chunks)):
            return []
        return self._end_all(chunks or plan.work, FinishReason.EXHAUSTED, message)

    def _end_all(self, works: list[Work], reason: FinishReason, message: str) -> list[TokenEvent]:
        ending = [sequence for work in works if (sequence := self._sequences.get(work.id)) is not None]
        for sequence in ending:
            self._drop(sequence)
        return [_end(sequence.request, reason, message) for sequence in ending]

    def _guesses(self, sequence: Sequence, most: int) -> list[int]:
        """Guesses to verify with a sequence's next token, whose own value must be known."""
        if self._guess is None or sequence.pending or not sequence.fed:
            return []
        left = sequence.request.max_new_tokens - sequence.generated - 1
        return self._guess(sequence.tokens)[: min(left, most)]

    @staticmethod
    def _decode(sequence: Sequence) -> Work:
        """The next step's share of a sequence whose last token is on the device: that token. As `_work`, but quick."""
        request, start, first_page = sequence.request, sequence.scheduled, sequence.handed_over
        pages = sequence.pages
        sequence.handed_over = len(pages)
        sequence.scheduled = start + 1
        sequence.pending += 1
        return Work(
            request.id, sequence.epoch, sequence.row, start, 1, [], first_page, pages[first_page:], True,
            request.adapter, None, request.top_logprobs,
        )  # fmt: skip

    def _work(self, sequence: Sequence, known: int, guesses: list[int] | None = None) -> Work:
        """The next step's share of a sequence: `known` of its tokens, and guesses of what follows them."""
        request, start, fed = sequence.request, sequence.scheduled, sequence.fed
        guesses = guesses or []
        count = known + len(guesses)
        asked = sequence.asked() if sequence.handed_over == 0 else None
        scored = request.prompt_ids[start + 1 : start + count + 1] if sequence.scores_prompt else []
        first_page, sequence.handed_over = sequence.handed_over, len(sequence.pages)
        sequence.scheduled = start + count
        sequence.fed = samples = start + count >= len(sequence.tokens) + sequence.pending
        sequence.pending += samples
        return Work(
            id=request.id,
            epoch=sequence.epoch,
            row=sequence.row,
            start=start,
            count=count,
            token_ids=[] if fed and not guesses else [*sequence.tokens[start : start + known], *guesses],
            first_page=first_page,
            new_pages=sequence.pages[first_page:],
            samples=samples,
            adapter=request.adapter,
            asked=asked,
            top_logprobs=request.top_logprobs,
            guessed=len(guesses),
            scored=scored,
        )

    def _grow(self, sequence: Sequence, tokens: int) -> bool:
        """Give a running sequence pages for `tokens`; preempts younger ones, or the sequence itself, if short."""
        missing = pages_for(tokens) - len(sequence.pages)
        if missing <= 0:
            return True
        while (pages := self._pool.take(missing)) is None:
            youngest = self._running[-1]
            self._preempt(youngest)
            if youngest is sequence:
                return False
        sequence.pages += pages
        return True

    def _make_room(self) -> None:
        """Preempt running sequences, the least urgent first, for a waiting one that is more urgent than they are.

        Before any work is planned: pages change hands between steps, never within one.
        """
        while self._waiting and self._running and self._waiting[0].key < self._running[-1].key:
            urgent = self._waiting[0]
            found = self._cached_prefix(urgent)
            missing = pages_for(len(urgent.tokens)) - len(found)
            fits = bool(self._rows) and missing <= self._pool.available
            self._pool.release(reversed(found))
            if fits:
                return
            self._preempt(self._running[-1])

    def _admit(self) -> Sequence | None:
        """Move the first waiting sequence to the running ones if its known tokens fit."""
        if not self._waiting or not self._rows or self._waiting[0].pending:
            return None  # a preempted sequence first gets the tokens that are still being sampled for it
        sequence = self._waiting[0]
        found = self._cached_prefix(sequence)
        missing = pages_for(len(sequence.tokens)) - len(found)
        if missing > self._pool.available or self._is_coming(sequence, len(found)):
            self._pool.release(reversed(found))
            return None
        sequence.pages = found
        self._waiting.pop(0)
        sequence.row = self._rows.pop()
        sequence.published = len(sequence.pages)
        sequence.computed = sequence.scheduled = sequence.published * PAGE_TOKENS
        sequence.handed_over = 0
        sequence.fed = False
        if sequence.queued_s is None:
            sequence.queued_s = self._clock() - sequence.arrived_s
            self.counts.prompt_tokens += len(sequence.tokens)
            self.counts.prefix_hit_tokens += sequence.computed
        insort(self._running, sequence, key=_key)
        return sequence

    def _cached_prefix(self, sequence: Sequence) -> list[int]:
        """Full pages found in the prefix index; at least one token is left to compute."""
        if sequence.scores_prompt:
            return []  # the logprobs of a prompt need all of it computed
        full = (len(sequence.tokens) - 1) // PAGE_TOKENS
        keys = [sequence.key_of_page(i) for i in range(full)]
        return self._pool.match(keys, [sequence.page_tokens(i) for i in range(full)], sequence.root)

    def _is_coming(self, sequence: Sequence, index: int) -> bool:
        """Whether an older sequence that runs will publish page `index`: then a herd's prompt is computed once."""
        if sequence.scores_prompt or (index + 1) * PAGE_TOKENS >= len(sequence.tokens):
            return False
        key = sequence.key_of_page(index)
        return any(other.key < sequence.key and other.will_publish(index, key) for other in self._running)

    def _preempt(self, sequence: Sequence) -> None:
        """Take a sequence's pages and row; it waits, with its age, to be recomputed."""
        self.counts.preemptions += 1
        self._stop_running(sequence)
        sequence.epoch += 1
        sequence.computed = sequence.scheduled = 0
        insort(self._waiting, sequence, key=_key)

    def _drop(self, sequence: Sequence) -> None:
        del self._sequences[sequence.request.id]
        if sequence.row >= 0:
            self._stop_running(sequence)
        else:
            self._waiting.remove(sequence)

    def _stop_running(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        self._rows.append(sequence.row)
        sequence.row = -1
        self._pool.release(reversed(sequence.pages))
        sequence.pages = []
        sequence.published = 0

    def _extend(self, sequence: Sequence, result: Sampled) -> TokenEvent:
        request, tokens = sequence.request, sequence.tokens
        before = len(tokens)
        first, limit = len(request.prompt_ids), len(request.prompt_ids) + request.max_new_tokens
        finish = None
        for token in result.token_ids:
            tokens.append(token)
            if token in request.stop_token_ids:
                finish = FinishReason.EOS
                break
            if len(tokens) >= limit:
                finish = FinishReason.LENGTH
                break
        ids, logprobs, top = result.token_ids, result.logprobs, result.top
        if (taken := len(tokens) - before) < len(ids):
            ids, logprobs, top = ids[:taken], logprobs[:taken], top[:taken]
        if before > first:
            return TokenEvent(request.id, ids, logprobs, finish, "", top)
        prompt = sequence.prompt_logprobs, sequence.prompt_top
        return TokenEvent(request.id, ids, logprobs, finish, "", top, *prompt, sequence.queued_s)

    def _publish(self, sequence: Sequence) -> None:
        """Put pages that are full and computed into the prefix index."""
        while sequence.row >= 0 and (sequence.published + 1) * PAGE_TOKENS <= sequence.computed:
            index = sequence.published
            key = sequence.key_of_page(index)
            self._pool.publish(
                sequence.pages[index], key, sequence.parent_of_page(index), sequence.page_tokens(index)
            )
            sequence.published = index + 1


_NOT_A_NUMBER = (
    "the model computed values that are no numbers (NaN or infinite) for this request; its weights may be damaged, "
    "or its values too large for the type they are computed in"
)


def _end(request: GenerationRequest, reason: FinishReason, message: str) -> TokenEvent:
    return TokenEvent(request.id, finish=reason, error=message)
