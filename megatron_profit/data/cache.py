"""Prepared data on disk: made once, found again by content, shared by all processes.

One process of a machine (the leader) prepares, the others wait for the finished folder by looking at the file
system: no collective is involved, so none can time out, and jobs that share a file system share the work.
A folder appears by one rename. Who prepares holds a lock file and touches it; a lock that is no longer
touched is of a process that died, and is taken over.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

from megatron_profit.data.errors import DataError
from megatron_profit.data.examples import ABOUT, Prepared, load, write
from megatron_profit.data.prepare import Preparation, default_workers, prepared_chunks
from megatron_profit.data.records import data_files
from megatron_profit.data.report import PreparationReport
from megatron_profit.data.sources import Source

# To be raised with every change of what is written for the same input.
FORMAT = 1

# What a tokenizer's ids and its chat template depend on.
_TOKENIZER_FILES = ("*.json", "*.jinja", "*.model", "*.txt", "chat_templates/*")
_NOT_OF_THE_TOKENIZER = ("config.json", "generation_config.json", "model.safetensors.index.json")
_BLOCK = 8 * 2**20

POLL_SECONDS = 0.2
TOUCH_SECONDS = 5.0
# A file system over the network may show a touch late.
STALE_SECONDS = 60.0


def default_cache() -> Path:
    """$MEGATRON_PROFIT_CACHE, else `megatron_profit` beside HuggingFace's folders or in the user's cache."""
    if own := os.environ.get("MEGATRON_PROFIT_CACHE"):
        return Path(own)
    if huggingface := os.environ.get("HF_HOME"):
        return Path(huggingface) / "megatron_profit"
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "megatron_profit"


def prepare(
    sources: Sequence[Source],
    tokenizer: Path,
    preparation: Preparation,
    cache: Path,
    *,
    leader: bool = True,
    workers: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> Prepared:
    """The examples of the sources, mapped from the cache; prepared first where they are not in it.

    Args:
        sources: What to read.
        tokenizer: Folder of the tokenizer.
        preparation: How records become examples.
        cache: Folder for prepared data; made where it is missing.
        leader: Whether this process prepares what is missing; the others of a machine wait for it.
        workers: Processes; None for as many as the data are worth.
        progress: Called with a line of text about every two seconds.

    Raises:
        DataError: The data cannot be used, or the cache cannot be written to.
    """
    try:
        cache.mkdir(parents=True, exist_ok=True)
        key = _key(sources, tokenizer, preparation, cache, leader)
        folder = cache / key[:32]
        while not (folder / ABOUT).is_file():
            if not leader:
                time.sleep(POLL_SECONDS)
                continue
            with _lock(folder.with_suffix(".lock"), progress) as mine:
                if mine and not (folder / ABOUT).is_file():
                    count = workers or default_workers(sources)
                    _fill(folder, sources, tokenizer, preparation, count, progress)
        return load(folder)
    except OSError as error:
        raise DataError(
            f"{cache}: the prepared data cannot be written or read there ({error}); give another "
            "folder with --data-cache"
        ) from error


def _fill(
    folder: Path,
    sources: Sequence[Source],
    tokenizer: Path,
    preparation: Preparation,
    workers: int,
    progress: Callable[[str], None] | None,
) -> None:
    for left_over in folder.parent.glob(f"{folder.name}.tmp-*"):
        shutil.rmtree(left_over, ignore_errors=True)
    temporary = folder.with_suffix(f".tmp-{uuid.uuid4().hex}")
    report = PreparationReport()
    chunks = prepared_chunks(
        sources, tokenizer, preparation, report, workers=workers, progress=progress
    )
    about = {
        "sources": [source.path for source in sources],
        "preparation": asdict(preparation),
        "format": FORMAT,
    }
    try:
        write(chunks, report, temporary, about)
        if not (folder / ABOUT).is_file():  # made by a process that was taken for dead, meanwhile
            temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _key(
    sources: Sequence[Source], tokenizer: Path, preparation: Preparation, cache: Path, leader: bool
) -> str:
    """A hash of everything that the prepared examples depend on."""
    import tokenizers
    import transformers

    files = [
        [_digest(file, cache, leader) for file in data_files(Path(source.path))]
        for source in sources
    ]
    names = {
        path
        for pattern in _TOKENIZER_FILES
        for path in tokenizer.glob(pattern)
        if path.name not in _NOT_OF_THE_TOKENIZER
    }
    parts = {
        "format": FORMAT,
        "versions": [transformers.__version__, tokenizers.__version__],
        "files": files,
        # The report names them.
        "paths": [source.path for source in sources],
        "layouts": [
            [dict(s.layout.columns), dict(s.layout.tags), s.layout.sharegpt, s.split]
            for s in sources
        ],
        "tokenizer": [[path.name, _hash_file(path)] for path in sorted(names)],
        "preparation": asdict(preparation),
    }
    return sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _digest(path: Path, cache: Path, leader: bool) -> str:
    """A hash of the content of a file or folder.

    It is kept under the file's place, size and time of change, so that the leader alone reads the file.
    """
    inner = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    stats = [(str(file.resolve()), file.stat()) for file in inner]
    known = repr([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats])
    note = cache / "files" / sha256(known.encode()).hexdigest()
    while not note.is_file():
        if leader:
            found = [(str(file.relative_to(path)), _hash_file(file)) for file in inner]
            _write_whole(note, sha256(repr(found).encode()).hexdigest())
        else:
            time.sleep(POLL_SECONDS)
    return note.read_text(encoding="ascii")


def _hash_file(path: Path) -> str:
    digest = sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _write_whole(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_suffix(f".tmp-{uuid.uuid4().hex}")
    temporary.write_text(text, encoding="ascii")
    temporary.rename(path)


@contextmanager
def _lock(path: Path, progress: Callable[[str], None] | None) -> Iterator[bool]:
    """Holds a lock file: True, or False where another process held it and has let go of it by now."""
    if not _acquire(path):
        _wait(path, progress)
        yield False
        return
    released = threading.Event()
    touching = threading.Thread(target=_touch, args=(path, released), daemon=True)
    touching.start()
    try:
        yield True
    finally:
        released.set()
        touching.join()
        path.unlink(missing_ok=True)


def _acquire(path: Path) -> bool:
    try:
        file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    except FileExistsError:
        return False
    with os.fdopen(file, "w") as lock:
        json.dump({"host": socket.gethostname(), "pid": os.getpid()}, lock)
    return True


def _touch(path: Path, released: threading.Event) -> None:
    while not released.wait(TOUCH_SECONDS):
        try:
            os.utime(path)
        except OSError:
            return  # taken over: this process was silent for too long


def _wait(path: Path, progress: Callable[[str], None] | None) -> None:
    """Until the lock is gone; that of a dead process is removed."""
    if progress:
        progress(f"waiting for another process that prepares the same data ({path})")
    seen, since = None, time.monotonic()
    while True:
        try:
            touched = path.stat().st_mtime_ns
        except FileNotFoundError:
            return
        if touched != seen:  # clocks of machines differ: only change counts
            seen, since = touched, time.monotonic()
        if time.monotonic() - since > STALE_SECONDS or _died_here(path):
            _remove(path)
            return
        time.sleep(POLL_SECONDS)


def _died_here(path: Path) -> bool:
    """Whether the holder was a process of this machine that is no more."""
    try:
        holder: dict[str, Any] = json.loads(path.read_text())
        if holder["host"] != socket.gethostname():
            return False
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return True
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return False


def _remove(path: Path) -> None:
    """Removes a stale lock; of several processes that try, one succeeds."""
    aside = path.with_suffix(f".stale-{uuid.uuid4().hex}")
    try:
        path.rename(aside)
    except FileNotFoundError:
        return
    aside.unlink()
