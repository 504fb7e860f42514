"""What the headers of safetensors files say, without torch and without reading weights."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open

from tgi_server.errors import StartupError


def stored_types(folder: Path) -> dict[str, str]:
    """The type of each tensor in the folder as its file writes it, such as "BF16"; empty without files.

    Raises StartupError naming a file that is damaged.
    """
    types: dict[str, str] = {}
    for path in sorted(folder.glob("model*.safetensors")):
        try:
            with safe_open(path, framework="np") as file:
                types.update({name: file.get_slice(name).get_dtype() for name in file.keys()})  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise StartupError(f"{path} cannot be read ({error}); fetch it again") from None
    return types
