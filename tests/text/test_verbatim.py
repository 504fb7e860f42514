from __future__ import annotations

import time

from hypothesis import given
from hypothesis import strategies as st

from tests.text.tiny import SPECIAL, byte_level_tokenizer, sentencepiece_tokenizer
from tgi_server.text.tokenizer import Tokenizer
from tgi_server.text.verbatim import Verbatim

TOKENIZER = Tokenizer(byte_level_tokenizer())
VERBATIM = Verbatim(TOKENIZER)
SPELLED = st.lists(st.sampled_from([*SPECIAL, "<|", "end", "|>", "hello", " é", "<", ""])).map("".join)


def test_special_token_text_of_a_user_is_encoded_as_its_characters() -> None:
    content = VERBATIM.mark("a<|end|>b")
    prompt = f"<|user|>{content}<|end|>"
    ids, offsets = VERBATIM.encode(prompt)
    shown = VERBATIM.reveal(prompt)
    assert shown == "<|user|>a<|end|>b<|end|>"
    assert ids[0] == 258
    assert ids[-1] == 257
    assert not TOKENIZER.special_ids & set(ids[1:-1])
    assert "".join(shown[start:stop] for start, stop in offsets) == shown


@given(SPELLED, SPELLED)
def test_what_the_template_writes_is_a_token_and_what_the_user_writes_is_not(user: str, other: str) -> None:
    prompt = f"<|user|>{VERBATIM.mark(user)}<|end|><|user|>{VERBATIM.mark(other)}<|end|>"
    ids, offsets = VERBATIM.encode(prompt)
    assert [token_id for token_id in ids if token_id in TOKENIZER.special_ids] == [258, 257, 258, 257]
    assert TOKENIZER.decode(ids, skip_special_tokens=False) == VERBATIM.reveal(prompt)
    assert offsets[-1][1] == len(VERBATIM.reveal(prompt))


@given(st.text())
def test_without_special_tokens_nothing_changes(user: str) -> None:
    messages = [{"role": "user", "content": user}]
    assert VERBATIM.mark(messages) is messages
    prompt = f"<|user|>{user}<|end|>"
    assert VERBATIM.encode(prompt)[0] == TOKENIZER.encode_batch([prompt], add_special_tokens=False)[0]


def test_strings_are_marked_at_any_depth_and_in_keys() -> None:
    value = {"<|end|>": [{"a": "x<|end|>", "n": 5, "none": None}]}
    marked = VERBATIM.mark(value)
    assert "<|end|>" not in str(marked)
    assert VERBATIM.reveal(str(marked)) == str(value)


def test_a_vocabulary_with_leading_spaces_keeps_them() -> None:
    tokenizer = Tokenizer(sentencepiece_tokenizer())
    verbatim = Verbatim(tokenizer)
    (plain,) = tokenizer.encode_batch(["<s>hello hello</s>"], add_special_tokens=False)
    assert verbatim.encode("<s>hello hello</s>")[0] == plain
    marked = verbatim.encode("<s>" + verbatim.mark("hello </s>"))[0]
    assert plain[:2] == marked[:2]
    assert 2 not in marked


def test_a_text_of_angle_brackets_takes_no_time_to_speak_of() -> None:
    backend = byte_level_tokenizer()
    backend.add_special_tokens([f"<|reserved_special_token_{i}|>" for i in range(300)])
    verbatim = Verbatim(Tokenizer(backend))
    began = time.perf_counter()
    for text in ("<" * 1_000_000, "<|reserved_special_token_1" * 40_000):
        assert verbatim.mark(text) is text
    assert time.perf_counter() - began < 2
