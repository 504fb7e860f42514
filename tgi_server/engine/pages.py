"""The pool of KV pages and the index of prefixes they hold. Plain Python: knows no tensor.

A page is in one of three states: held (references > 0), cached (no references, but its content is in the prefix
index: it can be reused by a later request or evicted, least recently used first), or free.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

PageKey = bytes


def page_key(parent: PageKey, tokens: Sequence[int]) -> PageKey:
    """The name of a full page: its own tokens and all before them, through the parent's key.

    The first page's parent is its `root_key`.
    """
    return hashlib.blake2b(parent + array("q", tokens).tobytes(), digest_size=16).digest()


def root_key(model: str, adapter: int, salt: str) -> PageKey:
    """The parent of first pages: requests that differ in model, adapter or salt share nothing."""
    # Lengths go first, so that no two triples run together to the same bytes.
    fields = (model.encode(), adapter.to_bytes(8, "little"), salt.encode())
    framed = b"".join(len(field).to_bytes(8, "little") + field for field in fields)
    return hashlib.blake2b(framed, digest_size=16).digest()


@dataclass(frozen=True)
class _Entry:
    page: int
    parent: PageKey
    tokens: tuple[int, ...]


class PagePool:
    """Reference-counted pages with a prefix index."""

    def __init__(self, num_pages: int) -> None:
        self._free = list(range(num_pages - 1, -1, -1))
        self._references = [0] * num_pages
        self._key_of: dict[int, PageKey] = {}
        self._index: dict[PageKey, _Entry] = {}
        self._cached: OrderedDict[int, None] = OrderedDict()  # unreferenced pages, oldest first

    @property
    def total(self) -> int:
        return len(self._references)

    @property
    def available(self) -> int:
        """Pages that `take` could hand out now: free ones and cached ones that would be evicted."""
        return len(self._free) + len(self._cached)

    def take(self, count: int) -> list[int] | None:
        """`count` pages with one reference each, or None (and no change) if there are not that many."""
        if count > self.available:
            return None
        return [self._take_one() for _ in range(count)]

    def release(self, pages: Iterable[int]) -> None:
        """Drop one reference of each. Give a sequence's pages last first, so that its tail is evicted first."""
        for page in pages:
            if self._references[page] <= 0:
                raise AssertionError(f"page {page} is released more often than it was taken")
            self._references[page] -= 1
            if self._references[page] == 0:
                if page in self._key_of:
                    self._cached[page] = None
                else:
                    self._free.append(page)

    def match(self, keys: Sequence[PageKey], tokens: Sequence[Sequence[int]], root: PageKey) -> list[int]:
        """Pages that hold the longest indexed prefix, each with a reference taken.

        keys[i] names tokens[i] in its context, the first of them below `root`; tokens are compared too, so a
        collision of hashes is harmless.
        """
        found: list[int] = []
        parent = root
        for key, own in zip(keys, tokens, strict=True):
            entry = self._index.get(key)
            if entry is None or entry.parent != parent or entry.tokens != tuple(own):
                break
            self._hold(entry.page)
            found.append(entry.page)
            parent = key
        return found

    def publish(self, page: int, key: PageKey, parent: PageKey, tokens: Sequence[int]) -> None:
        """Index a full, computed page that its caller holds. The first page of a key stays the indexed one."""
        if key not in self._index:
            self._index[key] = _Entry(page, parent, tuple(tokens))
            self._key_of[page] = key

    def _take_one(self) -> int:
        if self._free:
            page = self._free.pop()
        else:
            page, _ = self._cached.popitem(last=False)
            del self._index[self._key_of.pop(page)]
        self._references[page] = 1
        return page

    def _hold(self, page: int) -> None:
        if self._references[page] == 0:
            del self._cached[page]
        self._references[page] += 1
