"""The values that a pickle stands for, where nothing of it is imported or called."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


class PickleError(ValueError):
    """The pickle is broken, or holds a value that it must not."""


@dataclass(frozen=True)
class Named:
    """A class or function of another package; only its name is known."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(frozen=True, eq=False)
class Call:
    """The result of a function for arguments; the function is not called."""

    function: Named
    arguments: tuple[Any, ...]


@dataclass(eq=False)
class Instance:
    """An instance of a class, made without its constructor and then given a state. May be a key."""

    cls: Named
    state: Any = None


@dataclass(frozen=True, eq=False)
class PersistentId:
    """A reference to something that is stored next to the pickle."""

    identity: Any


class OrderedMap(dict[Any, Any]):
    """A `collections.OrderedDict`."""


Make = Callable[[Named, tuple[Any, ...]], Any]


@dataclass(frozen=True)
class Use:
    """The permitted uses of a class or function in a pickle.

    Attributes:
        call: Gives the result for arguments, or raises ValueError to refuse them; None if it must not
            be called.
        new: The same for an instance that is made without the constructor.
        state: Accepts the state that follows; None if none may.
        is_value: Whether a mere reference to it may stand in the data.
    """

    call: Make | None = None
    new: Make | None = None
    state: Callable[[Any], bool] | None = None
    is_value: bool = False


Uses = Callable[[str, str], Use | None]
Refer = Callable[[Any], Any]
