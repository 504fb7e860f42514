"""From what the user calls a model to a folder on disk. Knows no torch."""

from __future__ import annotations

import errno
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from tgi_server.errors import StartupError

_WANTED = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
_TROUBLE_WITH_THE_DISK = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR)
_CONFIG = ["config.json", "generation_config.json"]
_SECOND_COPIES = ["consolidated*", "original/*"]  # the same weights once more, in their maker's format


def model_folder(model_id: str, revision: str | None = None, *, only_config: bool = False) -> Path:
    """The folder of a local checkpoint, or of a Hub repository, which is downloaded if need be (resumable).

    revision: branch, tag or commit; None is the Hub's main. only_config: what describes the model is enough.
    Raises StartupError saying what to do when there is no such folder, repository or revision, when it is gated,
    or when the Hub cannot be reached and nothing is cached.
    """
    folder = Path(model_id).expanduser()
    if folder.is_dir():
        if revision not in (None, "main"):
            raise StartupError(
                f"{model_id} is a local folder: it has no revision {revision}; leave --revision out"
            )
        return folder
    if model_id.count("/") != 1 or model_id.startswith((".", "/", "~")):
        raise StartupError(f"{model_id}: no such folder, and not a Hub id (owner/name) either")
    try:
        return Path(
            snapshot_download(
                model_id,
                revision=revision,
                allow_patterns=_CONFIG if only_config else _WANTED,
                ignore_patterns=_SECOND_COPIES,
            )
        )
    except GatedRepoError:
        raise StartupError(
            f"{model_id} is gated: accept its conditions on the Hub, then give a token that may read it in HF_TOKEN"
        ) from None
    except RevisionNotFoundError:
        raise StartupError(
            f"{model_id} has no revision {revision or 'main'}: give a branch, tag or commit that the Hub lists for it"
        ) from None
    except RepositoryNotFoundError:
        raise StartupError(
            f"{model_id} is not on the Hub, or is private: check the spelling, or give a token in HF_TOKEN"
        ) from None
    except HFValidationError as error:
        raise StartupError(f"{model_id} is no Hub id: {error}") from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        if isinstance(error, OSError) and error.errno in _TROUBLE_WITH_THE_DISK:
            raise StartupError(
                f"{model_id} could not be stored: {error}; mend that, or choose a folder with --huggingface-hub-cache"
            ) from None
        raise StartupError(
            f"{model_id} could not be downloaded ({type(error).__name__}), and no complete copy is cached; check the "
            "network, or give a local folder"
        ) from None
