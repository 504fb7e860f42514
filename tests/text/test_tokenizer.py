from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest

from tests.text.tiny import BOS, END, byte_level_tokenizer, write_tiny_folder
from tgi_server.errors import StartupError
from tgi_server.text.text import Text
from tgi_server.text.tokenizer import Tokenizer


def test_special_tokens_are_added_as_the_file_says_and_only_if_asked_for() -> None:
    tokenizer = Tokenizer(byte_level_tokenizer())
    assert tokenizer.encode_batch(["hello"])[0] == [BOS, 263]
    assert tokenizer.encode_batch(["hello"], add_special_tokens=False)[0] == [263]


def test_truncation_and_padding_left_in_the_file_are_switched_off() -> None:
    backend = byte_level_tokenizer()
    backend.enable_truncation(4)
    backend.enable_padding(length=100)
    assert len(Tokenizer(backend).encode_batch(["0123456789"])[0]) == 11


def test_no_text_has_fewer_tokens_than_its_characters_allow() -> None:
    tokenizer = Tokenizer(byte_level_tokenizer())
    assert tokenizer.longest_token_chars == len("<|assistant|>")


@pytest.mark.parametrize("damage", [None, "", "{}", "[1"])
def test_a_missing_or_broken_tokenizer_file_is_named(tmp_path: Path, damage: str | None) -> None:
    if damage is not None:
        (tmp_path / "tokenizer.json").write_text(damage)
    with pytest.raises(StartupError, match=r"tokenizer\.json"):
        Tokenizer.from_folder(tmp_path)


def test_a_folder_says_where_answers_end_and_how_many_ids_the_model_knows(tmp_path: Path) -> None:
    text = Text.from_folder(write_tiny_folder(tmp_path))
    assert text.eos_token_ids == (END,)
    assert text.vocab_size == 300
    assert text.tokenizer.special_ids == {256, 257, 258, 259}
    assert text.template is not None


def test_a_tokens_bytes_are_known_even_inside_a_character() -> None:
    tokenizer = Tokenizer(byte_level_tokenizer())
    (ids,) = tokenizer.encode_batch(["é"], add_special_tokens=False)
    assert [tokenizer.token_bytes(i) for i in ids] == [b"\xc3", b"\xa9"]
    assert tokenizer.token_bytes(END) == b"<|end|>"
    assert tokenizer.token_bytes(99999) == b""


def test_answers_with_every_token_of_a_large_vocabulary_take_a_bounded_memory() -> None:
    tokenizer = Tokenizer(byte_level_tokenizer())
    tracemalloc.start()
    try:
        for token_id in range(100_000):
            tokenizer.token_bytes(token_id)
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < 3 << 20
