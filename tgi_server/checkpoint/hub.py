"""From what the user calls a model to a folder on disk. Knows no torch."""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from tgi_server.checkpoint.gguf_folder import folder_of, gguf_of
from tgi_server.errors import StartupError

_GGUF = ".gguf"
_WANTED = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
_TROUBLE_WITH_THE_DISK = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR)
_CONFIG = ["config.json", "generation_config.json"]
_SECOND_COPIES = ["consolidated*", "original/*"]  # the same weights once more, in their maker's format


def model_folder(model_id: str, revision: str | None = None, *, only_config: bool = False) -> Path:
    """The folder of a local checkpoint, or of a Hub repository, which is downloaded if need be (resumable).

    Of a GGUF file (`x.gguf`, `owner/name/x.gguf`), and of a folder or repository with one such file and no
    safetensors, it is a folder that describes it: see gguf_folder.
    revision: branch, tag or commit; None is the Hub's main. only_config: what describes the model is enough, which of
    a GGUF file is all of it.
    Raises StartupError saying what to do when there is no such folder, repository or revision, when it is gated,
    when the Hub cannot be reached and nothing is cached, and when a GGUF file cannot be served.
    """
    local = Path(model_id).expanduser()
    if _exists(local):
        if revision not in (None, "main"):
            raise StartupError(f"{model_id} is local: it has no revision {revision}; leave --revision out")
        return _described(local)
    owner_and_name, file = model_id, ""
    if model_id.count("/") > 1 and model_id.endswith(_GGUF):
        owner, name, file = model_id.split("/", 2)
        owner_and_name = f"{owner}/{name}"
    if owner_and_name.count("/") != 1 or model_id.startswith((".", "/", "~")):
        raise StartupError(
            f"{model_id}: no such folder or file, and not a Hub id (owner/name, owner/name/file.gguf) either"
        )
    return _fetched(
        model_id, revision, lambda: _fetch(owner_and_name, file, revision, only_config=only_config)
    )


def _fetch(model_id: str, file: str, revision: str | None, *, only_config: bool) -> Path:
    if not file:
        patterns = _CONFIG if only_config else _WANTED
        folder = Path(
            snapshot_download(
                model_id, revision=revision, allow_patterns=patterns, ignore_patterns=_SECOND_COPIES
            )
        )
        enough = any(folder.glob("config.json")) if only_config else any(folder.glob("*.safetensors"))
        file = "" if enough else _only_gguf(model_id, revision, folder)
        if not file:
            return folder
    return folder_of(Path(hf_hub_download(model_id, file, revision=revision)))


def _only_gguf(model_id: str, revision: str | None, cached: Path) -> str:
    """The name of the repository's GGUF file, of those `cached` if the Hub is out of reach; empty if it has none."""
    try:
        files = HfApi().list_repo_files(model_id, revision=revision)
    except Exception:
        files = [path.name for path in cached.glob(f"*{_GGUF}")]
        if not files:
            raise
    names = sorted(name for name in files if name.endswith(_GGUF))
    if len(names) > 1:
        raise _several(model_id, names)
    return names[0] if names else ""


def _described(local: Path) -> Path:
    """The folder that is served in the place of one, or of a file, that is here."""
    if local.is_file():
        if local.suffix != _GGUF:
            raise StartupError(f"{local} is a file; give a folder, or a file whose name ends in {_GGUF}")
        return folder_of(local)
    names = sorted(path.name for path in local.glob(f"*{_GGUF}"))
    if not names or gguf_of(local) or any(local.glob("*.safetensors*")):
        return local
    if len(names) > 1:
        raise _several(str(local), names)
    return folder_of(local / names[0])


def _several(place: str, names: Sequence[str]) -> StartupError:
    shown = ", ".join(names[:12]) + (", …" if len(names) > 12 else "")
    return StartupError(
        f"{place} holds {len(names)} GGUF files: {shown}. Name the one to serve: {place}/{names[0]}"
    )


def _fetched(model_id: str, revision: str | None, fetch: Callable[[], Path]) -> Path:
    """What `fetch` gives; its errors say what to do."""
    try:
        return fetch()
    except StartupError:
        raise
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


def _exists(path: Path) -> bool:
    """Whether a folder or file is there. Raises StartupError for a path that the file system does not take, such as
    one that is too long.
    """
    try:
        return path.is_dir() or path.is_file()
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
        if status == 404:
            return f"{model_id}: the Hub's repository has no such file; check the spelling"
        if status >= 400:
            return f"{model_id} could not be downloaded: the Hub answers {status}; try again later"
    return (
        f"{model_id} could not be downloaded ({type(chain[-1]).__name__}), and no complete copy is cached; check the "
        "network and start again: files that are complete are kept. Or give a local folder"
    )
