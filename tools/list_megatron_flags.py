"""Write the list of Megatron's native flags that `megatron-profit sft` checks before it imports anything.

    python tools/list_megatron_flags.py

Megatron's own parser takes seconds to import. The list is for one version of Megatron; a test compares the
two, and with another version the command leaves native flags to Megatron's parser.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

LIST = Path(__file__).resolve().parents[1] / "megatron_profit" / "recipe" / "megatron_flags.json"
_KINDS: dict[Any, str] = {int: "int", float: "float", str: "text", None: "text"}


def native_flags() -> dict[str, Any]:
    """Return the version of Megatron and, for each spelling of a flag, its argument, form and default.

    A form is `true` or `false` for a switch that gives this value, or the type of the value: int, float,
    text, or other for a type of Megatron's own. A number, + or * after it says how many values there are. A
    flag with choices has them at the end, unless they are of a type of Megatron's own.
    """
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        from megatron.training.arguments import add_megatron_arguments

        parser = add_megatron_arguments(argparse.ArgumentParser(add_help=False))
    flags = {
        option: [action.dest, _form(action, option), _plain(default), *_choices(action)]
        for action, default in _defaults(parser)
        for option in action.option_strings
    }
    return {
        "megatron-core": metadata.version("megatron-core"),
        "flags": dict(sorted(flags.items())),
    }


def _defaults(parser: argparse.ArgumentParser) -> Iterator[tuple[argparse.Action, Any]]:
    """Yield each flag with the default of its argument: of two flags the first decides."""
    defaults: dict[str, Any] = {}
    for action in parser._actions:
        is_text = isinstance(action.default, str)
        value = parser._get_value(action, action.default) if is_text else action.default
        yield action, defaults.setdefault(action.dest, value)


def _form(action: argparse.Action, option: str) -> str:
    if isinstance(action, argparse.BooleanOptionalAction):
        return "false" if option.startswith("--no-") else "true"
    if action.nargs == 0:
        return "true" if action.const else "false"
    kind = _KINDS.get(action.type, "other")
    return f"{kind}{'' if action.nargs is None else action.nargs}"


def _plain(value: Any) -> Any:
    """Return a default as JSON has it; None for a value of a type of Megatron's own."""
    return value if isinstance(value, bool | int | float | str | list) else None


def _choices(action: argparse.Action) -> list[list[Any]]:
    if action.choices is None or action.type not in _KINDS:
        return []
    return [list(action.choices)]


def main() -> None:
    """Write the list."""
    found = native_flags()
    lines = (f"  {json.dumps(name)}: {json.dumps(form)}" for name, form in found["flags"].items())
    version = json.dumps(found["megatron-core"])
    text = ",\n".join(lines)
    LIST.write_text(f'{{"megatron-core": {version}, "flags": {{\n{text}\n}}}}\n', encoding="utf-8")


if __name__ == "__main__":
    main()
