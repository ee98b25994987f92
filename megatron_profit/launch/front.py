"""`megatron-profit sft`: derive the ordinary flags from model and data, print them, and start them.

With `--model` or `--config` this is the front. With `--hf-model` it is the training entry itself, in one
process, as `python -m megatron_profit.sft` is.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from importlib import metadata
from typing import TYPE_CHECKING

from checkpoint_conversion.cli import FlagHelp
from checkpoint_conversion.errors import ConversionError, printable
from megatron_profit.data.errors import DataError
from megatron_profit.flags import ArgumentsError
from megatron_profit.recipe.errors import LaunchError
from megatron_profit.recipe.request import front_parser, read_request
from megatron_profit.training.process.interrupts import end_on_interrupt

if TYPE_CHECKING:
    from megatron_profit.launch.prepare import Launch

# Arguments that a command line must give, or its file.
REQUIRED = ("model", "data")
# Exit code for bad input.
REFUSED = 2
_IN_A_RANK = (
    "--model and --config start all processes of a run, and RANK is set in the environment, as in one of "
    "these processes; unset RANK (some clusters set it), or give torchrun -m megatron_profit.sft the flag "
    "--hf-model"
)
_USAGE = "megatron-profit sft --model ID --data FILE… [flags], or --config FILE"
_DESCRIPTION = """\
Train a model on chats. --model and --data are enough; all other flags follow from model, data and machine,
and are printed as one command. Given flags stay as they are. --help-all shows Megatron's flags as well.
With --hf-model DIR in place of --model, all flags are the training's own, in one process."""


def main(argv: Sequence[str] | None = None) -> int:
    """Train; return the exit code: 2 for bad input, else the training's."""
    words = sys.argv[1:] if argv is None else list(argv)
    try:
        text = help_text(words)
    except LaunchError as error:
        return _refuse(error)
    if text is not None:
        print(text)
        return 0
    if is_plain(words):
        if {"--model", "--config"} & _flags_of(words):
            return _refuse(LaunchError(_IN_A_RANK))
        from megatron_profit.sft import main as train

        train()
        return 0
    return launch(words)


def help_text(words: Sequence[str]) -> str | None:
    """Return the help or the version that a command line asks for; None if it asks for neither.

    `--help` shows this command's flags and the training's, `--help-all` Megatron's as well.
    """
    if "--version" in words:
        return f"megatron-profit {metadata.version('megatron-profit')}"
    if not {"-h", "--help", "--help-all"} & set(words):
        return None
    from megatron_profit.training.arguments.help import add_shown_flags

    parser = front_parser()
    parser.formatter_class = FlagHelp
    parser.usage, parser.description = _USAGE, _DESCRIPTION
    if "--help-all" in words:
        from megatron_profit.sft import help_text as help_of_training

        return f"{parser.format_help()}\n{help_of_training(words)}"
    try:
        add_shown_flags(parser, words)
    except ArgumentsError as error:
        raise LaunchError(str(error)) from error
    for action in parser._actions:
        action.required = action.dest in REQUIRED
    return parser.format_help()


def is_plain(words: Sequence[str]) -> bool:
    """Return whether a command line is for the training entry itself: under torchrun, or with --hf-model."""
    flags = _flags_of(words)
    return "RANK" in os.environ or ("--hf-model" in flags and not {"--model", "--config"} & flags)


def _flags_of(words: Sequence[str]) -> set[str]:
    return {word.partition("=")[0] for word in words}


def launch(words: Sequence[str]) -> int:
    """Derive, print and start what a command line of the front asks for."""
    end_on_interrupt()
    try:
        request = read_request(words)
        from megatron_profit.launch.prepare import prepare

        ready = prepare(request)
        return _run(ready)
    except (LaunchError, ConversionError, DataError, OSError) as error:
        return _refuse(error)


def _refuse(error: Exception) -> int:
    lines = "\n".join(map(printable, str(error).split("\n")))
    print(f"megatron-profit sft: error: {lines}", file=sys.stderr, flush=True)
    return REFUSED


def _write_files(ready: Launch) -> None:
    from megatron_profit.launch.processes import exports

    ready.run.write(["torchrun", *ready.words], ready.config, exports(ready.checkpoint))


def _run(ready: Launch) -> int:
    """Print a run and start it; return its exit code."""
    from megatron_profit.launch.processes import start, tell

    for line in ready.lines:
        tell(printable(line))
    command = shlex.join(["torchrun", *ready.words])
    if ready.request.front.dry_run:
        print(command)
        return 0
    goes_on = ready.run.is_resumed(ready.request)
    earlier = None if goes_on else ready.run.earlier(ready.request)
    if not goes_on:
        _write_files(ready)
    begins = "goes on from its newest checkpoint" if goes_on else "starts"
    resumes = "; the same command resumes it" * ready.run.loads_own(ready.request)
    tell(f"run: {ready.run.path} {begins}{resumes}. Command ({ready.run.command}):")
    print(command, flush=True)
    code = REFUSED
    try:
        code = start(ready.words, ready.processes, ready.machine.cores, ready.checkpoint)
    finally:
        if earlier is not None:
            earlier.restore(is_refused=code == REFUSED)
    if goes_on and code != REFUSED:  # the training has compared the flags with the run's
        _write_files(ready)
    export = ready.run.exported(ready.request)
    if code == 0 and export is not None and (export / "config.json").is_file():
        tell(f"the trained model is in {export}")
    return code
