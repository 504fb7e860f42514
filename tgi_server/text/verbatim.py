"""Special-token text inside what a user wrote stays text: `<|im_end|>` in a message ends nothing."""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable, Mapping
from itertools import groupby
from typing import TypeVar

from tgi_server.text.tokenizer import Tokenizer

T = TypeVar("T")


class Verbatim:
    """Marks special-token text in messages before the template sees it, and encodes the marked prompt.

    After rendering, whatever spells a special token without a mark was written by the template and is one;
    what is marked is not. Marks hold a random number, so that no client can write them, and only letters
    and digits, so that no template's escaping changes them.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        nonce = secrets.token_hex(8)
        self._tokenizer = tokenizer
        special = list(enumerate(tokenizer.special_tokens))
        self._mark_of = {token: f"mark{nonce}x{i}x" for i, token in special}
        self._token_of = {mark: token for token, mark in self._mark_of.items()}
        self._stand_in_of = {token: f"token{nonce}x{i}x" for i, token in special}
        self._special = _any_of(self._mark_of)
        self._special_or_mark = _any_of([*self._mark_of, *self._token_of])
        self._blind: tuple[Tokenizer, dict[int, int]] | None = None

    def mark(self, value: T) -> T:
        """`value`, JSON of any depth, with its strings marked; the same object if there is nothing to mark."""
        marked = self._mark(value)
        return value if marked == value else marked

    def reveal(self, prompt: str) -> str:
        """A marked prompt as the template wrote it."""
        return self._special_or_mark.sub(lambda found: self._token_of.get(found[0], found[0]), prompt)

    def encode(self, prompt: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of a marked prompt, and for each the range of characters of the revealed one it came from.

        The first call copies the tokenizer, which takes a moment.
        """
        if self._blind is None:
            self._blind = self._tokenizer.blind_to_special(self._stand_in_of)
        blind, back = self._blind
        text, origin = self._stand_in(prompt)
        ids, offsets = blind.encode_with_offsets(text, add_special_tokens=False)
        return [back.get(token_id, token_id) for token_id in ids], [
            (origin[a], origin[b]) for a, b in offsets
        ]

    def _stand_in(self, prompt: str) -> tuple[str, list[int]]:
        """The prompt with stand-ins for its special tokens, and where each character of it is when revealed."""
        parts: list[str] = []
        origin: list[int] = []
        at = 0
        for part in self._special_or_mark.split(prompt):
            shown = self._token_of.get(part, part)
            sent = self._stand_in_of.get(part, shown)
            parts.append(sent)
            origin.extend(range(at, at + len(shown)) if sent is shown else [at] * len(sent))
            at += len(shown)
        return "".join(parts), [*origin, at]

    def _mark(self, value: T) -> T:
        marked: object = value
        if isinstance(value, str):
            marked = self._special.sub(lambda found: self._mark_of[found[0]], value)
        elif isinstance(value, list):
            marked = [self._mark(entry) for entry in value]
        elif isinstance(value, Mapping):
            marked = {self._mark(key): self._mark(entry) for key, entry in value.items()}
        return marked  # type: ignore[return-value]  # every branch returns the kind it was given


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """Finds any of the texts, the longest where several begin; never matches if there are none.

    Written as a tree, not as a list: hundreds of reserved tokens that begin alike would each be tried at every
    `<` of a text.
    """
    return re.compile(f"({_tree(sorted(texts))})")


def _tree(texts: list[str]) -> str:
    """A pattern for sorted texts that branches on one character at a time."""
    branches = [
        re.escape(first) + _tree([text[1:] for text in group])
        for first, group in groupby((text for text in texts if text), key=lambda text: text[0])
    ]
    if not texts:
        return "(?!)"
    if not branches:
        return ""
    return f"(?:{'|'.join(branches)})" + ("?" if "" in texts else "")
