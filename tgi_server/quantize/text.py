"""Text to calibrate with and to measure by: a file, or what every Python carries about itself."""

from __future__ import annotations

from pathlib import Path
from pydoc_data.topics import topics
from typing import Final

import torch
from torch import Tensor

from tgi_server.errors import StartupError
from tgi_server.text.tokenizer import Tokenizer

HELD_BACK: Final = 0.2  # the end of the text, which calibration never sees


def windows(folder: Path, file: Path | None, count: int, tokens: int, *, held_back: bool) -> list[Tensor]:
    """`count` pieces of `tokens` ids each, [tokens] int64, spread over the text; fewer if the text is short.

    held_back: from the part that is kept for measuring. Raises StartupError if not one piece is there.
    """
    text = read(file)
    border = int(len(text) * (1 - HELD_BACK))
    (ids,) = Tokenizer.from_folder(folder).encode_batch([text[border:] if held_back else text[:border]])
    whole = torch.tensor(ids, dtype=torch.int64)
    possible = len(whole) // tokens
    if possible == 0:
        raise StartupError(
            f"{file or 'the text that comes with Python'} has {len(whole)} tokens for this; at least {tokens} are "
            "needed: give more text, or shorter pieces"
        )
    chosen = torch.linspace(0, possible - 1, min(count, possible)).round().long()
    return [whole[i * tokens : (i + 1) * tokens] for i in chosen.tolist()]


def read(file: Path | None) -> str:
    """The file's text; without one the help on Python's language, 0.7 MB of English and code."""
    if file is None:
        return "\n\n".join(topics[name] for name in sorted(topics))
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise StartupError(f"{file} cannot be read as UTF-8 text: {error}") from None
