"""The flags: this project's flags next to every native Megatron flag, parsed before Megatron starts."""

from __future__ import annotations

import argparse
import copy
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

from checkpoint_conversion.cli import FlagHelp
from megatron_profit.data.flags import add_data_flags
from megatron_profit.evaluation.after_training import EvalTasks
from megatron_profit.flags import ArgumentsError, add_flags, flag_of, nearest
from megatron_profit.megatron_patches import DEVICES
from megatron_profit.publish import Publication
from megatron_profit.training.arguments.lora import LoraFlags
from megatron_profit.training.checkpoints.keep_options import KeepOptions
from megatron_profit.training.checkpoints.run_record import GUARDED
from megatron_profit.training.monitoring.guards import GuardOptions
from megatron_profit.training.step.objective_flags import (
    add_objective_flags,
    add_option_flags,
    load_outside_objective,
)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        unknown = re.match(r"unrecognized arguments: (--[^ =]+)", message)
        if unknown:
            message += nearest(unknown[1], self._option_string_actions)
        raise ArgumentsError(message)


class _HelpFormatter(FlagHelp):
    """Shows the help of Megatron's flags, some of which hold a percent sign that argparse trips over."""

    def _expand_help(self, action: argparse.Action) -> str:
        try:
            return super()._expand_help(action)
        except ValueError:
            return action.help or ""


def _add_run_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--device",
        choices=DEVICES,
        default="auto",
        help="Where to train; auto is CUDA where there is a GPU, else the CPU backend.",
    )
    group.add_argument(
        "--quiet",
        action="store_true",
        help="Show this project's lines alone, a short one for each step. Megatron's go to megatron.log and "
        "its arguments to arguments.txt, next to the metrics file.",
    )
    group.add_argument(
        "--hf-model",
        metavar="DIR",
        help="HuggingFace folder: its config.json gives the architecture, and its tokenizer is used. "
        "Its weights are read too, unless --load or --pretrained-checkpoint holds a checkpoint.",
    )
    group.add_argument(
        "--random-init",
        action="store_true",
        help="Start from random weights in place of --hf-model's, unless --load or "
        "--pretrained-checkpoint holds a checkpoint.",
    )
    group.add_argument(
        "--export-hf",
        metavar="DIR",
        help="HuggingFace folder to write after the last step; it must not exist yet, unless a run with a "
        "checkpoint in --save goes on and an export was all that wrote there.",
    )
    group.add_argument(
        "--overwrite",
        action="store_true",
        help="Let this run take the place of one in --save, whose checkpoints and metrics are removed when "
        "the new run is ready for its first step, and of an earlier export in --export-hf.",
    )
    group.add_argument(
        "--allow-change",
        nargs="+",
        choices=GUARDED,
        default=(),
        metavar="NAME",
        help="Go on from a checkpoint of a run in which these were others, which is an error without it: "
        f"{', '.join(GUARDED)}.",
    )
    group.add_argument(
        "--skip-checksums",
        action="store_true",
        help="Load a checkpoint without comparing its checksums first, which reads all of it once.",
    )
    group.add_argument(
        "--epochs",
        type=int,
        metavar="E",
        help="Train every record this often, in place of --train-iters or --train-samples.",
    )


def _add_statistics_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--psft-steps-per-refresh",
        type=int,
        metavar="K",
        default=8,
        help="Optimizer steps of an outer batch, before which --objective psft refreshes its old policy.",
    )
    group.add_argument(
        "--ref-hf-model",
        metavar="DIR",
        help="HuggingFace folder with the weights of the reference model, for the objectives that have one; "
        "by default --hf-model.",
    )
    group.add_argument(
        "--ref-cache",
        metavar="DIR",
        help="Where the reference's log-probabilities are kept, to be computed only once; by default "
        "ref_log_prob in --save.",
    )
    group.add_argument(
        "--ref-mode",
        choices=("cache", "adapter-off"),
        help="Where the reference's log-probabilities come from: cache computes them once for all data; "
        "adapter-off computes them in each step, by a pass through the model without its adapters. By "
        "default adapter-off for adapters whose base is the reference, else cache.",
    )


def _add_report_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--metrics-file",
        metavar="FILE",
        help="JSON lines with the metrics of each logged step and each evaluation; by default "
        "metrics.jsonl in --save.",
    )
    group.add_argument(
        "--token-report",
        metavar="DIR",
        help="Write a token report of some validation records at each evaluation.",
    )
    group.add_argument(
        "--token-report-records",
        type=int,
        default=20,
        metavar="N",
        help="How many records the token report shows.",
    )


