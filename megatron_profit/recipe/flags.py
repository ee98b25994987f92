"""The training's flags as they are written: checked without Megatron, kept as text, put together again.

A command line becomes `Given`s by argument name. Derived flags are added to them, and all are written out as
the command that runs. Values stay as they were typed, so that 1e-5 does not become 1e-05.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata, resources
from typing import Any

from megatron_profit.flags import nearest
from megatron_profit.recipe.errors import LaunchError, LaunchParser

_KINDS: dict[str, Callable[[str], Any]] = {"int": int, "float": float, "text": str}


@dataclass(frozen=True)
class Given:
    """A flag of a command line.

    Attributes:
        option: The flag, for example --lr.
        texts: Its values as they were written; empty for a switch.
        value: Its value as the training gets it.
    """

    option: str
    texts: tuple[str, ...]
    value: Any

    @classmethod
    def of(cls, option: str, value: Any) -> Given:
        """Return a flag with a value: True for a switch, a list for several values."""
        values = value if isinstance(value, list | tuple) else [value]
        return cls(option, () if value is True else tuple(map(_text, values)), value)

    @property
    def words(self) -> tuple[str, ...]:
        """The flag and its values as words of a command line."""
        return (self.option, *self.texts)


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


class Store(argparse.Action):
    """Keeps a flag as a `Given`."""

    def __init__(
        self, *args: Any, read: Callable[..., Any] | None, switch: bool, **kw: Any
    ) -> None:
        kw["nargs"] = 0 if switch else kw.get("nargs")
        super().__init__(*args, **kw)
        self.read, self.switch = read, switch

    def __call__(
        self, parser: Any, namespace: Any, values: Any, option_string: str | None = None
    ) -> None:
        """See argparse."""
        option = option_string or ""
        texts = values if isinstance(values, list) else [values]
        if self.switch:
            setattr(namespace, self.dest, Given(option, (), not option.startswith("--no-")))
            return
        found = [self._value(option, text) for text in texts]
        value = found if isinstance(values, list) else found[0]
        before = getattr(namespace, self.dest, None)
        if self.several and before is not None:
            texts, value = [*before.texts, option, *texts], [*before.value, value]
        elif self.several:
            value = [value]
        setattr(namespace, self.dest, Given(option, tuple(texts), value))

    def _value(self, option: str, text: str) -> Any:
        try:
            value = text if self.read is None else self.read(text)
        except (ValueError, argparse.ArgumentTypeError):
            kind = (
                "a whole number"
                if self.read is int
                else "a number"
                if self.read is float
                else "valid"
            )
            raise LaunchError(f"{option} is {text!r}; it must be {kind}") from None
        if self.allowed and value not in self.allowed:
            names = ", ".join(map(str, self.allowed))
            raise LaunchError(
                f"{option} is {text!r}; it can be {names}{nearest(text, map(str, self.allowed))}"
            )
        return value

    allowed: Sequence[Any] | None = None
    several = False


@functools.cache
def native() -> Mapping[str, tuple[str, str]]:
    """Return Megatron's flags, each with its argument and its form; empty for an unlisted version."""
    text = resources.files("megatron_profit.recipe").joinpath("megatron_flags.json").read_text()
    found = json.loads(text)
    if found["megatron-core"] != metadata.version("megatron-core"):
        return {}
    return {option: (dest, form) for option, (dest, form) in found["flags"].items()}


def own_parser() -> argparse.ArgumentParser:
    """Return a parser of this project's flags of the training."""
    from megatron_profit.training.arguments.command_line import add_arguments

    return add_arguments(argparse.ArgumentParser(add_help=False, allow_abbrev=False))


def _options_of_objectives() -> frozenset[str]:
    from megatron_profit.objectives import objective_names, objective_options

    options = (option for name in objective_names() for option in objective_options(name))
    return frozenset(f"--{option.name.replace('_', '-')}" for option in options)


class FlagTable:
    """All flags of the training, this project's and Megatron's."""

    def __init__(self, own: argparse.ArgumentParser | None = None) -> None:
        self._parser = LaunchParser(add_help=False, allow_abbrev=False)
        self.defaults: dict[str, Any] = {}
        own = own_parser() if own is None else own
        for action in own._actions:
            self._add(action.option_strings, action.dest, action.nargs, action.type, action)
            self.defaults[action.dest] = action.default
        self.own = frozenset(o for action in own._actions for o in action.option_strings)
        self.of_objectives = _options_of_objectives()
        self.native = frozenset(native()) - self.own
        for option, (dest, form) in native().items():
            if option in self.own:
                continue
            kind = form.rstrip("+*0123456789")
            nargs: Any = form[len(kind) :] or None
            read = _KINDS.get(kind)
            self._add([option], dest, 0 if kind == "switch" else nargs, read, None)

    def _add(
        self,
        options: Sequence[str],
        dest: str,
        nargs: Any,
        read: Any,
        action: argparse.Action | None,
    ) -> None:
        switch = nargs == 0
        if isinstance(nargs, str) and nargs.isdigit():
            nargs = int(nargs)
        added = self._parser.add_argument(
            *options,
            action=Store,
            dest=dest,
            read=read,
            switch=switch,
            default=argparse.SUPPRESS,
            **({} if switch or nargs is None else {"nargs": nargs}),
        )
        assert isinstance(added, Store)
        added.several = isinstance(action, argparse._AppendAction)
        if action is not None and action.choices is not None:
            added.allowed = tuple(action.choices)

    @property
    def options(self) -> frozenset[str]:
        """All spellings of all flags."""
        return frozenset(self._parser._option_string_actions)

    def dest(self, option: str) -> str:
        """Return the argument of a flag. For example, `--lr` gives `lr`."""
        return self._parser._option_string_actions[option].dest

    def is_switch(self, option: str) -> bool:
        """Return whether a flag has no value."""
        return self._parser._option_string_actions[option].nargs == 0

    def parse(self, argv: Sequence[str], others: Iterable[str] = ()) -> dict[str, Given]:
        """Return the flags of a command line, by argument.

        Args:
            argv: The words of the command line.
            others: Further names to suggest for an unknown flag.

        Raises:
            LaunchError: A flag is unknown, or its value cannot be.
        """
        found, rest = self._parser.parse_known_args(list(argv))
        given: dict[str, Given] = dict(vars(found))
        objective = given.get("objective")
        if rest and not (objective and ":" in str(objective.value)) and native():
            raise LaunchError(self._unknown(rest, others))
        for number, word in enumerate(rest):  # options of an objective from outside
            if word.startswith("--"):
                values = tuple(_values_after(rest, number))
                dest = word[2:].replace("-", "_")
                given[dest] = Given(word, values, values or True)
        return given

    def _unknown(self, rest: Sequence[str], others: Iterable[str]) -> str:
        flags = [word.partition("=")[0] for word in rest if word.startswith("--")]
        known = {*self.options, *others}
        if not flags:
            return (
                f"{rest[0]!r} stands where a flag is expected; quote a value that has spaces, and put files "
                "after --data"
            )
        if len(flags) == 1:
            return f"there is no flag {flags[0]}{nearest(flags[0], known)}"
        named = ", ".join(f"{flag} ({nearest(flag, known)[2:] or 'unknown'})" for flag in flags)
        return f"there are no flags {named}"


def _values_after(words: Sequence[str], at: int) -> Iterable[str]:
    for word in words[at + 1 :]:
        if word.startswith("--"):
            return
        yield word


def words_of(flags: Iterable[Given]) -> list[str]:
    """Return flags as the words of a command line."""
    return [word for flag in flags for word in flag.words]
