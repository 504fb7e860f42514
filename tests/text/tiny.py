"""A model folder small enough to write in a test: a byte-level vocabulary, a chat template, a config."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

SPECIAL = ("<|bos|>", "<|end|>", "<|user|>", "<|assistant|>")
BOS, END = 256, 257
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message.role not in ['user', 'assistant', 'system'] %}"
    "{{ raise_exception('no role ' + message.role) }}{% endif %}"
    "<|{{ 'user' if message.role != 'assistant' else 'assistant' }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def byte_level_tokenizer() -> Tokenizer:
    """Ids 0-255 are the bytes in the alphabet's order, 256-259 the special tokens, then some merges.

    Encoding adds the first special token, as BOS.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {char: i for i, char in enumerate(alphabet)}
    for token in SPECIAL:
        vocab[token] = len(vocab)
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("Ġ", "w"), ("Ġ", "hello")]
    for left, right in merges:
        vocab[left + right] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{SPECIAL[0]} $A", special_tokens=[(SPECIAL[0], BOS)]
    )
    return tokenizer


def sentencepiece_tokenizer() -> Tokenizer:
    """As Llama 2 has it: words with their leading space, and bytes for everything else."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", "h", "e", "l", "o", "w", "▁h", "▁he", "▁w", "ll", "▁hell", "▁hello", "▁wo"]
    merges = [("▁", "h"), ("▁h", "e"), ("▁", "w"), ("l", "l"), ("▁he", "ll"), ("▁hell", "o"), ("▁w", "o")]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in ("<unk>", "<s>", "</s>")])
    return tokenizer


def write_tiny_folder(folder: Path, *, template: str | None = TEMPLATE) -> Path:
    """A folder `Text.from_folder` reads; there are no weights in it."""
    byte_level_tokenizer().save(str(folder / "tokenizer.json"))
    config: dict[str, object] = {"bos_token": SPECIAL[0], "eos_token": {"content": SPECIAL[1]}}
    if template is not None:
        config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    model = {
        "model_type": "llama",
        "vocab_size": 300,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "max_position_embeddings": 512,
        "eos_token_id": END,
    }
    (folder / "config.json").write_text(json.dumps(model))
    return folder
