"""`--help` of the training entry: this project's flags, without importing torch or Megatron.

`--help-all` shows Megatron's flags as well.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from checkpoint_conversion.cli import FlagHelp
from megatron_profit.training.arguments.command_line import REQUIRED, add_arguments
from megatron_profit.training.step.objective_flags import load_outside_objective

_USAGE = (
    "torchrun … -m megatron_profit.sft --hf-model DIR --data FILE… --seq-length N --micro-batch-size N "
    "--lr X --train-iters N [flags]"
)
_DESCRIPTION = """\
Supervised fine-tuning on Megatron-Core. Every native Megatron flag works too.
These are this project's flags, and the native flags that a run needs or often has.
--help-all shows all native flags as well."""


def own_help(argv: Sequence[str]) -> str:
    """Return the help of this project's flags and of some native ones.

    The options of an objective from outside are among them if the command line names it with --objective.

    Raises:
        ArgumentsError: The objective cannot be imported, or an option of it has the name of another one.
    """
    parser = argparse.ArgumentParser(
        usage=_USAGE,
        description=_DESCRIPTION,
        formatter_class=FlagHelp,
        allow_abbrev=False,
    )
    parser.add_argument("--help-all", action="store_true", help="Show Megatron's flags as well.")
    add_shown_flags(parser, argv)
    for action in parser._actions:
        action.required = action.dest in REQUIRED
    return parser.format_help()


def add_shown_flags(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    """Add the flags that help shows: this project's and some native ones.

    The arguments and errors are as for `own_help`.
    """
    load_outside_objective(argv)
    add_arguments(parser)
    _add_native_flags(parser.add_argument_group("native flags that a run needs or often has"))


def _add_native_flags(group: argparse._ArgumentGroup) -> None:
    def add(flag: str, metavar: str | None, help: str) -> None:
        switch = {"action": "store_true"} if metavar is None else {"metavar": metavar}
        group.add_argument(flag, help=help, **switch)  # type: ignore[arg-type]

    add("--seq-length", "N", "Positions of a row.")
    add("--micro-batch-size", "N", "Rows that a rank computes at a time.")
    add("--global-batch-size", "N", "Rows of a step, over all ranks.")
    add("--lr", "X", "Largest learning rate.")
    add("--train-iters", "N", "Steps; give these, --epochs or --train-samples.")
    add("--bf16", None, "Train in bfloat16.")
    add("--save", "DIR", "Folder for checkpoints and metrics.")
    add("--save-interval", "N", "Steps between two checkpoints (default 500).")
    add("--load", "DIR", "Folder of the checkpoint to resume from, usually the one of --save.")
    add("--pretrained-checkpoint", "DIR", "Megatron checkpoint whose weights the run starts from.")
    add("--eval-interval", "N", "Steps between two evaluations (default 100).")
    add("--eval-iters", "N", "Batches of an evaluation; by default all validation data.")
    add("--tensor-model-parallel-size", "N", "Ranks that share each layer (default 1).")
    add("--pipeline-model-parallel-size", "N", "Ranks that share the stack of layers (default 1).")
    add("--context-parallel-size", "N", "Ranks that share each row (default 1).")
