"""Token ids to text, one at a time, without ever showing half a character."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Protocol

from tgi_server.text.tokenizer import Tokenizer

CONTEXT_TOKENS = 5  # prompt tokens a decoder looks back at: enough for one character and its leading space

# A character has at most four bytes; a run that still ends in U+FFFD after this many tokens is no character.
_LONGEST_RUN_TOKENS = 8


class IncrementalDecoder(Protocol):
    """What `push` returned so far, joined, plus `flush()`, is the text of all the tokens pushed."""

    def push(self, token_id: int) -> str:
        """The text this token completes; empty while it ends inside a character or for a special token."""

    def flush(self) -> str:
        """What was held back. Bytes that never became a character are U+FFFD, as in any decoder."""


def incremental_decoder(tokenizer: Tokenizer, context: Sequence[int] = ()) -> IncrementalDecoder:
    """A decoder for what follows `context`, the prompt's last tokens: they decide about leading spaces."""
    if tokenizer.is_byte_level:
        return ByteDecoder(tokenizer)
    return WindowDecoder(tokenizer, context[-CONTEXT_TOKENS:])


class ByteDecoder:
    """For byte-level vocabularies: a table of bytes and a UTF-8 decoder with memory."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._token_bytes = tokenizer.token_bytes
        self._special = tokenizer.special_ids
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        if token_id in self._special:
            return ""
        return self._decoder.decode(self._token_bytes(token_id))

    def flush(self) -> str:
        return self._decoder.decode(b"", True)


class WindowDecoder:
    """For every other vocabulary: decode a window of the last few tokens and show what it grew by.

    ids: | shown long ago | window: shown | pending: not shown |
    A token's text may depend on those before it (a space is dropped at the start of a text, byte tokens
    join to one character), so pending tokens are decoded together with shown ones, whose text is cut off.
    The window moves whenever something is shown: each token is decoded a bounded number of times.
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._shown = [token_id for token_id in context if token_id not in tokenizer.special_ids]
        self._shown_text = tokenizer.decode(self._shown)
        self._pending: list[int] = []

    def push(self, token_id: int) -> str:
        if token_id in self._tokenizer.special_ids:
            return ""
        self._pending.append(token_id)
        grown = self._tokenizer.decode(self._shown + self._pending)
        half = grown.endswith("\ufffd") or len(grown) <= len(self._shown_text)
        if half and len(self._pending) < _LONGEST_RUN_TOKENS:
            return ""
        return self._show(grown)

    def flush(self) -> str:
        if not self._pending:
            return ""
        return self._show(self._tokenizer.decode(self._shown + self._pending))

    def _show(self, grown: str) -> str:
        text = grown[len(self._shown_text) :]
        self._shown = self._pending
        self._shown_text = self._tokenizer.decode(self._shown)
        self._pending = []
        return text
