"""The commands that follow an export, ready to be pasted."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from checkpoint_conversion.hf.stop_tokens import GENERATION_CONFIG

_COMMAND = "megatron-profit"
# vLLM reserves memory for ranks of adapters that are powers of two, from this one to this one.
_LEAST_RANK, _LARGEST_RANK = 8, 512


def next_steps(
    export: Path,
    base: Path,
    data: Sequence[str] = (),
    *,
    day: str | None = None,
    rank: int | None = None,
) -> list[str]:
    """Return lines of commands that talk with an exported model, evaluate, serve and look into it.

    Args:
        export: The exported folder.
        base: HuggingFace folder of its base.
        data: A chat file to show the tokens of, and the training's flags about its records; without any, the
            last command is left out.
        day: The day of the training's --template-date, if it has one.
        rank: Rank of the adapters that the export holds alone; None for a whole model.
    """
    dated = [] if day is None else ["--template-date", day]
    commands = [
        [_COMMAND, "chat", str(export)],
        [
            *(_COMMAND, "evaluate", f"base={base}", f"trained={export}"),
            *("--tasks", "gsm8k", "--data", "data/eval", *dated),
        ],
        ["vllm", "serve", str(export)],
    ]
    if rank is not None:
        space = max(_LEAST_RANK, 1 << (rank - 1).bit_length())
        modules = ["--enable-lora", "--max-lora-rank", str(space)]
        modules += ["--lora-modules", f"trained={export}"]
        if (export / GENERATION_CONFIG).exists():  # it stops where the training ended a turn
            modules += ["--generation-config", str(export)]
        served = ["vllm", "serve", str(base), *modules]
        commands[-1:] = [served] if rank <= _LARGEST_RANK else []
    elif data:
        page = export.with_name(f"{export.name}-tokens.html")
        commands.append(
            [_COMMAND, "report", "--model", str(export), "--data", *data, "--out", str(page)]
        )
    return [f"> next, with {export}:", *(f"    {shlex.join(command)}" for command in commands)]
