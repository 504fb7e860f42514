from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.text.tiny import byte_level_tokenizer, sentencepiece_tokenizer
from tgi_server.text.incremental import incremental_decoder
from tgi_server.text.tokenizer import Tokenizer

BYTE_LEVEL = Tokenizer(byte_level_tokenizer())
SENTENCEPIECE = Tokenizer(sentencepiece_tokenizer())
FAMILIES = pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, SENTENCEPIECE], ids=["bytes", "sentencepiece"])
EMOJI = "né 👩‍👩‍👧‍👦 e\u0301 语言 🇩🇪 ok"


def pieces_of(tokenizer: Tokenizer, token_ids: list[int], context: tuple[int, ...] = ()) -> list[str]:
    decoder = incremental_decoder(tokenizer, context)
    return [*(decoder.push(token_id) for token_id in token_ids), decoder.flush()]


@FAMILIES
def test_the_pieces_of_a_text_with_emoji_join_to_the_text(tokenizer: Tokenizer) -> None:
    (ids,) = tokenizer.encode_batch([EMOJI], add_special_tokens=False)
    pieces = pieces_of(tokenizer, ids)
    assert "".join(pieces) == EMOJI
    assert not any("\ufffd" in piece for piece in pieces)


@FAMILIES
def test_a_piece_is_shown_with_the_token_that_completes_it(tokenizer: Tokenizer) -> None:
    (ids,) = tokenizer.encode_batch([EMOJI], add_special_tokens=False)
    decoder = incremental_decoder(tokenizer)
    text = ""
    for i, token_id in enumerate(ids):
        text += decoder.push(token_id)
        whole = tokenizer.decode(ids[: i + 1])
        assert EMOJI.startswith(text)
        if "\ufffd" not in whole:
            assert text == whole


@FAMILIES
def test_a_text_cut_inside_a_character_says_so_at_its_end_only(tokenizer: Tokenizer) -> None:
    (ids,) = tokenizer.encode_batch([EMOJI], add_special_tokens=False)
    for end in range(len(ids)):
        *pieces, rest = pieces_of(tokenizer, ids[:end])
        assert EMOJI.startswith("".join(pieces))
        assert set(rest) <= {"\ufffd"}


@given(st.lists(st.integers(0, 320)))
def test_any_byte_level_tokens_join_to_what_the_library_decodes(token_ids: list[int]) -> None:
    assert "".join(pieces_of(BYTE_LEVEL, token_ids)) == BYTE_LEVEL.decode(token_ids)


@FAMILIES
def test_special_tokens_have_no_text(tokenizer: Tokenizer) -> None:
    special = min(tokenizer.special_ids)
    (ids,) = tokenizer.encode_batch(["hello"], add_special_tokens=False)
    assert "".join(pieces_of(tokenizer, [special, *ids, special])) == "hello"


def test_an_answer_keeps_the_space_between_it_and_its_prompt() -> None:
    (prompt,) = SENTENCEPIECE.encode_batch(["hello"], add_special_tokens=False)
    (answer,) = SENTENCEPIECE.encode_batch(["wo"], add_special_tokens=False)
    assert "".join(pieces_of(SENTENCEPIECE, answer)) == "wo"
    assert "".join(pieces_of(SENTENCEPIECE, answer, tuple(prompt))) == " wo"


def test_bytes_that_never_become_a_character_do_not_pile_up() -> None:
    byte = SENTENCEPIECE.encode_batch(["é"], add_special_tokens=False)[0][-2]
    decoder = incremental_decoder(SENTENCEPIECE)
    shown_at = [i for i in range(100) if decoder.push(byte)]
    assert all(later - earlier <= 8 for earlier, later in pairwise(shown_at))
    assert len(shown_at) > 10
