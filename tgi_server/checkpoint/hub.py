"""From what the user calls a model to a folder on disk. Knows no torch."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from tgi_server.errors import StartupError

_WANTED = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]


def model_folder(model_id: str) -> Path:
    """The folder of a local checkpoint, or of a Hub repository, which is downloaded if need be (resumable).

    Raises StartupError saying what to do when there is no such folder or repository, when it is gated, or when
    the Hub cannot be reached and nothing is cached.
    """
    folder = Path(model_id).expanduser()
    if folder.is_dir():
        return folder
    if model_id.count("/") != 1 or model_id.startswith((".", "/", "~")):
        raise StartupError(f"{model_id}: no such folder, and not a Hub id (owner/name) either")
    try:
        return Path(snapshot_download(model_id, allow_patterns=_WANTED))
    except GatedRepoError:
        raise StartupError(
            f"{model_id} is gated: accept its conditions on the Hub, then give a token that may read it in HF_TOKEN"
        ) from None
    except RepositoryNotFoundError:
        raise StartupError(
            f"{model_id} is not on the Hub, or is private: check the spelling, or give a token in HF_TOKEN"
        ) from None
    except RevisionNotFoundError as error:
        raise StartupError(f"{model_id}: {error}") from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise StartupError(
            f"{model_id} could not be downloaded ({type(error).__name__}), and no complete copy is cached; check the "
            "network, or give a local folder"
        ) from None
