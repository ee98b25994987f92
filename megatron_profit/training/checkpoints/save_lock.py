"""A lock on the folder of checkpoints: two runs in it would overwrite and remove each other's checkpoints."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from io import TextIOWrapper
from pathlib import Path

from checkpoint_conversion.engine.lock import NoLocksError, is_in_place, take_lock
from checkpoint_conversion.engine.regular_files import open_to_append
from checkpoint_conversion.errors import ConversionError
from megatron_profit.training.checkpoints.folder import CheckpointError
from megatron_profit.training.checkpoints.save_folder import checkpoints_in
from megatron_profit.training.process.console import print_rank_0, warn_rank_0
from megatron_profit.training.process.ranks import is_first_rank

NAME = ".in_use"
# Seconds that a run gets to leave while it is being stopped; a network file system notices late that it died.
_PATIENCE_SECONDS = 180
# Closing any descriptor of the file would release the lock.
_held: dict[Path, TextIOWrapper] = {}
# Descriptors of these folders: while one is open, no other folder can get its inode.
_folders: dict[Path, int] = {}


def hold_new(save: Path) -> None:
    """Hold a folder that did not exist when the run looked for checkpoints.

    Raises:
        CheckpointError: As for `hold`, or another run has used the folder meanwhile.
    """
    if hold(save) and any(save.glob("iter_*")):
        raise CheckpointError(
            f"--save {save}: another run has written checkpoints since this one was started; give the same "
            "command again to go on from them"
        )


def hold_still(save: Path) -> None:
    """Make a folder again that was removed or moved away while this run went on, and hold it.

    Raises:
        CheckpointError: Another run has the folder, or has left checkpoints there, or it cannot be written.
    """
    save = save.resolve()
    if save not in _held or is_in_place(save / NAME, _held[save].fileno()):
        return
    is_new = not is_in_place(save, _folders[save])
    os.close(_folders.pop(save))
    _held.pop(save).close()
    hold(save, patience=0)
    if not is_new:
        return
    warn_rank_0(f"--save {save} was removed while the run was going on; it is made anew")
    if checkpoints_in(save):
        raise CheckpointError(
            f"--save {save}: the folder was removed while this run was going on, and another run has written "
            "checkpoints there; name another folder"
        )


def hold(save: Path, patience: float = _PATIENCE_SECONDS) -> bool:
    """Keep other runs out of a folder until the first rank ends, however it ends. The first rank calls this.

    The kernel holds the lock, on a file `.in_use` that names the run. A file that is left over does not
    count. Other ranks, and later calls, return at once.

    Args:
        save: The folder; made if it does not exist.
        patience: Seconds to wait for a run that has it.

    Returns:
        Whether this call took the lock.

    Raises:
        CheckpointError: Another run has the folder, or it cannot be written.
    """
    save = save.resolve()
    if save in _held or not is_first_rank():
        return False
    try:
        save.mkdir(parents=True, exist_ok=True)
        file = os.fdopen(open_to_append(save / NAME), "a+", encoding="utf-8")
    except ConversionError as error:
        raise CheckpointError(f"--save {save} cannot be held: {error}") from error
    except OSError as error:
        raise CheckpointError(
            f"--save {save} cannot be written: {error.strerror}; name another folder"
        ) from error
    try:
        _wait_for(file, save, patience)
    except BaseException:
        file.close()
        raise
    _held[save], _folders[save] = file, os.open(save, os.O_RDONLY | os.O_DIRECTORY)
    with contextlib.suppress(OSError):  # a full disk: the lock is held all the same
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}, since {time.ctime()}")
        file.flush()
        os.fsync(file.fileno())
    return True


def _wait_for(file: TextIOWrapper, save: Path, patience: float) -> None:
    def holder() -> str:
        file.seek(0)
        return file.read() or "another process"

    def waiting() -> None:
        print_rank_0(f"> waiting for the run that uses --save {save} to end ({holder()})")

    try:
        is_held = take_lock(file.fileno(), patience, waiting)
    except NoLocksError:
        warn_rank_0(
            f"{save} is on a file system without locks; nothing keeps a second run out of it"
        )
        return
    except OSError as error:
        raise CheckpointError(f"--save {save} cannot be locked: {error.strerror}") from error
    if not is_held:
        raise CheckpointError(
            f"--save {save} is in use by another run ({holder()}); end that one, or name another folder. "
            f"If its machine is gone and the lock is still there, remove {save / NAME}"
        )
