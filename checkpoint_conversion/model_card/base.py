"""The model that a training started from: its id and revision on the hub, and its licence."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoint_conversion.engine.regular_files import (
    check_readable,
    open_regular,
    read_regular,
)
from checkpoint_conversion.errors import ConversionError
from checkpoint_conversion.hf.writer import check_link

CARD = "README.md"
# The name of a repository in the hub's cache, and the ids that the hub takes.
_CACHED = re.compile(r"(models|datasets)--(.+)")
_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_REVISION = re.compile(r"[\w.-][\w./-]*")
_LICENCE_FILE = re.compile(r"(?i:licen[cs]e|notice|use_policy)[\w.-]*")
_LICENCE_ID = re.compile(r"[a-z0-9][a-z0-9.+-]*")
# Words of a licence's text -> its id on the hub, and its name where that id is "other".
_TEXTS = (
    ("llama 3 community license", ("llama3", "")),
    ("llama 3.1 community license", ("llama3.1", "")),
    ("llama 3.2 community license", ("llama3.2", "")),
    ("llama 3.3 community license", ("llama3.3", "")),
    ("qwen research license", ("other", "qwen-research")),
    ("qwen license agreement", ("other", "qwen")),
    ("tongyi qianwen license", ("other", "tongyi-qianwen")),
    ("apache license version 2.0", ("apache-2.0", "")),
    ("mit license", ("mit", "")),
)
_MOST_TEXT = 1 << 20  # bytes of a card or a licence that are looked at
_BEGINNING = 4000  # characters that tell which licence it is


@dataclass(frozen=True)
class HubId:
    """A repository of the hub, and the revision of it that was read; "" where it is unknown."""

    id: str
    revision: str = ""

    def __str__(self) -> str:
        return f"{self.id}@{self.revision}" if self.revision else self.id

    @classmethod
    def parse(cls, text: str) -> HubId:
        """Read `ID` or `ID@REVISION`.

        Raises:
            ConversionError: The text has another form.
        """
        name, _, revision = text.partition("@")
        if not _ID.fullmatch(name) or ("@" in text and not _REVISION.fullmatch(revision)):
            raise ConversionError(
                f"{text!r} is no id of the hub; write it as Qwen/Qwen3-14B-Base or, with a revision, "
                "Qwen/Qwen3-14B-Base@main"
            )
        return cls(name, revision)

    @classmethod
    def noted(cls, name: Any, revision: Any = "") -> HubId | None:
        """Return the repository that a record notes; None where it notes none, or something else."""
        if not isinstance(name, str) or not _ID.fullmatch(name):
            return None
        return cls(name, revision if isinstance(revision, str) else "")

    @classmethod
    def of_path(cls, path: Path) -> HubId | None:
        """Return the repository that a file or folder of the hub's cache belongs to; None for another place.

        For example, `…/models--Qwen--Qwen3-4B/snapshots/1cfa9a7` gives `Qwen/Qwen3-4B` and `1cfa9a7`.
        """
        parts = path.absolute().parts
        for place, part in enumerate(parts):
            found = _CACHED.fullmatch(part)
            inner = parts[place + 1 : place + 3]
            if found and len(inner) == 2 and inner[0] == "snapshots":
                return cls(found[2].replace("--", "/", 1), inner[1])
        return None


@dataclass(frozen=True)
class Licence:
    """The licence of a model.

    Attributes:
        id: Its id on the hub; "unknown" where the folder does not tell.
        name: Its name, where the id is "other".
        link: Where its text is: a file of the folder, or an address.
        files: The files that belong to it.
    """

    id: str
    name: str
    link: str
    files: tuple[Path, ...]

    def texts(self) -> dict[str, bytes]:
        """Return the content of the files by name.

        Raises:
            ConversionError: A file is larger than any text of a licence.
        """
        return {file.name: read_regular(file) for file in self.files}


def licence_of(folder: Path) -> Licence:
    """Return the licence of a model folder, by its card, else by the text of its licence file.

    Raises:
        ConversionError: A licence file is a link that leaves the folder, or cannot be read.
    """
    files = tuple(
        entry
        for entry in sorted(folder.iterdir())
        if _LICENCE_FILE.fullmatch(entry.name) and not entry.is_dir()
    )
    for file in files:
        check_link(file, folder)
        check_readable(file)
    texts = [f for f in files if f.name.lower().startswith("licen")]
    stated = _front_matter(folder / CARD)
    link = texts[0].name if texts else _text(stated.get("license_link"))
    found = _text(stated.get("license")).lower()
    if _LICENCE_ID.fullmatch(found):
        return Licence(found, _text(stated.get("license_name")), link, files)
    found, name = _recognised(texts[0]) if texts else ("unknown", "")
    return Licence(found, name, link, files)


def _recognised(file: Path) -> tuple[str, str]:
    """Return id and name of the licence whose text a file holds."""
    text = _start_of(file)[:_BEGINNING]
    words = " ".join(re.findall(r"[\w.]+", text.lower()))
    return next((known for start, known in _TEXTS if start in words), ("other", "of-the-base"))


def _front_matter(card: Path) -> Mapping[str, Any]:
    """Return the metadata of a model card; empty where it has none that can be read."""
    import yaml

    try:
        match = re.match(r"\ufeff?---\s*\n(.*?)\n---\s*(\n|$)", _start_of(card), re.DOTALL)
        content = yaml.safe_load(match[1]) if match else None
    except (ConversionError, OSError, ValueError, yaml.YAMLError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _start_of(file: Path) -> str:
    """Return the first MiB of a file as text."""
    with open(open_regular(file), "rb") as stream:
        return stream.read(_MOST_TEXT).decode(errors="replace")


def _text(value: Any) -> str:
    """Return a value of a card as one line of text; the first one of a list."""
    if isinstance(value, list) and value:
        value = value[0]
    return " ".join(value.split())[:200] if isinstance(value, str) else ""
