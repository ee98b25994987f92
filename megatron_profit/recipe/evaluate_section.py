"""The section `evaluate:` of a run's file: the tasks, and flags of `megatron-profit evaluate` by name."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Mapping
from typing import Any

from megatron_profit.evaluation.command_line import add_evaluation_flags
from megatron_profit.flags import nearest
from megatron_profit.recipe.errors import LaunchError, LaunchParser
from megatron_profit.recipe.flags import words_with


def evaluation_words(section: Any) -> list[str]:
    """Return the words of a training's command line that a section stands for.

    For example, `{tasks: [gsm8k, ifeval], samples: 8}` gives `--eval-tasks gsm8k,ifeval --eval-flags
    '--samples 8'`.

    Args:
        section: The section's content.

    Raises:
        LaunchError: There is neither a task nor a task_file, or an entry is no flag of the evaluation.
    """
    if not isinstance(section, dict) or not (section.get("tasks") or section.get("task_file")):
        raise LaunchError("must hold tasks and flags of the evaluation; for example tasks: [gsm8k]")
    entries = dict(section)
    tasks = entries.pop("tasks", None) or []
    names = tasks if isinstance(tasks, list) else [tasks]
    known = _known()
    words = [word for name, value in entries.items() for word in _flag(str(name), value, known)]
    _parser().parse_args(words)
    flags = ["--eval-flags=" + shlex.join(words)] if words else []
    return [*(["--eval-tasks", ",".join(map(str, names))] if names else []), *flags]


def _known() -> dict[str, argparse.Action]:
    """Return the evaluation's flags, by the names of their entries."""
    actions = _parser()._actions
    return {action.option_strings[-1][2:].replace("-", "_"): action for action in actions}


def _parser() -> argparse.ArgumentParser:
    parser = LaunchParser(add_help=False, allow_abbrev=False)
    add_evaluation_flags(parser)
    return parser


def _flag(name: str, value: Any, known: Mapping[str, argparse.Action]) -> list[str]:
    """Return the words of one flag of the evaluation."""
    if name.replace("-", "_") not in known:
        raise LaunchError(f"there is no entry {name!r}{nearest(name, ['tasks', *known])}")
    action = known[name.replace("-", "_")]
    option = action.option_strings[-1]
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise LaunchError(f"{name} is {value!r}; it must be true or false")
        return [option] if value else []
    values = value if isinstance(value, list) else [value]
    several = action.nargs is not None or isinstance(action, argparse._AppendAction)
    if len(values) > 1 and not several:
        raise LaunchError(f"{name} has {value!r}; it takes one value")
    if any(isinstance(item, dict | list | bool) or item is None for item in values):
        raise LaunchError(f"{name} has {value!r}; it must be a value or a list of values")
    texts = list(map(str, values))
    if action.nargs is None:  # several values are the flag several times, as of --task-file
        return [word for text in texts for word in words_with(option, [text])]
    return [*words_with(option, texts)]
