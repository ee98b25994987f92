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

from megatron_profit.flags import flag_of, given_twice, nearest, number_text, second_lists
from megatron_profit.objectives.registry import is_from_outside
from megatron_profit.recipe.errors import LaunchError, LaunchParser
from megatron_profit.training.arguments.command_line import CommandLine, add_arguments

# Forms of native flags: values, switches with the value that they give, and values of Megatron's own types.
_KINDS: dict[str, Callable[[str], Any]] = {"int": int, "float": float, "text": str}
_SWITCHES = {"true": True, "false": False}
_OTHER = "other"
# Arguments of which a run has one.
_ONE_OF: tuple[frozenset[str], ...] = (
    frozenset({"epochs", "train_iters", "train_samples"}),
    frozenset({"lr_warmup_iters", "lr_warmup_samples", "lr_warmup_fraction"}),
    frozenset({"prob_threshold", "threshold_quantile", "keep_fraction"}),
    frozenset({"bf16", "fp16"}),
)


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
        return words_with(self.option, self.texts)


def words_with(option: str, texts: Sequence[str]) -> tuple[str, ...]:
    """Return a flag and its values as words, in one word if the value would be read as another flag."""
    if len(texts) == 1 and texts[0].startswith("-"):
        return (f"{option}={texts[0]}",)
    return (option, *texts)


def _text(value: Any) -> str:
    return number_text(value) if isinstance(value, float) else str(value)


class Store(argparse.Action):
    """Keeps a flag as a `Given`.

    Attributes:
        read: Makes a value from its text; None leaves the text.
        switch: The value that a switch gives; None for a flag with values.
        allowed: The values that it can have; None for any.
        several: Whether it may be given several times.
        is_native_type: Whether its values are of a type of Megatron's own, which are left as text.
    """

    read: Callable[[str], Any] | None = None
    switch: bool | None = None
    allowed: Sequence[Any] | None = None
    several = False
    is_native_type = False

    def __call__(
        self, parser: Any, namespace: Any, values: Any, option_string: str | None = None
    ) -> None:
        """See argparse."""
        option = option_string or ""
        texts = values if isinstance(values, list) else [values]
        if self.switch is not None:
            setattr(namespace, self.dest, Given(option, (), self.switch))
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


def native() -> Mapping[str, Sequence[Any]]:
    """Return Megatron's flags as `tools/list_megatron_flags.py` lists them."""
    return _listed()["flags"]


def is_listed_version() -> bool:
    """Return whether the list is of the installed Megatron; another one may have other flags."""
    return _listed()["megatron-core"] == metadata.version("megatron-core")


@functools.cache
def _listed() -> Mapping[str, Any]:
    file = resources.files("megatron_profit.recipe").joinpath("megatron_flags.json")
    return json.loads(file.read_text(encoding="utf-8"))


def _options_of_objectives() -> frozenset[str]:
    from megatron_profit.objectives import objective_names, objective_options

    options = (option for name in objective_names() for option in objective_options(name))
    return frozenset(flag_of(option.name) for option in options)