# Arguments that a command line must give, besides the length of the run.
REQUIRED = ("hf_model", "data", "seq_length", "micro_batch_size", "lr")

# Title of a group of flags -> the function that adds them, in the order of --help. A new room adds its own
# here: a function, or a dataclass of flags (`megatron_profit.flags`).
_GROUPS: Mapping[str, Callable[[argparse._ArgumentGroup], None]] = {
    "model and run": _add_run_flags,
    "data": add_data_flags,
    "objective": add_objective_flags,
    "options of objectives": add_option_flags,
    "statistics from elsewhere": _add_statistics_flags,
    "adapters (LoRA)": partial(add_flags, options=LoraFlags),
    "checkpoints": partial(add_flags, options=KeepOptions),
    "evaluation after training": partial(add_flags, options=EvalTasks),
    "model card and upload": partial(add_flags, options=Publication),
    "guards": partial(add_flags, options=GuardOptions),
    "metrics and reports": _add_report_flags,
}


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the flags of this project to a parser, among them one for each option of an objective."""
    for title, add in _GROUPS.items():
        add(parser.add_argument_group(title))
    return parser


@dataclass(frozen=True)
class CommandLine:
    """A parsed command line.

    Attributes:
        given: The flags that were given, by argument name.
        defaults: The defaults of all flags.
        options: The written form of each flag, for example `--seq-length` for `seq_length`.
    """

    given: Mapping[str, Any]
    defaults: Mapping[str, Any]
    options: Mapping[str, str]

    def option(self, name: str) -> str:
        """Return the written form of an argument's flag. For example, `seq_length` gives `--seq-length`."""
        return self.options.get(name, flag_of(name))

    def changes(self, name: str) -> bool:
        """Return whether the flag was given with another value than its default."""
        return name in self.given and self.given[name] != self.defaults[name]

    def refuse_contradictions(self, derived: Mapping[str, Any], source: str) -> None:
        """Refuse a flag that gives an argument another value than `source` does."""
        for name, value in derived.items():
            if name in self.given and self.given[name] != value:
                raise ArgumentsError(
                    f"{self.option(name)} gives {name}={self.given[name]!r}, but {source} {value!r}; "
                    "drop the flag"
                )


def parse_command_line(argv: Sequence[str]) -> CommandLine:
    """Parse the flags as Megatron's own parser does, together with this project's flags.

    Raises:
        ArgumentsError: A flag is unknown, or its value cannot be used.
    """
    parser = full_parser(argv)
    # As argparse does it: of two flags for one argument the first decides, and a text is converted.
    defaults = {
        action.dest: parser._get_value(action, action.default)
        if isinstance(action.default, str)
        else action.default
        for action in reversed(parser._actions)
        if action.default is not argparse.SUPPRESS
    }
    options = {action.dest: action.option_strings[0] for action in reversed(parser._actions)}
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    return CommandLine(vars(parser.parse_args(argv)), defaults, options)


def provider_of(values: Mapping[str, Any]) -> Callable[[argparse.ArgumentParser], Any]:
    """Return Megatron's `extra_args_provider` for arguments that are parsed already.

    Megatron asks the parser that the provider returns for the arguments. So it gets these, validates them,
    and does not read `sys.argv`. It changes some of them, so it gets a copy.
    """
    parsed = argparse.Namespace(**copy.deepcopy(dict(values)))
    return lambda _: SimpleNamespace(parse_args=lambda: parsed)


def full_parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    """Return a parser of this project's and of Megatron's flags.

    Args:
        argv: The command line. It may name an objective from outside, whose options are flags too.

    Raises:
        ArgumentsError: The objective cannot be imported, or an option of it has the name of another flag.
    """
    # This import takes seconds, and help does without it.
    from megatron.training.arguments import add_megatron_arguments

    parser = _Parser(
        prog="megatron-profit-sft",
        usage="torchrun … -m megatron_profit.sft --hf-model DIR --data FILE… [flags]",
        description="Supervised fine-tuning on Megatron-Core. Every native Megatron flag works too.",
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
    )
    load_outside_objective(argv)
    try:
        return add_megatron_arguments(add_arguments(parser))
    except argparse.ArgumentError as error:
        raise ArgumentsError(
            f"an option of an objective has the name of a native flag ({error}); rename it"
        ) from error
