"""Values of tokens are found by sample and position, whatever order they came in."""

from __future__ import annotations

import pytest
import torch

from megatron_profit.training.statistics.token_table import TokenTable, token_keys


def table() -> TokenTable:
    samples, positions = torch.tensor([7, 2, 7, 2**31 - 1]), torch.tensor([0, 5, 3, 2**31])
    values = torch.tensor([0.7, 0.25, 0.73, 0.1])
    return TokenTable.of(token_keys(samples, positions), {"log_prob": values})


def test_wanted_tokens_get_their_values_and_others_zero():
    samples, positions = torch.tensor([[7, 7], [2, -1]]), torch.tensor([[3, 0], [5, 0]])
    wanted = torch.tensor([[True, False], [True, False]])
    found = table().look_up("log_prob", token_keys(samples, positions), wanted)
    torch.testing.assert_close(found, torch.tensor([[0.73, 0.0], [0.25, 0.0]]))


@pytest.mark.parametrize(("sample", "position"), [(7, 1), (3, 0), (2**31 - 1, 2**31 + 1)])
def test_a_wanted_token_that_is_unknown_is_named(sample, position):
    keys = token_keys(torch.tensor([[sample]]), torch.tensor([[position]]))
    with pytest.raises(
        KeyError, match=f"log_prob is known for position {position} of sample {sample}"
    ):
        table().look_up("log_prob", keys, torch.tensor([[True]]))


def test_an_empty_table_serves_whoever_wants_nothing():
    empty = TokenTable.of(torch.empty(0, dtype=torch.int64), {"log_prob": torch.empty(0)})
    keys = torch.zeros(1, 2, dtype=torch.int64)
    assert empty.look_up("log_prob", keys, torch.zeros(1, 2, dtype=torch.bool)).sum() == 0
    with pytest.raises(KeyError, match="1 other"):
        empty.look_up("log_prob", keys, torch.ones(1, 2, dtype=torch.bool))


def test_tables_are_joined_in_the_order_of_tokens():
    joined = TokenTable.joined(
        [table(), TokenTable.of(torch.tensor([5]), {"log_prob": torch.ones(1)})]
    )
    assert joined.keys.tolist() == sorted([5, *table().keys.tolist()])
    assert joined.statistics["log_prob"][0] == 1
