"""Groups of flags as frozen dataclasses, and the error of flags that cannot be used.

A field is a flag: its default is the flag's default, its metadata are the keywords of `add_argument`. For
example, `keep_last: int | None = flag("Remove all but the N newest.", type=int, metavar="N")` is
`--keep-last N`.
"""

from __future__ import annotations

import argparse
import difflib
from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import field, fields
from typing import Any


class ArgumentsError(ValueError):
    """The flags cannot be used; the message names the value, the limit and the remedy."""


def flag(help: str, *, default: Any = None, **argparse: Any) -> Any:
    """Declare a flag: a field of a dataclass that `add_flags` adds to a parser.

    Args:
        help: The effect of the flag.
        default: Its value when it is not given.
        **argparse: Further keywords of `ArgumentParser.add_argument`: `type`, `choices`, `metavar`, ...
    """
    return field(default=default, metadata={"help": help, **argparse})


def flag_of(name: str) -> str:
    """Return the flag of an option or argument. For example, `prob_threshold` gives `--prob-threshold`."""
    return "--" + name.replace("_", "-")


def given_twice(option: str) -> str:
    """Return the error of a flag with a list of values that stands twice in a command line."""
    return (
        f"{option} is given twice, and the second list would replace the first; give all values after one "
        f"{option}"
    )


def second_lists(words: Sequence[str], options: Container[str]) -> list[str]:
    """Return which of these flags stand more than once in a command line."""
    named = Counter(word.partition("=")[0] for word in words if word.startswith("--"))
    return [option for option, count in named.items() if count > 1 and option in options]


class OneList(argparse.Action):
    """Stores a flag's values; a flag that takes a list of them is refused a second time.

    It takes the place of argparse's own action: `parser.register("action", None, OneList)`.
    """

    def __call__(
        self, parser: Any, namespace: Any, values: Any, option_string: str | None = None
    ) -> None:
        """See argparse."""
        if self.nargs == "+" and getattr(namespace, self.dest) is not self.default:
            parser.error(given_twice(option_string or self.dest))
        setattr(namespace, self.dest, values)


def number_text(value: float) -> str:
    """Return a number as a flag's value, as `:g` writes it where that is exact. For example, 1e-05."""
    short = f"{value:g}"
    return short if float(short) == value else repr(value)


def nearest(name: str, known: Iterable[str], cutoff: float = 0.65) -> str:
    """Return `; did you mean X?` with the known name that is spelt most alike, "" if none is near.

    Args:
        cutoff: The least likeness of `difflib.get_close_matches`, from 0 to 1.
    """
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return f"; did you mean {found[0]}?" if found else ""


def add_flags(group: argparse._ActionsContainer, options: type) -> None:
    """Add the flags that the fields of a dataclass declare."""
    for option in fields(options):
        group.add_argument(flag_of(option.name), default=option.default, **option.metadata)


def options_of[T](options: type[T], values: Mapping[str, Any]) -> T:
    """Return a dataclass of flags with the values of these arguments, given by name."""
    return options(**{option.name: values[option.name] for option in fields(options)})  # type: ignore[arg-type]
