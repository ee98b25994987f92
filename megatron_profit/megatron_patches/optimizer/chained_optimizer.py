"""Optimizer states between runs with and without expert parallelism.

With `--expert-model-parallel-size` above 1 Megatron has two optimizers, one of them for the experts. It keeps
the state of each under its number. Without expert parallelism there is one optimizer, and no number. The
tensors of a checkpoint are found by the names of their parameters in either case. Only the few values that
all parameters share are left (step, learning rate, decay), and they are the same in both.
"""

from __future__ import annotations

from copy import copy
from itertools import zip_longest
from typing import Any

_GROUPS, _EXPERTS = "param_groups", "is_expert_parallel"


def regrouped(state_dict: dict[Any, Any], count: int) -> dict[Any, Any]:
    """Return the state for `ChainedOptimizer.load_state_dict` in the form of `count` optimizers.

    Args:
        state_dict: The loaded state. Saved values are in the form of the saving run, and the values that this
            run's optimizers asked for are in this run's form.
        count: Number of this run's optimizers.

    Returns:
        The same values, each group of them in one place; unchanged if the numbers of optimizers agree.
    """
    numbered = {key: part for key, part in state_dict.items() if isinstance(key, int)}
    shared = {key: part for key, part in state_dict.items() if key not in numbered}
    if count == 1 and numbered:
        saved: dict[Any, Any] = {}
        for number in sorted(numbered):
            saved = _joined(saved, numbered[number])
        return _completed(saved, shared)
    if count > 1 and shared:
        return {n: _completed(_for_both(shared), numbered.get(n, {})) for n in range(count)}
    return state_dict


def _joined(one: dict[Any, Any], other: dict[Any, Any]) -> dict[Any, Any]:
    """Return the values on which two optimizers agree, with the parameter groups of both."""
    result = dict(one)
    for key, value in other.items():
        if key == _GROUPS:
            result[key] = [*one.get(key, []), *value]
        elif isinstance(value, dict):
            result[key] = _joined(one.get(key, {}), value)
        else:
            result[key] = value
    return result


def _for_both(saved: dict[Any, Any]) -> dict[Any, Any]:
    """Return the state with a second copy of each parameter group, marked as one of experts."""
    result: dict[Any, Any] = {}
    for key, value in saved.items():
        if key == _GROUPS:
            result[key] = [
                {**group, _EXPERTS: experts} for experts in (False, True) for group in value
            ]
        else:
            result[key] = _for_both(value) if isinstance(value, dict) else copy(value)
    return result


def _completed(saved: dict[Any, Any], own: dict[Any, Any]) -> dict[Any, Any]:
    """Return the saved state with the tensors and the parameters of this rank."""
    none: dict[Any, Any] = {}
    result = dict(saved)
    for key, value in own.items():
        if key == _GROUPS:
            # Megatron finds the group by its settings, and takes the parameters in the order of this run.
            pairs = zip_longest(saved.get(key, []), value, fillvalue=none)
            result[key] = [{**group, "params": [], **mine} for group, mine in pairs]
        elif isinstance(value, dict):
            result[key] = _completed(saved.get(key, {}), value)
        else:
            result[key] = value
    return result
