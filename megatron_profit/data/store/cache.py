"""Prepared data on disk: made once, found again by content, checked by every start, shared by all processes.

One process of a machine (the leader) prepares. The others wait for the finished folder by looking at the file
system: no collective is involved, so none can time out, and jobs that share a file system share the work.
A folder appears by one rename. The preparing process holds a lock file and touches it. If a lock is no longer
touched, its process has died, and another one takes it over. A damaged folder is renamed and made again.

The lock saves work and protects no data: each process writes into a folder of its own and the first rename
wins. So a process that was wrongly taken for dead does no harm.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from megatron_profit.data.errors import DataError
from megatron_profit.data.files.bounded import open_regular
from megatron_profit.data.files.sources import Source
from megatron_profit.data.render.tokenizer_files import decides_ids, tokenizer_paths
from megatron_profit.data.report import PreparationReport
from megatron_profit.data.store.checksums import is_usable
from megatron_profit.data.store.examples import ABOUT, FILES, Prepared, load, write
from megatron_profit.data.store.prepare import (
    Preparation,
    default_workers,
    file_names,
    prepared_chunks,
)

_BLOCK = 8 * 2**20

POLL_SECONDS = 0.2
TOUCH_SECONDS = 5.0
# A network file system may show a touch late.
STALE_SECONDS = 60.0


def default_cache() -> Path:
    """Return $MEGATRON_PROFIT_CACHE, else `megatron_profit` next to HuggingFace's folders or in the user's
    cache.

    Raises:
        DataError: The user has no home folder.
    """
    if own := os.environ.get("MEGATRON_PROFIT_CACHE"):
        return Path(own)
    if huggingface := os.environ.get("HF_HOME"):
        return Path(huggingface) / "megatron_profit"
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "megatron_profit"
    try:
        return Path.home() / ".cache" / "megatron_profit"
    except RuntimeError as error:
        raise DataError(
            "there is no folder for prepared data: HOME is not set, and the user has no entry in passwd; "
            "give one with --data-cache or $MEGATRON_PROFIT_CACHE"
        ) from error


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
    """Return the examples of the sources, mapped from the cache; they are prepared first if they are not in
    it.

    Args:
        sources: The sources to read.
        tokenizer: Folder of the tokenizer.
        preparation: The settings with which records become examples.
        cache: Folder for prepared data; made if it is missing.
        leader: Whether this process prepares missing data; the others of a machine wait for it.
        workers: Processes; None for as many as the data are worth.
        progress: Called with a line of text about every two seconds.

    Raises:
        DataError: The data cannot be used, or the cache cannot be written to.
    """
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _reading("the data"):
            files = [source.files() for source in sources]
        states = _states(files)
        key = _key(sources, files, tokenizer, preparation, cache)
        folder = cache / key[:32]
        for note in filter(None, (source.left_out for source in sources)):
            if progress:
                progress(note)
        while not is_usable(folder, FILES, progress):
            if not leader:
                time.sleep(POLL_SECONDS)
                continue
            token = uuid.uuid4().hex
            with _lock(folder.with_suffix(".lock"), token, progress) as mine:
                if mine and not folder.exists():
                    with _reading("the data"):
                        count = workers or default_workers(sources)
                    _fill(folder, token, sources, tokenizer, preparation, count, progress, states)
        return _under_these_paths(load(folder, file_names(files)), folder, sources)
    except OSError as error:
        raise DataError(
            f"{cache}: the prepared data cannot be written or read there ({error}); give another "
            "folder with --data-cache"
        ) from error


def _under_these_paths(prepared: Prepared, folder: Path, sources: Sequence[Source]) -> Prepared:
    """Return the data with the report's places under this run's paths.

    The same files may have been prepared under other paths.
    """
    about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
    paths = dict(zip(about["sources"], (source.path for source in sources), strict=True))
    return replace(prepared, report=prepared.report.under(paths))


def _fill(
    folder: Path,
    token: str,
    sources: Sequence[Source],
    tokenizer: Path,
    preparation: Preparation,
    workers: int,
    progress: Callable[[str], None] | None,
    states: Sequence[_State],
) -> None:
    _remove_left_overs(folder)
    temporary = _temporary(folder, token)
    report = PreparationReport()
    chunks = prepared_chunks(
        sources, tokenizer, preparation, report, workers=workers, progress=progress
    )
    about = {
        "sources": [source.path for source in sources],
        "preparation": asdict(preparation),
    }
    try:
        write(chunks, report, temporary, about)
        _check_unchanged(states)
        if not folder.exists():  # made by a process that was taken for dead, meanwhile
            temporary.rename(folder)
    except FileNotFoundError:
        # This process was silent for so long that its successor removed its files.
        if temporary.exists():
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _temporary(folder: Path, token: str) -> Path:
    """Return the folder into which the holder of the lock `token` writes."""
    return folder.with_suffix(f".tmp-{token}")


def _remove_left_overs(folder: Path) -> None:
    """Remove files that dead processes left of any data; they touched these folders as they did
    their locks.
    """
    # The own lock, touched a moment ago, tells the file system's time.
    now = folder.with_suffix(".lock").stat().st_mtime
    for left_over in folder.parent.glob("*.tmp-*"):
        try:
            silent = now - left_over.stat().st_mtime
        except FileNotFoundError:
            continue
        if silent > STALE_SECONDS:
            shutil.rmtree(left_over, ignore_errors=True)


def _key(
    sources: Sequence[Source],
    files: Sequence[Sequence[Path]],
    tokenizer: Path,
    preparation: Preparation,
    cache: Path,
) -> str:
    """Return a hash of everything that the prepared examples depend on; `files` are each source's files."""
    import tokenizers
    import transformers

    # A name decides how a file is read and where a record stands; the folder does not matter.
    contents = [[(path.name, content_digest(path, cache)) for path in paths] for paths in files]
    parts = {
        "code": _code(),
        "versions": [transformers.__version__, tokenizers.__version__],
        "files": contents,
        "layouts": [
            [dict(s.layout.columns), dict(s.layout.tags), s.layout.sharegpt, s.split]
            for s in sources
        ],
        "tokenizer": tokenizer_files(tokenizer),
        "preparation": asdict(preparation),
    }
    return sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def tokenizer_files(tokenizer: Path) -> list[list[str]]:
    """Return name and hash of each file in a folder that a tokenizer's ids and its chat
    template depend on.
    """
    return [
        [str(path.relative_to(tokenizer)), _hash_file(path)]
        for path in tokenizer_paths(tokenizer)
        if decides_ids(path)
    ]


