"""The training entry: `torchrun … -m megatron_profit.sft …` (console script `megatron-profit-sft`).

It chooses the device before anything imports Megatron; the rest is in `megatron_profit.training.main`.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from checkpoint_conversion.errors import ConversionError
from megatron_profit.flags import ArgumentsError
from megatron_profit.megatron_patches import DEVICES, activate
from megatron_profit.megatron_patches.enduring import endure_console
from megatron_profit.recipe.errors import LaunchError
from megatron_profit.training.arguments.platform import check_restarts
from megatron_profit.training.process.console import fail, print_rank_0
from megatron_profit.training.process.interrupts import end_on_interrupt
from megatron_profit.training.process.launcher import die_with_launcher
from megatron_profit.training.process.quiet import begin_quiet
from megatron_profit.training.process.ranks import world_size

_HELP, _HELP_ALL = {"-h", "--help"}, "--help-all"


def main() -> None:
    """Run supervised fine-tuning with the flags of the command line."""
    # Before the imports, which take long.
    endure_console()
    end_on_interrupt()
    die_with_launcher()
    argv = sys.argv[1:]
    text = help_text(argv)
    if text is not None:
        print_rank_0(text)
        return
    refuse_early(argv)
    if "--quiet" in argv:
        begin_quiet()
    device = start(argv)

    from megatron_profit.training import main

    main.main(argv, device)


def help_text(argv: Sequence[str]) -> str | None:
    """Return the help that the command line asks for, None if it asks for none.

    `--help` is fast, because it imports neither torch nor Megatron.
    """
    if _HELP_ALL not in argv and not _HELP.intersection(argv):
        return None
    try:
        if _HELP_ALL in argv:
            start(argv)
            from megatron_profit.training.arguments.command_line import full_parser

            return full_parser(argv).format_help()
        from megatron_profit.training.arguments.help import own_help

        return own_help(argv)
    except ArgumentsError as error:
        fail(error)


def refuse_early(argv: Sequence[str]) -> None:
    """End the process where the command line, or torchrun's, is wrong in a way that shows without torch and
    Megatron.
    """
    from megatron_profit.recipe.check import check_command_line

    try:
        check_restarts()
        check_command_line(argv, world_size())
    except (ArgumentsError, LaunchError, ConversionError) as error:
        fail(error)


def start(argv: Sequence[str]) -> str:
    """Make the process ready for Megatron, before anything imports it.

    --device is read here by itself: the parser of all flags imports Megatron, which needs the device first.

    Args:
        argv: The flags of the run, without the program's name.

    Returns:
        The device that they ask for, "cuda" or "cpu".
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--device", choices=DEVICES, default="auto")
    # Tensor parallelism overlaps communication only with this, and Megatron insists on it.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    try:
        _stand_in_for_torchrun()
        return activate(parser.parse_known_args(argv)[0].device)
    except (argparse.ArgumentError, RuntimeError, ValueError) as error:
        fail(error)


def _stand_in_for_torchrun() -> None:
    """Let a single process run without torchrun, which sets these variables.

    Raises:
        ValueError: Another program has set some of them, so that the process would wait for others.
    """
    if "RANK" in os.environ:
        return
    if (processes := os.environ.get("WORLD_SIZE", "1")) != "1":
        raise ValueError(
            f"WORLD_SIZE is {processes} in the environment, and RANK is missing; unset WORLD_SIZE for a run "
            "of one process, or start all of them with torchrun"
        )
    # Nobody else has to know the port, so the store may take any free one at the moment when it opens.
    variables = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1"}
    for name, value in {**variables, "MASTER_PORT": 0}.items():
        os.environ.setdefault(name, str(value))


if __name__ == "__main__":
    main()
