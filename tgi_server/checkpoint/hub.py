"""From what the user calls a model to a folder on disk. Knows no torch."""

from __future__ import annotations

import errno
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
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
    if _is_folder(folder):
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
    except Exception as error:  # the library lets its HTTP client's own errors through, whichever that is
        raise StartupError(_why_not(model_id, error)) from None


def _is_folder(path: Path) -> bool:
    """Raises StartupError for a path that the file system does not take, such as one that is too long."""
    try:
        return path.is_dir()
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise StartupError(f"{str(path)[:100]!r} cannot be a folder: {why}") from None


def _why_not(model_id: str, error: BaseException) -> str:
    """What kept a download from being completed, and what to do; the cause may lie under several errors."""
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    for one in chain:
        if isinstance(one, OSError) and one.errno in _TROUBLE_WITH_THE_DISK:
            return f"{model_id} could not be stored: {one}; mend that, or choose a folder with --huggingface-hub-cache"
        if isinstance(one, OfflineModeIsEnabled):
            return f"{model_id} is not in the cache, and HF_HUB_OFFLINE forbids to fetch it; unset that, or fetch it"
        status = one.response.status_code if isinstance(one, HfHubHTTPError) else 0
        if status == 429:
            return (
                f"{model_id} could not be downloaded: the Hub answers 429, too many requests; wait some minutes, or "
                "give a token in HF_TOKEN, which allows more"
            )
        if status >= 400:
            return f"{model_id} could not be downloaded: the Hub answers {status}; try again later"
    return (
        f"{model_id} could not be downloaded ({type(chain[-1]).__name__}), and no complete copy is cached; check the "
        "network and start again: files that are complete are kept. Or give a local folder"
    )