@functools.cache
def _code() -> str:
    """Return a hash of this package: any change of it may change the written data."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return sha256(repr([(file.name, _hash_file(file)) for file in files]).encode()).hexdigest()


@contextmanager
def _reading(what: str | Path) -> Iterator[None]:
    """Distinguish errors of the data from errors of the cache: raise the former as DataError."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{what}: cannot be read ({error}); check the file and its permissions"
        ) from error


type _State = tuple[Path, int, int, int]


def _states(files: Sequence[Sequence[Path]]) -> list[_State]:
    """Return path, size, time of change and number of each file that is read, folders opened."""
    with _reading("the data"):
        inner = [file for paths in files for path in paths for file in _inner(path)]
        return [(file, s.st_size, s.st_mtime_ns, s.st_ino) for file in inner for s in [file.stat()]]


def _check_unchanged(states: Sequence[_State]) -> None:
    """Check that no data file has changed since it was looked at: the hashed content was the content read."""
    for state in states:
        if _states([[state[0]]]) != [state]:
            raise DataError(
                f"{state[0]}: changed while it was read; wait until it is complete and start again"
            )


def _inner(path: Path) -> list[Path]:
    """Yield the regular files in a folder, or a file itself."""
    return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]


def content_digest(path: Path, cache: Path) -> str:
    """Return a hash of the content of a file or folder.

    The hash is kept in `cache` under all that the file system tells of the file. So a file that seems
    unchanged is read once. A file that was copied, restored or mounted again is read again.

    Raises:
        DataError: A file cannot be read, or is no regular file.
        OSError: The cache cannot be written to.
    """
    with _reading(path):
        inner = _inner(path)
        known = [
            (str(file.resolve()), s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino)
            for file in inner
            for s in [file.stat()]
        ]
    note = cache / "files" / sha256(repr(known).encode()).hexdigest()
    note.parent.mkdir(parents=True, exist_ok=True)
    while not (digest := _noted(note)):
        with _lock(note.with_suffix(".lock"), uuid.uuid4().hex, None) as mine:
            if mine:
                found = [(str(file.relative_to(path)), _hash_file(file)) for file in inner]
                _write_whole(note, f"{note.name} {sha256(repr(found).encode()).hexdigest()}")
    return digest


