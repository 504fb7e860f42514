"""The page pool and its prefix index against a model that only counts, over long random histories."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tgi_server.config import PAGE_TOKENS
from tgi_server.engine.pages import PageKey, PagePool, page_key, root_key

SALTS = (root_key("model", 0, ""), root_key("model", 0, "another tenant"), root_key("model", 1, ""))


def keys_of(tokens: list[int], salt: PageKey) -> tuple[list[PageKey], list[list[int]]]:
    """The keys and the tokens of all full pages."""
    pages = [tokens[at : at + PAGE_TOKENS] for at in range(0, len(tokens) - PAGE_TOKENS + 1, PAGE_TOKENS)]
    keys: list[PageKey] = []
    for page in pages:
        keys.append(page_key(keys[-1] if keys else salt, page))
    return keys, pages


@dataclass
class Holder:
    """A sequence as the pool sees it: its tokens and the pages it holds for them."""

    tokens: list[int]
    salt: PageKey
    pages: list[int] = field(default_factory=list)


class Model:
    """Every operation of the pool, beside the truth: who holds what, and what was written where."""

    def __init__(self, total: int) -> None:
        self.pool = PagePool(total)
        self.holders: list[Holder] = []
        self.content: dict[
            int, tuple[PageKey, tuple[int, ...]]
        ] = {}  # of published pages: salt, tokens so far

    def start(self, tokens: list[int], salt: PageKey) -> bool:
        """Match a prefix, take the other pages; gives the prefix back if there are too few."""
        holder = Holder(tokens, salt)
        keys, own = keys_of(tokens, salt)
        holder.pages = self.pool.match(keys, own, salt)
        for i, page in enumerate(holder.pages):
            assert self.content[page] == (salt, tuple(tokens[: (i + 1) * PAGE_TOKENS])), (
                "a wrong page matched"
            )
        before = self.pool.available
        taken = self.pool.take(-(-len(tokens) // PAGE_TOKENS) - len(holder.pages))
        if taken is None:
            assert self.pool.available == before, "what cannot be taken whole is not taken at all"
            self.pool.release(reversed(holder.pages))
            return False
        held = {page for other in self.holders for page in other.pages}
        assert not held & set(taken), "a page that is held was handed out"
        assert not set(holder.pages) & set(taken), "a page was handed out twice"
        assert len(set(taken)) == len(taken)
        for page in taken:
            self.content.pop(page, None)
        holder.pages += taken
        self.holders.append(holder)
        return True

    def publish(self, index: int) -> None:
        holder = self.holders[index]
        keys, own = keys_of(holder.tokens, holder.salt)
        for i, (key, tokens) in enumerate(zip(keys, own, strict=True)):
            parent = keys[i - 1] if i else holder.salt
            self.pool.publish(holder.pages[i], key, parent, tokens)
            self.content[holder.pages[i]] = (holder.salt, tuple(holder.tokens[: (i + 1) * PAGE_TOKENS]))

    def finish(self, index: int) -> None:
        self.pool.release(reversed(self.holders.pop(index).pages))

    def check(self) -> None:
        references = Counter(page for holder in self.holders for page in holder.pages)
        assert self.pool.available == self.pool.total - len(references)
        shared = [page for page, count in references.items() if count > 1]
        assert all(page in self.content for page in shared), "a page that is still written to is shared"

    def check_nothing_is_lost(self) -> None:
        while self.holders:
            self.finish(0)
        assert sorted(self.pool.take(self.pool.total) or []) == list(range(self.pool.total))


def test_no_page_is_lost_shared_or_freed_twice_in_a_hundred_thousand_operations() -> None:
    chance = random.Random(0)
    model = Model(total=40)
    started = refused = 0
    for _ in range(100_000):
        kind = chance.random()
        if kind < 0.4 or not model.holders:
            # Few families, so that prefixes are often shared, and of all lengths around page borders.
            tokens = [chance.randrange(3)] * chance.randrange(1, 100)
            fits = model.start(tokens, chance.choice(SALTS))
            started, refused = started + fits, refused + (not fits)
        elif kind < 0.6:
            model.publish(chance.randrange(len(model.holders)))
        else:
            model.finish(chance.randrange(len(model.holders)))
        model.check()
    assert started > 10_000 and refused > 1_000, "the history must exercise both"
    model.check_nothing_is_lost()


class PoolMachine(RuleBasedStateMachine):
    """The same in hypothesis's hands, which finds the shortest history that breaks it."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Model(total=6)

    @rule(family=st.integers(0, 1), length=st.integers(1, 5 * PAGE_TOKENS), salt=st.sampled_from(SALTS))
    def start(self, family: int, length: int, salt: PageKey) -> None:
        self.model.start([family] * length, salt)

    @precondition(lambda self: self.model.holders)
    @rule(data=st.data())
    def publish(self, data: st.DataObject) -> None:
        self.model.publish(data.draw(st.integers(0, len(self.model.holders) - 1)))

    @precondition(lambda self: self.model.holders)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        self.model.finish(data.draw(st.integers(0, len(self.model.holders) - 1)))

    @invariant()
    def counts_agree(self) -> None:
        self.model.check()

    def teardown(self) -> None:
        self.model.check_nothing_is_lost()


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


def test_releasing_more_often_than_taking_is_an_error_not_a_corruption() -> None:
    pool = PagePool(2)
    pages = pool.take(1)
    assert pages is not None
    pool.release(pages)
    with pytest.raises(AssertionError, match="released more often"):
        pool.release(pages)


def test_keys_that_collide_do_not_share_pages() -> None:
    pool = PagePool(4)
    page = (pool.take(1) or [])[0]
    pool.publish(page, b"same", b"", [1] * PAGE_TOKENS)
    assert pool.match([b"same"], [[2] * PAGE_TOKENS], b"") == []
    assert pool.match([b"same"], [[1] * PAGE_TOKENS], b"other salt") == []
    assert pool.match([b"same"], [[1] * PAGE_TOKENS], b"") == [page]


def test_the_least_recently_used_tail_is_evicted_first() -> None:
    model = Model(total=4)
    for family in (1, 2):
        model.start([family] * 2 * PAGE_TOKENS, b"")
        model.publish(0)
        model.finish(0)
    assert model.start([3], b""), "one page must go"
    for family, pages in ((1, 1), (2, 2)):
        keys, own = keys_of([family] * 2 * PAGE_TOKENS, b"")
        assert len(model.pool.match(keys, own, b"")) == pages
