"""All that a front end knows of a checkpoint's language: tokenizer, chat template, where answers end."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tgi_server.config import ModelConfig
from tgi_server.text.template import ChatTemplate
from tgi_server.text.tokenizer import Tokenizer
from tgi_server.text.verbatim import Verbatim


@dataclass(frozen=True)
class Text:
    """vocab_size: rows of the model's embedding; no id at or above it may reach the engine."""

    tokenizer: Tokenizer
    template: ChatTemplate | None
    eos_token_ids: tuple[int, ...]
    vocab_size: int

    @cached_property
    def verbatim(self) -> Verbatim:
        return Verbatim(self.tokenizer)

    @classmethod
    def from_folder(
        cls, folder: Path, *, tokenizer_config: Path | None = None, chat_template: Path | None = None
    ) -> Text:
        """Read tokenizer.json, chat template and config.json; raises StartupError naming the file.

        tokenizer_config, chat_template: read instead of those in the folder.
        """
        model = ModelConfig.from_folder(folder)
        return cls(
            tokenizer=Tokenizer.from_folder(folder),
            template=ChatTemplate.from_folder(folder, tokenizer_config, chat_template),
            eos_token_ids=model.eos_token_ids,
            vocab_size=model.vocab_size,
        )


def doubts(text: Text) -> list[str]:
    """What is odd about a checkpoint's language, though it can be served: lines of warning."""
    lines = []
    if text.tokenizer.vocab_size > text.vocab_size:
        lines.append(
            f"the tokenizer has {text.tokenizer.vocab_size} tokens, the model {text.vocab_size}: prompts with tokens "
            f"from {text.vocab_size} on are refused; the two may belong to different models"
        )
    if not text.eos_token_ids:
        lines.append(
            "neither generation_config.json nor config.json names an eos_token_id: answers end at max_tokens or a "
            "stop string only"
        )
    return lines
