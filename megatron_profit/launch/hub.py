"""Models and data sets by their ids on the Hugging Face hub, through its cache; no code of theirs is run.

`Qwen/Qwen3-14B-Base` is the newest revision, `Qwen/Qwen3-14B-Base@v1` a branch, tag or commit. Of a data set
`openai/gsm8k/main` is a folder inside. A name that exists here as a file or folder is that one.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from checkpoint_conversion.errors import printable
from checkpoint_conversion.model_card.hub import last_cause
from megatron_profit.data.files.splits import ENDINGS, is_data_file
from megatron_profit.flags import nearest
from megatron_profit.recipe.errors import LaunchError

_PART = r"[A-Za-z0-9][\w.-]*"
_ID = re.compile(
    rf"(?P<repo>{_PART}(?:/{_PART})?)(?P<inner>(?:/[\w.-]+)*)(?:@(?P<revision>[\w./-]+))?"
)
# The card and the licence tell an export the terms of its base.
_TERMS = ("README.md", "LICEN*", "NOTICE*", "USE_POLICY*")
# An address of the hub, as people copy it from a browser.
_PAGE = re.compile(
    r"(?:hf://|(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/)(?:datasets/)?(?P<id>[\w./-]+?)"
    r"(?:/tree/(?P<revision>[\w.-]+)(?P<inner>(?:/[\w.-]+)*))?/?"
)
_TEMPLATES = "*.jinja"
_SMALL_FILES = ("*.json", _TEMPLATES, "*.model", "*.txt", *_TERMS)
_WEIGHTS = "*.safetensors"
_DATA_FILES = tuple(f"*{ending}" for ending in ENDINGS)
# The folder that most data sets keep their files in.
_USUAL_FOLDER = "data"


@dataclass(frozen=True)
class HubId:
    """A repository of the hub.

    Attributes:
        kind: What it holds.
        repo: Its id.
        inner: A folder in it, "" for all of it.
        revision: A branch, tag or commit; None for the newest.
    """

    kind: Literal["model", "dataset"]
    repo: str
    inner: str
    revision: str | None

    @property
    def download(self) -> str:
        """The command that puts it into the cache."""
        kind = " --repo-type dataset" if self.kind == "dataset" else ""
        revision = f" --revision {self.revision}" if self.revision else ""
        return f"hf download {self.repo}{kind}{revision}"


def find_model(name: str, weights: bool = True, flag: str = "--model") -> Path:
    """Return the folder of a model: a local one, or one of the hub's cache, downloaded if it is not there.

    Args:
        name: The folder, or the id on the hub.
        weights: Whether the weights are downloaded too.
        flag: The argument that names it, for messages.

    Raises:
        LaunchError: There is no such model, or it can be neither read nor downloaded.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise LaunchError(
            f"{flag} {printable(name)} is a file; name a HuggingFace folder or an id of the hub"
        )
    found = parse_id(name, "model")
    if found is None or found.inner:
        raise LaunchError(
            f"{flag} {printable(name)}: there is no such folder, and it is no id of the hub (such as "
            "Qwen/Qwen3-0.6B-Base)"
        )
    # Of inner folders chat templates alone: others hold the weights again, in other formats.
    inner = [f"*/{kind}" for kind in (*_SMALL_FILES, _WEIGHTS) if kind != _TEMPLATES]
    return _snapshot(found, (*_SMALL_FILES, *[_WEIGHTS] * weights), inner, flag)


def local_folder(name: str, flag: str = "MODEL") -> str:
    """Return the folder in the hub's cache of a model that is named by its id; any other name is a path.

    Raises:
        LaunchError: There is no such model, or it can be neither read nor downloaded.
    """
    if is_hub_name(name, "model"):
        return str(find_model(name, flag=flag))
    # No shell has read the base of a plan, and some shells leave LABEL=~/model as it is.
    return os.path.expanduser(name)


def find_data(name: str) -> str:
    """Return the path of data: a local file or folder, or a folder of the hub's cache.

    A name that ends like a data file is one.

    Raises:
        LaunchError: There is no such data set, or it can be neither read nor downloaded.
    """
    path = Path(name).expanduser()
    found = parse_id(name, "dataset") if is_hub_name(name, "dataset") else None
    if found is None:
        return str(path) if path.exists() else name
    files = [f"{found.inner}/{kind}" for kind in _DATA_FILES] if found.inner else [*_DATA_FILES]
    folder = _snapshot(found, files, None, "--data")
    return str(_data_folder(found, folder / found.inner))