class FlagTable:
    """All flags of the training, this project's and Megatron's."""

    def __init__(self) -> None:
        self._parser = LaunchParser(add_help=False, allow_abbrev=False)
        # The first spelling of each argument's flag.
        self._spelling: dict[str, str] = {}
        self.defaults: dict[str, Any] = {}
        own = add_arguments(argparse.ArgumentParser(add_help=False, allow_abbrev=False))._actions
        for action in own:
            for option in action.option_strings:
                self._add_own(option, action)
            self.defaults[action.dest] = action.default
        self.own = frozenset(option for action in own for option in action.option_strings)
        self.of_objectives = _options_of_objectives()
        self.native = frozenset(native())
        for option, (dest, form, default, *choices) in native().items():
            kind = form.rstrip("+*0123456789")
            number = form[len(kind) :]
            nargs = 0 if kind in _SWITCHES else int(number) if number.isdigit() else number or None
            store = self._add(option, dest, nargs)
            store.read, store.switch = _KINDS.get(kind), _SWITCHES.get(kind)
            store.allowed = choices[0] if choices else None
            store.is_native_type = kind == _OTHER
            self.defaults.setdefault(dest, default)

    def _add_own(self, option: str, action: argparse.Action) -> None:
        store = self._add(option, action.dest, action.nargs)
        store.read = action.type  # type: ignore[assignment]
        if action.nargs == 0:
            is_no = isinstance(action, argparse.BooleanOptionalAction) and option[:5] == "--no-"
            store.switch = not is_no
        store.allowed = None if action.choices is None else tuple(action.choices)
        store.several = isinstance(action, argparse._AppendAction)

    def _add(self, option: str, dest: str, nargs: int | str | None) -> Store:
        self._spelling.setdefault(dest, option)
        added = self._parser.add_argument(
            option, action=Store, dest=dest, nargs=nargs, default=argparse.SUPPRESS
        )
        assert isinstance(added, Store)
        return added

    @property
    def options(self) -> frozenset[str]:
        """All spellings of all flags."""
        return frozenset(self._parser._option_string_actions)

    def dest(self, option: str) -> str:
        """Return the argument of a flag. For example, `--lr` gives `lr`."""
        return self._parser._option_string_actions[option].dest

    def is_switch(self, option: str) -> bool:
        """Return whether a flag of the training has no value."""
        known = self._parser._option_string_actions
        return option in known and known[option].nargs == 0

    def takes_several(self, option: str) -> bool:
        """Return whether a flag of the training takes several values."""
        known = self._parser._option_string_actions
        return option in known and known[option].nargs is not None

    def refuse_second_lists(self, words: Sequence[str]) -> None:
        """Refuse a flag with a list of values that one command line or file gives twice.

        Raises:
            LaunchError: Names the flag.
        """
        known = self._parser._option_string_actions.items()
        lists = {
            option
            for option, action in known
            if isinstance(action, Store) and action.nargs == "+" and not action.several
        }
        for option in second_lists(words, lists):
            raise LaunchError(given_twice(option))

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
        if rest and is_listed_version() and not self.has_outside_objective(given):
            raise LaunchError(self._unknown(rest, others))
        for number, word in enumerate(rest):  # options of an objective from outside
            if word.startswith("--"):
                option, is_one, value = word.partition("=")
                values = (value,) if is_one else tuple(_values_after(rest, number))
                given[option[2:].replace("-", "_")] = Given(option, values, values or True)
        return given

    def kept_of_earlier(
        self, words: Sequence[str], later: Sequence[str], left_out: Iterable[str] = ()
    ) -> list[str]:
        """Return the flags of an earlier source that a later one leaves in force.

        A later one replaces the options of another objective, and flags that exclude its own. For example,
        after a file with `--objective profit --prob-threshold 0.1 --epochs 2`, both `--objective dft` and
        `--threshold-quantile 0.3` drop the threshold, and `--train-iters 10` drops the epochs.

        Args:
            words: The earlier flags.
            later: The later flags.
            left_out: The later source's flags of `--without`.
        """
        found, rest = self._parser.parse_known_args(list(words))
        flags: dict[str, Given] = vars(found)
        chosen: dict[str, Given] = vars(self._parser.parse_known_args(list(later))[0])
        dropped = {self.dest(option) for option in left_out if option in self.options}
        dropped = dropped.union(*(group for group in _ONE_OF if group & chosen.keys()))
        names = [each["objective"].value for each in (chosen, flags) if "objective" in each]
        if len(set(names)) == 2:
            options = {*self.of_objectives, "--objective", "--objective-schedule"}
            dropped |= {name for name, flag in flags.items() if flag.option in options}
        if not dropped & flags.keys():
            return list(words)
        return [*words_of(flag for name, flag in flags.items() if name not in dropped), *rest]

    def has_outside_objective(self, given: Mapping[str, Given]) -> bool:
        """Return whether flags ask for an objective from outside, whose options are flags too."""
        return "objective" in given and is_from_outside(given["objective"].value)

    def command_line(self, given: Mapping[str, Given]) -> CommandLine:
        """Return flags in the form in which the training checks them.

        Values of Megatron's own types are left out, as only Megatron's parser reads them.
        """
        actions = self._parser._option_string_actions
        values = {
            name: flag.value
            for name, flag in given.items()
            if not getattr(actions.get(flag.option), "is_native_type", False)
        }
        return CommandLine(values, self.defaults, self._spelling)

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
