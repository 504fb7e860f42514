"""A GGUF file's vocabulary as a Hugging Face tokenizer: byte-level BPE, cut as the file says."""

from __future__ import annotations

from typing import Final

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from tgi_server.checkpoint.gguf_file import GgufFile
from tgi_server.errors import StartupError

CONTROL_TOKEN: Final = 3
USER_TOKEN: Final = 4

# Hugging Face's name of a special token → llama.cpp's.
SPECIAL_KEYS: Final = {
    "bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown", "eot": "eot", "eom": "eom"
}  # fmt: skip


# What llama.cpp calls a pre-tokenizer (`tokenizer.ggml.pre`) → the same in the tokenizers library.
PRE_TOKENIZERS: Final[dict[str, pre_tokenizers.PreTokenizer]] = {
    "smollm": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
}


def build_tokenizer(gguf: GgufFile) -> Tokenizer:
    """The tokenizer that `gguf` describes; token ids are positions in its vocabulary.

    Raises StartupError if the file's tokenizer is of another kind, or its vocabulary contradicts itself.
    """
    kind, pre = gguf.text("tokenizer.ggml.model"), gguf.text("tokenizer.ggml.pre", "gpt-2")
    if kind != "gpt2" or pre not in PRE_TOKENIZERS:
        raise StartupError(
            f"{gguf.path}: its tokenizer is {kind}/{pre}; only gpt2 with one of "
            f"{', '.join(PRE_TOKENIZERS)} can be rebuilt, take the original checkpoint"
        )
    tokens = gguf.texts("tokenizer.ggml.tokens")
    types = gguf.integers("tokenizer.ggml.token_type")
    vocab = {token: i for i, token in enumerate(tokens)}
    if len(vocab) != len(tokens) or len(types) != len(tokens):
        raise StartupError(
            f"{gguf.path}: {len(tokens)} tokens, {len(vocab)} of them different, {len(types)} token types; "
            "these numbers must be the same"
        )
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=_merges(gguf, vocab)))
    tokenizer.pre_tokenizer = PRE_TOKENIZERS[pre]
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(_added(tokens, types, CONTROL_TOKEN))
    tokenizer.add_tokens(_added(tokens, types, USER_TOKEN))
    if gguf.flag("tokenizer.ggml.add_bos_token", False):
        bos_id = special_ids(gguf).get("bos")
        if bos_id is None:
            raise StartupError(f"{gguf.path}: add_bos_token is set, but bos_token_id is missing")
        bos = tokens[bos_id]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, bos_id)]
        )
    return tokenizer


def special_ids(gguf: GgufFile) -> dict[str, int]:
    """The ids of the special tokens the file names, under Hugging Face's names: bos, eos, pad …"""
    num_tokens = len(gguf.texts("tokenizer.ggml.tokens"))
    ids = {}
    for name, key in SPECIAL_KEYS.items():
        if f"tokenizer.ggml.{key}_token_id" in gguf.metadata:
            ids[name] = gguf.integer(f"tokenizer.ggml.{key}_token_id")
            if not 0 <= ids[name] < num_tokens:
                raise StartupError(
                    f"{gguf.path}: {name} token {ids[name]} is outside the {num_tokens} tokens"
                )
    return ids


def tokenizer_config(gguf: GgufFile) -> dict[str, object]:
    """The content of `tokenizer_config.json`: which tokens are special, and the chat template."""
    tokens, ids = gguf.texts("tokenizer.ggml.tokens"), special_ids(gguf)
    config: dict[str, object] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": gguf.flag("tokenizer.ggml.add_bos_token", False),
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": gguf.size(f"{gguf.text('general.architecture')}.context_length"),
    }
    config |= {f"{name}_token": tokens[ids[name]] for name in ("bos", "eos", "pad", "unk") if name in ids}
    if "tokenizer.chat_template" in gguf.metadata:
        config["chat_template"] = gguf.text("tokenizer.chat_template")
    return config


def _added(tokens: list[str], types: list[int], wanted: int) -> list[AddedToken]:
    return [
        AddedToken(token, normalized=False, special=wanted == CONTROL_TOKEN)
        for token, kind in zip(tokens, types, strict=True)
        if kind == wanted
    ]


def _merges(gguf: GgufFile, vocab: dict[str, int]) -> list[tuple[str, str]]:
    merges = []
    for number, line in enumerate(gguf.texts("tokenizer.ggml.merges")):
        left, _, right = line.partition(" ")
        if left not in vocab or right not in vocab or left + right not in vocab:
            raise StartupError(f"{gguf.path}: merge {number} is {line!r}, which the vocabulary does not have")
        merges.append((left, right))
    return merges
