"""`megatron-profit COMMAND …`, the one console command: `python -m megatron_profit` is the same.

Each command is the `main` of a module, which is imported when it is called and not before: help is fast.
`sft` is for one process; under torchrun it is `torchrun … -m megatron_profit.sft …`.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata

from checkpoint_conversion.cli import escape_unencodable, run
from megatron_profit.flags import nearest


@dataclass(frozen=True)
class Command:
    """A command: the module whose `main` it calls, and one line about it."""

    module: str
    summary: str


COMMANDS = {
    "sft": Command(
        "megatron_profit.launch.front", "train a model on chats: --model ID --data FILE"
    ),
    "data": Command(
        "megatron_profit.commands.prepare_data", "tokenize data into the cache and report on them"
    ),
    "report": Command(
        "megatron_profit.commands.token_report", "show what an objective trains, token by token"
    ),
    "plot": Command("megatron_profit.commands.plot_run", "draw the curves of runs"),
    "evaluate": Command(
        "megatron_profit.commands.evaluate", "evaluate models on tasks: avg@k, pass@k, differences"
    ),
    "compare": Command(
        "megatron_profit.commands.compare",
        "train one base in several ways and evaluate all of them",
    ),
    "chat": Command("megatron_profit.commands.chat", "talk with a model in the terminal"),
    "layout": Command(
        "megatron_profit.commands.choose_layout", "print the parallel layout for a model and GPUs"
    ),
    "estimate": Command(
        "megatron_profit.commands.estimate_memory", "estimate the memory of a training's ranks"
    ),
    "doctor": Command(
        "megatron_profit.doctor.command", "examine machine, model and data before a training"
    ),
    "slurm": Command("megatron_profit.launch.slurm", "start a training as a Slurm job"),
    "to-megatron": Command(
        "checkpoint_conversion.hf_to_megatron", "convert a HuggingFace folder to torch_dist"
    ),
    "to-hf": Command(
        "checkpoint_conversion.megatron_to_hf", "convert a torch_dist checkpoint to HuggingFace"
    ),
    "verify": Command("checkpoint_conversion.verify", "compare weights, or logits"),
}


def usage() -> str:
    """Return the help: the commands, each with its line."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: megatron-profit COMMAND …",
            "",
            "Supervised fine-tuning on Megatron-Core with probability-guided objectives.",
            "",
            *lines,
            "",
            "megatron-profit COMMAND --help tells the flags of a command, and --version the version.",
        ]
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command; the exit code is 2 for one that does not exist."""
    escape_unencodable()
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help", "help"):
        print(usage())
        return
    if name == "--version":
        print(f"megatron-profit {metadata.version('megatron-profit')}")
        return
    if name not in COMMANDS:
        hint = nearest(name, COMMANDS, cutoff=0.6)
        print(f"error: there is no command {name!r}{hint}\n\n{usage()}", file=sys.stderr)
        sys.exit(2)
    sys.argv = [f"megatron-profit {name}", *rest]
    run(importlib.import_module(COMMANDS[name].module).main)
