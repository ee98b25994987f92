"""Random numbers per token: the published sequence, uniform, independent, and the same in every layout."""

import pytest
import torch

from megatron_profit.objectives import token_uniform
from megatron_profit.objectives.random_numbers import _GAMMA, _mix

SAMPLES, POSITIONS = 300, 700


@pytest.fixture(scope="module")
def grid():
    return token_uniform(5, torch.arange(SAMPLES)[:, None], torch.arange(POSITIONS))


def correlation(left, right):
    return torch.corrcoef(torch.stack([left.flatten(), right.flatten()]))[0, 1].item()


def test_the_hash_is_splitmix64():
    """First outputs for the seed 1234567, as published with the generator."""
    states = torch.tensor([1234567]) + torch.arange(1, 4) * _GAMMA
    assert [bits % 2**64 for bits in _mix(states).tolist()] == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
    ]


def test_it_is_uniform(grid):
    count = grid.numel()
    assert grid.dtype == torch.float32
    assert 0 <= grid.min() < grid.max() < 1
    assert abs(grid.double().mean() - 1 / 2) < 4 * (1 / 12 / count) ** 0.5
    assert abs(grid.double().var() - 1 / 12) < 4 * (1 / 180 / count) ** 0.5
    observed = torch.histc(grid, 100, 0, 1)
    chi_square = ((observed - count / 100) ** 2 / (count / 100)).sum()
    assert 50 < chi_square < 160  # 99 degrees of freedom: mean 99, deviation 14


def test_neighbours_are_independent(grid):
    limit = 4 / grid.numel() ** 0.5
    assert abs(correlation(grid[1:], grid[:-1])) < limit
    assert abs(correlation(grid[:, 1:], grid[:, :-1])) < limit
    assert abs(correlation(grid[1:, :-1], grid[:-1, 1:])) < limit
    assert abs(correlation(grid, token_uniform_of_grid(6))) < limit


def token_uniform_of_grid(seed):
    return token_uniform(seed, torch.arange(SAMPLES)[:, None], torch.arange(POSITIONS))


def test_numbers_do_not_repeat(grid):
    expected_collisions = grid.numel() ** 2 / 2 / 2**24
    assert grid.numel() - grid.unique().numel() < 1.2 * expected_collisions


def test_it_depends_on_the_token_and_not_on_the_layout(grid):
    torch.manual_seed(0)
    sample, position = torch.randint(SAMPLES, (50,)), torch.randint(POSITIONS, (50,))
    assert torch.equal(token_uniform(5, sample, position), grid[sample, position])
    assert not torch.equal(token_uniform(6, sample, position), grid[sample, position])


@pytest.mark.parametrize("seed", [0, -1, 2**63, 2**64 - 1, 10**30])
def test_any_integer_is_a_seed(seed):
    index = torch.tensor([0, 1, -1, 2**62, -(2**63)])
    uniform = token_uniform(seed, index, index.flip(0))
    assert ((uniform >= 0) & (uniform < 1)).all()
    assert torch.equal(uniform, token_uniform(seed + 2**64, index, index.flip(0)))


def test_indices_must_be_int64():
    index = torch.arange(3)
    with pytest.raises(ValueError, match=r"position is torch\.int32; pass int64"):
        token_uniform(0, index, index.int())
    with pytest.raises(ValueError, match=r"draw_index is torch\.float32"):
        token_uniform(0, index.float(), index)