def _noted(note: Path) -> str:
    """Return the digest in a note; "" where there is none, half of one, or another note's."""
    try:
        text = note.read_text(encoding="ascii")
    except (FileNotFoundError, ValueError):
        return ""
    found = re.fullmatch(f"{note.name} ([0-9a-f]{{64}})", text)
    return found[1] if found else ""


def _hash_file(path: Path) -> str:
    digest = sha256()
    with _reading(path), open_regular(path) as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _write_whole(path: Path, text: str) -> None:
    temporary = path.with_suffix(f".tmp-{uuid.uuid4().hex}")
    temporary.write_text(text, encoding="ascii")
    temporary.rename(path)


@contextmanager
def _lock(path: Path, token: str, progress: Callable[[str], None] | None) -> Iterator[bool]:
    """Hold a lock file: True; or False if another process held it and has released it by now.

    `token` belongs to this holder alone: no process touches or removes another's lock by mistake.
    """
    if not _acquire(path, token):
        _wait(path, progress)
        yield False
        return
    released = threading.Event()
    touching = threading.Thread(target=_touch, args=(path, token, released), daemon=True)
    touching.start()
    try:
        yield True
    finally:
        released.set()
        touching.join()
        _remove(path, token)


def _acquire(path: Path, token: str) -> bool:
    try:
        file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    except FileExistsError:
        return False
    with os.fdopen(file, "w") as lock:
        json.dump({"token": token, "processes": _processes(), "pid": os.getpid()}, lock)
    return True


def _holder(path: Path) -> dict[str, Any]:
    """Return the content of a lock; empty where it is gone, or not written yet."""
    try:
        holder = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return holder if isinstance(holder, dict) else {}


def _processes() -> str | None:
    """Return a name of the set of processes among which a process number is unique.

    It is one boot of a machine, in one container. None where the system does not say.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _touch(path: Path, token: str, released: threading.Event) -> None:
    temporary = _temporary(path.with_suffix(""), token)
    while not released.wait(TOUCH_SECONDS):
        if _holder(path).get("token") != token:
            return  # taken over: this process was silent for too long
        for touched in (path, temporary):
            with suppress(OSError):
                os.utime(touched)


def _wait(path: Path, progress: Callable[[str], None] | None) -> None:
    """Wait until the lock is gone; a dead process's lock is removed."""
    if progress:
        progress(f"waiting for another process that prepares the same data ({path})")
    seen, since = None, time.monotonic()
    while True:
        try:
            holder, touched = _holder(path), path.stat().st_mtime_ns
        except FileNotFoundError:
            return
        state = (touched, holder.get("token"))
        if state != seen:  # clocks of machines differ: only change counts
            seen, since = state, time.monotonic()
        died = _died_here(holder)
        if died:
            shutil.rmtree(
                _temporary(path.with_suffix(""), holder.get("token", "")), ignore_errors=True
            )
        if died or time.monotonic() - since > STALE_SECONDS:
            _remove(path, holder.get("token"))
            return
        time.sleep(POLL_SECONDS)


def _died_here(holder: Mapping[str, Any]) -> bool:
    """Return whether the holder was one of the processes that are seen here, and has ended."""
    if not holder or holder.get("processes") is None or holder["processes"] != _processes():
        return False
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return True
    except (OSError, KeyError, TypeError):
        return False
    return False


def _remove(path: Path, token: str | None) -> None:
    """Remove the lock, if it still has this token."""
    if _holder(path).get("token") == token:
        path.unlink(missing_ok=True)
