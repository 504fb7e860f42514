"""A GGUF file's vocabulary as a Hugging Face tokenizer: byte-level BPE, or SentencePiece's by scores.

Knows no torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from tgi_server.checkpoint.gguf_file import GgufFile
from tgi_server.checkpoint.gguf_model import special_ids
from tgi_server.errors import StartupError

NORMAL_TOKEN: Final = 1
UNKNOWN_TOKEN: Final = 2
CONTROL_TOKEN: Final = 3
USER_TOKEN: Final = 4
_SPACE: Final = "\u2581"  # what SentencePiece writes for one
_LONGEST_PIECE: Final = (
    256  # characters: each is cut everywhere; the largest vocabularies have two million in all
)
_MOST_CHARS: Final = 1 << 22
MAX_ADDED_TOKENS: Final = 1 << 14  # the library takes its time for each; models have a few hundred


def _words(digits: str) -> pre_tokenizers.PreTokenizer:
    """Contractions, words, `digits`, runs of signs, line ends, spaces: as GPT-4's tokenizer cuts, and many since."""
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
        + digits
        + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


# What llama.cpp calls a pre-tokenizer (`tokenizer.ggml.pre`) → the same in the tokenizers library.
PRE_TOKENIZERS: Final[dict[str, pre_tokenizers.PreTokenizer]] = {
    "smollm": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "llama-bpe": _words(r"\p{N}{1,3}"),
    "qwen2": _words(r"\p{N}"),
}


def build_tokenizer(gguf: GgufFile) -> Tokenizer:
    """The tokenizer that `gguf` describes; token ids are positions in its vocabulary.

    Raises StartupError if the file's tokenizer is of another kind, or its vocabulary contradicts itself.
    """
    kind, pre = gguf.text("tokenizer.ggml.model"), gguf.text("tokenizer.ggml.pre", "gpt-2")
    if kind != "llama" and (kind != "gpt2" or pre not in PRE_TOKENIZERS):
        raise StartupError(
            f"{gguf.path}: its tokenizer is {kind}/{pre}; only llama, and gpt2 with one of "
            f"{', '.join(PRE_TOKENIZERS)}, can be rebuilt, take the original checkpoint"
        )
    tokens = gguf.texts("tokenizer.ggml.tokens")
    types = gguf.integers("tokenizer.ggml.token_type")
    vocab = {token: i for i, token in enumerate(tokens)}
    if len(vocab) != len(tokens) or len(types) != len(tokens):
        raise StartupError(
            f"{gguf.path}: {len(tokens)} tokens, {len(vocab)} of them different, {len(types)} token types; "
            "these numbers must be the same"
        )
    tokenizer = _by_scores(gguf, tokens, types) if kind == "llama" else _byte_level(gguf, vocab, pre)
    special = {CONTROL_TOKEN, UNKNOWN_TOKEN} if kind == "llama" else {CONTROL_TOKEN}
    added = [[i for i, kind in enumerate(types) if kind in kinds] for kinds in (special, {USER_TOKEN})]
    if (count := sum(map(len, added))) > MAX_ADDED_TOKENS:
        raise StartupError(
            f"{gguf.path}: {count} of its tokens are special; {MAX_ADDED_TOKENS} are taken at most"
        )
    tokenizer.add_special_tokens([AddedToken(tokens[i], normalized=False, special=True) for i in added[0]])
    tokenizer.add_tokens([AddedToken(tokens[i], normalized=False) for i in added[1]])
    _add_ends(gguf, tokenizer, tokens)
    return tokenizer


def begins_with_bos(gguf: GgufFile) -> bool:
    """Whether prompts do; what the file does not say is what llama.cpp takes for its kind."""
    usual = gguf.text("tokenizer.ggml.model") == "llama" or gguf.text("tokenizer.ggml.pre", "") == "llama-bpe"
    return gguf.flag("tokenizer.ggml.add_bos_token", usual)


