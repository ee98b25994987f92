"""A rank that has no adapters for one of Megatron's optimizers."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from checkpoint_conversion.errors import ConversionError
from megatron_profit.training.checkpoints.adapters import _check_each_rank_trains

DENSE, EXPERT = True, False


def stage(*kinds: bool) -> torch.nn.Module:
    """A frozen weight, and a trained factor of each kind."""
    made = torch.nn.Module()
    made.weight = torch.nn.Parameter(torch.zeros(1), requires_grad=False)
    for number, kind in enumerate(kinds):
        factor = torch.nn.Parameter(torch.zeros(1))
        factor.allreduce = kind
        setattr(made, f"factor_{number}", factor)
    return made


@pytest.fixture
def check(monkeypatch):
    """Check the first of several ranks, each given by its kinds of factors, in a run with some flags."""

    def run(*ranks: tuple[bool, ...], **flags: object) -> None:
        def gather(of_all, own):
            of_all[:] = [own, *map(set, ranks[1:])]

        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: len(ranks))
        monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
        unset = {"save": None, "load": None, "use_distributed_optimizer": False}
        args = SimpleNamespace(**{**unset, **flags})
        _check_each_rank_trains([stage(*ranks[0]), stage()], args)

    return run


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        (((), (DENSE,)), "has no layer with adapters, and"),
        (((), (DENSE, EXPERT)), "has no layer with adapters, and"),
        (((EXPERT,), (DENSE, EXPERT)), "has no layer with adapters outside of experts, and"),
        (((DENSE,), (DENSE, EXPERT)), "has no layer with adapters of experts, and"),
    ],
)
def test_a_rank_that_an_optimizer_has_none_of_is_refused(check, ranks, message):
    with pytest.raises(ConversionError, match=f"{message}.* drop --use-distributed-optimizer"):
        check(*ranks, use_distributed_optimizer=True)


@pytest.mark.parametrize("flags", [{"save": "s"}, {"load": "s"}, {"save": "s", "load": "s"}])
def test_a_rank_that_could_not_be_resumed_is_refused(check, flags):
    dropped = " and ".join(f"--{name}" for name in flags)
    with pytest.raises(ConversionError, match=f"cannot resume a rank .* drop {dropped}$"):
        check((), (DENSE,), **flags)
    check((), (DENSE,))
    check((DENSE,), (DENSE, EXPERT), **flags)


def test_ranks_that_train_the_same_kinds_are_right(check):
    check((DENSE,), (DENSE, DENSE), use_distributed_optimizer=True)
    check((DENSE, EXPERT), (EXPERT, DENSE), use_distributed_optimizer=True)
