"""Objectives by name.

A new objective is one file with a decorated dataclass and one import in ``__init__.py``. Its fields are its
options, for ``build_objective`` and for a command line alike. An objective from outside is named by an entry
point of the group ``megatron_profit.objectives``, or as ``package.module:Class``.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import Field, fields, is_dataclass
from importlib.metadata import entry_points
from typing import Any, TypeVar

from megatron_profit.objectives.base import Objective

ENTRY_POINT_GROUP = "megatron_profit.objectives"

# Earlier names of options and of divisors, which are accepted for one version.
RENAMED_OPTIONS = {"keep_ratio": "keep_fraction", "keep_share": "keep_fraction"}
RENAMED_NORMALIZATIONS = {"valid": "supervised"}

_OBJECTIVES: dict[str, type[Objective]] = {}

ObjectiveClass = TypeVar("ObjectiveClass", bound=type[Objective])


def register_objective(name: str) -> Callable[[ObjectiveClass], ObjectiveClass]:
    """Return a class decorator that makes an objective available as ``build_objective(name)``.

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
    """Return the names of the registered objectives, sorted: this package's, and the loaded ones."""
    return tuple(sorted(_OBJECTIVES))


def is_from_outside(name: str) -> bool:
    """Return whether a name asks for an objective from outside, whose import may take long."""
    return name not in _OBJECTIVES and (
        ":" in name or name in entry_points(group=ENTRY_POINT_GROUP).names
    )


def load_objective(name: str) -> type[Objective]:
    """Return the class of a name; one from outside is imported and registered.

    Args:
        name: a registered name, the name of an entry point of ``megatron_profit.objectives``, or
            ``package.module:Class``.

    Raises:
        ValueError: the name is unknown, cannot be imported, or refers to something else than an objective.
    """
    if name in _OBJECTIVES:
        return _OBJECTIVES[name]
    cls = _outside_class(name)
    if not (isinstance(cls, type) and issubclass(cls, Objective) and is_dataclass(cls)):
        raise ValueError(
            f"objective {name!r} is {cls!r}; it must be a dataclass that extends "
            "megatron_profit.objectives.Objective."
        )
    # `dataclass` puts the defaults in the place of the fields.
    if loose := [option for option, value in vars(cls).items() if isinstance(value, Field)]:
        raise ValueError(
            f"objective {name!r} has the option {', '.join(loose)} and is no dataclass by itself, so that "
            "the option would be ignored; decorate the class with @dataclass(frozen=True)."
        )
    # The import may have registered the class, under this name or under one of its own.
    return cls if name in _OBJECTIVES else register_objective(name)(cls)


def objective_options(name: str) -> tuple[Field[Any], ...]:
    """Return options of an objective; the ``metadata`` of each is ``add_argument`` keywords.

    Raises:
        ValueError: unknown name.
    """
    return fields(load_objective(name))


def build_objective(name: str, /, **options: Any) -> Objective:
    """Build an objective from its name and options.

    Example: ``build_objective("profit", prob_threshold=0.1, threshold_direction="higher")``.

    Raises:
        ValueError: unknown name, unknown option (both list the possible ones), or an invalid value.
    """
    known = [option.name for option in objective_options(name)]
    options = {RENAMED_OPTIONS.get(option, option): value for option, value in options.items()}
    unknown = [option for option in options if option not in known]
    if unknown:
        takes = f"its options are {', '.join(known)}" if known else "it takes no options"
        raise ValueError(f"objective {name!r} has no option {', '.join(unknown)}; {takes}.")
    return load_objective(name)(**options)


def _outside_class(name: str) -> Any:
    """Return the class that an entry point or ``package.module:Class`` refers to."""
    points = entry_points(group=ENTRY_POINT_GROUP)
    if ":" in name:
        module, _, attribute = name.partition(":")
    elif name in points.names:
        module, attribute = points[name].module, points[name].attr
    else:
        available = sorted({*_OBJECTIVES, *points.names})
        raise ValueError(
            f"unknown objective {name!r}; choose from {', '.join(available)}, or name one of your "
            "own as package.module:Class."
        )
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"objective {name!r} cannot be loaded: {error}. Is the folder of {module} on PYTHONPATH?"
        ) from error