def is_hub_name(name: str, kind: Literal["model", "dataset"]) -> bool:
    """Return whether a name that was given for a model or data is an id of the hub.

    Files and folders that are here come first. Of data, a name that ends like a data file is one, and one
    without an owner too: such ids are few, and missing files are many.
    """
    path, found = Path(name).expanduser(), parse_id(name, kind)
    if path.exists() or found is None:
        return False
    if kind == "model":
        return True
    suffixes = (*_DATA_FILES, "*.gz", "*.zst")
    return "/" in found.repo and not (path.suffix and f"*{path.suffix}" in suffixes)


def plain_id(name: str) -> str:
    """Return the id that an address of the hub stands for; another name as it is.

    For example, `https://huggingface.co/Qwen/Qwen3-4B/tree/v1` is `Qwen/Qwen3-4B@v1`.
    """
    page = _PAGE.fullmatch(name)
    if page is None:
        return name
    revision = f"@{page['revision']}" if page["revision"] else ""
    return f"{page['id']}{page['inner'] or ''}{revision}"


def parse_id(name: str, kind: Literal["model", "dataset"]) -> HubId | None:
    """Return the id of a repository that a name spells; None if it spells a path."""
    match = _ID.fullmatch(plain_id(name))
    if match is None:
        return None
    return HubId(kind, match["repo"], match["inner"].strip("/"), match["revision"])


def _data_folder(found: HubId, folder: Path) -> Path:
    """Return the folder that holds the files of a data set.

    Raises:
        LaunchError: It holds several, or none.
    """
    if not folder.is_dir():
        raise LaunchError(
            f"--data {found.repo}: has no folder {found.inner} with data files ({_known()})"
        )
    if any(map(is_data_file, folder.iterdir())):
        return folder
    inner = sorted({file.parent for file in folder.rglob("*") if is_data_file(file)})
    if len(inner) == 1:
        return inner[0]
    if folder / _USUAL_FOLDER in inner:
        return folder / _USUAL_FOLDER
    if not inner:
        raise LaunchError(
            f"--data {found.repo}: the data set has no file that can be read ({_known()}); save it with the "
            "datasets library as parquet and name the file"
        )
    names = ", ".join(f"{found.repo}/{part.relative_to(folder)}" for part in inner[:6])
    raise LaunchError(f"--data {found.repo}: holds several data sets; name one, such as {names}")


def _known() -> str:
    return ", ".join(kind[1:] for kind in _DATA_FILES)


def _snapshot(found: HubId, allowed: Any, ignored: Any, flag: str) -> Path:
    """Return the folder of a repository in the hub's cache."""
    import huggingface_hub
    from huggingface_hub import errors

    name = found.repo if found.revision is None else f"{found.repo}@{found.revision}"
    try:
        return Path(
            huggingface_hub.snapshot_download(
                found.repo,
                repo_type=found.kind,
                revision=found.revision,
                allow_patterns=list(allowed),
                ignore_patterns=ignored,
            )
        )
    except errors.GatedRepoError as error:
        raise LaunchError(
            f"{flag} {name}: access is granted on its page, https://huggingface.co/{found.repo}; accept "
            "its terms there, then `hf auth login`"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise LaunchError(
            f"{flag} {name}: the repository has no revision {found.revision}"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise LaunchError(
            f"{flag} {name}: there is no such folder here and no such {found.kind} on the hub; correct the "
            "name, or `hf auth login` if it is private"
        ) from error
    except errors.HFValidationError as error:
        raise LaunchError(f"{flag} {name}: no id of the hub ({printable(error)})") from error
    except Exception as error:  # the hub's library and its transport raise errors of many kinds
        cache = huggingface_hub.constants.HF_HUB_CACHE
        alike = _cached_alike(found, Path(cache))
        raise LaunchError(
            f"{flag} {name}: there is no such folder here, the hub's cache ({cache}) does not hold it, and "
            f"the hub cannot be reached ({last_cause(error)}){alike}; on a machine with a network "
            f"run `{found.download}` and bring its cache, or name a folder"
        ) from error


def _cached_alike(found: HubId, cache: Path) -> str:
    """Return a hint at a repository in the cache whose id is spelt nearly alike."""
    start = f"{found.kind}s--"
    names = (entry.name for entry in cache.glob(f"{start}*"))
    ids = [name.removeprefix(start).replace("--", "/", 1) for name in names]
    return nearest(found.repo, [name for name in ids if name != found.repo])
