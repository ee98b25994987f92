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
from importlib import metadata
from pathlib import Path
from typing import Any

LIST = Path(__file__).resolve().parents[1] / "megatron_profit" / "recipe" / "megatron_flags.json"


def native_flags() -> dict[str, Any]:
    """Return the version of Megatron and, for each spelling of a flag, its argument and its form.

    A form is `switch`, or the type of the value: int, float or text. A number, + or * after it says how many
    values there are.
    """
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        from megatron.training.arguments import add_megatron_arguments

        parser = add_megatron_arguments(argparse.ArgumentParser(add_help=False))
    flags = {
        option: [action.dest, _form(action)]
        for action in parser._actions
        for option in action.option_strings
    }
    return {
        "megatron-core": metadata.version("megatron-core"),
        "flags": dict(sorted(flags.items())),
    }


def _form(action: argparse.Action) -> str:
    if action.nargs == 0:
        return "switch"
    kind = "int" if action.type is int else "float" if action.type is float else "text"
    return f"{kind}{'' if action.nargs is None else action.nargs}"


def main() -> None:
    """Write the list."""
    found = native_flags()
    lines = (f"  {json.dumps(name)}: {json.dumps(form)}" for name, form in found["flags"].items())
    version = json.dumps(found["megatron-core"])
    text = ",\n".join(lines)
    LIST.write_text(f'{{"megatron-core": {version}, "flags": {{\n{text}\n}}}}\n', encoding="utf-8")


if __name__ == "__main__":
    main()
