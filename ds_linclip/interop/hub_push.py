"""Publishing an exported folder on the Hugging Face hub."""

import re
from pathlib import Path
from typing import cast

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError

__all__ = ["check_push", "push_folder"]

_PREFIX = "hf-hub:"
#: Refusals of the hub, and what the HTTP client of the library raises where nothing answers.
_ERRORS = cast(tuple[type[Exception], ...], (OSError, HfHubHTTPError, *HfHubHTTPError.__bases__))


def check_push(target: str) -> str:
    """Check before an export that it can be pushed; return the repository's ``owner/name``.

    Raises:
        ValueError: when ``target`` is not ``hf-hub:owner/name``, or there is no token.
    """
    repository = target.removeprefix(_PREFIX)
    if repository == target or not re.fullmatch(r"[\w.-]+/[\w.-]+", repository, re.ASCII):
        raise ValueError(f"--push ({target}) must be hf-hub:owner/name")
    if get_token() is None:
        raise ValueError(f"--push ({target}) needs a token: set HF_TOKEN, or run hf auth login")
    return repository


def push_folder(folder: Path, target: str) -> str:
    """Upload a folder as one commit to a model repository, and return its URL.

    A repository that does not exist is created, private. The token is that of ``HF_TOKEN``, or of
    ``hf auth login``.

    Args:
        folder: What ``linclip export`` wrote.
        target: ``hf-hub:owner/name``.

    Raises:
        ValueError: when the target is not valid, or the hub refuses or does not answer; the folder
            stays as it is.
    """
    repository, hub = check_push(target), HfApi()
    try:
        url = hub.create_repo(repository, private=True, exist_ok=True)
        hub.upload_folder(
            repo_id=repository, folder_path=folder, commit_message="Export of ds_linclip"
        )
    except _ERRORS as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"--push ({target}) failed: {reason}; {folder} is written and can be uploaded with "
            f"hf upload {repository} {folder}"
        ) from error
    return str(url)
