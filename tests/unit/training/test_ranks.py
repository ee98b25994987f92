"""What the first rank finds, on all ranks."""

from __future__ import annotations

import threading

import pytest

from megatron_profit.training.process import ranks


@pytest.fixture
def collectives(monkeypatch) -> list[object]:
    """The values that the first rank has sent; the others wait for each of them in a collective."""
    sent: list[object] = []

    def from_first_rank(function):
        sent.append(function())
        return sent[-1]

    monkeypatch.setattr(ranks, "from_first_rank", from_first_rank)
    monkeypatch.setattr(ranks, "_LOOK_EVERY_SECONDS", 0.01)
    return sent


def test_the_other_ranks_hear_of_a_long_computation_while_it_lasts(collectives):
    heard_twice = threading.Event()

    def compute():
        while len(collectives) < 2:
            heard_twice.wait(0.01)
        return "found"

    assert ranks.from_first_rank_in_time(compute) == "found"
    assert collectives[:2] == [True, True]
    assert collectives[-2:] == [False, "found"]


@pytest.mark.parametrize("error", [SystemExit(2), ValueError("damaged")])
def test_an_error_of_the_first_rank_ends_it(collectives, error):
    def fail():
        raise error

    with pytest.raises(type(error)) as raised:
        ranks.from_first_rank_in_time(fail)
    assert raised.value is error
