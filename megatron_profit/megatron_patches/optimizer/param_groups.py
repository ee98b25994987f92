"""Parameter groups of an optimizer between a checkpoint and a run with other hyperparameters.

Megatron finds the saved group of each group by its learning rates. Here groups are found by the kind of
their parameters. The hyperparameters come from the flags, or from the checkpoint if the flags ask for it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

Group = dict[str, Any]

# Values by which Megatron recognises a group and which a flag may change.
_RATES = ("max_lr", "min_lr", "start_wd", "end_wd")
# The optimizer's state that is kept in its groups, which is no hyperparameter.
_STATE = ("params", "step")


def adapt_groups(current: Iterable[Group], saved: Iterable[Group], *, keep_saved: bool) -> None:
    """Make the groups of a checkpoint and of a run recognise each other, in place.

    Groups that have no counterpart, or more than one, stay as they are: Megatron refuses them.

    Args:
        current: The groups of the run; changed with `keep_saved`.
        saved: The groups of the checkpoint; changed without.
        keep_saved: Whether the learning rates of the checkpoint win.
    """
    ours, theirs = _by_kind(current), _by_kind(saved)
    for kind in ours.keys() & theirs.keys():
        if len(ours[kind]) > 1 or len(theirs[kind]) > 1:
            continue
        (own,), (loaded,) = ours[kind], theirs[kind]
        if keep_saved:
            own.update({key: loaded[key] for key in _RATES if key in loaded})
        else:
            loaded.update({key: value for key, value in own.items() if key not in _STATE})


def _by_kind(groups: Iterable[Group]) -> dict[tuple[Any, ...], list[Group]]:
    """Return the groups by the kind of their parameters: with weight decay or not, of experts or not, and so
    on.
    """
    found: dict[tuple[Any, ...], list[Group]] = {}
    for group in groups:
        found.setdefault(_kind(group), []).append(group)
    return found


def _kind(group: Group) -> tuple[Any, ...]:
    multipliers = (group.get(key, group.get(f"pre_{key}", 1.0)) for key in ("wd_mult", "lr_mult"))
    flags = (bool(group.get(key)) for key in ("is_expert_parallel", "is_decoupled_lr"))
    # The learning rate of embedding and output may be one of its own (--decoupled-lr).
    return (*multipliers, *flags, bool(group.get("default_config", True)), group.get("optimizer"))
