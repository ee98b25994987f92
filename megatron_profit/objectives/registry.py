"""Objectives by name.

A new objective is one file with a decorated dataclass and one import in ``__init__.py``; its fields
are its options, for ``build_objective`` and for a command line alike.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import Field, fields
from typing import Any, TypeVar

from megatron_profit.objectives.base import Objective

_OBJECTIVES: dict[str, type[Objective]] = {}

ObjectiveClass = TypeVar("ObjectiveClass", bound=type[Objective])


def register_objective(name: str) -> Callable[[ObjectiveClass], ObjectiveClass]:
    """Class decorator that makes an objective available as ``build_objective(name)``.

    Raises:
        ValueError: the name is taken by another class.
    """

    def register(cls: ObjectiveClass) -> ObjectiveClass:
        if name in _OBJECTIVES:
            raise ValueError(
                f"objective {name!r} is already registered by {_OBJECTIVES[name].__qualname__}; "
                "choose another name."
            )
        cls.name = name
        _OBJECTIVES[name] = cls
        return cls

    return register


def objective_names() -> tuple[str, ...]:
    """Names that ``build_objective`` accepts, sorted."""
    return tuple(sorted(_OBJECTIVES))


def objective_options(name: str) -> tuple[Field[Any], ...]:
    """Options of an objective; the ``metadata`` of each is ``add_argument`` keywords.

    Raises:
        ValueError: unknown name.
    """
    return fields(_objective_class(name))


def build_objective(name: str, /, **options: Any) -> Objective:
    """Builds an objective from its name and options.

    Example: ``build_objective("profit", prob_threshold=0.1, threshold_direction="higher")``.

    Raises:
        ValueError: unknown name, unknown option (both list the possible ones), or an invalid value.
    """
    known = [option.name for option in objective_options(name)]
    unknown = [option for option in options if option not in known]
    if unknown:
        takes = f"its options are {', '.join(known)}" if known else "it takes no options"
        raise ValueError(f"objective {name!r} has no option {', '.join(unknown)}; {takes}.")
    return _objective_class(name)(**options)


def _objective_class(name: str) -> type[Objective]:
    if name not in _OBJECTIVES:
        raise ValueError(f"unknown objective {name!r}; choose from {', '.join(objective_names())}.")
    return _OBJECTIVES[name]
