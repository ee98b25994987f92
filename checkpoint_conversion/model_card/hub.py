"""The upload of an exported folder to the Hugging Face hub, by its own library.

All that can be wrong is looked at before the export is made: network, token, name and the right to write.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from checkpoint_conversion.errors import ConversionError, printable
from checkpoint_conversion.model_card.base import HubId

FLAG = "--push-to-hub"
_ON = ("1", "true", "yes", "on")
# Files of the converter, which mean something in their place only.
_NOT_UPLOADED = (".*",)


def check_upload(name: str, *, public: bool = False) -> str:
    """Make sure that a folder can be uploaded later; the repository is made if it is missing.

    Args:
        name: Id of the repository; without an owner it is the token's.
        public: Whether everybody may read it; a repository that is there must be so already.

    Returns:
        The id with its owner.

    Raises:
        ConversionError: The hub cannot be reached, there is no token, or it may not write there. Or the
            repository is there, and public or private against the wish.
    """
    import huggingface_hub

    if "@" in name or HubId.noted(name) is None:
        raise ConversionError(f"{FLAG} {name}: no id of the hub; write it as OWNER/NAME")
    if is_offline():
        raise ConversionError(
            f"{FLAG} {name}: HF_HUB_OFFLINE is set; unset it, or leave the flag out and upload the export "
            "later with `hf upload`"
        )
    if huggingface_hub.get_token() is None:
        raise ConversionError(
            f"{FLAG} {name}: there is no token of the hub; `hf auth login` with one that may write, or set "
            "HF_TOKEN"
        )
    api = huggingface_hub.HfApi()
    repo = name if "/" in name else f"{_call(name, api.whoami)['name']}/{name}"
    _call(repo, api.create_repo, repo_id=repo, private=not public, exist_ok=True)
    is_private = _call(repo, api.repo_info, repo_id=repo).private
    if not public and not is_private:
        raise ConversionError(
            f"{FLAG} {repo}: everybody can read this repository; give --push-public to upload there, or "
            "name another one, which will be private"
        )
    if public and is_private:
        raise ConversionError(
            f"{FLAG} {repo}: this repository is private, and --push-public changes none that is there; make "
            "it public in its settings on the hub, drop --push-public, or name another one"
        )
    return repo


def upload(folder: Path, repo: str) -> str:
    """Upload an exported folder in one commit; return the address of the repository.

    Raises:
        ConversionError: It did not get there; the folder stays, and the message says how to try again.
    """
    import huggingface_hub

    api = huggingface_hub.HfApi()
    try:
        _call(
            repo,
            api.upload_folder,
            repo_id=repo,
            folder_path=folder,
            commit_message=f"{folder.name}, trained with megatron_profit",
            ignore_patterns=list(_NOT_UPLOADED),
        )
    except ConversionError as error:
        raise ConversionError(
            f"{error}. The export is whole in {folder}; upload it with: hf upload {repo} {folder}"
        ) from error
    return f"{api.endpoint}/{repo}"


def is_offline() -> bool:
    """Return whether the user keeps the hub's library from the network."""
    return os.environ.get("HF_HUB_OFFLINE", "0").lower() in _ON


def last_cause(error: BaseException) -> str:
    """Return the last cause of an error of the hub's library in a few words."""
    if is_offline():
        return "HF_HUB_OFFLINE is set"
    while error.__cause__ is not None:
        error = error.__cause__
    return printable(str(error).strip().partition("\n")[0][:200] or type(error).__name__)


def _call(repo: str, function: Any, **arguments: Any) -> Any:
    """Call a function of the hub's library; its errors, and its transport's, are of many kinds."""
    try:
        return function(**arguments)
    except Exception as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status == 401:
            reason = "the hub does not know the token; `hf auth login` again, or correct HF_TOKEN"
        elif status == 403:
            reason = "the token may not write there; take one that may, or another owner"
        elif status is not None:
            reason = f"the hub answers {last_cause(error)}"
        else:
            reason = f"the hub cannot be used ({last_cause(error)})"
        raise ConversionError(f"{FLAG} {repo}: {reason}") from error