def _add_ends(gguf: GgufFile, tokenizer: Tokenizer, tokens: Sequence[str]) -> None:
    """What the tokenizer puts before and after each text."""
    ids = special_ids(gguf)
    ends: list[str] = []
    for name, wanted in (
        ("bos", begins_with_bos(gguf)),
        ("eos", gguf.flag("tokenizer.ggml.add_eos_token", False)),
    ):
        if wanted and name not in ids:
            raise StartupError(f"{gguf.path}: add_{name}_token is set, but {name}_token_id is missing")
        ends.append(tokens[ids[name]] if wanted else "")
    used = {end: tokens.index(end) for end in ends if end}
    if not used:
        return
    single, second = ([part for part in (ends[0], f"${which}", ends[1]) if part] for which in "AB")
    try:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=single, pair=[*single, *second], special_tokens=list(used.items())
        )
    except ValueError as error:
        raise StartupError(f"{gguf.path}: texts cannot be put between {list(used)}: {error}") from None


def _byte_level(gguf: GgufFile, vocab: dict[str, int], pre: str) -> Tokenizer:
    # Llama 3 looks whole words up before it merges anything.
    tokenizer = Tokenizer(
        models.BPE(vocab=vocab, merges=_merges(gguf, vocab), ignore_merges=pre == "llama-bpe")
    )
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = PRE_TOKENIZERS[pre]
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _by_scores(gguf: GgufFile, tokens: Sequence[str], types: Sequence[int]) -> Tokenizer:
    """SentencePiece joins the neighbours whose piece has the best score: BPE whose merges are sorted by it."""
    scores = gguf.floats_of("tokenizer.ggml.scores")
    if len(scores) != len(tokens) or not all(map(math.isfinite, scores)):
        raise StartupError(
            f"{gguf.path}: {len(scores)} scores for {len(tokens)} tokens; as many finite numbers are needed"
        )
    pieces = {token: i for i, token in enumerate(tokens) if types[i] == NORMAL_TOKEN}
    if (chars := sum(map(len, pieces))) > _MOST_CHARS or max(map(len, pieces), default=0) > _LONGEST_PIECE:
        raise StartupError(
            f"{gguf.path}: its vocabulary has {chars} characters, or a token more than {_LONGEST_PIECE}; "
            f"{_MOST_CHARS} are taken at most"
        )
    merges = []
    for piece, token_id in pieces.items():
        for cut in range(1, len(piece)):
            left, right = pieces.get(piece[:cut]), pieces.get(piece[cut:])
            if left is not None and right is not None:
                merges.append((-scores[token_id], token_id, left, right))
    unknown = special_ids(gguf).get("unk")
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=[(tokens[left], tokens[right]) for _, _, left, right in sorted(merges)],
            unk_token=None if unknown is None else tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    has_prefix = gguf.flag("tokenizer.ggml.add_space_prefix", True)
    spaces: list[normalizers.Normalizer] = [normalizers.Replace(" ", _SPACE)]
    texts: list[decoders.Decoder] = [
        decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()
    ]  # fmt: skip
    if has_prefix:
        spaces.insert(0, normalizers.Prepend(_SPACE))
        texts.append(decoders.Strip(" ", 1, 0))
    tokenizer.normalizer = normalizers.Sequence(spaces)
    tokenizer.decoder = decoders.Sequence(texts)
    return tokenizer


def tokenizer_config(gguf: GgufFile) -> dict[str, object]:
    """The content of `tokenizer_config.json`: which tokens are special, and the chat template."""
    tokens, ids = gguf.texts("tokenizer.ggml.tokens"), special_ids(gguf)
    config: dict[str, object] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": begins_with_bos(gguf),
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": gguf.size(f"{gguf.text('general.architecture')}.context_length"),
    }
    config |= {f"{name}_token": tokens[ids[name]] for name in ("bos", "eos", "pad", "unk") if name in ids}
    if "tokenizer.chat_template" in gguf.metadata:
        config["chat_template"] = gguf.text("tokenizer.chat_template")
    return config


def _merges(gguf: GgufFile, vocab: dict[str, int]) -> list[tuple[str, str]]:
    merges = []
    for number, line in enumerate(gguf.texts("tokenizer.ggml.merges")):
        left, _, right = line.partition(" ")
        if left not in vocab or right not in vocab or left + right not in vocab:
            raise StartupError(f"{gguf.path}: merge {number} is {line!r}, which the vocabulary does not have")
        merges.append((left, right))
    return merges
