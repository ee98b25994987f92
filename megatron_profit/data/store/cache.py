"""Prepared data on disk: made once, found again by content, checked by every start, shared by all processes.

One process of a machine (the leader) prepares. The others wait for the finished folder by looking at the file
system: no collective is involved, so none can time out, and jobs that share a file system share the work.
A folder appears by one rename. The preparing process holds a lock, which the kernel releases if it dies. A
damaged folder is renamed and made again.

The lock saves work and protects no data: each process writes into a folder of its own and the first rename
wins. So two processes that prepare at once, on a file system without locks, do no harm.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import asdict, replace
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path

from checkpoint_conversion.engine.lock import lock_file
from checkpoint_conversion.engine.output import whole_file
from checkpoint_conversion.errors import ConversionError
from megatron_profit.data.errors import DataError
from megatron_profit.data.files.bounded import open_regular
from megatron_profit.data.files.sources import DataSource
from megatron_profit.data.files.splits import is_dataset
from megatron_profit.data.render.tokenizer_files import decides_ids, tokenizer_paths
from megatron_profit.data.report import DataReport
from megatron_profit.data.store.checksums import is_usable, machine_name
from megatron_profit.data.store.examples import ABOUT, FILES, TokenizedData, load, write
from megatron_profit.data.store.prepare import (
    Preparation,
    default_workers,
    file_names,
    tokenize_records,
)

_BLOCK = 8 * 2**20

POLL_SECONDS = 0.2
# Silence after which the unfinished folder of another machine is taken for a dead process's.
STALE_SECONDS = 600.0


def default_cache() -> Path:
    """Return the folder for prepared data.

    It is $MEGATRON_PROFIT_CACHE, else `megatron_profit` next to HuggingFace's folders or in the user's cache.

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


def load_or_build(
    sources: Sequence[DataSource],
    tokenizer: Path,
    preparation: Preparation,
    cache: Path,
    *,
    leader: bool = True,
    workers: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> TokenizedData:
    """Return the examples of the sources, mapped from the cache.

    They are prepared first if they are not in the cache.

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
            with _lock(folder, progress):
                if not folder.exists():
                    with _reading("the data"):
                        count = workers or default_workers(sources)
                    _fill(folder, sources, tokenizer, preparation, count, progress, states)
        return _under_these_paths(load(folder, file_names(files)), folder, sources)
    except (OSError, ConversionError) as error:
        raise DataError(
            f"{cache}: the prepared data cannot be written or read there ({error}); give another "
            "folder with --data-cache"
        ) from error


def _under_these_paths(
    prepared: TokenizedData, folder: Path, sources: Sequence[DataSource]
) -> TokenizedData:
    """Return the data with the report's places under this run's paths.

    The same files may have been prepared under other paths.
    """
    about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
    paths = dict(zip(about["sources"], (source.path for source in sources), strict=True))
    return replace(prepared, report=prepared.report.under(paths))


def _fill(
    folder: Path,
    sources: Sequence[DataSource],
    tokenizer: Path,
    preparation: Preparation,
    workers: int,
    progress: Callable[[str], None] | None,
    states: Sequence[_State],
) -> None:
    _remove_left_overs(folder)
    temporary = folder.with_suffix(f".tmp-{machine_name()}-{uuid.uuid4().hex}")
    report = DataReport()
    chunks = tokenize_records(
        sources, tokenizer, preparation, report, workers=workers, progress=progress
    )
    about = {
        "sources": [source.path for source in sources],
        "preparation": asdict(preparation),
    }
    try:
        write(chunks, report, temporary, about)
        _check_unchanged(states)
        if not folder.exists():  # made meanwhile, on a file system without locks
            temporary.rename(folder)
    except FileNotFoundError:
        # Another machine, which does not see this one's lock, removed the files after a long silence.
        if temporary.exists():
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _lock(
    path: Path, progress: Callable[[str], None] | None = None
) -> AbstractContextManager[bool]:
    """Hold the lock of a file or folder that is about to be made; wait for a process that makes it."""
    lock = path.with_suffix(".lock")
    told = f"waiting for another process that prepares the same data ({lock})"
    return lock_file(lock, waiting=lambda: progress and progress(told))


def _remove_left_overs(folder: Path) -> None:
    """Remove the unfinished folders of dead processes; `folder` is the one whose lock is held."""
    # The own lock, made a moment ago, tells the file system's time.
    now = folder.with_suffix(".lock").stat().st_mtime
    for left_over in folder.parent.glob("*.tmp-*"):
        of = left_over.with_suffix("")
        with suppress(OSError, ConversionError), ExitStack() as stack:
            if of != folder and not stack.enter_context(lock_file(of.with_suffix(".lock"), 0)):
                continue
            latest = max(path.stat().st_mtime for path in (left_over, *left_over.iterdir()))
            is_from_here = left_over.suffix.startswith(f".tmp-{machine_name()}-")
            if is_from_here or now - latest > STALE_SECONDS:
                shutil.rmtree(left_over, ignore_errors=True)


def _key(
    sources: Sequence[DataSource],
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
        "versions": [transformers.__version__, tokenizers.__version__, version("jinja2")],
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
    """Return name and hash of each file that a tokenizer's ids and its chat template depend on."""
    return [
        [str(path.relative_to(tokenizer)), _hash_file(path)]
        for path in tokenizer_paths(tokenizer)
        if decides_ids(path)
    ]


@functools.cache
def _code() -> str:
    """Return a hash of all code of the data: any change of it may change the written data."""
    return _hash_code(Path(__file__).parents[1])


def _hash_code(package: Path) -> str:
    files = sorted(package.rglob("*.py"))
    hashes = [(str(file.relative_to(package)), _hash_file(file)) for file in files]
    return sha256(repr(hashes).encode()).hexdigest()


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


def _inner(path: Path, above: frozenset[Path] = frozenset()) -> list[Path]:
    """Return the regular files in a folder, or a file itself.

    A link in the folder is followed if it leads to a saved data set, as the link of a split may. `above` are
    the folders that lead to `path`: a link to one of them leads in a circle.
    """
    if not path.is_dir():
        return [path] if not above or path.is_file() else []
    if above and path.is_symlink() and not is_dataset(path):
        return []
    chain = above | {path.resolve()}
    if chain == above:
        return []
    entries: list[Path] = []
    with suppress(PermissionError):
        entries = list(path.iterdir())
    return sorted(file for entry in entries for file in _inner(entry, chain))


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
    if not (digest := _noted(note)):
        with _lock(note):
            if not (digest := _noted(note)):
                found = [(str(file.relative_to(path)), _hash_file(file)) for file in inner]
                digest = sha256(repr(found).encode()).hexdigest()
                # Without locks, another process may be writing the same note.
                with suppress(FileExistsError, FileNotFoundError), whole_file(note) as stream:
                    stream.write(f"{note.name} {digest}".encode())
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
