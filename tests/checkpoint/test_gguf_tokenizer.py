"""Tokenizers rebuilt from GGUF files cut texts as those they were made from."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import Qwen2Tokenizer

from tests.checkpoint.tiny_gguf import SPECIAL, TOKENS, random_llama, weights_of, write_gguf
from tests.text.tiny import sentencepiece_tokenizer
from tgi_server.checkpoint.gguf_file import GgufFile
from tgi_server.checkpoint.gguf_tokenizer import build_tokenizer
from tgi_server.errors import StartupError

TEXTS = [
    "I'm sure WE'LL see 1234567 things, don't you?",
    "naïve — 你好 👍🏽\n\n\t end  \r\n x",
    "  two  spaces,tabs\t\tand\u00a0nbsp",
    "e\u0301 is é; ½ is \u2167",
]


def file(tmp_path: Path, **changes: Any) -> GgufFile:
    """With a vocabulary of its own; the matrices, which nobody looks at here, do not fit it."""
    torch.manual_seed(0)
    path = tmp_path / "tiny.gguf"
    fields = {f"tokenizer.ggml.{name}": value for name, value in changes.items()}
    write_gguf(path, weights_of(random_llama(tied=True)), changes=fields)
    return GgufFile(path)


def byte_level_vocabulary() -> tuple[list[str], list[str]]:
    """Tokens and merges: letters in pairs, digits in threes, so that cuts show."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [f"{a} {b}" for a in "aeinst" for b in "aeinst"]
    merges += [f"{a} {b}" for a in "0123456789" for b in "0123456789"] + [
        "12 3",
        "45 6",
        "Ġ t",
        "' l",
        "'l l",
        "Ċ Ċ",
    ]
    tokens = [*SPECIAL, *alphabet, *(merge.replace(" ", "") for merge in merges)]
    return tokens, merges


def test_qwen_cuts_as_transformers_does(tmp_path: Path) -> None:
    tokens, merges = byte_level_vocabulary()
    types = [3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL))
    gguf = file(tmp_path, pre="qwen2", tokens=tokens, merges=merges, token_type=types)
    pairs = [(left, right) for left, right in (merge.split(" ") for merge in merges)]
    theirs = Qwen2Tokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=pairs)
    ours = build_tokenizer(gguf)
    for text in TEXTS:
        assert ours.encode(text).ids == theirs(text)["input_ids"]


def test_llama_3_cuts_digits_in_threes_takes_whole_words_and_begins_with_bos(tmp_path: Path) -> None:
    tokens, merges = byte_level_vocabulary()
    tokens.append("zz")  # no merge makes it
    types = [3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL))
    gguf = file(tmp_path, pre="llama-bpe", tokens=tokens, merges=merges, token_type=types, add_bos_token=None)
    assert build_tokenizer(gguf).encode("zz 1234567").tokens == [SPECIAL[1], "zz", "Ġ", "123", "456", "7"]


SCORED = {
    piece: -float(i)
    for i, piece in enumerate(
        ["▁he", "llo", "▁hello", "ll", "▁h", "he", "▁w", "or", "wor", "ld", "orld", "lo", "el"]
    )
}
LETTERS = "▁helowrd"
PIECES = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *SCORED, *LETTERS]
SCORES = [0.0] * 259 + list(SCORED.values()) + [-100.0 - i for i in range(len(LETTERS))]
TYPES = [2, 3, 3, *[6] * 256, *[1] * (len(SCORED) + len(LETTERS))]
SENTENCEPIECE: dict[str, Any] = {
    "model": "llama", "pre": None, "merges": None, "tokens": PIECES, "scores": SCORES, "token_type": TYPES,
    "bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0, "padding_token_id": None, "add_bos_token": None,
}  # fmt: skip


def joined_by_score(text: str) -> list[str]:
    """SentencePiece's way: again and again the leftmost neighbours whose piece scores best; bytes for what is left."""
    pieces = list("▁" + text.replace(" ", "▁"))
    while True:
        pairs = [
            (SCORED[a + b], -i) for i, (a, b) in enumerate(itertools.pairwise(pieces)) if a + b in SCORED
        ]
        if not pairs:
            return [part for piece in pieces for part in _known(piece)]
        at = -max(pairs)[1]
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]


def _known(piece: str) -> list[str]:
    return [piece] if piece in PIECES else [f"<0x{byte:02X}>" for byte in piece.encode()]


def test_sentencepiece_joins_the_best_scored_pieces_first(tmp_path: Path) -> None:
    tokenizer = build_tokenizer(file(tmp_path, **SENTENCEPIECE))
    dice = random.Random(0)
    for _ in range(300):
        text = "".join(dice.choices("helowrd é\n", k=dice.randrange(1, 30)))
        encoded = tokenizer.encode(text)
        assert encoded.tokens == ["<s>", *joined_by_score(text)]
        assert tokenizer.decode(encoded.ids) == text


def test_a_sentencepiece_vocabulary_needs_no_prefix_and_may_end_texts(tmp_path: Path) -> None:
    gguf = file(
        tmp_path, **SENTENCEPIECE | {"add_space_prefix": False, "add_eos_token": True, "add_bos_token": False}
    )
    tokenizer = build_tokenizer(gguf)
    assert tokenizer.encode("he w").tokens == ["he", "▁w", "</s>"]
    assert tokenizer.decode(tokenizer.encode(" he").ids) == " he"
    assert (
        sentencepiece_tokenizer().encode("hello").tokens
    )  # the kind of file it stands for is served elsewhere


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"scores": SCORES[:-1]}, rf"{len(SCORES) - 1} scores for {len(SCORES)} tokens"),
        ({"scores": [*SCORES[:-1], float("nan")]}, "finite numbers are needed"),
        ({"scores": None}, "scores is missing"),
        ({"scores": [1] * len(SCORES)}, "an array of floats is needed"),
        ({"bos_token_id": None}, "add_bos_token is set, but bos_token_id is missing"),
        ({"tokens": [*PIECES[:-1], "x" * 257]}, "or a token more than 256"),
        (
            {"token_type": [4] * len(PIECES), "tokens": PIECES, "bos_token_id": 400},
            "bos token 400 is outside",
        ),
    ],
)
def test_a_sentencepiece_vocabulary_that_contradicts_itself_is_refused(
    tmp_path: Path, changes: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(StartupError, match=complaint):
        build_tokenizer(file(tmp_path, **SENTENCEPIECE | changes))


def test_a_file_whose_tokens_are_all_special_is_refused(tmp_path: Path) -> None:
    tokens = [*TOKENS, *(f"<{i}>" for i in range(1 << 14))]
    gguf = file(tmp_path, tokens=tokens, token_type=[3] * len(tokens))
    with pytest.raises(StartupError, match="of its tokens are special; 16384 are taken at most"):
        build_tokenizer(gguf)
