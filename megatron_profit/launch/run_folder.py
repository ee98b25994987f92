"""The folder of a run: its name, and the files that say how it was started."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from checkpoint_conversion.engine.output import problem_of_place, write_file
from checkpoint_conversion.torch_dist.writer import TRACKER
from megatron_profit.launch.hub import plain_id
from megatron_profit.recipe.config_file import read_config
from megatron_profit.recipe.errors import LaunchError
from megatron_profit.recipe.flags import Given
from megatron_profit.recipe.request import Request, front_parser

_RUNS = Path("runs")
_LONGEST_NAME = 100
# In each script that a run writes.
_ABOUT = b"# Written by `megatron-profit sft`"
# Flags that a run keeps when it is resumed, although they were derived: its rows, and the form of its
# optimizer's state, which loads with the same one only. The switch was left out where it was off.
_KEPT = ("--seq-length", "--global-batch-size", "--use-distributed-optimizer")
_SWITCH = _KEPT[-1]


@dataclass(frozen=True)
class RunFolder:
    """The folder of a run and its parts."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        """Checkpoints."""
        return self.path / "checkpoints"

    @property
    def export(self) -> Path:
        """The trained model, as a HuggingFace folder."""
        return self.path / "hf"

    @property
    def tensorboard(self) -> Path:
        """Curves."""
        return self.path / "tensorboard"

    @property
    def metrics(self) -> Path:
        """Metrics as JSON lines; Megatron's arguments and log are next to them."""
        return self.path / "metrics.jsonl"

    @property
    def logs(self) -> Path:
        """What each process has printed, by node and start."""
        return self.path / "logs"

    @property
    def config(self) -> Path:
        """The run as a file for --config."""
        return self.path / "config.yaml"

    @property
    def command(self) -> Path:
        """The run as a shell script."""
        return self.path / "command.sh"

    def saved(self, request: Request) -> Path:
        """Return the folder of a command line's checkpoints: the one of --save, else the run's own."""
        return Path(request.values.get("save", self.checkpoints))

    def exported(self, request: Request) -> Path | None:
        """Return the folder of a command line's export: --export-hf's, else the run's own, if any."""
        own = None if "--export-hf" in request.front.without else self.export
        return Path(request.values["export_hf"]) if "export_hf" in request.given else own

    def loads_own(self, request: Request) -> bool:
        """Return whether a command line goes on from the checkpoints that it writes, once there are any."""
        saved, given = self.saved(request), request.values
        is_own = Path(given.get("load", saved)).absolute() == saved.absolute()
        left_out = {"--load", "--save"} & set(request.front.without)
        return is_own and not left_out and "overwrite" not in given

    def is_resumed(self, request: Request) -> bool:
        """Return whether a command line goes on from checkpoints that are there."""
        return self.loads_own(request) and (self.saved(request) / TRACKER).is_file()

    def earlier(self, request: Request) -> EarlierRun:
        """Return the run that was started here before, as far as there is one: it may still be running."""
        tracker = self.saved(request) / TRACKER
        there = [file for file in (self.config, self.command) if file.is_file()]
        files = {file: (file.read_bytes(), file.stat().st_mode) for file in there}
        return EarlierRun(tracker, _stamp(tracker), files)

    def check_place(self) -> None:
        """Refuse a folder that can neither be written to nor made, or that has files of somebody's own.

        Raises:
            LaunchError: Names the place and the remedy.
        """
        is_ours = self.command.is_file() and _ABOUT in self.command.read_bytes()
        for file in (self.command, self.config):
            if file.is_file() and not is_ours:
                raise LaunchError(
                    f"--run {self.path}: {file} was not written by a run and would be replaced; name another "
                    "folder, or move the file"
                )
        if (problem := problem_of_place(self.path)) is not None:
            raise LaunchError(f"--run {self.path}: {problem}")

    def remembered(self, request: Request) -> dict[str, Given]:
        """Return flags that a run to be resumed was started with, by argument."""
        if not (self.is_resumed(request) and self.config.is_file()):
            return {}
        parser, table = front_parser(), request.table
        try:
            words = read_config(self.config, table, frozenset(parser._option_string_actions))
            given = table.parse(parser.parse_known_args(words)[1])
        except LaunchError:  # of another version; the values are derived again
            return {}
        names = [table.dest(flag) for flag in _KEPT if flag not in request.front.without]
        off = {table.dest(_SWITCH): Given.of(_SWITCH, False)}
        return {name: flag for name, flag in {**off, **given}.items() if name in names}

    def write(self, command: Sequence[str], config: str, setup: str = "") -> None:
        """Write the files that say how the run is started.

        Args:
            command: The words of the command.
            config: The text of the file for --config.
            setup: Lines of shell to run before the command.

        Raises:
            LaunchError: The folder cannot be written to.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write_file(self.command, script(command, setup).encode())
            self.command.chmod(0o755)
            write_file(self.config, config.encode())
        except OSError as error:
            raise LaunchError(
                f"--run {self.path}: cannot be written ({error.strerror or error}); free some space or name "
                "another folder"
            ) from error


@dataclass(frozen=True)
class EarlierRun:
    """A run that another start in its folder replaces, unless that one is refused or fails before.

    Attributes:
        tracker: The file that names its newest checkpoint.
        stamp: Identity of that file.
        files: Content and mode of the files that say how it was started.
    """

    tracker: Path
    stamp: tuple[int, int] | None
    files: Mapping[Path, tuple[bytes, int]]

    def restore(self, is_refused: bool) -> None:
        """Write its files again if the other start was refused, or if its checkpoints are still there.

        The next start goes on from these.
        """
        if is_refused or (self.stamp is not None and _stamp(self.tracker) == self.stamp):
            for file, (content, mode) in self.files.items():
                write_file(file, content)
                file.chmod(mode)


def _stamp(file: Path) -> tuple[int, int] | None:
    """Return what tells a file from another one of its name; None where there is none."""
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns


def folder_of(request: Request) -> RunFolder:
    """Return the folder that --run names; else one named after model, objective and data."""
    if request.front.run is not None:
        return RunFolder(Path(request.front.run).expanduser())
    objective = str(request.value("objective") or "profit").rpartition(":")[2]
    method = "-lora" if request.value("lora_rank") else ""
    model, data = (short_name(name) for name in (request.model, request.value("data")[0]))
    return RunFolder(_RUNS / f"{model}-{objective}{method}-{data}"[:_LONGEST_NAME])


def short_name(name: str) -> str:
    """Return a file name's stem or the last part of an id. For example, `Qwen3-4B` of `Qwen/Qwen3-4B@v1`."""
    last = Path(plain_id(name).rstrip("/").partition("@")[0] or name).name
    last = re.sub(r"\.(jsonl?|ndjson|parquet|arrow|csv)(\.gz|\.zst)?$", "", last)
    return re.sub(r"[^\w.+-]+", "_", last).strip(".") or "run"


def script(command: Sequence[str], setup: str = "") -> str:
    """Return a command as a shell script, a flag with its values on each line, after lines of setup."""
    lines: list[str] = []
    for word in command:
        quoted = shlex.quote(word)
        if lines and not word.startswith("--"):
            lines[-1] += f" {quoted}"
        else:
            lines.append(quoted)
    text = " \\\n    ".join(lines)
    about = f"{_ABOUT.decode()}: the command that it started."
    place = f"cd {shlex.quote(str(Path.cwd()))} || exit"
    return "\n".join(["#!/bin/sh", about, place, *filter(None, [setup]), f"exec {text}", ""])
