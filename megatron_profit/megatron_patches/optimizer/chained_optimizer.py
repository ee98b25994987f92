"""Optimizer states between runs with and without expert parallelism.

With `--expert-model-parallel-size` above 1 Megatron has two optimizers, one of them for the experts, and
keeps the state of each under its number; without, there is one, and no number. The tensors of a checkpoint
are found by the names of their parameters in either case. What is left are the few values that all
parameters share (step, learning rate, decay), and they are the same in both.
"""

from __future__ import annotations

from copy import copy
from itertools import zip_longest
from typing import Any

_GROUPS, _EXPERTS = "param_groups", "is_expert_parallel"


def regrouped(state_dict: dict[Any, Any], count: int) -> dict[Any, Any]:
    """Return the state that `ChainedOptimizer.load_state_dict` is given, as `count` optimizers understand it.

    Args:
        state_dict: What was saved by another number of optimizers lies where they had it, and what
            was asked for by these optimizers where they have it.
        count: Of the optimizers of this run.

    Returns:
        The same with all that belongs together in one place; unchanged where the numbers are alike.
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
    """Return the values of two optimizers that agree, with the parameter groups of both."""
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
    """With each parameter group also as one of experts."""
    result = {}
    for key, value in saved.items():
        if key == _GROUPS:
            result[key] = [
                {**group, _EXPERTS: experts} for experts in (False, True) for group in value
            ]
        else:
            result[key] = _for_both(value) if isinstance(value, dict) else copy(value)
    return result


def _completed(saved: dict[Any, Any], own: dict[Any, Any]) -> dict[Any, Any]:
    """What was saved, with the tensors and the parameters of this rank."""
    result = dict(saved)
    for key, value in own.items():
        if key == _GROUPS:
            # Megatron finds the group by what it says, and takes the parameters in the order of this run.
            pairs = zip_longest(saved.get(key, []), value, fillvalue={})
            result[key] = [{**group, "params": [], **mine} for group, mine in pairs]
        elif isinstance(value, dict):
            result[key] = _completed(saved.get(key, {}), value)
        else:
            result[key] = value
    return result
