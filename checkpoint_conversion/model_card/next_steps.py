"""The commands that follow an export, ready to be pasted."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

_COMMAND = "megatron-profit"


def next_steps(
    export: Path, base: Path, data: Sequence[str] = (), *, is_adapter: bool = False
) -> list[str]:
    """Return lines of commands that talk with an exported model, evaluate, serve and look into it.

    Args:
        export: The exported folder.
        base: HuggingFace folder of its base.
        data: Chat files to show the tokens of; without any, the last command is left out.
        is_adapter: Whether the export holds adapters alone.
    """
    commands = [
        [_COMMAND, "chat", str(export)],
        [
            *(_COMMAND, "evaluate", f"base={base}", f"trained={export}"),
            *("--tasks", "gsm8k", "--data", "data/eval"),
        ],
        ["vllm", "serve", str(export)],
    ]
    if is_adapter:
        modules = ["--enable-lora", "--lora-modules", f"trained={export}"]
        commands[-1] = ["vllm", "serve", str(base), *modules]
    elif data:
        page = export.with_name(f"{export.name}-tokens.html")
        commands.append(
            [_COMMAND, "report", "--model", str(export), "--data", data[0], "--out", str(page)]
        )
    return [f"> next, with {export}:", *(f"    {shlex.join(command)}" for command in commands)]
