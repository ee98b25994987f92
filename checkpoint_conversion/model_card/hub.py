"""The upload of an exported folder to the Hugging Face hub, by its own library.

All that can be wrong is looked at before the export is made: network, token, name and the right to write.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from checkpoint_conversion.errors import ConversionError, printable
from checkpoint_conversion.hf.folder import ADAPTER, read_json_object
from checkpoint_conversion.model_card.base import HubId

FLAG = "--push-to-hub"
_ON = ("1", "true", "yes", "on")
_BASE_NAME = "base_model_name_or_path"
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


def check_named_base(base: HubId | None, folder: str | Path) -> HubId:
    """Return the id of the base of adapters, which an upload names in place of its folder.

    Args:
        base: The id; None where it is unknown.
        folder: The folder of the base.

    Raises:
        ConversionError: It is unknown.
    """
    if base is None:
        raise ConversionError(
            f"{FLAG} would upload adapters whose base is {folder}, a folder of this machine; give the base's "
            "id on the hub with --base-model-id OWNER/NAME"
        )
    return base


def upload(folder: Path, repo: str, base: HubId | None = None) -> str:
    """Upload an exported folder in one commit; return the address of the repository.

    Args:
        folder: The export.
        repo: Id of the repository, as `check_upload` returns it.
        base: The base of adapters, which the uploaded PEFT folder names; the export itself keeps its folder.

    Raises:
        ConversionError: It did not get there; the folder stays, and the message says how to try again.
    """
    import huggingface_hub

    api = huggingface_hub.HfApi()
    try:
        with _named_base(folder, base) as place:
            _call(
                repo,
                api.upload_folder,
                repo_id=repo,
                folder_path=place,
                commit_message=f"{folder.name}, trained with megatron_profit",
                ignore_patterns=list(_NOT_UPLOADED),
            )
    except ConversionError as error:
        remedy = f"upload it with: hf upload {repo} {folder}"
        if base is not None:
            remedy = f"change {_BASE_NAME} in its {ADAPTER} to {base.id}, and {remedy}"
        raise ConversionError(f"{error}. The export is whole in {folder}; {remedy}") from error
    return f"{api.endpoint}/{repo}"


@contextlib.contextmanager
def _named_base(folder: Path, base: HubId | None) -> Iterator[Path]:
    """Yield an export, or for adapters a temporary folder of links to it whose options name the base's id."""
    if base is None:
        yield folder
        return
    content = {**read_json_object(folder / ADAPTER), _BASE_NAME: base.id}
    if base.revision:
        content["revision"] = base.revision
    with tempfile.TemporaryDirectory() as name:
        for file in folder.rglob("*"):  # an upload follows no link to a folder
            place = Path(name) / file.relative_to(folder)
            place.mkdir() if file.is_dir() else place.symlink_to(file.absolute())
        (Path(name) / ADAPTER).unlink()
        (Path(name) / ADAPTER).write_text(json.dumps(content, indent=2) + "\n")
        yield Path(name)


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
