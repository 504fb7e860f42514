"""Text to token ids and back, over the `tokenizers` library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path

import tokenizers
from tokenizers import decoders

from tgi_server.errors import StartupError

# Finding a token's bytes takes 1 µs, remembering them 0.1 µs and, of a vocabulary of 128 000, 14 MB: as answers come
# to use rarer tokens, that memory would grow for hours. The commonest are nearly all of a text.
_REMEMBERED_TOKENS = 8192


class Tokenizer:
    """A checkpoint's `tokenizer.json`.

    Only batch calls of the library are used to encode: its plain `encode` holds the interpreter lock, and
    a long prompt would stop every stream of the process.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        # Files come with truncation and padding left on from training; both change prompts silently.
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._remembered_bytes = lru_cache(_REMEMBERED_TOKENS)(self._find_bytes)
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        self._special = {i: token for i, token in backend.get_added_tokens_decoder().items() if token.special}
        self.special_ids: frozenset[int] = frozenset(self._special)
        self.special_tokens: tuple[str, ...] = tuple(token.content for token in self._special.values())

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer:
        """Read `folder/tokenizer.json`; raises StartupError naming the file and what is wrong with it."""
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise StartupError(
                f"{file} does not exist; convert the checkpoint's tokenizer to a tokenizer.json "
                "(transformers writes one with save_pretrained)"
            )
        try:
            return cls(tokenizers.Tokenizer.from_file(str(file)))
        except Exception as error:  # the library raises bare Exception for a malformed file
            raise StartupError(f"{file} cannot be read: {error}") from None

    @cached_property
    def longest_token_chars(self) -> int:
        """Characters of the longest token: a text of n characters has at least n / this many tokens."""
        return max(map(len, self._backend.get_vocab(with_added_tokens=True)), default=1)

    @cached_property
    def is_byte_level(self) -> bool:
        """Whether a token stands for the same bytes wherever it appears."""
        return isinstance(self._backend.decoder, decoders.ByteLevel)

    def encode_batch(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        """Ids of each text; `add_special_tokens`: the file's post-processor adds its own, such as BOS."""
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        return [encoding.ids for encoding in encodings]

    def encode_with_offsets(
        self, text: str, *, add_special_tokens: bool = True
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of a text, and for each the range of characters it came from."""
        (encoding,) = self._backend.encode_batch([text], add_special_tokens=add_special_tokens)
        return encoding.ids, encoding.offsets

    def blind_to_special(self, stand_ins: Mapping[str, str]) -> tuple[Tokenizer, dict[int, int]]:
        """A copy to which special tokens are text like any other, and their `stand_ins` are the tokens.

        stand_ins: special token to the text that stands for it. Returned with it: which id of the copy stands
        for which of this tokenizer's.
        """
        copy = tokenizers.Tokenizer.from_str(self._backend.to_str())
        copy.encode_special_tokens = True
        copy.add_tokens(
            [
                tokenizers.AddedToken(
                    stand_ins[token.content], normalized=False, lstrip=token.lstrip, rstrip=token.rstrip
                )
                for token in self._special.values()
            ]
        )
        back = {
            copied: token_id
            for token_id, token in self._special.items()
            if (copied := copy.token_to_id(stand_ins[token.content])) is not None
        }
        return Tokenizer(copy), back

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of `token_ids`; bytes that are no UTF-8 become U+FFFD, ids without a token nothing."""
        text: str = self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        return text

    def token(self, token_id: int) -> str | None:
        """The token as the vocabulary spells it; None for an id it does not have."""
        token: str | None = self._backend.id_to_token(token_id)
        return token

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token stands for. Exact for byte-level vocabularies, else those of its text alone."""
        return self._remembered_bytes(token_id)

    def _find_bytes(self, token_id: int) -> bytes:
        token = self.token(token_id)
        if token is None:
            return b""
        if not self.is_byte_level:
            return self.decode([token_id], skip_special_tokens=False).encode()
        try:
            return bytes(_BYTE_OF[char] for char in token)
        except KeyError:  # an added token outside the byte alphabet stands for its own characters
            return token.encode()


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for bytes: visible Latin-1 is itself, the rest counts from U+0100."""
    visible = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


_BYTE_OF = _byte_alphabet()
